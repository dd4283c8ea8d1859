"""A training warns about a shortage of host memory before it fails, with numbers and a way out."""

import gc
import os
import threading
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.build import InfiniteDataLoader, build_yolo_dataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import LOGGER, plotting

from yolov12.mas.memory.host import HostMemory
from yolov12.training.data import host
from yolov12.training.data.host import AHEAD, affordable_workers, has_room_for_packed, limit_prefetch, limit_workers

MIB, GIB = 2**20, 2**30


@pytest.mark.parametrize(
    ("shm_bytes", "host_bytes", "affordable"),
    [
        (64 * MIB, 64 * GIB, 0),  # Docker's default: four batches of 16 images of 640 are 75 MiB
        (80 * MIB, 64 * GIB, 1),
        (8 * GIB, 64 * GIB, 8),
        (8 * GIB, 1 * GIB, 2),
        (None, 64 * GIB, 8),
    ],
)
def test_workers_that_have_room_for_their_batches(shm_bytes, host_bytes, affordable):
    assert affordable_workers(8, 16 * 3 * 640**2, shm_bytes, host_bytes) == affordable


@pytest.fixture
def warnings(monkeypatch):
    seen = []
    monkeypatch.setattr(LOGGER, "warning", seen.append)
    return seen


def a_host(tmp_path, available_bytes):
    proc = tmp_path / "proc"
    proc.mkdir()
    (proc / "meminfo").write_text(
        f"MemTotal: {2 * available_bytes >> 10} kB\nMemAvailable: {available_bytes >> 10} kB\n"
    )
    return HostMemory(proc, tmp_path / "no cgroups")


def a_trainer(**args):
    args = SimpleNamespace(**{"workers": 8, "imgsz": 640, "cache": False, **args})
    return SimpleNamespace(args=args, batch_size=256, world_size=1, device=torch.device("meta"))


