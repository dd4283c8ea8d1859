"""Checks at the start of a watch that need the model and the data set."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from yolov12.errors import ConfigError, plain
from yolov12.watch.samples import TASKS

__all__ = ["check"]


def check(request: Mapping[str, Any]) -> int:
    """Check the model, the data set and the training arguments, and print what they say as one line of JSON.

    The line has `data`, the path of the data set yaml; `names`, its class names by id; `known`, those of the model;
    `task`; and `folders`, where its images are.

    Args:
        request: `model`, `data`, and `training`, the words for the training.

    Returns:
        The exit status 0.

    Raises:
        ConfigError: An argument is not valid.
        DataError: The data set cannot be used.
        WeightsError: The model cannot be used.
    """
    with contextlib.redirect_stdout(sys.stderr):
        found = _check(request["model"], request["data"], request["training"])
    print(json.dumps(found))
    return 0


def _check(model: str, data: str, words: list[str]) -> dict[str, Any]:
    from ultralytics import YOLO
    from ultralytics.cfg import check_cfg
    from ultralytics.data.utils import check_det_dataset
    from ultralytics.utils import DEFAULT_CFG_DICT, SETTINGS

    from yolov12 import cli, demo
    from yolov12.mas.config import Config
    from yolov12.training.run.options import Interval, check_data_arguments
    from yolov12.training.run.preflight import check_training_arguments

    options = cli.parse(words)
    try:
        check_cfg(options)
    except (TypeError, ValueError) as error:
        raise ConfigError(plain(error)) from error
    everything = {**DEFAULT_CFG_DICT, **options, "data": data, "replay": data}
    Config.check(everything)
    Interval.parse(everything["save_every"])
    check_data_arguments(everything)
    yolo = YOLO(model)
    if yolo.task not in TASKS:
        raise ConfigError(f"model={model} is for the task {yolo.task}; watch knows {', '.join(TASKS)}")
    check_training_arguments(everything, yolo.task)
    yaml = demo.ensure(data, Path(SETTINGS["datasets_dir"])) if demo.is_demo(data) else data
    found = check_det_dataset(yaml)
    names = [str(found["names"][index]) for index in range(len(found["names"]))]
    folders = [path for split in ("train", "val") for path in _listed(found.get(split))]
    return {
        "data": str(Path(found["yaml_file"]).resolve()),
        "names": names,
        "known": [str(name) for name in yolo.names.values()],
        "task": yolo.task,
        "folders": folders,
    }


def _listed(paths: Any) -> list[str]:
    return [str(Path(path).resolve()) for path in (paths if isinstance(paths, list) else [paths] if paths else [])]
