"""Replay: images of an older data set, mixed into the training so that a model does not forget its classes.

Ultralytics makes one data set of both. The labels of the old images get the class ids of the new data, by name; labels
of classes that the new data does not have are left out. So mosaic and mixup join images of both, and caches, workers
and ranks see an ordinary data set. In each epoch, the sampler draws every new image once and as many old ones as
`replay_fraction` asks for. The order comes from the loader's generator alone, as without replay, so a run resumes in
mid-epoch and all ranks draw the same images.
"""

from __future__ import annotations

import functools
import itertools
import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils.data import RandomSampler

from yolov12.errors import ConfigError, DataError, plain
from yolov12.training.classes.names import hint, listed, match, renamed
from yolov12.training.data import partners

__all__ = ["ReplaySampler", "class_ids", "mixed", "replayed_images", "with_class_ids"]


def replayed_images(images: int, fraction: float) -> int:
    """Return how many old images an epoch has, so that they are a fraction of all its images.

    Args:
        images: Number of new images, each of which is in the epoch once.
        fraction: Fraction of the images of an epoch that are old, between 0 and 1.

    Returns:
        The nearest whole number, at least 1.
    """
    return max(round(images * fraction / (1 - fraction)), 1)


class ReplaySampler(RandomSampler):
    """Sampler that draws every new image once in an epoch, and some of the old ones, in random order.

    No old image comes a second time before all have come once.

    Args:
        new: Number of new images, which have the first indices.
        old: Number of old images, which have the next ones.
        replayed: Number of old images in an epoch.
        generator: Generator of the loader.
    """

    def __init__(self, new: int, old: int, replayed: int, generator: torch.Generator) -> None:
        super().__init__(range(new + old), generator=generator)
        self._new, self._old, self._replayed = new, old, replayed

    def __len__(self) -> int:
        return self._new + self._replayed

    def __iter__(self) -> Iterator[int]:
        draw = functools.partial(torch.randperm, generator=self.generator)
        rounds = math.ceil(self._replayed / self._old)
        old = torch.cat([draw(self._old) for _ in range(rounds)])[: self._replayed] + self._new
        indices = torch.cat([torch.arange(self._new), old])
        yield from indices[draw(len(indices))].tolist()


def with_class_ids(labels: list[dict[str, Any]], ids: Mapping[int, int | None]) -> Counter[int]:
    """Give labels other class ids, and leave out those of classes without one.

    Args:
        labels: Labels of images, as Ultralytics' data sets have them; they are changed.
        ids: Class id → new class id, or None.

    Returns:
        Number of labels that were left out, by their old class id.
    """
    left_out: Counter[int] = Counter()
    for label in labels:
        old = label["cls"][:, 0].astype(int)
        new = np.array([-1 if ids[index] is None else ids[index] for index in old.tolist()], dtype=int)
        keep = new >= 0
        left_out.update(old[~keep].tolist())
        label["cls"] = new[keep, None].astype(label["cls"].dtype)
        label["bboxes"] = label["bboxes"][keep]
        if label["segments"]:
            label["segments"] = [segment for segment, kept in zip(label["segments"], keep, strict=True) if kept]
        if label.get("keypoints") is not None:
            label["keypoints"] = label["keypoints"][keep]
    return left_out


def class_ids(
    old: Mapping[int, str], new: Mapping[int, str], rename: Mapping[str, str] | None
) -> dict[int, int | None]:
    """Return the class id in the new data for each class id of the old data; None for a class that is not there.

    Args:
        old: Class id → name in the old data.
        new: Class id → name in the new data.
        rename: Old name → new name of classes that were renamed. Several may become one.
    """
    now = renamed(old, rename)
    order = list(now)
    found = match(new, {place: now[index] for place, index in enumerate(order)})
    ids = dict(zip(order, found, strict=True))
    joined = {name.strip().lower() for name in (rename or {}).values()}
    for index, name in now.items():
        if ids[index] is None and name.strip().lower() in joined:
            ids[index] = match(new, {0: name})[0]
    return ids


@contextmanager
def mixed(trainer: Any) -> Iterator[None]:
    """Return a context in which a trainer builds its loaders with the images of `replay`, if there are any.

    Validation covers the validation images of both data sets.

    Args:
        trainer: Ultralytics trainer.

    Raises:
        ConfigError: The trainer's own loader, or a stock training in several processes, cannot replay.
        DataError: The old data set cannot be used, or has no images that the new one does not have.
    """
    if not (trainer.args.mas and trainer.args.replay):
        yield
        return
    replay = _Replay(trainer)
    with ExitStack() as stack:
        for name in ("build_dataset", "get_dataloader", "build_optimizer"):
            own = vars(trainer).get(name)
            setattr(trainer, name, functools.partial(getattr(replay, name), getattr(trainer, name)))
            stack.callback(functools.partial(_put_back, trainer, name, own))
        yield


def _put_back(trainer: Any, name: str, own: Any) -> None:
    vars(trainer).pop(name, None)
    if own is not None:
        setattr(trainer, name, own)


