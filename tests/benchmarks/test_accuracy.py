"""The benchmark of accuracy: arguments of its variants, time budget, stock's batch, comparisons, data and picture."""

import json
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import cv2
import pytest
import yaml

from benchmarks import accuracy, accuracy_picture, accuracy_runs, accuracy_table, drawings
from benchmarks.accuracy_settings import GPU, VARIANTS
from benchmarks.common import report
from benchmarks.common.processes import environment


def job(tmp_path, variant):
    return accuracy.Accuracy(GPU, tmp_path, 1, lambda: 1.0).job("hard", "s", variant, 2, "base-s.pt", stock_batch=32)


def test_variants_differ_in_batch_and_limit_and_in_nothing_else_unnamed(tmp_path):
    jobs = {variant: job(tmp_path, variant) for variant in VARIANTS}
    given = {variant: each.call["arguments"] for variant, each in jobs.items()}
    assert {variant for variant, each in jobs.items() if each.is_stock} == {"stock", "stock256", "nbs256"}
    assert {variant: each["batch"] for variant, each in given.items()} == {
        **dict.fromkeys(("stock", "nbs256", "same"), 32),
        **dict.fromkeys(("256", "256lr", "neighbour", "stock256", "device"), 256),
    }
    assert [variant for variant, each in given.items() if each["nbs"] != 64] == ["nbs256"]
    assert given["256lr"]["lr0"] == 2 * given["256"]["lr0"]
    limited = {variant for variant, each in jobs.items() if each.call["limit_gib"] == 4}
    assert limited == {"stock", "nbs256"}
    assert {variant for variant, each in given.items() if each.get("mem_limit") == "4GiB"} == {
        "same", "256", "256lr", "neighbour", "device",
    }  # fmt: skip
    assert [variant for variant, each in given.items() if each.get("augment_on") == "device"] == ["device"]
    behind = {variant for variant, each in jobs.items() if each.call["niceness"]}
    assert behind == {"256", "256lr", "neighbour", "stock256", "device"}
    varied = {"batch", "nbs", "lr0", "mem_limit", "recipe", "augment_on", "name"}
    assert len({json.dumps({k: v for k, v in each.items() if k not in varied}) for each in given.values()}) == 1


class _Job:
    """A job whose process is over at once."""

    def __init__(self, name, started):
        self.name, self._started = name, started

    def start(self):
        self._started.append(self.name)
        return SimpleNamespace(process=SimpleNamespace(poll=lambda: 0), wait=lambda: 0)

    def result(self, _):
        return {"name": self.name}


def test_jobs_run_in_order_and_none_begins_that_would_not_end_in_time():
    started = []
    jobs = [_Job(name, started) for name in range(4)]
    left = iter([10.0, 10.0, 10.0, 10.0, 10.0])  # then none is left
    rows = [row for row, _ in accuracy_runs.at_once(jobs, 2, lambda: next(left, -1.0))]
    assert started[:2] == [0, 1]
    assert [row["name"] for row in rows] == started
    assert len(started) < 4


@pytest.mark.parametrize("keep", [False, True])
def test_what_still_runs_at_the_end_of_the_budget_is_killed_and_may_leave_its_curve(tmp_path, monkeypatch, keep):
    process = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    endless = job(tmp_path, "stock")
    call = SimpleNamespace(process=process, wait=process.wait)
    monkeypatch.setattr(accuracy_runs.Job, "start", lambda _: call)
    endless.folder.mkdir(parents=True)
    (endless.folder / "results.csv").write_text(f"epoch,time,{accuracy_runs.MAP}\n1,9.5,0.25\n2,19.0,0.5\n")
    left = iter([1.0, 1.0])
    rows = [row for row, _ in accuracy_runs.at_once([endless], 1, lambda: next(left, -1.0), keep_unfinished=keep)]
    assert rows == [{**endless.name, "map_so_far": [0.25, 0.5]}] * keep
    assert process.returncode != 0
    process.stdin.close()


