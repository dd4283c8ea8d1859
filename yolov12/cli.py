"""`yolov12 train|val|predict|export|plan|watch|monitor|check key=value ...`: the grammar of Ultralytics' `yolo`.

Missing arguments have defaults. `train` without arguments teaches the weights that come with this package two new
classes. `val`, `predict` and `export` without `model=` use the weights that were trained last. `yolov12 COMMAND --help`
lists the arguments of a command; `check` also has `--json`. `yolov12 --version` prints the versions of this package,
Ultralytics and PyTorch.

Exit status: 0 on success, 1 after a failure, 2 if an argument, the data set or the weights cannot be used. Every error
is one line on stderr that says what to do. `YOLOV12_TRACEBACK=1` shows the traceback instead.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from difflib import get_close_matches
from importlib import import_module, metadata
from pathlib import Path
from typing import Any

from yolov12 import __version__, autopatch
from yolov12.cfg import reference
from yolov12.cli_errors import disk_errors, refusals
from yolov12.errors import (
    ConfigError,
    DataError,
    FolderInUseError,
    MissingWeightsError,
    WeightsError,
    YOLOv12Error,
    plain,
)
from yolov12.printable import printable

__all__ = ["ENVIRONMENT", "EXIT_STATUSES", "OWN_ARGUMENTS", "USER_ERRORS", "failed", "main"]

EXIT_STATUSES: Mapping[int, str] = {
    0: "Success. For `check`: training can work. For `plan`: every model fits.",
    1: "Failure, after which another attempt may succeed. The last line on stderr says what happened and what to do. "
    "For `check`: training cannot work. For `plan`: a model does not fit. In a distributed training, every process "
    "that ends because another one failed has this status too.",
    2: "An argument is unknown or not valid, or the data set or the weights cannot be used. No step was trained, and "
    "another attempt ends in the same way.",
    130: "SIGINT, which Ctrl-C sends. A training has saved its state; `resume=auto` continues it.",
    143: "SIGTERM, which `docker stop` and Kubernetes send. A training has saved its state, as after SIGINT.",
}
"""Exit status of `yolov12` → its meaning."""

ENVIRONMENT: Mapping[str, str] = {
    "YOLOV12_AUTOPATCH": "`0` leaves Ultralytics as it is when it is imported. `from yolov12 import YOLO` and the "
    "command `yolov12` use this package anyway.",
    "YOLOV12_TRUST_WEIGHTS": "`1` loads weight files without the check of what they contain. Loading such a file can "
    "run any code.",
    "YOLOV12_TRUST_DATA": "`1` runs the code in the `download:` of a data set yaml, and reads `*.cache` files of data "
    "sets as Ultralytics does. Both can run any code.",
    "YOLOV12_TRACEBACK": "`1` shows the traceback of an error instead of one line.",
    "YOLOV12_LOCK": "`lock` or `current`: the lock that the scripts make an environment of, and `scripts/image.sh` "
    "an image. Without it, the scripts take `current` only if every Python is too new for `lock`.",
    "YOLOV12_REQUIRE": "Parts that a machine must have for `scripts/smoke.sh`, of `gpu`, `flash-attn` and `tensorrt`, "
    "with commas between them. If one is missing, no test runs, and the status is not 0.",
    "YOLOV12_IMAGE": "Tag of the image that `scripts/image.sh` builds and tests. The default is `yolov12`.",
    "YOLOV12_IMAGE_DIGEST": "Digest of the image, for the report of `yolov12 check`: an image does not know its own.",
}
"""Environment variable → its effect."""

OWN_ARGUMENTS = ("check", "monitor", "plan", "watch")
"""Commands whose arguments are not those of Ultralytics. Each is a package with `main`."""

# Ultralytics mostly uses these types for what the user can fix. An error of any other type shows its traceback.
USER_ERRORS = (YOLOv12Error, OSError, ValueError, TypeError, SyntaxError, RuntimeError, AssertionError)

_ANOTHER_MODEL = "Check the path, or use the name of a model, as in yolov12s.yaml"


def main(args: list[str] | None = None) -> int:
    """Run one command line.

    Args:
        args: The words after `yolov12`. None stands for the arguments of this process.

    Returns:
        The exit status: 0, 1 or 2.

    Raises:
        KeyboardInterrupt: The command was interrupted.
    """
    verb, *words = (sys.argv[1:] if args is None else args) or ["help"]
    verb = verb.lstrip("-")
    wants_help = bool({"help", "-h", "--help"} & set(words))
    if wants_help and verb in reference.COMMANDS:
        print(reference.help_text(verb))
        return 0
    if verb in ("version", "V"):
        print(_versions())
        return 0
    if verb in ("help", "h") or (verb not in OWN_ARGUMENTS and wants_help):
        print(__doc__)
        return 0
    try:
        if verb in ("check", "monitor", "watch"):
            command = import_module(f"yolov12.{verb}")
            if wants_help:
                print(command.__doc__)
                return 0
            return int(command.main(words))
        if verb == "plan":
            autopatch.apply()
            from yolov12 import plan

            with refusals(missing=_ANOTHER_MODEL):
                return plan.main(words)
        if verb not in VERBS:
            raise ConfigError(f"unknown command '{verb}'. Commands: {', '.join([*VERBS, *OWN_ARGUMENTS])}")
        _use_every_core()
        autopatch.apply()
        options = parse(words)
        if options.pop("mode", verb) != verb:
            raise ConfigError(f"mode= contradicts the command, which is {verb}")
        VERBS[verb]({**reference.DEFAULTS.get(verb, {}), **options})
    except USER_ERRORS as error:
        return failed(error)
    except KeyboardInterrupt:
        if os.environ.get("YOLOV12_TRACEBACK") != "1":
            print("yolov12: interrupted", file=sys.stderr)
            _hide_interruptions()
        raise
    return 0


def _hide_interruptions() -> None:
    """Print no traceback of a KeyboardInterrupt. Python then ends the process by SIGINT, as shells expect."""
    others = sys.excepthook
    sys.excepthook = lambda kind, *error: None if issubclass(kind, KeyboardInterrupt) else others(kind, *error)


def failed(error: Exception) -> int:
    """Print an error as one line on stderr, or raise it again if the user wants a traceback. Returns the status."""
    if os.environ.get("YOLOV12_TRACEBACK") == "1":
        raise error
    hint = "" if isinstance(error, YOLOv12Error) else " (YOLOV12_TRACEBACK=1 shows where)"
    message = " ".join(plain(error).split())  # messages of Ultralytics may have several lines
    print(f"yolov12: error: {message}{hint}", file=sys.stderr)
    return _status(error)


def _status(error: BaseException) -> int:
    """Return 2 for an error that another attempt meets again, else 1."""
    cause = error.__cause__
    is_transient = isinstance(cause, OSError) and not isinstance(cause, FileNotFoundError)  # such as a download
    if is_transient or isinstance(error, FolderInUseError):
        return 1
    return 2 if isinstance(error, (ConfigError, DataError, WeightsError)) else 1


def _versions() -> str:
    """Return the versions that an issue report needs. Nothing is imported, so they are there at once."""
    names = [name for name in ("ultralytics", "torch") if any(metadata.distributions(name=name))]
    return ", ".join([f"yolov12 {__version__}", *(f"{name} {metadata.version(name)}" for name in names)])


def _use_every_core() -> None:
    # Ultralytics starts with one thread and leaves the other cores to its data workers. Training on the CPU has no data
    # workers, so the other cores would be idle.
    import torch

    if not torch.cuda.is_available():
        os.environ.setdefault("OMP_NUM_THREADS", str(torch.get_num_threads()))


def parse(words: list[str]) -> dict[str, Any]:
    """Parse `key=value` words with the grammar of Ultralytics' `yolo`.

    Args:
        words: The words after the command.

    Returns:
        Argument name → value. A task such as `detect` is stored under `task`.

    Raises:
        ConfigError: A word is not an argument, has no value, or names an unknown argument.
    """
    from ultralytics.cfg import TASKS, _handle_deprecation, merge_equals_args, parse_key_value_pair
    from ultralytics.utils import DEFAULT_CFG_DICT

    options: dict[str, Any] = {}
    for word in merge_equals_args(words):
        word = word.lstrip("-").rstrip(",")
        if "=" in word:
            try:
                key, value = parse_key_value_pair(word)
            except AssertionError:
                raise ConfigError(f"'{word}' has no value, as in epochs=100") from None
            if key == "cfg" and value:
                options = {**_from_file(value), **options}
            else:
                options[key] = value
        elif word in TASKS:
            options["task"] = word
        elif isinstance(DEFAULT_CFG_DICT.get(word), bool) or word in ("half", "int8", "nms", "resume"):
            options[word] = True
        else:
            raise ConfigError(f"'{word}' is not an argument. Arguments are key=value, as in epochs=100")
    options = _handle_deprecation(options)
    for key in options.keys() - DEFAULT_CFG_DICT.keys() - {"save_dir"}:
        near = get_close_matches(key, DEFAULT_CFG_DICT.keys() - {"mode"}, n=1)  # the command is the mode
        raise ConfigError(f"unknown argument '{key}'" + (f". Did you mean '{near[0]}'?" if near else ""))
    return options


def _from_file(file: str) -> dict[str, Any]:
    from ultralytics.utils import YAML
    from ultralytics.utils.checks import check_yaml

    with refusals():
        found = YAML.load(check_yaml(file))
    # A copy of Ultralytics' defaults lists every key. An empty value means: not set. The command replaces `mode`.
    return {k: v for k, v in found.items() if v is not None and k not in ("cfg", "mode")}


def _train(options: dict[str, Any]) -> None:
    from ultralytics.utils import RANK

    from yolov12.demo import first_run
    from yolov12.training.run import outcome

    resume = options.get("resume")
    if resume and str(resume).lower() != "auto":
        if resume is True:
            options["resume"] = options.get("model") or _last_trained("last.pt")
        options["model"] = options["resume"]
    has_data, given = bool(options.get("data")), dict(options)
    is_detection = options.get("task") in (None, "detect")  # a weight file would hide another task
    model = _model(options, default=first_run.MODEL if is_detection and not has_data else "yolov12n.yaml")
    is_first_run = not has_data and not _resumes(options, model.task)
    if is_first_run:
        options = {**first_run.arguments(model, given), **options}
    log = first_run.without_frozen_parameters() if is_first_run else nullcontext()
    began = refusals(lambda: hasattr(model.trainer, "train_time_start"))  # set before the first step
    with log, began, disk_errors(model):
        model.train(**options)
    trainer = model.trainer
    if RANK > 0:
        return
    best = Path(trainer.best)
    steps = first_run.next_steps(best) if is_first_run else ()
    print("\n" + outcome.describe(Path(trainer.save_dir), best, Path(trainer.csv), steps))


def _resumes(options: dict[str, Any], task: str) -> bool:
    """Return whether a training goes on with a run, which has its own data and arguments."""
    from yolov12.training.run.resume import latest_interrupted

    resume = options.get("resume")
    if str(resume).lower() != "auto":
        return bool(resume)
    return latest_interrupted(options, task, quiet=True) is not None  # the training looks again, and warns


def _check_batch(options: dict[str, Any]) -> None:
    # Ultralytics would divide by zero, or run no images.
    batch = options.get("batch")
    if isinstance(batch, (int, float)) and batch <= 0:
        raise ConfigError(f"batch={batch}: give a number of images, as in 16")


def _val(options: dict[str, Any]) -> None:
    _check_batch(options)
    with refusals():
        _model(options).val(**options)


def _predict(options: dict[str, Any]) -> None:
    _check_batch(options)
    model = _model(options)
    if "source" not in options:
        options["source"] = _validation_images(model)
    with refusals():
        for _ in model.predict(stream=True, **options):  # a stream: the results of a long video would fill memory
            pass


def _export(options: dict[str, Any]) -> None:
    _check_batch(options)
    with refusals():
        _model(options).export(**options)


VERBS: dict[str, Callable[[dict[str, Any]], None]] = {
    "train": _train,
    "val": _val,
    "predict": _predict,
    "export": _export,
}


def _model(options: dict[str, Any], default: str | None = None) -> Any:
    from yolov12 import YOLO

    name = options.pop("model", None) or default or _last_trained("best.pt")
    task = options.pop("task", None)
    with refusals(missing=_ANOTHER_MODEL):
        try:
            return YOLO(name, task=task)
        except KeyError as error:
            if not str(name).endswith((".yaml", ".yml")):
                raise
            kind = f"a {task} model" if task else "a model"
            raise ConfigError(f"model={name}: this yaml has no {error}, so it does not describe {kind}") from error


def _last_trained(name: str) -> str:
    from ultralytics.utils import SETTINGS

    found = Path(SETTINGS["runs_dir"]).glob(f"**/weights/{name}")
    last = max(found, key=lambda file: file.stat().st_mtime, default=None)
    if last is None:
        raise MissingWeightsError(f"no model= given, and nothing trained yet in {SETTINGS['runs_dir']}. Train first")
    print(f"model={last} (trained last)")
    return str(last)


def _validation_images(model: Any) -> str:
    from ultralytics.data.utils import check_det_dataset

    data = model.overrides.get("data")
    if not data:
        raise ConfigError("source= is missing: a file, a folder, a video or a camera number")
    images: str = check_det_dataset(data)["val"]
    print(f"source={printable(str(images))} (the validation images this model was trained with)")
    return images


if __name__ == "__main__":
    sys.exit(main())