class _Replay:
    """Stands around three methods of a trainer while it builds its loaders."""

    def __init__(self, trainer: Any) -> None:
        from ultralytics.data.utils import check_det_dataset, convert_ndjson_to_yolo_if_needed
        from ultralytics.utils import LOCAL_RANK, LOGGER
        from ultralytics.utils.torch_utils import torch_distributed_zero_first

        args = trainer.args
        self._trainer = trainer
        try:
            with torch_distributed_zero_first(LOCAL_RANK):  # it may have to be downloaded or unpacked
                self._data = check_det_dataset(convert_ndjson_to_yolo_if_needed(args.replay), split="train")
        except FileNotFoundError as error:
            reason = plain(error).strip().splitlines()[0]
            raise DataError(f"replay={args.replay}: {reason}. Give replay= with its place, also to resume") from error
        args.replay = str(Path(self._data["yaml_file"]).absolute())  # the run may be resumed in another folder
        for key in ("channels", "kpt_shape") if args.task == "pose" else ("channels",):
            if self._data.get(key) != trainer.data.get(key):
                raise DataError(
                    f"replay={args.replay}: {key} is {self._data.get(key)}, but {trainer.data.get(key)} in "
                    f"data={args.data}: both need the same"
                )
        self._ids = class_ids(self._data["names"], trainer.data["names"], args.rename)
        if args.single_cls:
            self._ids = dict.fromkeys(self._ids, 0)
        lost = [self._data["names"][old] for old, new in self._ids.items() if new is None]
        without = [name for new, name in trainer.data["names"].items() if new not in self._ids.values()]
        if (words := hint(lost, without)) is not None:
            LOGGER.info(f"replay: a class that was only renamed keeps its labels with {words}")
        self._counts = (0, 0)  # new and old images for training
        self._images = 0  # images in an epoch

    def build_dataset(self, stock: Callable[..., Any], img_path: Any, mode: str = "train", batch: Any = None) -> Any:
        """Build a data set of both."""
        from ultralytics.data.dataset import YOLODataset

        old_path = self._data.get("train" if mode == "train" else self._trainer.args.split)
        if not old_path:
            return stock(img_path, mode, batch)
        get_labels = YOLODataset.get_labels
        counts: list[tuple[int, int]] = []

        def of_both(dataset: Any) -> list[dict[str, Any]]:
            labels, files = get_labels(dataset), dataset.im_files
            old = self._old_labels(get_labels, dataset, old_path, files)
            dataset.im_files = [*files, *(label["im_file"] for label in old)]
            counts.append((len(labels), len(old)))
            both = [*labels, *old]
            dataset.verify_labels(both, Path(str(old_path)))  # drops polygons that only one of them has
            return both

        YOLODataset.get_labels = of_both  # the data set's own constructor then caches and sorts images of both
        try:
            dataset = stock(img_path, mode, batch)
        finally:
            YOLODataset.get_labels = get_labels
        if len(counts) != 1:
            raise ConfigError("replay needs a data set of Ultralytics' own: leave replay out, or build_dataset")
        if mode == "train":
            self._counts = counts[0]
            partners.balance(dataset, *self._counts, self._trainer.args.replay_fraction)
        return dataset

    def get_dataloader(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Build a loader; that of the training draws its images with a `ReplaySampler`."""
        from ultralytics.data.build import InfiniteDataLoader
        from ultralytics.utils import LOGGER

        self._counts = (0, 0)
        loader, (new, old) = stock(*args, **kwargs), self._counts
        if (args[3] if len(args) > 3 else kwargs.get("mode", "train")) != "train":
            return loader
        trainer = self._trainer
        if not new:
            raise ConfigError("replay needs Ultralytics' own data set: leave replay out, or get_dataloader")
        if not old:
            raise DataError(f"replay={trainer.args.replay}: all its images are in data={trainer.args.data}, too")
        if not (isinstance(loader, InfiniteDataLoader) and type(loader.sampler) is RandomSampler):
            raise ConfigError("replay needs Ultralytics' own loader, and in several processes a model that mas trains")
        count = replayed_images(new, trainer.args.replay_fraction)
        sampler = ReplaySampler(new, old, count, loader.generator)
        loader.batch_sampler.sampler.sampler = sampler
        object.__setattr__(loader, "sampler", sampler)  # PyTorch refuses an ordinary assignment
        self._images = len(sampler)
        LOGGER.info(
            f"replay: {new} new images and {count} of {old} old ones ({count / len(sampler):.0%}) in each epoch"
        )
        return loader

    def build_optimizer(self, stock: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Build the optimizer; `optimizer=auto` chooses it by the number of updates, which Ultralytics estimates."""
        trainer = self._trainer
        if "iterations" in kwargs:
            updates = math.ceil(self._images / max(trainer.batch_size, trainer.args.nbs))
            kwargs["iterations"] = updates * trainer.epochs
        return stock(*args, **kwargs)

    def _old_labels(self, get_labels: Any, dataset: Any, path: Any, files: list[str]) -> list[dict[str, Any]]:
        """Return the labels of the old images with the class ids of the new data.

        Images of the new data are left out: no image is trained on twice, or trained on and validated.
        """
        from ultralytics.utils import LOGGER

        state = {name: getattr(dataset, name) for name in ("data", "fraction", "im_files", "label_files")}
        try:
            dataset.fraction = 1.0
            data, splits = self._trainer.data, ("train", self._trainer.args.split)
            new = (file for split in splits if data.get(split) for file in dataset.get_img_files(data[split]))
            present = set(map(_place, itertools.chain(files, new)))
            dataset.data = self._data
            dataset.im_files = [file for file in dataset.get_img_files(path) if _place(file) not in present]
            labels: list[dict[str, Any]] = get_labels(dataset) if dataset.im_files else []
        finally:
            for name, value in state.items():
                setattr(dataset, name, value)
        left_out = with_class_ids(labels, self._ids)
        if left_out:
            names = [f"{self._data['names'][index]} ({count})" for index, count in left_out.most_common()]
            LOGGER.warning(f"replay: labels of classes that the data does not have are left out: {listed(names)}")
        return labels


def _place(file: str) -> Path:
    return Path(file).resolve()
