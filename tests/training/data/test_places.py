"""The place of an image in the run decides its pixels and boxes, and the hardware does not."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset
from ultralytics.cfg import get_cfg
from ultralytics.data.build import InfiniteDataLoader, build_dataloader, build_yolo_dataset, seed_worker
from ultralytics.data.dataset import YOLOConcatDataset, YOLODataset
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils.torch_utils import init_seeds

from yolov12.mas.distributed.ranks import RankStatus
from yolov12.training.data.loader import SKIPPED, ResumableLoader
from yolov12.training.data.places import chooses_by_place
from yolov12.training.data.random_state import random_state
from yolov12.training.data.replay import ReplaySampler
from yolov12.training.data.sharing import SHARE, Sharing

EPOCHS, CLOSE = 3, 2
HARDWARE = [
    {"workers": 3},
    {"cut": (4, 2)},  # within an epoch
    {"cut": (6, 0), "workers": 1},  # at the end of an epoch, after which mosaic is closed
    {"cut": (8, 1)},  # after that
    {"rank": (1, 2), "workers": 1, "numbers": {2: 3, 6: 2}},
    {"rank": (2, 3), "workers": 2, "cut": (5, 0)},
    {"workers": 2, "numbers": {1: 1, 3: 3, 7: 2}},  # of workers, within an epoch, at its end and without mosaic
]
KINDS = [
    {},
    {"cache": "ram", "size": 18},
    {"rect": True},
    {"replay": True, "size": 3},
    {"task": "segment", "copy_paste": 0.5, "copy_paste_mode": "mixup", "cutmix": 0.3},
    {"joined": True},
]


@pytest.fixture(scope="module")
def data(tmp_path_factory, trainings):
    """Data sets of 24 images of three sizes, with boxes and with outlines."""
    folder, sizes = tmp_path_factory.mktemp("data"), [(64, 64), (48, 80), (80, 48)]
    return {task: check_det_dataset(trainings.draw_data(folder / task, task, sizes)) for task in ("detect", "segment")}


def dataset_of(data, size, *, joined=False, **arguments):
    """Return a data set of Ultralytics, or one that is joined from two."""
    cfg = get_cfg(overrides={"imgsz": 64, "mosaic": 0.8, "mixup": 0.3, "degrees": 5.0, **arguments})
    tasks = ["detect", "segment"] if joined else [arguments.get("task", "detect")]
    parts = [build_yolo_dataset(cfg, data[task]["train"], size, data[task]) for task in tasks]
    dataset = YOLOConcatDataset(parts) if joined else parts[0]
    assert chooses_by_place(dataset)
    return dataset


def loader_of(data, *, workers=0, rank=None, size=8, replay=False, **arguments):
    """Return a loader of the training, and of ranks the sharing.

    Args:
        data: Data sets.
        workers: Number of workers.
        rank: Rank and number of ranks.
        size: Number of images in a batch.
        replay: True to draw a part of the images in each epoch.
        arguments: Arguments of the training, and of `dataset_of`.
    """
    init_seeds(1, deterministic=False)
    dataset = dataset_of(data, size, **arguments)
    loader = build_dataloader(dataset, size, workers, shuffle="rect" not in arguments, device="cpu")
    if replay:
        sampler = ReplaySampler(16, 8, 4, loader.generator)
        loader.batch_sampler.sampler.sampler = sampler
        object.__setattr__(loader, "sampler", sampler)
    sharing = Sharing(*rank, size, 2, 2 * workers + 1) if rank else None
    return ResumableLoader(loader, 64, sharing=sharing, arrange=rank is None).take_over(), sharing


def run(loader, sharing, found, last=None, state=None, numbers=None):
    """Load the images of a training into a dictionary; return the state after its last batch.

    Args:
        loader: Loader of the training.
        sharing: Sharing among ranks; None for one process.
        found: Batch and name of an image → its pixels and boxes, and the seed of the batch.
        last: Number of batches after which the training is interrupted; None for never.
        state: State from which it goes on.
        numbers: Number of batches → number of workers from then on.
    """
    if state is not None:
        assert loader.load_state_dict(state, lambda: None)
    epoch = 0 if state is None else (state["position"] == len(loader)) + state["epoch"]
    if state is not None and state["position"] == len(loader):
        list(loader)  # the placeholders of a complete epoch
        loader.repeated()
    done, closed = epoch * len(loader), False
    for _ in range(epoch, EPOCHS):
        if done >= CLOSE * len(loader) and not closed:
            closed = True
            loader.dataset.close_mosaic(get_cfg())
            loader.reset()
            assert loader.resets == 1
        for batch in loader:
            done += 1
            if SKIPPED in batch:
                continue
            if sharing is not None:
                batch.pop(SHARE)
                sharing.observe([RankStatus(1, 1.0), RankStatus(1, 2.0)])
            for place, file in enumerate(batch["im_file"]):
                boxes = batch["batch_idx"] == place
                found[done, file] = batch["img"][place], batch["bboxes"][boxes], batch["cls"][boxes], loader.seed
            if done == last:
                return loader.state_dict()
            if numbers and done in numbers:
                loader.restart(numbers[done], 2 * numbers[done] + 1)
    return None


def images(data, *, cut=None, numbers=None, **settings):
    """Return what a training loads.

    Args:
        data: Data sets.
        cut: Batch after which it is interrupted, and its workers before; None for never.
        numbers: See `run`.
        settings: Arguments of `loader_of`.
    """
    found, state = {}, None
    if cut is not None:
        before, sharing = loader_of(data, **{**settings, "workers": cut[1]})
        state = run(before, sharing, found, last=cut[0])
        before.close()
    loader, sharing = loader_of(data, **settings)
    run(loader, sharing, found, state=state, numbers=numbers)
    loader.close()
    return found


def assert_same(found, wanted):
    assert found.keys() <= wanted.keys()
    for key, (*tensors, seed) in found.items():
        *others, other_seed = wanted[key]
        assert seed == other_seed
        assert all(map(torch.equal, tensors, others)), key


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_images_depend_on_their_place_and_not_on_the_hardware(data, monkeypatch, deep, kind):
    monkeypatch.setattr("os.cpu_count", lambda: 8)  # Ultralytics has no more workers than processors
    wanted = images(data, **kind)
    sums = Counter(float(pixels.double().sum()) for pixels, *_ in wanted.values())
    assert len(sums) > 0.9 * len(wanted)  # otherwise nothing would be drawn
    first = KINDS.index(kind) if not deep else 0
    for hardware in (HARDWARE[first:] + HARDWARE[:first])[: len(HARDWARE) if deep else 2]:
        found = images(data, **kind, **hardware)
        assert len(found) == len(wanted) or "rank" in hardware
        assert_same(found, wanted)


def test_other_seeds_and_epochs_give_other_draws_and_the_process_keeps_its_own(data):
    loader, _ = loader_of(data)
    first, *_, second = [*loader, next(iter(loader))]
    init_seeds(2, deterministic=False)
    other = next(iter(ResumableLoader(build_dataloader(dataset_of(data, 8), 8, 0, device="cpu"), 64).take_over()))
    assert len({float(batch["img"].double().sum()) for batch in (first, second, other)}) == 3
    before = random_state()
    next(iter(loader))
    after = random_state()
    assert before["python"] == after["python"]
    assert torch.equal(before["numpy"][1], after["numpy"][1])
    assert torch.equal(before["torch"], after["torch"])


def test_the_generators_of_gpus_are_not_touched(data, monkeypatch):
    """Layers such as dropout draw from them."""
    loader, _ = loader_of(data)
    monkeypatch.setattr(torch.cuda, "manual_seed_all", lambda seed: pytest.fail("a GPU was seeded"))
    next(iter(loader))


def test_a_run_that_resumes_from_the_end_of_an_epoch_goes_on_with_the_next(data):
    whole, _ = loader_of(data)
    epochs = [[(batch["im_file"], batch["img"].sum()) for batch in whole] for _ in range(3)]
    init_seeds(1, deterministic=False)
    stock = build_dataloader(dataset_of(data, 8), 8, 0, device="cpu")
    resumed = ResumableLoader(stock, 64, arrange=True, epoch=2).take_over()
    assert [(batch["im_file"], batch["img"].sum()) for batch in resumed] == epochs[2]


class Own(Dataset):
    """Data set of the user's own, which draws from all generators."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return index, random.random(), np.random.rand(), float(torch.rand(1))  # noqa: NPY002