def test_a_small_shm_reduces_the_workers_with_a_warning(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    monkeypatch.setattr("os.statvfs", lambda folder: SimpleNamespace(f_bavail=64, f_frsize=MIB))
    trainer = a_trainer()
    limit_workers(trainer, a_host(tmp_path, 256 * GIB))
    assert trainer.args.workers == 0
    assert "8 workers may have 9,600 MiB of batches of 256 images in flight" in warnings[0]
    assert "/dev/shm has 64 MiB free. `docker run --shm-size=18g`" in warnings[0]


def test_a_small_host_reduces_the_workers_with_a_warning(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    trainer = a_trainer()
    limit_workers(trainer, a_host(tmp_path, 16 * GIB), shm=str(tmp_path / "none"))
    assert trainer.args.workers == 2
    assert "the host has 16,384 MiB available: going on with workers=2" in warnings[0]


def test_packed_images_may_need_twice_as_much(tmp_path, warnings, monkeypatch):
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    memory, none = a_host(tmp_path, 16 * GIB), str(tmp_path / "none")
    trainer = a_trainer(augment_on="device")
    limit_workers(trainer, memory, shm=none)
    assert trainer.args.workers == 1
    for workers, expected in ((1, True), (2, False)):
        trainer.train_loader = SimpleNamespace(num_workers=workers)
        assert has_room_for_packed(trainer, memory, none) == expected


def test_with_enough_memory_nothing_changes(tmp_path, warnings):
    trainer = a_trainer(imgsz=64)
    limit_workers(trainer, a_host(tmp_path, 256 * GIB), shm=str(tmp_path / "none"))
    assert (trainer.args.workers, warnings) == (8, [])


@pytest.mark.parametrize(("batch", "imgsz"), [(-1, 64), (0.7, 64), (16, [64, 64])])
def test_workers_are_limited_when_batch_and_image_size_are_known(trainings, tmp_path, monkeypatch, batch, imgsz):
    """Ultralytics chooses 16 images on the CPU. Memory for four batches of one worker would be 768 KiB."""
    workers = []
    monkeypatch.setattr(host, "_free_bytes", lambda folder: 700 << 10)
    monkeypatch.setattr("os.cpu_count", lambda: 8)

    def have_workers(trainer):
        trainer.args.workers = 2  # without a GPU, Ultralytics uses no workers

    def look(trainer):
        workers.append((trainer.train_loader.num_workers, trainer.test_loader.num_workers))
        raise KeyboardInterrupt

    callbacks = [("on_pretrain_routine_start", have_workers), ("on_train_start", look)]
    run = trainings.train(tmp_path, batch=batch, imgsz=imgsz, callbacks=callbacks, raises=KeyboardInterrupt)
    assert workers == [(0, 0)]
    assert run.log.count("2 workers may have 2 MiB of batches of 16 images in flight, and /dev/shm has 1 MiB free") == 1


def test_workers_get_a_quarter_where_the_model_needs_the_same_memory(tmp_path, warnings, monkeypatch):
    """A worker has eleven batches of 300 MiB in flight and keeps the images of 3.3: 1,000. Within 0.9 × 64 GiB, a
    quarter has room for 3 workers, and half of 64 GiB for 8."""
    monkeypatch.setattr("os.cpu_count", lambda: 8)
    trainer, memory = a_trainer(), a_host(tmp_path, 64 * GIB)
    (memory.proc / "self").mkdir()
    (memory.proc / "self/status").write_text(f"VmRSS: {MIB} kB\n")
    limit_workers(trainer, memory, shm=str(tmp_path / "none"))
    assert (trainer.args.workers, warnings) == (8, [])
    trainer.device = torch.device("cpu")
    trainer.args.mem_limit = 64 * GIB
    limit_workers(trainer, memory, shm=str(tmp_path / "none"))
    assert trainer.args.workers == 3
    assert (
        "9,375 MiB of images for mosaics, more than a quarter of the 57,958 MiB that are left for this run"
        in warnings[0]
    )


@pytest.fixture
def data(tmp_path, trainings):
    return check_det_dataset(trainings.draw_data(tmp_path / "set"))


@pytest.mark.parametrize(("room_bytes", "cached"), [(1 * GIB, True), (100 << 10, False)])
def test_images_are_cached_only_within_the_limit_of_the_container(data, warnings, monkeypatch, room_bytes, cached):
    """8 images of 64 × 64 take 96 KiB. Ultralytics asks psutil, which tells only the memory of the machine."""
    monkeypatch.setattr(HostMemory, "room_bytes", lambda self: (room_bytes, room_bytes))
    dataset = build_yolo_dataset(get_cfg(overrides={"imgsz": 64, "cache": "ram"}), data["train"], 4, data)
    assert (dataset.cache == "ram") is cached
    assert any(image is not None for image in dataset.ims) is cached
    assert any("cache=ram would take 0 MiB" in warning for warning in warnings) is not cached


def test_cached_images_get_a_quarter_where_the_model_needs_the_same_memory(data, tmp_path, warnings, monkeypatch):
    """8 images of 64 × 64 take 96 KiB. The second data set has less room beside the first."""
    lines = []
    monkeypatch.setattr(LOGGER, "info", lines.append)
    memory, trainer = a_host(tmp_path, 2 * GIB), a_trainer(cache="ram", mem_safety_ratio=0.0)
    trainer.device = torch.device("cpu")
    (memory.proc / "self").mkdir()
    (memory.proc / "self/status").write_text(f"VmRSS: {MIB} kB\n")
    cached = []
    for room in (200 << 10, 500 << 10):
        trainer.args.mem_limit = GIB + room
        with host.data_room(trainer, memory):
            for _ in range(2):
                dataset = build_yolo_dataset(get_cfg(overrides={"imgsz": 64, "cache": "ram"}), data["train"], 4, data)
                cached.append(dataset.cache == "ram")
    assert cached == [False, False, True, False]
    assert (
        "beside 0 MiB of other cached images more than a quarter of the 0 MiB that are left for this run" in warnings[0]
    )
    assert [
        line
        for line in lines
        if "share one pool, with 0 MiB left for this run: at most 0 MiB for cached images" in line
    ]


def test_only_images_that_are_drawn_are_turned_into_floats(tmp_path, monkeypatch):
    floats = []
    stock = torch.Tensor.float
    monkeypatch.setattr(torch.Tensor, "float", lambda tensor: floats.append(len(tensor)) or stock(tensor))
    images = torch.randint(0, 256, (40, 3, 32, 32), dtype=torch.uint8)
    labels = {"img": images, "cls": torch.zeros(40, 1), "batch_idx": torch.arange(40.0), "bboxes": torch.rand(40, 4)}
    drawn = [
        plotting.plot_images(dict(labels), fname=str(tmp_path / "all.jpg"), threaded=False, save=False),
        plotting.plot_images(
            {key: value for key, value in labels.items() if key != "img"}, images, threaded=False, save=False
        ),
        plotting.plot_images.__wrapped__(dict(labels), threaded=False, save=False),
    ]
    assert floats == [16, 16, 40]
    assert all(np.array_equal(drawn[2], picture) for picture in drawn[:2])


@pytest.mark.parametrize(("mas", "ahead"), [(True, AHEAD), (False, 4)])
def test_workers_prefetch_no_more_than_needed(tmp_path, trainings, mas, ahead):
    """The test counts the batches that were requested and not trained on after the first step."""
    outstanding = []

    def have_a_worker(trainer):
        trainer.args.workers = 1  # without a GPU, Ultralytics uses no workers

    def look(trainer):
        iterator = trainer.train_loader.iterator
        outstanding.append(iterator._send_idx - iterator._rcvd_idx)

    callbacks = [("on_pretrain_routine_start", have_a_worker), ("on_train_batch_end", look)]
    trainings.train(tmp_path, mas=mas, callbacks=callbacks, epochs=1, val=False, save=False)
    assert outstanding[0] == ahead


@pytest.mark.parametrize(("given", "kept"), [(1, 1), (4, AHEAD)])
def test_a_loader_that_prefetches_less_is_left_alone(given, kept):
    loader = InfiniteDataLoader([0] * 4, num_workers=1, prefetch_factor=given)
    limit_prefetch(SimpleNamespace(train_loader=loader))
    assert loader.prefetch_factor == kept


class CollectsGarbage(torch.utils.data.Dataset):
    def __len__(self):
        return 2

    def __getitem__(self, index):
        gc.collect()
        return index


def test_a_worker_does_not_collect_garbage_of_its_parent_which_may_hold_tensors_of_a_gpu(tmp_path):
    class Garbage:
        def __init__(self):
            self.itself = self

        def __del__(self):
            (tmp_path / str(os.getpid())).touch()

    gc.disable()
    try:
        Garbage()
        list(torch.utils.data.DataLoader(CollectsGarbage(), num_workers=1, multiprocessing_context="fork"))
        assert not list(tmp_path.iterdir())
    finally:
        gc.enable()
    gc.collect()
    assert [file.name for file in tmp_path.iterdir()] == [str(os.getpid())]


def test_the_room_of_one_training_is_not_that_of_another_thread(data, tmp_path, warnings):
    """A service may train several models at once. The end of one set-up leaves the limit of another."""
    memory, trainer = a_host(tmp_path, 2 * GIB), a_trainer(cache="ram", mem_safety_ratio=0.0)
    trainer.device = torch.device("cpu")
    (memory.proc / "self").mkdir()
    (memory.proc / "self/status").write_text(f"VmRSS: {MIB} kB\n")
    trainer.args.mem_limit = GIB + (200 << 10)

    def set_up():
        with host.data_room(trainer, memory):
            pass

    with host.data_room(trainer, memory):
        other = threading.Thread(target=set_up)
        other.start()
        other.join()
        set_up()
        dataset = build_yolo_dataset(get_cfg(overrides={"imgsz": 64, "cache": "ram"}), data["train"], 4, data)
    assert dataset.cache is None
    assert "that are left for this run" in warnings[0]
