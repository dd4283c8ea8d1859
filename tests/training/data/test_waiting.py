"""A training that waited for its data says so, with what would help on this machine."""

import dataclasses
import time
from types import SimpleNamespace

import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.build import build_dataloader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset

from yolov12.mas.journal.summary import WARM_UP_UPDATES, summarise
from yolov12.mas.memory.host import HostMemory
from yolov12.training.data import waiting
from yolov12.training.data.load_clock import LoadClock
from yolov12.training.data.loader import ResumableLoader
from yolov12.training.data.waiting import waited_for_data

GIB = 2**30


def rows(*updates):
    """Return rows of memory.csv. Each update is its event, its wait and its period in milliseconds."""
    common = {"epoch": "1", "images": "4", "micro_batches": "4", "plan": "", "image_size": "64x64"}
    common |= {f"{name}_mib": "1.0" for name in ("predicted", "peak", "reserved", "free", "budget")}
    common |= {"step_ms": "10.0", "images_per_s": "400.0", "decode_ms": "8.0", "augment_ms": "12.0"}
    return [
        {**common, "step": str(number), "events": event, "data_wait_ms": wait, "period_ms": period}
        for number, (event, wait, period) in enumerate(updates, 1)
    ]


def summary_of(journal):
    return summarise({0: journal}, None, 1, 0, None)


def test_warm_ups_and_the_first_updates_of_epochs_do_not_count():
    warm_up = [("", "900.0", "1000.0")] * WARM_UP_UPDATES
    first = ("", "500.0", "")
    run = [*warm_up, ("", "60.0", "100.0"), first, *warm_up[:2], ("", "10.0", "2000.0")]
    assert summary_of(rows(*run)).data_wait_percent == pytest.approx(100 * 1870 / 4100)
    resumed = [*run, ("resumed after step 4", "900.0", "1000.0"), *warm_up[1:], ("", "30.0", "100.0")]
    found = summary_of(rows(*resumed))
    assert found.data_wait_percent == pytest.approx(100 * 1900 / 4200)
    assert (found.decode_ms, found.augment_ms) == (2.0, 3.0)
    assert summary_of(rows(*warm_up)).data_wait_percent is None
    assert summary_of(rows(*[("", "", "")] * 20)).data_wait_percent is None