class OwnBatches(Own):
    """One that loads a batch at once."""

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def drawing(samples):
    """Collate function that draws, too."""
    return {"samples": samples, "drawn": (random.random(), float(torch.rand(1))), "kind": type(samples)}


@pytest.mark.parametrize("kind", [Own, OwnBatches])
def test_code_of_the_users_own_draws_by_place(kind):
    found = []
    for workers in (0, 1, 2):
        generator = torch.Generator().manual_seed(3)
        loader = InfiniteDataLoader(
            kind(), batch_size=4, shuffle=True, num_workers=workers, generator=generator, collate_fn=drawing,
            prefetch_factor=2 if workers else None, worker_init_fn=seed_worker,
        )  # fmt: skip
        ours = ResumableLoader(loader, 64).take_over()
        found.append([batch for _ in range(2) for batch in ours])
        random.random()
        loader.close()
    assert found[0] == found[1] == found[2]
    assert {batch["kind"] for batch in found[0]} == {list}
    assert len({sample for batch in found[0] for sample in batch["samples"]}) == 24
    assert len({batch["drawn"] for batch in found[0]}) == 6


class Around(Dataset):
    """Wrapper of the user's own that passes on whatever it does not have."""

    def __init__(self, dataset):
        self.dataset = dataset

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        return self.dataset[index]

    def __getattr__(self, name):
        return getattr(self.__dict__["dataset"], name)


