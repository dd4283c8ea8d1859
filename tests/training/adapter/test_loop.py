"""What users do around the loop: they replace callbacks, read results.csv, and stop by time."""

import csv
import gc

import pytest
from ultralytics.utils.callbacks import default_callbacks

from yolov12.mas.scheduling import groups


def header(run):
    return (run.folder / "results.csv").read_text().partition("\n")[0].split(",")


def replace_with_set_callback(trainer):
    for event in default_callbacks:
        trainer.set_callback(event, lambda trainer: None)


def replace_the_lists(trainer):
    for callbacks in trainer.callbacks.values():
        callbacks.clear()


@pytest.mark.parametrize("replace", [replace_with_set_callback, replace_the_lists])
def test_callbacks_may_be_replaced_at_any_time(trainings, tmp_path, replace):
    """The engine's own work at these events is done anyway: columns of each epoch, the journal's end, the state's."""
    run = trainings.train(tmp_path, **trainings.SPLIT, save_every=1, callbacks=[("on_train_start", replace)])
    assert run.calls["on_train_end"] == 0
    assert run.summary["updates"] == run.summary["updates_expected"] == 2 * trainings.BATCHES
    assert "0 images lost, 8 of 8 updates" in run.log
    assert [row["memory/micro_batch"] for row in run.results] == [2, 2]
    assert not (run.folder / "weights" / "state.pt").exists()


def test_columns_of_ultralytics_come_first_in_its_order(trainings, tmp_path):
    """A file in which ours are in the middle, as they were once, goes on in its own order."""
    stock, ours = (trainings.train(tmp_path, epochs=1, mas=mas) for mas in (False, True))
    memory = ["memory/peak_MiB", "memory/budget_MiB", "memory/micro_batch"]
    assert header(ours) == [*header(stock), *memory]

    def reorder(trainer):
        if trainer.epoch == 0:
            rows = list(csv.DictReader(trainer.csv.read_text().splitlines()))
            names = ["epoch", "time", *memory, *(name for name in rows[0] if name not in ("epoch", "time", *memory))]
            lines = [names, *([row[name] for name in names] for row in rows)]
            trainer.csv.write_text("".join(",".join(line) + "\n" for line in lines))

    run = trainings.train(tmp_path, callbacks=[("on_fit_epoch_end", reorder)])
    first, second = run.results
    assert list(first)[2:5] == memory
    assert second["memory/micro_batch"] == first["memory/micro_batch"] == 8
    assert second["memory/budget_MiB"] == float(f"{second['memory/budget_MiB']:.6g}") > 1000
    assert second["lr/pg0"] < 0.011


def test_decisions_know_how_many_batches_are_left(trainings, tmp_path, monkeypatch):
    left, decide = [], groups.decide

    def noted(state, *models):
        left.append(state.batches_left)
        return decide(state, *models)

    monkeypatch.setattr(groups, "decide", noted)
    trainings.train(tmp_path, epochs=3)
    assert left == list(range(3 * trainings.BATCHES, 0, -1))


def test_an_epoch_collects_no_garbage(trainings, tmp_path, monkeypatch):
    """It takes tenths of a second. With `time=`, fewer epochs than on stock would have time where they are short."""
    collections = []
    collect = gc.collect
    monkeypatch.setattr(gc, "collect", lambda *args: collections.append(1) or collect(*args))
    counts = []
    for epochs in (1, 3):
        collections.clear()
        trainings.train(tmp_path, bn_group=8, epochs=epochs)
        counts.append(len(collections))
    assert counts[0] == counts[1]


def test_images_of_an_accumulation_that_the_end_cuts_short_are_not_lost_as_stock_makes_no_update_of_them(
    trainings, tmp_path
):
    """Three of the eight batches make an update."""
    runs = [trainings.train(tmp_path / str(mas), mas=mas, nbs=24, bn_group=None) for mas in (True, False)]
    assert [run.steps for run in runs] == [2, 2]
    summary = runs[0].summary
    assert (summary["updates"], summary["updates_expected"]) == (2, 2)
    assert (summary["images"], summary["images_lost"]) == (48, 0)