def test_a_later_call_does_what_is_missing(tmp_path, monkeypatch):
    ran, cut_off = [], []

    def at_once(jobs, most, seconds_left, keep_unfinished=False):
        for job in jobs:
            ran.append(job.name["variant"])
            if cut_off:
                yield job.unfinished(), 1.0
                continue
            arguments = job.call["arguments"]
            weights = Path(arguments["project"], arguments["name"], "weights")
            weights.mkdir(parents=True)
            (weights / "last.pt").touch()
            yield {**job.name, "ran_at": arguments["batch"], "map": [0.5]}, 1.0

    def call(*words):
        command = ["accuracy", "--out", str(tmp_path / "part.json"), "--runs", str(tmp_path / "runs"), "--models", "n"]
        monkeypatch.setattr(sys, "argv", [*command, "--data", "hard", "--only", "stock", "256", *words])
        accuracy.main()
        return json.loads((tmp_path / "part.json").read_text())["gpu"], ran[:], ran.clear()

    monkeypatch.setattr(report, "machine", lambda _: {})
    monkeypatch.setattr(accuracy, "at_once", at_once)
    monkeypatch.setattr(accuracy.Accuracy, "data", lambda *_: "data.yaml")
    found, first, _ = call("--prepare")
    assert first == ["base", *["stock"] * len(GPU.candidates)]
    assert (len(found["base"]), found["stock_batch"][0]["batch"], found["runs"]) == (1, 48, [])
    _, second, _ = call("--seeds", "0")
    assert second == ["stock", "256"]
    found, third, _ = call("--seeds", "0", "1")
    assert third == ["stock", "256"]
    assert [(run["seed"], run["batch"]) for run in found["runs"]] == [(0, 48), (0, 256), (1, 48), (1, 256)]
    assert call("--seeds", "1")[1] == []
    cut_off.append(True)  # no curve is there yet
    found, fourth, _ = call("--seeds", "2")
    assert [run.get("map_so_far") for run in found["runs"]] == [None] * 4 + [[], []]
    assert [row["map"] for row in found["table"]] == [[0.5, 0.5], [0.5, 0.5]]
    assert {run["mps"] for run in found["runs"]} == {False}
    cut_off.clear()
    found, fifth, _ = call("--seeds", "2")
    assert fourth == fifth == ["stock", "256"]
    assert [run["map"] for run in found["runs"]] == [[0.5]] * 6
    with pytest.raises(SystemExit, match=r"part\.json has a part gpu with other settings"):
        call("--epochs", "7")


@pytest.mark.parametrize(
    ("bad", "expected"),
    [(None, 48), ({"batch": 32, "assigner_fallbacks": 1}, 24), ({"batch": 32, "halvings": 1}, 24)],
)
def test_the_batch_of_stock_is_the_largest_up_to_which_all_are_stable(bad, expected):
    rows = [{"batch": each, "halvings": 0, "assigner_fallbacks": 0} for each in (48, 24, 32)]
    rows = [{**row, **bad} if bad and bad["batch"] == row["batch"] else row for row in rows]
    assert accuracy_runs.largest_stable(rows) == expected
    failed = {"batch": 64, "exit_status": 1, "failure": "OutOfMemoryError: CUDA out of memory."}
    assert accuracy_runs.largest_stable([*rows, failed]) == expected
    with pytest.raises(RuntimeError, match=r"failed, but not for memory:\nKeyError"):
        accuracy_runs.largest_stable([*rows, {**failed, "failure": "KeyError: 'names'"}])
    halved = [{**row, "halvings": 1} for row in rows]
    with pytest.raises(RuntimeError, match="not even batch 24 is stable"):
        accuracy_runs.largest_stable(halved)


def test_a_model_without_a_batch_is_told_after_those_with_one_and_is_tried_again(tmp_path, monkeypatch):
    def at_once(jobs, most, seconds_left):
        for job in jobs:
            yield {**job.name, "halvings": int(job.name["model"] == "s")}, 1.0

    monkeypatch.setattr(accuracy, "at_once", at_once)
    rows = accuracy.Accuracy(GPU, tmp_path, 1, lambda: 1.0).trials(["hard"], {"s": "s.pt", "n": "n.pt"})
    row = next(rows)
    assert (row["model"], row["batch"]) == ("n", 48)
    with pytest.raises(SystemExit, match="s, hard: not even batch 16 is stable"):
        next(rows)


def test_the_table_compares_with_stock_and_leaves_out_failed_trainings():
    rows = [
        {"data": "hard", "model": "s", "variant": variant, "seed": seed, "map": [0.0, value]}
        for variant, values in (("256", (0.5, 0.52, 0.54)), ("stock", (0.51, 0.5, 0.55)), ("same", (0.3,)))
        for seed, value in enumerate(values)
    ]
    rows.append({"data": "hard", "model": "s", "variant": "same", "seed": 1, "exit_status": 1})
    stock, large, same = accuracy_table.table(rows)
    assert (stock["mean"], stock["map"]) == (0.52, [0.51, 0.5, 0.55])
    assert "against_stock" not in stock
    assert "sd" not in same
    assert large["against_stock"]["difference"] == 0.0
    # Welch: variances 4e-4 and 7e-4 of three values each, 3.72 degrees of freedom
    assert large["against_stock"]["interval"] == pytest.approx(2.859 * (1.1e-3 / 3) ** 0.5, rel=1e-3)