class Longer(YOLODataset):
    """Data set of the user's own that has each of its first three images very often, and no other."""

    def __len__(self):
        return 800

    def __getitem__(self, index):
        return super().__getitem__(index % 3)


class Weighted(YOLODataset):
    """Data set of the user's own that draws an image, whatever the index."""

    def __getitem__(self, index):
        return super().__getitem__(random.randrange(3))


@pytest.mark.parametrize("kind", [Longer, Weighted])
def test_a_data_set_of_the_users_own_that_chooses_images_chooses_those_of_mosaics(data, kind):
    dataset = dataset_of(data, 8, mosaic=1.0, mixup=0.0)
    dataset.__class__ = kind
    assert not chooses_by_place(dataset)
    for _ in itertools.islice(ResumableLoader(build_dataloader(dataset, 8, 0, device="cpu"), 64).take_over(), 3):
        assert {index for index, image in enumerate(dataset.ims) if image is not None} <= {0, 1, 2}


def test_a_data_set_inside_one_of_the_users_own_keeps_as_many_images_as_with_ultralytics(data):
    dataset = dataset_of(data, 4, mosaic=1.0)
    dataset.max_buffer_length = 8
    assert not chooses_by_place(Around(dataset))
    loader = ResumableLoader(build_dataloader(Around(dataset), 4, 0, device="cpu"), 64).take_over()
    for _ in range(3):
        for _ in loader:
            in_memory = [index for index, image in enumerate(dataset.ims) if image is not None]
            assert sorted(dataset.buffer) == in_memory
            assert len(in_memory) < 8
    assert loader.times.decode_ms is None, "it is not the method that loads an image"


class Blur:
    """Transform with a generator of its own, as Albumentations have since version 1.4.21."""

    seed = None

    def set_random_seed(self, seed):
        self.seed, self._draw = seed, random.Random(seed)

    def __call__(self, image):
        return {"image": image // (1 + self._draw.randrange(100))}


@pytest.mark.parametrize("kind", [dict, tuple])
def test_whatever_a_data_set_of_the_users_own_loads_at_once_is_collated(kind):
    class Whole(Own):
        def __getitems__(self, indices):
            return kind(img=torch.tensor(indices)) if kind is dict else tuple(indices)

    loader = InfiniteDataLoader(
        Whole(), 4, shuffle=True, generator=torch.Generator(), collate_fn=lambda loaded: {"loaded": loaded}
    )
    assert type(next(iter(ResumableLoader(loader, 64).take_over()))["loaded"]) is kind


def test_albumentations_draw_by_place(data):
    found = []
    for workers in (0, 2):
        loader, _ = loader_of(data, workers=workers)
        albumentations = next(each for each in loader.dataset.transforms if type(each).__name__ == "Albumentations")
        albumentations.transform, albumentations.p, albumentations.contains_spatial = Blur(), 1.0, False
        found.append([batch["img"] for batch in loader])
        loader.close()
    assert all(map(torch.equal, *found))
    assert found[0][0].max() < 128  # the transform was used


@pytest.mark.parametrize(("most", "kept"), [(24, 24), (18, 18), (3, 16)])
def test_a_worker_keeps_as_many_images_as_with_ultralytics(data, most, kept):
    """More only if a batch is larger. An image that is kept is not decoded again."""
    loader, _ = loader_of(data, size=16, mosaic=1.0, mixup=0.5)
    dataset, decoded = loader.dataset, []
    stock, dataset.max_buffer_length = dataset.load_image, most

    def load_image(index, *args, **kwargs):
        decoded.extend([index] if dataset.ims[index] is None else [])
        return stock(index, *args, **kwargs)

    dataset.load_image = load_image
    for _ in range(3):
        for _ in loader:
            in_memory = [index for index, image in enumerate(dataset.ims) if image is not None]
            assert sorted(dataset.buffer) == in_memory
            assert len(in_memory) <= kept
    assert (sorted(decoded) == list(range(24))) is (most == 24)
    assert dataset.max_buffer_length == most
    plain = next(iter(DataLoader(dataset, batch_size=4, collate_fn=list)))  # stock's way to load goes on
    assert len(plain) == 4
