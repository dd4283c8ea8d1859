"""The place where images are augmented changes no draw and no box. `auto` moves if the loader is slow."""

import itertools
from types import SimpleNamespace

import pytest
import torch
from ultralytics.cfg import get_cfg
from ultralytics.data.augment import Albumentations
from ultralytics.data.build import build_dataloader
from ultralytics.utils import LOGGER
from ultralytics.utils.torch_utils import init_seeds

from tests.training.data.datasets import assert_alike, dataset_of
from yolov12.training.adapter.deferred_tensor import made
from yolov12.training.data import augmentation as module
from yolov12.training.data import loader as loader_module
from yolov12.training.data import recipes
from yolov12.training.data.augmentation import Augmentation, chosen
from yolov12.training.data.device_rendering import PackedTensor
from yolov12.training.data.loader import ResumableLoader
from yolov12.training.data.packing import MOST
from yolov12.training.data.places import Later
from yolov12.training.data.recipes import samples
from yolov12.training.data.rendering import Rendering
from yolov12.training.data.resolution import ResolutionControl, resolution_steps
from yolov12.training.data.sharing import SHARE, Sharing

CPU = torch.device("cpu")
MIXED = {"mosaic": 0.8, "mixup": 0.3, "degrees": 5.0}


def loader_of(yamls, mode, workers=0, sharing=None, task="detect", **arguments):
    """Return a loader of 6 batches."""
    init_seeds(1, deterministic=False)
    dataset = dataset_of(yamls[task], task, **MIXED | arguments)
    stock = build_dataloader(dataset, len(dataset) // 6, workers, shuffle=True, device="cpu")
    return ResumableLoader(stock, 64, sharing=sharing).take_over(Augmentation(mode, CPU))


def assert_all_same(host, device):
    for one, other in zip(host, device, strict=True):
        assert_same(one, other)


def assert_same(host, device):
    assert list(host) == list(device)
    for key, value in host.items():
        if key == "img":
            assert isinstance(device[key], PackedTensor)
            assert_alike(value, made(device[key]))
        elif isinstance(value, torch.Tensor):
            assert torch.equal(value, device[key]), key
        else:
            assert value == device[key], key


@pytest.mark.parametrize("workers", [0, 1])
def test_batches_are_the_same_also_after_a_resume_and_without_mosaic(yamls, workers):
    found = []
    for mode in ("host", "device"):
        loader = loader_of(yamls, mode, workers)
        batches = list(itertools.islice(loader, 4))
        state = loader.state_dict()
        loader.close()
        again = loader_of(yamls, mode, workers)
        assert again.load_state_dict(state, lambda: None)
        batches += list(again)[4:]
        again.dataset.close_mosaic(get_cfg())
        again.reset()
        found.append([*batches, next(iter(again))])
        again.close()
    assert_all_same(*found)


def test_after_a_change_of_workers_too_in_places_of_the_same_size(yamls, monkeypatch):
    sizes, found = [], []
    monkeypatch.setattr(loader_module, "shared_images", lambda loader, image_size, most: sizes.append(most))
    host, loader = (loader_of(yamls, mode, workers=2) for mode in ("host", "device"))
    for batch in loader:
        found.append(batch)
        if len(found) == 3:
            loader.restart(1, 3)
    assert_all_same(list(host), found)
    assert sizes == [1.0, MOST, MOST]
    for each in (host, loader):
        each.close()


def test_ranks_load_the_same(yamls):
    host, device = (list(loader_of(yamls, mode, sharing=Sharing(1, 2, 8, 2, 1))) for mode in ("host", "device"))
    assert all(len(batch["img"]) == 4 for batch in device)
    for batch in (*host, *device):
        batch.pop(SHARE)
    assert_all_same(host, device)


@pytest.mark.parametrize("task", ["segment", "pose", "obb"])
def test_other_tasks_load_the_same(yamls, task):
    assert_all_same(*(list(loader_of(yamls, mode, task=task, copy_paste=0.5)) for mode in ("host", "device")))


def test_users_get_whole_images(yamls):
    found = []
    for mode in ("host", "device"):
        loader = loader_of(yamls, mode)
        loader.is_loops = False
        found.append(next(iter(loader))["img"])
    assert type(found[1]) is torch.Tensor
    assert_alike(*found)


def test_smaller_images_are_packed_or_resized(yamls):
    dataset, control = dataset_of(yamls["detect"]), ResolutionControl("auto", resolution_steps(64, 32, 32), 32)
    control.join(dataset, get_cfg(overrides={"imgsz": 64}))
    rendering = Rendering(dataset.collate_fn)
    rendering.augmentation = Augmentation("device", CPU)

    def loaded():
        return rendering.augmentation.received(rendering(dataset.__getitems__(Later(range(4)))))

    full = loaded()
    smaller = control.smaller(full)
    assert smaller["img"].shape == (4, 3, 32, 32)
    assert smaller["img"].dtype == torch.uint8
    assert isinstance(loaded()["img"], PackedTensor)
    assert loaded()["img"].shape == (4, 3, 32, 32)


def test_images_without_a_recipe_stay_on_the_host(yamls):
    dataset = dataset_of(yamls["detect"], rect=True)
    rendering = Rendering(dataset.collate_fn)
    rendering.augmentation = Augmentation("device", CPU)
    assert isinstance(rendering(samples(dataset, Later(range(4))))["img"], torch.Tensor)


@pytest.fixture
def said(monkeypatch):
    lines = []
    monkeypatch.setattr(LOGGER, "info", lines.append)
    return lines


def epoch(augmentation, monkeypatch, wait, work, batches=20):
    """Train an epoch by a clock of our own."""
    clock = [100.0]
    monkeypatch.setattr(module.time, "perf_counter", lambda: clock[0])

    def take():
        clock[0] += wait
        return {}, None

    for _ in range(batches):
        augmentation.next(take)
        clock[0] += work
    augmentation.epoch_ends()


def test_auto_moves_to_the_device_after_an_epoch_that_waited(monkeypatch, said):
    augmentation = Augmentation("auto", CPU, skip=8)
    epoch(augmentation, monkeypatch, wait=9.0, work=1.0, batches=8)  # these are skipped
    epoch(augmentation, monkeypatch, wait=0.1, work=9.9)
    assert not augmentation.is_on_device
    epoch(augmentation, monkeypatch, wait=1.0, work=1.0)
    assert augmentation.is_on_device
    assert augmentation.has_moved
    epoch(augmentation, monkeypatch, wait=1.0, work=1.0)
    (line,) = said
    assert (
        line == "loader: the training waited for data 50% of the time: images are augmented on the device from now on"
    )


@pytest.mark.parametrize(("mode", "why", "expected"), [("auto", "", True), ("auto", "no", False), ("host", "", False)])
def test_a_resumed_run_augments_where_it_did(mode, why, expected):
    augmentation = Augmentation(mode, CPU, why)
    augmentation.resume(on_device=False)
    assert not augmentation.is_on_device
    augmentation.resume(on_device=True)
    assert augmentation.is_on_device == expected
    assert not augmentation.has_moved, "this is no event"


@pytest.mark.parametrize(("batches", "epochs"), [(24, 1), (12, 2), (6, 5)])
def test_auto_measures_small_data_sets_over_several_epochs(monkeypatch, batches, epochs):
    """With 8 workers that load two batches ahead, the wait for the first 16 batches tells nothing."""
    augmentation = Augmentation("auto", CPU, skip=8 * 2)
    for number in range(epochs):
        assert not augmentation.is_on_device, number
        epoch(augmentation, monkeypatch, wait=1.0, work=1.0, batches=batches)
    assert augmentation.is_on_device


def test_auto_says_once_why_it_cannot(monkeypatch, said):
    augmentation = Augmentation("auto", CPU, "it rains")
    for _ in range(2):
        epoch(augmentation, monkeypatch, wait=1.0, work=1.0)
    assert not augmentation.is_on_device
    (line,) = said
    assert line.endswith("images would be augmented on the device, but it rains")


def a_trainer(yamls, mode, device="cpu", task="detect", **arguments):
    dataset = dataset_of(yamls[task], task, **arguments)
    loader = build_dataloader(dataset, 4, 0, device="cpu")
    args = SimpleNamespace(augment_on=mode, imgsz=64, **arguments)
    return SimpleNamespace(args=args, device=torch.device(device), train_loader=loader, batch_size=4, world_size=1)


def test_the_host_augments_what_the_device_cannot_and_says_so(yamls, said):
    def because():
        return [line.rpartition(", as ")[2] for line in said if line.startswith("augment_on=device: ")]

    assert chosen(a_trainer(yamls, "device"), True).is_on_device
    assert not chosen(a_trainer(yamls, "host"), True).is_on_device
    assert not chosen(a_trainer(yamls, "auto"), True).is_on_device
    assert because() == []
    assert not chosen(a_trainer(yamls, "device", rect=True), True).is_on_device
    assert not chosen(a_trainer(yamls, "device"), False).is_on_device
    trainer = a_trainer(yamls, "device")
    trainer.train_loader.collate_fn = lambda samples: samples
    assert not chosen(trainer, True).is_on_device
    trainer = a_trainer(yamls, "device")
    trainer.train_loader.dataset.transforms.append(lambda labels: labels)
    assert not chosen(trainer, True).is_on_device
    trainer = a_trainer(yamls, "device")
    found = recipes._flat(trainer.train_loader.dataset.transforms)
    next(each for each in found if isinstance(each, Albumentations)).transform = object()
    assert not chosen(trainer, True).is_on_device
    assert not chosen(a_trainer(yamls, "device", channels=4), True).is_on_device
    assert because() == [
        "the device does not support rect=True",
        "preprocess_batch is your own",
        "collate_fn is your own",
        "the data set or a transform is not the one that Ultralytics makes",
        "the device does not support Albumentations",
        "the device does not support images with 4 channels",
    ]


@pytest.mark.parametrize(
    ("task", "arguments", "expected"),
    [
        ("detect", {"copy_paste": 0.5, "mosaic": 1.0}, []),
        ("segment", {"copy_paste": 0.5, "cutmix": 0.0}, ["copy_paste"]),
        ("detect", {"perspective": 1e-4, "cutmix": 0.5}, ["perspective, cutmix"]),
    ],
)
def test_what_the_host_renders_for_some_images_is_said(yamls, said, task, arguments, expected):
    assert chosen(a_trainer(yamls, "device", task=task, **arguments), True).is_on_device
    lines = [line for line in said if line.startswith("augment_on")]
    assert lines == [f"augment_on=device: images with {names} are rendered on the host" for names in expected]


def test_a_batch_that_the_host_augmented_after_all_is_noted_once(yamls, said):
    """A callback may change the transforms at any time."""
    asked, auto = Augmentation("device", CPU), Augmentation("auto", CPU)
    auto.resume(on_device=True)  # batches may have been loaded ahead
    for augmentation in (asked, asked, auto, Augmentation()):
        augmentation.received({"img": torch.zeros(1, 3, 8, 8, dtype=torch.uint8)})
    (line,) = said
    assert line.startswith("augment_on=device: images are augmented on the host, as no transform or image of a batch")


def test_the_device_would_help_a_training_that_could_use_it(yamls, monkeypatch):
    monkeypatch.setattr(module, "has_kernel", lambda device: True)
    monkeypatch.setattr(module, "shares_memory", lambda device: False)
    monkeypatch.setattr(module, "has_room_for_packed", lambda trainer: True)

    def would_help(mode, device="cuda", knows_preprocess=True, **arguments):
        return chosen(a_trainer(yamls, mode, device, **arguments), knows_preprocess).would_help()

    assert would_help("host")
    assert not would_help("host", device="cpu")
    assert not would_help("host", knows_preprocess=False)
    assert not would_help("host", rect=True)
    assert not would_help("device")
    assert not would_help("auto")
    monkeypatch.setattr(module, "has_kernel", lambda device: False)
    assert not would_help("host")


def test_without_the_kernel_auto_stays_on_the_host_and_device_is_slow(yamls, monkeypatch, said):
    for name, value in (("has_kernel", False), ("shares_memory", False), ("has_room_for_packed", True)):
        monkeypatch.setattr(module, name, lambda _, value=value: value)
    assert not chosen(a_trainer(yamls, "auto", "cuda"), True).may_pack
    assert chosen(a_trainer(yamls, "device", "cuda"), True).is_on_device
    found = [line for line in said if line.startswith("augment_on")]
    assert found == ["augment_on=device: PyTorch renders the images, slowly, as the kernel does not run here"]
