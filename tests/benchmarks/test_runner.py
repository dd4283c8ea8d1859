"""`python -m benchmarks` finds all benchmarks, and what they share: processes, turns, and the JSON file."""

import json
import math
import re
import subprocess
import sys
from argparse import ArgumentParser
from pathlib import Path

import pytest

from benchmarks.__main__ import benchmarks, main
from benchmarks.common.processes import Call, environment, summed
from benchmarks.common.report import Report, command, machine, parser
from benchmarks.common.rounds import in_turn, median_ratio

RESULTS = Path(__file__).parents[2] / "benchmarks" / "results"


def test_each_benchmark_is_listed_with_one_line(capsys):
    assert main([]) == 0
    listed = dict(re.findall(r"^(\w+)  +(\S.*)$", capsys.readouterr().out, re.MULTILINE))
    assert listed == benchmarks()
    assert {"memory", "controller", "step"} <= set(listed)
    assert not {"neighbour", "drawings", "ranks_work", "common"} & set(listed)


def test_every_result_of_a_benchmark_names_one_that_exists():
    known = benchmarks()
    for file in RESULTS.glob("*.json"):
        for name in re.findall(r'"command": "python (?:benchmarks/|-m benchmarks[. ])(\w+)', file.read_text()):
            assert name in known, file.name


class _ParsedError(Exception):
    pass


def test_every_command_in_docs_and_docstrings_can_be_parsed(monkeypatch):
    def parse(parser, parse_known=ArgumentParser.parse_known_args):
        _, rest = parse_known(parser)
        raise _ParsedError(rest)

    monkeypatch.setattr(ArgumentParser, "parse_args", parse)
    monkeypatch.setattr(sys, "argv", [])
    root = RESULTS.parents[1]
    pages = [*root.glob("*.md"), *root.glob("docs/**/*.md"), *root.glob("benchmarks/**/*.py")]
    found = "".join(file.read_text("utf-8") for file in pages)
    commands = set(
        re.findall(r"python (benchmarks/\w+\.py|-m benchmarks[. ](?!NAME)\w+) ([^`\n]*--out .*?)(?:`|  |\n)", found)
    )
    assert len(commands) > 40
    for runner, options in commands:
        name = runner.removeprefix("-m benchmarks ")
        with pytest.raises(_ParsedError, match=r"^\[\]$"):
            main([name, *options.split()])


def test_cores_are_those_that_the_process_may_use(monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 32)
    monkeypatch.setattr("os.sched_getaffinity", lambda _: {3})  # as with `taskset -c 3`
    assert (machine("cpu")["cores"], machine("cpu")["device"]) == (1, "1 CPU cores")


def test_an_unknown_name_is_an_error_that_lists_the_names(capsys):
    assert main(["memry", "--out", "x.json"]) == 2
    assert "memory" in capsys.readouterr().err


def test_a_command_has_no_paths_of_this_machine():
    assert command(["/a/benchmarks/step.py", "--out", "/b/step.json"]) == "python benchmarks/step.py --out step.json"
    words = ["python -m benchmarks step", "--before", "/tmp/before", "--steps", "5"]
    assert command(words) == "python -m benchmarks step --before before --steps 5"


def test_a_report_says_how_it_was_made_and_keeps_other_parts(tmp_path):
    out = tmp_path / "part.json"
    out.write_text(json.dumps({"calm": [1], "command": "earlier"}))
    result = Report(out, "cpu", keep=True, limits=[8])
    result.add("loud", {"ratio": 2.0}, seconds=3)
    found = json.loads(out.read_text())
    assert found == result
    assert (found["calm"], found["loud"], found["limits"]) == ([1], {"ratio": 2.0}, [8])
    head = {"date", "device", "torch", "ultralytics", "commit"}
    assert head <= set(found)
    assert head | {"command", "seconds"} <= set(found["measured_on"]["loud"])
    assert found["command"] != "earlier"
    assert "calm" not in Report(out, "cpu")
    assert list(tmp_path.iterdir()) == [out]


@pytest.mark.parametrize("wrong", [math.nan, -math.inf])
def test_a_figure_that_is_not_a_number_is_refused_and_other_parts_stay(tmp_path, wrong):
    out = tmp_path / "part.json"
    result = Report(out, "cpu")
    result.add("calm", [1.0])
    before = out.read_text()
    with pytest.raises(ValueError, match=r"part\.json is not written: loud\.runs\[1\]\.loss is (nan|-inf)$"):
        result.add("loud", {"runs": [{"loss": 1.0}, {"loss": wrong}]})
    assert out.read_text() == before
    result.add("late", [2.0])
    assert json.loads(out.read_text()) == result
    assert set(result["measured_on"]) == {"calm", "late"}


def test_options_that_benchmarks_share():
    options = parser("Doc", parts=("a", "b"), small="one image").parse_args(["--out", "x.json", "--only", "b"])
    assert (options.out, options.only, options.small, options.device) == (Path("x.json"), ["b"], False, "cuda")


def test_variants_take_turns():
    order = []
    found = in_turn({name: lambda name=name: order.append(name) or len(order) for name in "ab"}, 2, warm_up=1)
    assert order == list("ababab")
    assert found == {"a": [3, 5], "b": [4, 6]}
    assert median_ratio([2.0, 9.0, 4.0], [1.0, 3.0, 1.0]) == 3.0


def test_a_function_runs_in_a_process_of_its_own():
    calls = [Call("common.processes:environment", stock=stock, MARK="1") for stock in (True, False)]
    stock, ours = (call.result() for call in calls)
    assert stock["MARK"] == ours["MARK"] == "1"
    assert stock["YOLOV12_AUTOPATCH"] == "0"
    assert ours.get("YOLOV12_AUTOPATCH") == environment().get("YOLOV12_AUTOPATCH")


def test_results_of_several_processes_are_summed():
    parts = [
        {"kills": 3, "largest": 0.5, "device": "cpu", "steps_of_a_round": 9, "failed": ["add", "mul"]},
        {"kills": 4, "largest": None, "device": "cpu", "steps_of_a_round": 9, "failed": ["add", "cat"], "lost": 1},
    ]
    alike = {"device": "cpu", "steps_of_a_round": 9}
    assert summed(parts) == {"kills": 7, "largest": 0.5, "failed": ["add", "cat", "mul"], "lost": 1, **alike}


def test_a_failure_of_such_a_process_is_raised(tmp_path):
    with (tmp_path / "log").open("w") as log, pytest.raises(subprocess.CalledProcessError):
        Call("common.report:command", log=log, words=[]).result()
    assert "not enough values" in (tmp_path / "log").read_text()