def test_of_a_training_that_was_cut_off_the_longest_curve_stays_until_it_ends():
    name = {"data": "hard", "model": "n", "variant": "256", "seed": 0}
    short, long, failed, ended = ({**name, **each} for each in (
        {"map_so_far": [0.1]}, {"map_so_far": [0.1, 0.2]}, {"exit_status": 1}, {"map": [0.1, 0.2, 0.3]},
    ))  # fmt: skip
    other = {**short, "seed": 1}
    rows = accuracy_table.with_row([other, long], short)
    assert rows == [other, long]
    assert accuracy_table.with_row([other, short], long) == [other, long]
    rows = accuracy_table.with_row(rows, failed)
    assert rows == [other, long, failed]
    assert accuracy_table.with_row(rows, ended) == [other, failed, ended]


def test_harder_boards_are_denser_and_have_less_contrast_and_are_repeated(tmp_path):
    contrast, boxes = {}, {}
    for name, hard in (("demo", False), ("hard", True)):
        file = Path(drawings.inspection(tmp_path / name, 5, 1, 256, repeat=3, hard=hard))
        about = yaml.safe_load(file.read_text())
        assert (len(about["train"]), len(about["names"])) == (3, 10)
        images = [cv2.imread(str(file), cv2.IMREAD_GRAYSCALE) for file in tmp_path.glob(f"{name}/images/train/*.jpg")]
        contrast[name] = sum(cv2.blur(image, (8, 8)).std() for image in images)
        boxes[name] = [len(file.read_text().splitlines()) for file in sorted(tmp_path.glob(f"{name}/labels/*/*.txt"))]
    assert contrast["hard"] < 0.7 * contrast["demo"]
    assert sum(count > 100 for count in boxes["hard"]) == 2
    assert sum(count > 100 for count in boxes["demo"]) == 1


def test_a_picture_has_a_panel_for_each_model_and_data_set(tmp_path):
    runs = [
        {"data": data, "model": "n", "variant": variant, "map": [0.1, 0.2]}
        for data in ("hard", "demo")
        for variant in ("stock", "256", "256")
    ]
    cut_off = {"data": "demo", "model": "n", "variant": "256", "map_so_far": [0.3]}
    part = {
        "runs": [*runs, cut_off, {"exit_status": 1}],
        "settings": {"images": 8, "passes": 4, "epochs": 2, "large": 64},
    }
    figure = accuracy_picture.draw(part)
    assert [axes.get_title() for axes in figure.axes] == ["n, hard", "n, demo"]
    assert [len(axes.lines) for axes in figure.axes] == [5, 6]
    assert [len(line.get_xdata()) for line in figure.axes[1].lines] == [2, 2, 2, 2, 1, 1]  # means of all
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["stock", "ours 64"]
    assert figure.axes[0].lines[0].get_xdata().tolist() == [16, 32]
    assert set(accuracy_picture.STYLES) == set(VARIANTS)


@pytest.mark.deep
def test_the_small_variant_goes_on_where_it_ended(tmp_path):
    out = tmp_path / "part.json"
    command = [sys.executable, "-m", "benchmarks", "accuracy", "--device", "cpu", "--small", "--seeds", "0"]
    command += ["--out", str(out), "--runs", str(tmp_path / "runs"), "--only"]
    for variants in (["stock"], ["stock", "256"]):
        subprocess.run([*command, *variants], env=environment(), check=True, capture_output=True)
    runs = json.loads(out.read_text())["cpu"]["runs"]
    assert [run["variant"] for run in runs] == ["stock", "256"]
    assert [len(run["map"]) for run in runs] == [1, 1]
    assert (runs[1]["engine"]["micro_batch_max"], runs[1]["engine"]["bn_group"]) == (2, 2)
    command += ["stock", "--passes", "3", "--part", "longer"]  # the data have two
    run = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert run.returncode == 1
    assert "give another --runs" in run.stderr
    assert "longer" not in json.loads(out.read_text())
