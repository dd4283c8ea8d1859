"""Recipes of augmented images: what Ultralytics' transforms draw and do to labels, with the pixels left for later.

Ultralytics' own objects draw the random numbers and change the labels, in their own order, so that labels and random
generators are those of Ultralytics to the bit. Instead of an image, they get an empty one of the same shape. What they
would do to the pixels is kept in a `Recipe`.

This needs transforms that are known. A transform of the user's own, or one in another place, makes its images as in
Ultralytics; so does an image that is no array of 8-bit integers with one or three channels.
"""

from __future__ import annotations

import copy
import functools
import random
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np

from yolov12.joining import PINNED
from yolov12.training.adapter.users_code import module_of
from yolov12.training.data.boxes import formatted, joined
from yolov12.training.data.pixels import Array, Blend, Canvas, Image, Recipe, Renderer, Tile, Warp
from yolov12.training.data.places import Later, Placed, by_place

__all__ = ["Later", "only_on_host", "samples"]

_IMAGE = "yolov12_image"  # key of labels: the image that their empty image stands for
_OTHERS = ("semantic_mask", "depth", "rect_shape", "texts")  # keys of labels that other tasks have
_OF_DATASET = ("__getitem__", "get_image_and_label", "load_image", "update_labels_info", "collate_fn")
_OF_TRANSFORM = (
    "__call__", "get_params", "apply_image", "apply_instances", "apply_semantic", "apply_depth",
    "_cat_labels", "_compute_affine_matrix", "_format_img", "_update_labels",
)  # fmt: skip


def samples(dataset: Any, indices: Sequence[int]) -> list[Any]:
    """Load samples of a data set.

    Args:
        dataset: Data set of Ultralytics.
        indices: Indices of the samples. If they are `Later`, and the data set and its transforms are known, a sample
            has a `Recipe` in the place of its image. If they are `Placed`, each is drawn by its place.
    """
    load = _Recipes(dataset).sample if isinstance(indices, Later) and _is_known(dataset) else dataset.__getitem__
    return by_place(dataset, indices, load) if isinstance(indices, Placed) else [load(index) for index in indices]


def _is_known(dataset: Any) -> bool:
    """Return whether a data set makes its samples with code of Ultralytics, from transforms in their usual order.

    Args:
        dataset: Data set of a training loader.
    """
    import ultralytics
    from ultralytics.data import augment
    from ultralytics.data.dataset import YOLODataset

    if ultralytics.__version__ != PINNED or not isinstance(dataset, YOLODataset):
        return False
    if dataset.rect or not dataset.augment or not _is_untouched(dataset, _OF_DATASET):
        return False
    found = list(_flat(dataset.transforms))
    paste, affine = augment.CopyPaste, augment.RandomPerspective
    rest = ("MixUp", "CutMix", "Albumentations", "RandomHSV", "RandomFlip", "RandomFlip", "Format")
    kinds = [type(transform) for transform in found]
    return (
        kinds[2:5] in ([augment.Mosaic, paste, affine], [augment.Mosaic, affine, paste])
        and kinds[:2] == [augment.Compose] * 2
        and kinds[5:] == [getattr(augment, name) for name in rest]
        and [len(found[0].transforms), len(found[1].transforms)] == [8, 3]
        and all(_is_untouched(transform, _OF_TRANSFORM) for transform in found)
        and found[5].pre_transform is found[1]
        and found[2].n == 4
        and found[7].transform is None  # Albumentations are not installed, so that nothing is drawn for them
    )


def only_on_host(dataset: Any) -> str:
    """Return why the images of a data set have no recipes; empty if they have.

    Args:
        dataset: Data set of a training loader.
    """
    from ultralytics.data.augment import Albumentations
    from ultralytics.data.dataset import YOLODataset

    refused = ""
    if _is_known(dataset):
        refused = "" if dataset.channels in (1, 3) else f"images with {dataset.channels} channels"
    elif getattr(dataset, "rect", False):
        refused = "rect=True"
    elif isinstance(dataset, YOLODataset) and any(
        isinstance(each, Albumentations) and each.transform is not None for each in _flat(dataset.transforms)
    ):
        refused = "Albumentations"
    else:
        return "the data set or a transform is not the one that Ultralytics makes"
    return f"the device does not support {refused}" if refused else ""


def _flat(transform: Any) -> Iterator[Any]:
    """Yield a transform, and those that it is composed of."""
    yield transform
    for inner in getattr(transform, "transforms", None) or ():
        yield from _flat(inner)


def _is_untouched(value: Any, names: Sequence[str]) -> bool:
    """Return whether methods are those of Ultralytics or of this package, in all its classes and in the object."""
    places = [vars(value), *map(vars, type(value).__mro__)]  # a method of this package may call one of its class
    found = [place[name] for place in places for name in names if name in place]
    return all(module_of(method).startswith(("ultralytics.", "yolov12.", "torch.")) for method in found)


