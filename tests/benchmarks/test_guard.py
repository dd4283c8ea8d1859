"""The regression guard: what counts as worse, what is compared with what, and the workflow that runs it."""

import inspect
import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml

from benchmarks import checkpointing, guard, step
from benchmarks.common.processes import environment
from benchmarks.guard_ratios import MOST_TOLERANCE, Comparison, Ratio, reference_for

ROOT = Path(__file__).parents[2]
STEADY = [2.0, 2.0, 2.0, 2.0, 2.0]
HEADS = {"T4": {"gpus": 1}, "A10": {"gpus": 1}, "EPYC": {"gpus": 0}}
PORTABLE = {"rounds": [1.5], "margin": 0.01, "is_portable": True}
SPEED = {"rounds": STEADY, "margin": 0.03, "is_portable": False}


@pytest.mark.parametrize(
    ("before", "now", "allowed", "verdict"),
    [
        (STEADY, [1.95] * 5, 1.94, "same"),
        (STEADY, [1.93] * 5, 1.94, "WORSE"),
        (STEADY, [2.05] * 5, 1.94, "same"),
        (STEADY, [2.07] * 5, 1.94, "better"),
        (STEADY, [1.90, 1.92, 1.92, 1.93, 1.98], 2 * (0.97 - 0.04 / 1.92), "same"),  # half the range of the rounds
        ([1.9, 2.0, 2.1], [1.83], 2 * (0.97 - 0.05), "WORSE"),
        (STEADY, [1.0, 1.6, 3.0], 1.7, "WORSE"),  # noise excuses no more than MOST_TOLERANCE
        (STEADY, [1.0, 1.8, 3.0], 1.7, "same"),
    ],
)
def test_a_ratio_is_worse_beyond_its_margin_and_the_scatter_of_the_rounds(before, now, allowed, verdict):
    found = Comparison("speed", Ratio(before, 0.03), Ratio(now, 0.03))
    assert found.allowed == pytest.approx(allowed)
    assert found.verdict == verdict
    assert found.is_worse is (verdict == "WORSE")


def test_a_device_without_ratios_is_compared_by_the_portable_ones_of_its_kind():
    committed = {"measured_on": HEADS, "T4": {"a": SPEED, "b": PORTABLE}, "A10": {"a": SPEED}, "EPYC": {"c": SPEED}}
    assert reference_for(committed, "T4", is_gpu=True) == ("T4", {"a": Ratio(**SPEED), "b": Ratio(**PORTABLE)})
    assert reference_for(committed, "A10", is_gpu=True) == ("A10", {"a": Ratio(**SPEED)})
    assert reference_for(committed, "H200", is_gpu=True) == ("T4", {"b": Ratio(**PORTABLE)})
    assert reference_for(committed, "Xeon", is_gpu=False) == (None, {})
    assert reference_for({}, "T4", is_gpu=True) == (None, {})


@pytest.fixture
def run(tmp_path, monkeypatch, capsys):
    """Run the guard on a CPU, with what its parts find; None for one that fails. Returns status, output and file."""
    monkeypatch.setattr(guard, "device_name", lambda device: "EPYC")

    def run(*words, **parts):
        class Call:
            def __init__(self, function, variables, part, **_):
                self.found = parts[part]

            def wait(self):
                return int(self.found is None)

            def result(self):
                return self.found

        monkeypatch.setattr(guard, "Call", Call)
        out = tmp_path / "guard.json"
        reference = tmp_path / "committed.json"
        words = ["guard", "--device", "cpu", "--out", str(out), "--reference", str(reference), "--only", *parts, *words]
        monkeypatch.setattr(sys, "argv", words)
        return guard.main(), capsys.readouterr().out, json.loads(reference.read_text()) if reference.exists() else {}

    return run


def test_a_worse_ratio_fails_and_the_table_says_which(run):
    status, output, committed = run(imports={"start": SPEED}, loader={"loading": PORTABLE})
    assert (status, committed) == (0, {})
    assert "No reference for EPYC" in output
    assert "--update" in output
    status, _, committed = run("--update", imports={"start": SPEED}, loader={"loading": PORTABLE})
    assert status == 0
    assert committed["EPYC"] == {"start": SPEED, "loading": PORTABLE}
    worse = {"start": {**SPEED, "rounds": [1.8]}}
    status, output, unchanged = run(imports=worse, loader={"loading": PORTABLE})
    assert (status, unchanged) == (1, committed)
    assert "| start | 2.000 | 1.800 (1.800 to 1.800) | 1.940 | WORSE |" in output
    assert "| loading | 1.500 | 1.500 (1.500 to 1.500) | 1.485 | same |" in output
    assert "1 worse, 0 better, 1 the same" in output
    status, output, committed = run("--update", imports=worse)  # a loss that is meant, of one part alone
    assert (status, committed["EPYC"]) == (1, {**worse, "loading": PORTABLE})
    status, output, _ = run(imports={"start": SPEED})
    assert status == 0
    assert "1 better" in output


