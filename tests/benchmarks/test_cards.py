"""Trainings in the memory of smaller cards: the search of a batch, what is counted, and small on the CPU."""

import json
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch

from benchmarks import cards, dense_trainings
from benchmarks.common import report
from benchmarks.common.processes import environment
from benchmarks.dense_runs import OutOfTimeError, told
from benchmarks.dense_search import Comparison, next_tries, over
from benchmarks.drawings import shapes


@pytest.mark.parametrize(
    ("held", "expected"),
    [
        ({}, [24, 32, 40]),
        ({24: True, 32: True, 40: True}, [48, 56, 64]),
        ({24: False, 32: False, 40: False}, [8, 16]),
        ({24: True, 32: False, 40: False}, []),
        ({8: False, 16: False}, []),  # no batch is left
    ],
)
def test_batches_are_tried_until_one_holds_and_the_next_fails(held, expected):
    assert next_tries(held, start=29, step=8, count=3) == expected


class _Trainings:
    """Trainings whose memory is enough for a batch: in tries, which see fewer dense batches, for a larger one."""

    def __init__(self, tries_hold, whole_holds, end_after=None):
        self._tries_hold, self._whole_holds, self.started, self._end_after = tries_hold, whole_holds, [], end_after

    def __call__(self, comparison, who, batch, *, until_failure=False, epochs=None, **__):
        assert until_failure is (who != "ours")  # whole trainings of a searched batch, too
        is_try = epochs is not None
        self.started.append((who, batch, "try" if is_try else "whole"))
        fits = batch <= (self._tries_hold if is_try else self._whole_holds)
        failure = None if fits else "OutOfMemoryError: CUDA out of memory."
        run = {
            "failure": failure,
            "log_tail": "",
            "epoch_end_s": [*range(1, 1 + fits * (epochs or comparison.epochs))],
            "memory_csv": [],
        }

        def result(_clock):
            if self._end_after is not None and len(self.started) > self._end_after:
                raise OutOfTimeError
            return run

        return SimpleNamespace(result=result, call=SimpleNamespace(process=SimpleNamespace(kill=lambda: None)))


def _compare(monkeypatch, trainings, found):
    monkeypatch.setattr(Comparison, "_start", lambda *args, **more: trainings(*args, **more))
    monkeypatch.setattr(Comparison, "_at_once", lambda _: 3)
    memory, saved = {"total_mib": 14914, "usable_mib": 14464}, []
    comparison = Comparison("", 8, 4, memory, {"workers": 0}, save=lambda found: saved.append(json.dumps(found)))
    comparison.found = found
    return comparison, saved


def test_the_largest_batch_is_one_that_holds_a_whole_run(monkeypatch):
    trainings = _Trainings(tries_hold=50, whole_holds=33)
    found = {}
    comparison, saved = _compare(monkeypatch, trainings, found)
    comparison.measure("stock")
    tries = [("stock", batch, "try") for batch in (24, 32, 40, 48, 56, 64)]
    assert trainings.started == [*tries, *(("stock", batch, "whole") for batch in (48, 40, 32))]
    assert found["rows"]["stock"]["batch"] == 32
    assert len(saved) == 5
    comparison.measure("stock")  # it is there
    assert len(saved) == 5


def test_rows_have_their_commits_and_the_head_has_those_of_all(monkeypatch, tmp_path):
    monkeypatch.setattr(report, "machine", lambda _: {"commit": "def"})
    monkeypatch.setattr(report, "commit", lambda: "def")
    found = {"rows": {"stock": {"commit": "abc"}}}
    comparison, _ = _compare(monkeypatch, _Trainings(50, 33), found)
    comparison.measure("ours")
    result = report.Report(tmp_path / "cards.json", "cpu")
    cards._save(result, "t4", found)
    assert result["measured_on"]["t4"]["commits"] == {"stock": "abc", "ours": "def"}


def test_a_search_goes_on_where_the_time_was_over(monkeypatch):
    found = {}
    comparison, saved = _compare(monkeypatch, _Trainings(50, 33, end_after=7), found)
    with pytest.raises(OutOfTimeError):
        comparison.measure("stock")
    trainings = _Trainings(50, 33)
    comparison, _ = _compare(monkeypatch, trainings, json.loads(saved[-1]))
    comparison.measure("stock")
    assert trainings.started == [("stock", 40, "whole"), ("stock", 32, "whole")]


def test_a_failure_that_is_not_memory_ends_the_search(monkeypatch):
    comparison, _ = _compare(monkeypatch, _Trainings(0, 0), {})
    monkeypatch.setattr("benchmarks.dense_runs.MEMORY_FAILURES", ())
    with pytest.raises(RuntimeError, match="not for memory"):
        comparison.measure("stock")


