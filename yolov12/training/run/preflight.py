"""Checks of training arguments that need no model and no run folder, so that wrong ones leave nothing behind."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from yolov12 import demo
from yolov12.errors import ArgumentTypeError, ConfigError, DataError, MissingImagesError, UntrustedDataError, plain
from yolov12.training.classes.names import check_rename, listed, match, renamed
from yolov12.untrusted.download import find_yaml

__all__ = ["check_keypoints", "check_training_arguments"]

_REPLAYED = ("detect", "segment", "pose", "obb")


def check_training_arguments(arguments: Mapping[str, Any], task: str, known: Mapping[int, str] | None = None) -> None:
    """Check training arguments before anything is written.

    Args:
        arguments: Argument name → value that the user has set. Missing names have Ultralytics' defaults.
        task: Ultralytics' task name, such as `detect`.
        known: Class id → name of the model; None if they are not known.

    Raises:
        ConfigError: The device does not exist, the image size or the batch is not valid, the task cannot replay, or
            `rename` names a class that does not exist.
        DataError: A data set is missing, malformed, of another task, or has no images.
    """
    if (device := arguments.get("device")) is not None:
        _check_device(device)
    _check_image_size(arguments.get("imgsz", 640))
    batch = arguments.get("batch")
    if isinstance(batch, float) and batch >= 1:
        raise ConfigError(f"batch={batch}: give a number of images, as in 16, or a fraction of the memory below 1")
    if isinstance(batch, (int, float)) and batch <= 0 and batch != -1:  # Ultralytics takes 0 and -2 for -1
        raise ConfigError(f"batch={batch}: give a number of images, as in 16, or -1 for Ultralytics' AutoBatch")
    data = arguments.get("data")
    replay, val_split = arguments.get("replay"), arguments.get("split") or "val"
    if replay is not None and task not in _REPLAYED:
        raise ConfigError(f"replay={replay}: a {task} training cannot replay, only {', '.join(_REPLAYED)}")
    if isinstance(data, (str, Path)) and task != "classify":
        names = _check_data("data", str(data), ("train", val_split), task)
        rename, old = arguments.get("rename"), known
        if replay is not None:
            old = _check_data("replay", str(replay), ("train",), task, optional=val_split)
            if not arguments.get("single_cls"):
                _check_names(names, old and renamed(old, rename), replay)
        if rename and names and old and known:
            check_rename(rename, [*known.values(), *old.values()], names.values())


def _check_device(device: Any) -> None:
    import torch
    from ultralytics.utils.torch_utils import parse_device

    wanted = [] if "-1" in str(device) else parse_device(device).split(",")  # -1 asks Ultralytics to choose
    missing = [index for index in wanted if index.isdigit() and int(index) >= torch.cuda.device_count()]
    if missing:
        count = torch.cuda.device_count()
        there = f"only {count} GPU{'s are' if count > 1 else ' is'}" if count else "no GPU is"
        raise ConfigError(
            f"device={device}: {there} visible to PyTorch. `yolov12 check` says why; device=cpu trains without a GPU"
        )


def _check_image_size(imgsz: Any) -> None:
    from ultralytics.utils.checks import check_imgsz

    if not isinstance(imgsz, (int, str, list, tuple)):
        raise ArgumentTypeError(f"imgsz={imgsz} is not an image size. Give pixels, as in imgsz=640")
    try:
        # Up to three numbers are accepted: the trainer reduces them to one, with a warning.
        sizes = check_imgsz(imgsz, stride=1, min_dim=2, max_dim=3)
    except (TypeError, ValueError):
        sizes = []
    if not sizes or imgsz in (0, "0") or "-" in str(imgsz):
        raise ConfigError(f"imgsz={imgsz} is not an image size. Give pixels, as in imgsz=640")


def _check_data(
    key: str, data: str, splits: Sequence[str], task: str, optional: str | None = None
) -> Mapping[int, str] | None:
    """Check the data set of an argument, and return its class names; None if they are not known yet.

    Args:
        key: Name of the argument.
        data: Its value.
        splits: Parts of the data set that need images.
        task: Ultralytics' task name.
        optional: Part of the data set that needs images if the yaml names any.
    """
    from ultralytics.data.utils import check_det_dataset

    if demo.is_demo(data):
        names = demo.parse(data, key).names
        _check_task(key, data, {}, task)
        return dict(enumerate(names))
    if "://" in data or data.endswith(".ndjson"):
        return None  # Ultralytics downloads the data set, and then checks it
    try:
        found = check_det_dataset(data, split=splits[-1])
    except UntrustedDataError:
        raise
    except FileNotFoundError as error:
        found_yaml = find_yaml(data) or (data if Path(data).exists() else None)  # the second is an archive with a yaml
        reason = f"{key}={data}: {_first_line(error)}"
        if found_yaml is None:
            raise DataError(f"{reason}. Give the path of a data set yaml, or {key}=demo") from error
        raise DataError(f"{reason}. Correct 'path:' and the splits in {found_yaml}") from error
    except Exception as error:  # Ultralytics, too, makes one error of whatever is wrong with a data set
        reason = " ".join(plain(error).split()) or type(error).__name__  # the second line may name what is missing
        raise DataError(f"{key}={data}: {reason.rstrip('.')}") from error
    _check_task(key, data, found, task)
    for split in (*splits, *([optional] if optional and found.get(optional) else ())):
        sources = found[split] if isinstance(found[split], list) else [found[split]]
        if not all(sources):
            raise DataError(f"{key}={data}: '{split}:' names no images")
        try:
            has_images = _has_images(sources)
        except (OSError, UnicodeError) as error:  # Ultralytics, too, makes an error of files that are not there
            raise MissingImagesError(
                f"{key}={data}: a list of images for '{split}' in {', '.join(sources)} cannot be read "
                f"({_first_line(error)}). It has to be text in UTF-8, with one path per line"
            ) from error
        if not has_images:
            way_out = f". Leave '{split}:' empty to do without them" if split == optional else ""
            raise MissingImagesError(f"{key}={data}: no images for '{split}' in {', '.join(sources)}{way_out}")
    return found["names"]  # type: ignore[no-any-return]


def check_keypoints(data: Mapping[str, Any], model: Any) -> None:
    """Check that a model finds the keypoints that a data set has labels for.

    Args:
        data: Data set, as Ultralytics has read it from its yaml.
        model: Model to validate. One without keypoints passes.

    Raises:
        DataError: They have other keypoints.
    """
    of_model, of_data = getattr(model, "kpt_shape", None), data.get("kpt_shape")
    if of_model and of_data and list(of_model) != list(of_data):
        raise DataError(
            f"data={data.get('yaml_file', '')}: it has keypoints of kpt_shape={list(of_data)}, and the model finds "
            f"those of {list(of_model)}: validate a model that was trained on these keypoints"
        )


def _check_names(names: Mapping[int, str] | None, old: Mapping[int, str] | None, replay: Any) -> None:
    if names is not None and old is not None and match(old, names).count(None) == len(names):
        from ultralytics.utils import LOGGER

        LOGGER.warning(
            f"replay={replay}: it has no class of data= by name, so its images are background: "
            f"{listed(old.values())} against {listed(names.values())}"
        )


def _check_task(key: str, data: str, found: Mapping[str, Any], task: str) -> None:
    # Ultralytics finds labels without polygons by itself when it reads them. Here it would raise a KeyError.
    if task == "pose" and "kpt_shape" not in found:
        raise DataError(
            f"{key}={data}: task=pose needs keypoints, and this data set has no 'kpt_shape:', as in [17, 3]"
        )


def _first_line(error: Exception) -> str:
    lines = plain(error).strip().splitlines()
    return lines[0].rstrip(".") if lines else type(error).__name__


def _has_images(sources: Iterable[str]) -> bool:
    from ultralytics.data.utils import IMG_FORMATS

    for source in sources:
        if Path(source).is_file():  # a list of paths, one per line
            names: Iterable[str] = Path(source).read_text(encoding="utf-8-sig").splitlines()
        else:
            # Path.rglob would not follow linked folders.
            names = glob.iglob(f"{glob.escape(source)}/**/*.*", recursive=True)  # noqa: PTH207
        if any(name.strip().rpartition(".")[2].lower() in IMG_FORMATS for name in names):
            return True
    return False