def a_training(
    monkeypatch, cores=32, free_bytes=GIB, device="cuda", workers=8, world_size=1, fitting=99, packed=0, **args
):
    monkeypatch.setattr(waiting, "cores_of_rank", lambda trainer: cores // trainer.world_size)
    monkeypatch.setattr(waiting, "cache_room_bytes", lambda trainer, memory: free_bytes)

    def room_for_workers(trainer, workers, memory, *, are_packed=False):
        return min(workers, packed if are_packed else fitting)

    monkeypatch.setattr(waiting, "room_for_workers", room_for_workers)
    augmentation = SimpleNamespace(would_help=lambda: packed > 0)
    data_set = SimpleNamespace(labels=[{"shape": (480, 640)}, {"shape": (2000, 1000)}, {}] * 200)
    loader = SimpleNamespace(num_workers=workers, dataset=data_set, augmentation=augmentation)
    return SimpleNamespace(
        args=SimpleNamespace(**{"cache": False, "imgsz": 640, "auto_workers": False, **args}),
        device=torch.device(device),
        world_size=world_size,
        train_loader=loader,
    )


def told(training, percent=61.4, decode_ms=2.0, augment_ms=3.0):
    some = dataclasses.replace(summary_of([]), data_wait_percent=percent, decode_ms=decode_ms, augment_ms=augment_ms)
    return waited_for_data(training, training.train_loader, some, HostMemory())


def test_the_advice_fits_the_machine(monkeypatch):
    """200 images each of 640 × 480, of 320 × 640, and of unknown size at 640 take 527 MiB."""
    begin = "\ndata: the GPU waited for data 61 % of the time: "
    assert told(a_training(monkeypatch)) == begin + "more workers (workers=31), cache=ram (527 MiB)"
    own = a_training(monkeypatch, auto_workers=True)  # a data set of the user's own, where the number stays
    assert told(own) == begin + "more workers (workers=31), cache=ram (527 MiB)"
    monkeypatch.setattr(waiting, "chooses_by_place", lambda dataset: True)
    assert told(own) == begin + "cache=ram (527 MiB)"
    assert told(a_training(monkeypatch, cores=9)) == begin + "cache=ram (527 MiB)"
    assert told(a_training(monkeypatch, cores=9, free_bytes=527 * 2**20)) == begin + "cache=disk"
    assert told(a_training(monkeypatch, cache="ram")) == begin + "more workers (workers=31)"
    assert told(a_training(monkeypatch), decode_ms=0.1) == begin + "more workers (workers=31)"
    assert (
        told(a_training(monkeypatch, workers=0, fitting=2)) == begin + "more workers (workers=2), cache=ram (527 MiB)"
    )
    assert told(a_training(monkeypatch, cache="ram", cores=9, packed=8)) == begin + "augment_on=device"
    nothing = "the loader needs more CPU cores, or less augmentation"
    assert told(a_training(monkeypatch, fitting=8, cache=True)) == begin + nothing
    assert told(a_training(monkeypatch, imgsz=[640, 640])) == begin + nothing
    assert told(a_training(monkeypatch, fitting=8, cache=True, packed=7)) == begin + nothing, "they have no room"
    assert "the GPUs waited" in told(a_training(monkeypatch, world_size=2))
    assert "workers=" not in told(a_training(monkeypatch, cores=18, world_size=2))
    on_cpu = told(a_training(monkeypatch, device="cpu", workers=0))
    assert on_cpu == "\ndata: the training waited for data 61 % of the time: cache=ram (527 MiB)"


@pytest.mark.parametrize("percent", [None, 0.0, 9.9])
def test_nothing_is_said_of_a_training_that_did_not_wait(monkeypatch, percent):
    assert told(a_training(monkeypatch), percent) == ""


def test_a_run_that_went_on_with_a_loader_of_the_users_own_ends_without_advice(monkeypatch):
    """The waits in the journal are those before the resume."""
    training = a_training(monkeypatch)
    some = dataclasses.replace(summary_of([]), data_wait_percent=50.0)
    assert waited_for_data(training, None, some, HostMemory()) == ""


def test_decoding_is_told_from_everything_else(monkeypatch):
    now = [0.0]
    monkeypatch.setattr("yolov12.training.data.load_clock.time.perf_counter", lambda: now[0])

    def pass_time(seconds):
        now[0] += seconds

    class Dataset:
        def load_image(self, seconds):
            pass_time(seconds)

        def __getitems__(self, seconds):
            for each in seconds:
                self.load_image(each)
                pass_time(0.25)

    clock, data_set = LoadClock(), Dataset()
    clock.watch(data_set)
    data_set.__getitems__([1.0])
    assert clock.times_ms() == (None, None), "methods of the user's own are left alone"
    monkeypatch.setattr("yolov12.training.data.load_clock.module_of", lambda method: "ultralytics.data.base")
    clock.watch(data_set)
    for _ in range(2):
        data_set.__getitems__([1.0, 0.5])
        pass_time(3.0)  # collation
        assert clock.times_ms() == (1500.0, 3500.0)
    data_set.load_image(1.0)  # not for a batch
    assert clock.times_ms() == (None, None)


def test_workers_send_their_times_with_each_batch(trainings, tmp_path):
    data = check_det_dataset(trainings.draw_data(tmp_path / "set"))
    dataset = build_yolo_dataset(get_cfg(overrides={"imgsz": 64}), data["train"], 2, data)
    loader = ResumableLoader(build_dataloader(dataset, 2, 2, device="cpu"), 64).take_over()
    for batch in loader:
        assert batch.keys() == {
            "im_file",
            "ori_shape",
            "resized_shape",
            "ratio_pad",
            "img",
            "cls",
            "bboxes",
            "batch_idx",
        }
        assert loader.times.decode_ms > 0
        assert loader.times.augment_ms > 0
        assert loader.times.wait.elapsed_ms() >= 0
    loader.close()


def test_a_training_notes_what_it_waits_for(trainings, tmp_path, monkeypatch):
    monkeypatch.setattr("yolov12.mas.journal.summary.WARM_UP_UPDATES", 0)
    run = trainings.train(tmp_path)
    assert len(run.memory) == 2 * trainings.BATCHES
    for number, row in enumerate(run.memory):
        assert min(float(row[name]) for name in ("data_wait_ms", "decode_ms", "augment_ms")) > 0
        assert (row["period_ms"] == "") == (number % trainings.BATCHES == 0)
        loading_ms = float(row["decode_ms"]) + float(row["augment_ms"])  # in this process, which waits for it
        assert loading_ms <= float(row["data_wait_ms"]) + 0.2  # each is rounded
        if row["period_ms"]:
            assert float(row["data_wait_ms"]) + float(row["step_ms"]) <= float(row["period_ms"]) + 0.2
    percent = run.summary["data_wait_percent"]
    assert 0 < percent < 100
    assert ("waited for data" in run.log) == (percent >= 10)


@pytest.mark.parametrize("labels", [None, torch.zeros(3), [torch.zeros(3), "a.txt"]])
def test_labels_of_a_data_set_of_the_users_own_may_be_anything(monkeypatch, labels):
    training = a_training(monkeypatch)
    training.train_loader.dataset.labels = labels
    assert "waited for data 61 % of the time" in told(training)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
def test_waits_are_those_of_the_gpu(trainings, tmp_path):
    """A callback that sleeps is no wait for data, although the loader has had time to load ahead."""
    callbacks = [("on_train_batch_end", lambda trainer: time.sleep(0.2))]
    run = trainings.train(tmp_path, device=0, workers=2, epochs=3, callbacks=callbacks)
    rows = [row for row in run.memory[trainings.BATCHES :] if row["period_ms"]]
    assert min(float(row["decode_ms"]) for row in rows) > 0
    assert all(float(row["period_ms"]) > 200 for row in rows)
    assert sum(float(row["data_wait_ms"]) for row in rows) < 0.2 * sum(float(row["period_ms"]) for row in rows)
