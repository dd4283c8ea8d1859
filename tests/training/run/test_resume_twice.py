"""What a resume makes again is written once, and what was decided before it stays decided."""

import shutil

import pytest
import torch
from ultralytics.models.yolo.detect import DetectionTrainer
from ultralytics.utils.callbacks import default_callbacks

SCORES = (0.5, 0.3, 0.4, 0.2, 0.1, 0.05)


class ScoredTrainer(DetectionTrainer):
    """Its fitness is that of a table."""

    def validate(self):
        best = self.best_fitness
        metrics, _ = super().validate()
        fitness = SCORES[self.epoch]
        self.best_fitness = fitness if best is None else max(best, fitness)
        return metrics, fitness


@pytest.mark.parametrize("has_state", [True, False])
def test_best_fitness_and_early_stopping_are_those_of_before(trainings, power, tmp_path, has_state):
    """The best epoch is the first one. Without knowing that, a resumed run finds another, and stops later."""
    settings = {"trainer": ScoredTrainer, "epochs": 6, "patience": 3, "bn_group": 8}
    run = trainings.train(tmp_path, callbacks=power.cut_at(10), raises=power.CutError, **settings)
    assert [row["epoch"] for row in run.results] == [1, 2]
    if not has_state:
        (run.folder / "weights" / "state.pt").unlink()
    again = trainings.train(tmp_path, run.folder / "weights" / "last.pt", resume=True, trainer=ScoredTrainer)
    assert [row["epoch"] for row in again.results] == [1, 2, 3, 4]
    assert (again.trainer.best_fitness, again.trainer.stopper.best_fitness) == (0.5, 0.5)
    assert again.trainer.stopper.best_epoch == 1
    best = torch.load(run.folder / "weights" / "best.pt", weights_only=False)
    assert best["train_metrics"]["fitness"] == 0.5


@pytest.mark.parametrize("batch", [8, 16])
def test_image_sizes_grow_back_with_the_patience_of_before(trainings, power, tmp_path, batch):
    """With another batch, the run goes on from the checkpoint of the first epoch."""
    states = {"step": 1, "patience": 64, "calm": 5, "since_rise": 7}
    seen = []

    def control(trainer):
        return trainer.yolov12_saver._resolution

    def grow_old(trainer):
        control(trainer).load_state_dict(states)

    run = trainings.train(
        tmp_path,
        bn_group=8,
        callbacks=[("on_train_start", grow_old), *power.cut_at(6)],
        raises=power.CutError,
    )
    trainings.train(
        tmp_path,
        run.folder / "weights" / "last.pt",
        resume=True,
        batch=batch,
        callbacks=[("on_train_start", lambda trainer: seen.append(control(trainer).state_dict()))],
    )
    done = 6 if batch == 8 else trainings.BATCHES
    assert seen == [{**states, "calm": 5 + done, "since_rise": 7 + done}]


@pytest.mark.parametrize("cut_by", ["on_train_batch_end", "on_train_epoch_end"])
def test_a_resume_with_another_batch_leaves_one_row_for_each_epoch_and_step(trainings, power, tmp_path, cut_by):
    """Two batches, or a whole epoch without its end, are made again."""
    calls = []

    def cut(trainer):
        calls.append(trainer.epoch)
        if calls.count(1) == (2 if cut_by == "on_train_batch_end" else 1):
            raise power.CutError

    run = trainings.train(tmp_path, bn_group=8, callbacks=[(cut_by, cut)], raises=power.CutError)
    assert len(run.memory) == trainings.BATCHES + (2 if cut_by == "on_train_batch_end" else trainings.BATCHES)
    again = trainings.train(tmp_path, run.folder / "weights" / "last.pt", resume=True, batch=16)
    assert [row["epoch"] for row in again.results] == [1, 2]
    rows = [(int(row["step"]), int(row["epoch"]), int(row["images"])) for row in again.memory]
    assert rows == [(1, 1, 8), (2, 1, 8), (3, 1, 8), (4, 1, 8), (5, 2, 16), (6, 2, 16)]
    assert ["resumed" in row["events"].split("; ") for row in again.memory] == [False] * 4 + [True, False]
    assert again.summary["updates"] == again.summary["updates_expected"] == 6