class _Recipes:
    """Makes samples with a `Recipe` in the place of their image, from the known transforms of a data set."""

    def __init__(self, dataset: Any) -> None:
        self._dataset, self._renderer = dataset, Renderer()
        self._first, *rest = dataset.transforms.transforms
        mixup, self._cutmix, _, self._colors, *self._flips, self._format = rest
        self._mixup = copy.copy(mixup)
        self._mixup.pre_transform = self._before_mixing

    def sample(self, index: int) -> Any:
        """Return a sample. Its image is a `Recipe`, or a tensor if it is of a kind that is not known."""
        labels = self._dataset.get_image_and_label(index)
        if not _is_plain(labels["img"]) or any(key in labels for key in _OTHERS):
            return self._dataset.transforms(labels)
        labels = self._mix(self._mixup, self._before_mixing(labels), self._blend)
        labels = self._mix(self._cutmix, labels, self._cut)
        gains = self._gains(labels["img"].shape[2])
        flips = {"vertical": False, "horizontal": False}
        for flip in self._flips:
            params = flip.get_params(labels)
            flips[params["direction"]] ^= params["flip"]
            labels = _finish(flip, labels, params)
        params = self._format.get_params(labels)
        height, width, channels = labels["img"].shape
        labels["img"] = Recipe(
            _image_of(labels),
            (channels, height, width),
            gains,
            flips["vertical"],
            flips["horizontal"],
            swaps_channels=random.uniform(0, 1) > self._format.bgr and channels == 3,
        )
        return labels if formatted(self._format, labels, params) else _finish(self._format, labels, params)

    def _before_mixing(self, labels: Any) -> Any:
        """Apply mosaic, copy-paste and the warp."""
        from ultralytics.data.augment import CopyPaste, Mosaic

        for transform in self._first.transforms:
            if isinstance(transform, Mosaic):
                labels = self._mix(transform, labels, self._join)
            elif isinstance(transform, CopyPaste):
                if len(labels["instances"].segments) and transform.p:
                    labels = transform(self._with_pixels(labels))
            else:
                labels = self._warp(transform, labels)
        return labels

    def _mix(self, transform: Any, labels: Any, apply: Callable[[Any, Any, Any], bool]) -> Any:
        """Apply a transform that mixes images with a probability.

        Args:
            transform: The transform.
            labels: Labels of the first image.
            apply: Applies it to the image, and returns True if it has changed the labels as well.
        """
        if random.uniform(0, 1) > transform.p:
            return labels
        params = transform.get_params(labels)
        if not apply(transform, labels, params):
            labels = _finish(transform, labels, params)
        labels.pop("mix_labels", None)
        return labels

    def _join(self, mosaic: Any, labels: Any, params: Any) -> bool:
        """Join the images of a mosaic, and their labels."""
        layout, side = params["layout"], mosaic.imgsz * 2
        images = [part["labels_patch"]["img"] for part in layout]
        if not all(_is_plain(image) and image.shape[2] == images[0].shape[2] for image in images):
            mosaic.apply_image(labels, params)
            return False
        places = [(part["x1a"], part["y1a"], part["x2a"], part["y2a"]) for part in layout]
        first, second, third, fourth = (
            Tile(image, part["x1b"], part["y1b"], place)
            for image, part, place in zip(images, layout, places, strict=True)
        )
        _stand_for(labels, Canvas(side, places[0][2:], (first, second, third, fourth)), side, side)
        return joined(labels, layout, side)

    def _warp(self, affine: Any, labels: Any) -> Any:
        params = affine.get_params(labels)
        if _is_plain(labels["img"]):
            width, height = params["size"]
            warp = Warp(_image_of(labels), params["M"], (width, height), bool(affine.perspective))
            _stand_for(labels, warp, width, height)
            labels["resized_shape"] = (height, width)
        else:
            affine.apply_image(labels, params)
        return _finish(affine, labels, params)

    def _blend(self, mixup: Any, labels: Any, params: Any) -> bool:
        other = params["mix_labels"][0]
        height, width, channels = labels["img"].shape
        if _is_plain(other["img"]) and other["img"].shape[2] == channels:
            _stand_for(labels, Blend(_image_of(labels), _image_of(other), params["r"]), width, height)
        else:
            self._with_pixels(other)
            mixup.apply_image(self._with_pixels(labels), params)
        return False

    def _cut(self, cutmix: Any, labels: Any, params: Any) -> bool:
        cutmix.apply_image(self._with_pixels(labels), params)
        return False

    def _gains(self, channels: int) -> tuple[float, ...] | None:
        """Draw the change of colours."""
        most = [self._colors.hgain, self._colors.sgain, self._colors.vgain]
        if channels != 3 or not any(most):
            return None
        return tuple((np.random.uniform(-1, 1, 3) * most).tolist())  # noqa: NPY002 - Ultralytics draws from it

    def _with_pixels(self, labels: Any) -> Any:
        """Give labels the image that their empty image stands for."""
        if _IMAGE in labels:
            labels["img"] = self._renderer.rendered(labels.pop(_IMAGE))
        return labels


def _is_plain(image: Any) -> bool:
    """Return whether an image is an array of 8-bit integers, (height, width, channels), with one or three channels."""
    return image.dtype == np.uint8 and image.ndim == 3 and image.shape[2] in (1, 3)


def _finish(transform: Any, labels: Any, params: Any) -> Any:
    """Let a transform do what is left after its change of the image."""
    labels = transform.apply_instances(labels, params)
    labels = transform.apply_semantic(labels, params)
    return transform.apply_depth(labels, params)


def _image_of(labels: Any) -> Any:
    """Return the image that the empty image of labels stands for, or their image."""
    return labels.pop(_IMAGE) if _IMAGE in labels else labels["img"]


def _stand_for(labels: Any, image: Image | Canvas, width: int, height: int) -> None:
    """Give labels an empty image that stands for another one."""
    labels[_IMAGE] = image
    labels["img"] = _empty((height, width, labels["img"].shape[2]))


@functools.lru_cache(maxsize=8)
def _empty(shape: tuple[int, int, int]) -> Array:
    return np.broadcast_to(np.zeros(1, np.uint8), shape)
