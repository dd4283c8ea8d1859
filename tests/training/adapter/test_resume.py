"""An interrupted training continues as it began, within the memory that there is now."""

import pytest
import torch

from yolov12 import own_files
from yolov12.mas import Engine
from yolov12.mas.config import DEFAULTS
from yolov12.training.run.options import OPTIONS


class PowerCutError(Exception):
    """Power cut between two epochs."""


def cut_power(trainer):
    if trainer.epoch == 0:
        raise PowerCutError


def test_a_resumed_run_keeps_its_group_and_takes_the_memory_it_is_given(trainings, tmp_path):
    cut = trainings.train(
        tmp_path, **trainings.SPLIT, callbacks=[("on_fit_epoch_end", cut_power)], raises=PowerCutError
    )
    before = cut.memory
    assert len(before) == trainings.BATCHES
    last = cut.folder / "weights" / "last.pt"
    run = trainings.train(tmp_path, last, resume=True, bn_group=4, mem_limit="8GiB", mem_safety_ratio=0.2)
    assert run.folder == cut.folder
    assert "bn_group=4: a run goes on with the bn_group=2 it began with" in run.log
    assert "Resume ignores" not in run.log
    assert "nothing to resume" not in run.log
    assert (run.args["bn_group"], run.args["micro_batch"]) == (2, 2)
    assert (run.args["mem_limit"], run.args["mem_safety_ratio"]) == ("8GiB", 0.2)

    rows = run.memory
    assert rows[: trainings.BATCHES] == before
    assert [int(row["step"]) for row in rows] == list(range(1, 2 * trainings.BATCHES + 1))
    assert [int(row["epoch"]) for row in rows] == [1] * trainings.BATCHES + [2] * trainings.BATCHES
    assert [row["events"] for row in rows] == [""] * trainings.BATCHES + ["resumed after step 4"] + [""] * (
        trainings.BATCHES - 1
    )
    assert all(float(row["budget_mib"]) <= 0.8 * 8 * 1024 for row in rows[trainings.BATCHES :])
    assert run.micro_batches() == [[2, 2, 2, 2]] * 2 * trainings.BATCHES
    assert len(run.results) == 2
    assert run.summary["updates"] == 2 * trainings.BATCHES
    assert run.summary["images"] == 2 * trainings.IMAGES
    assert run.summary["updates_expected"] == 2 * trainings.BATCHES
    assert "lost, 8 of 8 updates" in run.log


def test_the_group_that_auto_chose_is_resumed(trainings, tmp_path):
    """The group is resumed even if another would be chosen after the resume."""
    cut = trainings.train(tmp_path, micro_batch=4, callbacks=[("on_fit_epoch_end", cut_power)], raises=PowerCutError)
    assert cut.args["bn_group"] == 4
    run = trainings.train(tmp_path, cut.folder / "weights" / "last.pt", resume=True, micro_batch=8)
    assert run.folder == cut.folder
    assert (run.args["bn_group"], run.args["micro_batch"]) == (4, 8)
    assert run.micro_batches() == [[4, 4]] * trainings.BATCHES + [[8]] * trainings.BATCHES
    assert run.args["micro_batch"] == 8


def test_a_resumed_run_is_that_of_ultralytics(trainings, tmp_path):
    """Every batch is one micro-batch, and the run resumes from Ultralytics' checkpoint of the end of an epoch."""
    left = []
    for settings in ({"mas": False}, {"bn_group": 8}):
        cut = trainings.train(tmp_path, **settings, callbacks=[("on_fit_epoch_end", cut_power)], raises=PowerCutError)
        (cut.folder / "weights" / "state.pt").unlink(missing_ok=True)
        run = trainings.train(tmp_path, cut.folder / "weights" / "last.pt", resume=True)
        assert run.folder == cut.folder
        left.append(run)
    stock, ours = left
    parameters = dict(ours.trainer.model.named_parameters())
    assert all(torch.equal(parameters[name], stock.after[name]) for name in parameters)


@pytest.mark.parametrize("began_with", [True, False])
def test_the_engine_may_be_switched_on_at_a_resume_and_not_off(trainings, tmp_path, began_with):
    """A run that died of out-of-memory may continue with the engine; no run of the engine continues without it.

    results.csv stays a table.
    """
    cut = trainings.train(
        tmp_path, mas=began_with, callbacks=[("on_fit_epoch_end", cut_power)], raises=PowerCutError, bn_group=2
    )
    run = trainings.train(tmp_path, cut.folder / "weights" / "last.pt", resume=True, mas=not began_with)
    assert ("mas=False: a run goes on with the mas=True it began with" in run.log) is began_with
    assert run.trainer.args.mas
    assert "updates" in run.log
    assert len(run.results) == 2


@pytest.mark.parametrize("mas", [False, True])
def test_a_run_of_plain_ultralytics_goes_on_as_the_user_says(trainings, tmp_path, mas):
    """Its checkpoint has no argument of this package, so it began neither with the engine nor with a group."""
    cut = trainings.train(tmp_path, mas=False, callbacks=[("on_fit_epoch_end", cut_power)], raises=PowerCutError)
    last = cut.folder / "weights" / "last.pt"
    checkpoint = torch.load(last, weights_only=False)
    for key in (*DEFAULTS, *OPTIONS):
        checkpoint["train_args"].pop(key, None)
    with own_files.written(last):
        torch.save(checkpoint, last)
    run = trainings.train(tmp_path, last, resume=True, mas=mas, bn_group=4)
    assert "it began with" not in run.log
    assert (run.args["mas"], run.args["bn_group"]) == (mas, 4)
    assert (run.folder / "memory.csv").exists() is mas


def test_what_the_engine_learned_is_in_the_checkpoint_and_taken_from_there(trainings, tmp_path, monkeypatch):
    cut = trainings.train(tmp_path, bn_group=2, callbacks=[("on_fit_epoch_end", cut_power)], raises=PowerCutError)
    last = cut.folder / "weights" / "last.pt"
    saved = torch.load(last, weights_only=False)["optimizer"]["mas_state"]
    assert saved["cost"]["laws"][0]["seen"]
    taken = []
    monkeypatch.setattr(Engine, "load_state_dict", lambda engine, state: taken.append(state))
    run = trainings.train(tmp_path, last, resume=True)
    assert taken == [saved]
    # The final weights hold nothing of the engine.
    assert "mas_state" not in str(torch.load(run.folder / "weights" / "best.pt", weights_only=False).keys())