@pytest.mark.parametrize(("event", "steps"), [("on_train_batch_end", 5), ("on_train_epoch_end", 8)])
def test_a_resume_from_an_earlier_checkpoint_drops_what_came_after_it(trainings, power, tmp_path, event, steps):
    """It is cut in the second epoch, or at the end of it. Then `last.pt` still is the one of before."""
    run = trainings.train(
        tmp_path, bn_group=8, epochs=3, save_period=1, callbacks=power.cut_at(10), raises=power.CutError
    )
    weights = run.folder / "weights"
    again = trainings.train(
        tmp_path, weights / "epoch0.pt", resume=True, callbacks=[(event, power.cut)], raises=power.CutError
    )
    assert [row["epoch"] for row in again.results] == [1]
    assert [int(row["step"]) for row in again.memory] == list(range(1, steps + 1))
    whole = trainings.train(tmp_path, weights / "last.pt", resume=True)
    assert [row["epoch"] for row in whole.results] == [1, 2, 3]
    assert [int(row["step"]) for row in whole.memory] == list(range(1, 13))


_EVENTS = [event for event in default_callbacks if event.startswith(("on_train_", "on_fit_", "on_model_"))]


def events_of(trainings, *where, cut=None, raises=None, more=(), **arguments):
    """Return a training, and its events of epochs as (event, epoch)."""
    seen = []

    def note(event):
        def callback(trainer):
            seen.append((event, trainer.epoch))
            if seen[-1] == cut:
                raise raises

        return event, callback

    callbacks = [*(note(event) for event in _EVENTS if event != "on_train_start"), *more]
    return trainings.train(*where, callbacks=callbacks, raises=raises, **arguments), seen


@pytest.mark.parametrize("last", [1, 2])
def test_an_epoch_that_was_complete_is_not_announced_again(trainings, power, tmp_path, last):
    """The run is cut after the checkpoint of an epoch, which is the last one or not."""
    settings = {"epochs": 3, "bn_group": 8, "optimizer": "AdamW", "lr0": 1e-3}
    whole, expected = events_of(trainings, tmp_path, **settings)
    part, before = events_of(trainings, tmp_path, cut=("on_fit_epoch_end", last), raises=power.CutError, **settings)
    resumed, after = events_of(trainings, tmp_path, part.folder / "weights" / "last.pt", resume=True)
    assert before + after == expected
    assert_alike(resumed, whole)


@pytest.mark.parametrize(("last", "batches"), [(0, 1), (1, 2)])
def test_batches_after_the_last_update_are_trained_on_again_in_an_epoch_that_is_not_announced_again(
    trainings, power, tmp_path, last, batches
):
    """Three batches make an update, and an epoch has four. The gradients of the others are not in the state."""
    settings = {"epochs": 3, "bn_group": 8, "optimizer": "AdamW", "lr0": 1e-3, "nbs": 24}
    whole, expected = events_of(trainings, tmp_path, **settings)
    part, before = events_of(trainings, tmp_path, cut=("on_fit_epoch_end", last), raises=power.CutError, **settings)
    resumed, after = events_of(trainings, tmp_path, part.folder / "weights" / "last.pt", resume=True)
    again = [("on_train_epoch_start", last)]
    again += [("on_train_batch_start", last), ("on_train_batch_end", last)] * batches
    assert after[: len(again)] == again
    assert before + after[len(again) :] == expected
    assert_alike(resumed, whole)


def test_an_epoch_is_not_announced_again_where_the_state_is_older_than_its_checkpoint(trainings, power, tmp_path):
    """A kill: the run was saved for the last time in the middle of an epoch, which was complete later."""
    settings = {"epochs": 3, "bn_group": 8, "optimizer": "AdamW", "lr0": 1e-3}
    whole, expected = events_of(trainings, tmp_path, **settings)
    kept = tmp_path / "state.pt"

    def keep(trainer):
        if trainer.epoch == 1 and not kept.exists():
            shutil.copy(trainer.wdir / "state.pt", kept)  # after its first batch

    part, before = events_of(
        trainings, tmp_path, cut=("on_fit_epoch_end", 1), raises=power.CutError, more=[("on_train_batch_end", keep)],
        save_every=1, **settings,
    )  # fmt: skip
    shutil.copy(kept, part.folder / "weights" / "state.pt")
    resumed, after = events_of(trainings, tmp_path, part.folder / "weights" / "last.pt", resume=True)
    again = [("on_train_epoch_start", 1)] + [("on_train_batch_start", 1), ("on_train_batch_end", 1)] * 3
    assert after[: len(again)] == again
    assert before + after[len(again) :] == expected
    assert_alike(resumed, whole)


def assert_alike(resumed, whole):
    assert resumed.stock_results() == whole.stock_results()
    assert [row["step"] for row in resumed.memory] == [row["step"] for row in whole.memory]
    assert resumed.trainer.best_fitness == whole.trainer.best_fitness
    assert all(torch.equal(value, resumed.after[name]) for name, value in whole.after.items())