def test_speeds_are_over_the_whole_training_and_without_its_first_epoch():
    run = {"failure": None, "epoch_end_s": [20.0, 24.0, 28.0, 32.0], "memory_csv": ["step,peak_mib", "1,2.0", "2,6.0"]}
    found = told(run, images=320, epochs=4)
    assert (found["images_per_s_all"], found["images_per_s_after_first"], found["images_per_s"]) == (40.0, 80.0, 80.0)
    assert (found["peak_mean_all_mib"], found["peak_sd_all_mib"], found["peak_sd_mib"]) == (4.0, 2.0, 0.0)
    ended = told({**run, "epoch_end_s": [20.0], "failure": "CUDA out of memory"}, images=320, epochs=4)
    assert "images_per_s_all" not in ended
    assert over({"rows": {"ours": found, "stock": ended}}) == {"peak_sd_all_mib": 1.0}


def test_a_peak_is_that_of_an_optimizer_step(monkeypatch):
    peaks = iter([1, 3, 7, 4, 2])
    monkeypatch.setattr(torch.cuda, "max_memory_allocated", lambda: next(peaks) * 2**20)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda: None)
    record = dense_trainings._Record(until_failure=False, recompute=False, refuse_above=0)
    trainer = SimpleNamespace(device=torch.device("cuda"), accumulate=2, batch_size=4)
    for again in (False, True):
        for _ in range(2 + (not again)):
            record.on_train_batch_end(trainer)
        record.on_train_epoch_start(trainer)  # Ultralytics begins the epoch again, without the step that was begun
    found = record.close(trainer, None)
    assert found["peaks_mib"] == [3.0, 4.0]
    assert found["batch_peak_mean_mib"] == 3.4


def test_ultralytics_sees_the_memory_of_the_imitated_card(monkeypatch):
    card = SimpleNamespace(total_memory=141 * 2**30, name="NVIDIA H200")
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda device=None: card)
    monkeypatch.setattr(torch.cuda, "mem_get_info", None)
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device=None: 4464 * 2**20)
    limits = []
    monkeypatch.setattr(dense_trainings, "limit_memory", limits.append)
    memory = cards.memory_of("t4")
    assert memory == {"total_mib": 14914, "usable_mib": 14464}
    dense_trainings.imitate(**memory, limited=True)
    assert torch.cuda.get_device_properties(0).total_memory == 14914 * 2**20
    assert torch.cuda.get_device_properties(0).name == "NVIDIA H200"
    assert torch.cuda.mem_get_info(0) == (10000 * 2**20, 14914 * 2**20)
    assert limits == [14464 / 1024]


def test_the_docstring_says_the_memory_of_the_cards():
    for name in cards.CARDS:
        assert f"{cards.memory_of(name)['total_mib']:,} MiB" in cards.__doc__
        assert "takes 450 MiB" in cards.__doc__


def test_a_batch_that_ultralytics_halves_is_counted(tiny_model, tmp_path):
    found = dense_trainings.train(
        {
            **dense_trainings.TRAIN,
            **dense_trainings.EQUAL,
            "model": tiny_model,
            "data": shapes(8, 4, 64),
            "imgsz": 64,
            "batch": 8,
            "epochs": 1,
            "workers": 0,
            "device": "cpu",
            "cache": False,
            "mas": False,
            "project": str(tmp_path),
        },
        refuse_above=4,
    )
    assert (found["started_at"], found["ran_at"], found["halvings"]) == (8, 4, 1)
    assert (found["failure"], found["assigner_fallbacks"], len(found["epoch_s"])) == (None, 0, 1)
    assert "Reducing to batch=4" in found["warnings"][0]


@pytest.mark.deep
def test_the_small_variant_measures_all_rows_and_keeps_them(tmp_path):
    out = tmp_path / "cards.json"
    command = [sys.executable, "-m", "benchmarks", "cards", "--small", "--device", "cpu", "--out", str(out)]
    command += ["--only", "t4"]
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    found = json.loads(out.read_text("utf-8"))
    rows = found["t4"]["rows"]
    assert {name: (run["started_at"], run["ran_at"]) for name, run in rows.items()} == {
        "stock": (4, 4),
        "ours": (8, 8),
        "autobatch": (16, 4),
        "halving": (8, 4),
        "all": (4, 4),
    }
    assert [(attempt["batch"], attempt["held"]) for attempt in found["t4"]["search"]["stock"]] == [
        (4, True),
        (6, False),
        (4, True),
    ]
    assert {run["images"] for run in rows.values()} == {32}
    assert all(run["images_per_s_all"] > 0 for run in rows.values())
    assert found["t4"]["summary"]["images_lost"] == 0
    subprocess.run(command, env=environment(), check=True, capture_output=True)
    assert json.loads(out.read_text("utf-8"))["t4"]["rows"] == rows