def test_a_part_that_fails_or_has_no_time_is_said(run):
    status, output, _ = run(imports=None, loader={"loading": PORTABLE})
    assert status == 1
    assert "imports: not measured: failed" in output
    assert "controller: not measured: not asked for" in output
    status, output, _ = run("--seconds", "-1", imports={"start": SPEED})
    assert status == 0
    assert "imports: not measured: -1 s were over" in output


def test_without_a_gpu_it_measures_no_other_device(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr(sys, "argv", ["guard", "--out", str(tmp_path / "guard.json")])
    assert guard.main() == 2
    assert "--device cpu" in capsys.readouterr().err


def test_what_is_committed_holds_and_a_loss_of_any_ratio_fails():
    committed = json.loads(guard.COMMITTED.read_text())
    for device, head in committed["measured_on"].items():
        name, ratios = reference_for(committed, device, head["gpus"] > 0)
        assert name == device
        for key, ratio in ratios.items():
            assert Comparison(key, ratio, ratio).verdict == "same"
            lost = Ratio([each * (1 - MOST_TOLERANCE - 0.01) for each in ratio.rounds], ratio.margin)
            assert Comparison(key, ratio, lost).is_worse, key


@pytest.mark.parametrize("who", ["ours", "stock"])
def test_the_limit_is_measured_by_a_part_of_checkpointing(who, monkeypatch):
    signature, given = inspect.signature(checkpointing.PARTS[f"{who}-s"]), []

    def part(*args, **kwargs):
        given.append(signature.bind(*args, **kwargs).arguments)
        yield {"images_per_s": 1.0}

    monkeypatch.setitem(checkpointing.PARTS, f"{who}-s", part)
    assert guard.limited(who) == {"images_per_s": 1.0}
    assert given[0]["scope"].limits == (guard.LIMIT_GIB,)


def test_a_step_is_measured_by_the_processes_of_step(monkeypatch):
    def ask(variant, **request):
        time = 2.0 if variant.name == "stock" else 1.0
        return {"launches": 10 * time} if request.get("profile") else {"ms": [time]}

    monkeypatch.setattr(step.subprocess, "Popen", lambda command, **_: SimpleNamespace(args=command))
    monkeypatch.setattr(step.Variant, "ask", ask)
    monkeypatch.setattr(step.Variant, "end", lambda variant: None)
    found = guard.measure("step", "cpu", 2)
    assert [ratio["rounds"] for ratio in found.values()] == [[2.0, 2.0], [2.0, 2.0]]


def test_a_part_yields_ratios_by_name():
    found = guard.measure("controller", "cpu", 1)
    ratio = Ratio(**found["controller against an oracle"])
    assert 0.5 < ratio.median <= 1.02


@pytest.mark.deep
def test_the_small_variant_measures_all_parts_of_a_cpu(tmp_path):
    command = [
        sys.executable,
        "-m",
        "benchmarks",
        "guard",
        "--small",
        "--device",
        "cpu",
        "--out",
        tmp_path / "small.json",
    ]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    found = json.loads((tmp_path / "small.json").read_text())
    (device,) = found["measured_on"]
    assert device.endswith(", small")  # compared with no reference
    assert len(found[device]) == 7
    assert all(min(ratio["rounds"]) > 0 for ratio in found[device].values())


def test_the_workflow_runs_it_on_trusted_code_alone():
    folder = ROOT / ".github"
    workflow = yaml.safe_load((folder / "workflows" / "gpu.yml").read_text())
    triggers = workflow[True]  # YAML reads `on` as a truth value
    assert triggers.keys() == {"schedule", "workflow_dispatch", "pull_request"}
    assert triggers["pull_request"] == {"types": ["labeled"]}
    assert workflow["permissions"] == {"contents": "read"}
    (job,) = workflow["jobs"].values()
    assert "permissions" not in job
    assert job["runs-on"] == ["self-hosted", "gpu"]
    known = yaml.safe_load((folder / "actionlint.yaml").read_text())["self-hosted-runner"]["labels"]
    assert "gpu" in known
    assert "github.event.pull_request.head.repo.full_name == github.repository" in job["if"]
    assert "github.event.label.name == 'gpu'" in job["if"]
    assert "secrets." not in str(job)
    (bench,) = (step["run"] for step in job["steps"] if "bench.sh" in step.get("run", ""))
    assert bench.split() == ["./scripts/bench.sh", "--update"]
    (upload,) = (step["with"]["path"] for step in job["steps"] if "upload-artifact" in step.get("uses", ""))
    assert ROOT / upload == guard.COMMITTED
