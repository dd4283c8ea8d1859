"""Texts about arguments: what `yolov12 train --help` prints, and docs/reference/arguments.md.

Both are made from the table of this package's arguments (`arguments.py`) and from the file with Ultralytics' own
defaults. Ultralytics itself is not imported, so help is there at once.
"""

from __future__ import annotations

import importlib.util
import re
import textwrap
from collections.abc import Iterable, Iterator, Mapping
from importlib import metadata
from pathlib import Path
from typing import Any

from yolov12.cfg.arguments import ARGUMENTS, DATA, ENGINE, EXPORT, RUN, Argument

__all__ = ["COMMANDS", "DEFAULTS", "arguments_page", "help_text", "ultralytics_arguments"]

COMMANDS: Mapping[str, str] = {
    "train": "Train a model. Without data= and model=, teach the weights of this package two classes.",
    "val": "Validate a model. Without model=, validate the weights that were trained last, on their own data.",
    "predict": "Run a model on images or videos. Without source=, on the validation images of its training.",
    "export": "Export a model. Without format=, to ONNX.",
}
"""Command → what it does."""

_GROUPS: Mapping[str, str] = {
    ENGINE: "Memory-aware engine",
    DATA: "Images and replay",
    RUN: "Runs",
    EXPORT: "Exported models",
}
_WIDTH = 100

_MORE_VALUES: Mapping[str, tuple[tuple[str, ...], str]] = {
    "data=demo": (
        ("train",),
        "Train on the embedded data set, which is drawn on first use; demo:images=2000,seed=1,imgsz=640 draws another.",
    ),
    "model=yolov12s.yaml": (
        ("train", "val", "predict", "export"),
        "Build YOLOv12 in the turbo layout, scales n, s, m, l and x; yolov12s-v1.yaml is the layout of the paper. "
        "yolov12s.pt and yolov12s-v1.pt are the official weights.",
    ),
    "resume=auto": (
        ("train",),
        "Continue the run of this project and name that was interrupted last, or start a new one if there is none.",
    ),
}
"""Value that an argument of Ultralytics has here in addition → commands that read it, and its effect."""

# Which sections of Ultralytics' file, and which further arguments, each command lists.
_SECTIONS: Mapping[str, tuple[tuple[str, ...], tuple[str, ...]]] = {
    "train": (("Train", "Hyperparameters", "Val/Test"), ()),
    "val": (("Val/Test", "Visualize"), ("rect", "augment", "agnostic_nms", "classes", "single_cls")),
    "predict": (("Predict", "Visualize"), ("conf", "iou", "max_det", "quantize", "dnn", "save", "channels_last")),
    "export": (("Export",), ("quantize", "nms", "fraction", "split")),
}
_FOR_ALL = ("model", "data", "imgsz", "batch", "device", "workers", "project", "name", "exist_ok", "verbose", "cfg")
"""Arguments of Ultralytics that most commands read; its file has them among those of training."""

DEFAULTS: Mapping[str, Mapping[str, Any]] = {"predict": {"save": True}, "export": {"format": "onnx"}}
"""Command → values of Ultralytics' arguments that the command line gives in place of its defaults."""


def help_text(command: str) -> str:
    """Return what `yolov12 COMMAND --help` prints.

    Args:
        command: A key of `COMMANDS`.
    """
    lines = [f"usage: yolov12 {command} key=value ...", "", COMMANDS[command]]
    for group, title in _GROUPS.items():
        arguments = [each for each in ARGUMENTS if each.group == group and command in each.commands]
        if arguments:
            lines += ["", title]
            for each in arguments:
                lines += [f"  {each.name}={each.default}", *_wrapped(each.help, 6), *_wrapped(f"[{each.values}]", 6)]
    lines += ["", "More values for arguments of Ultralytics"]
    for value, (commands, effect) in _MORE_VALUES.items():
        lines += [f"  {value}", *_wrapped(effect, 6)] if command in commands else []
    lines += ["", f"Arguments of Ultralytics {metadata.version('ultralytics')}, with their defaults"]
    lines += _wrapped(" ".join(f"{name}={default}" for name, default in _of_command(command)), 2)
    lines += ["", "Their meaning: https://docs.ultralytics.com/usage/cfg"]
    return "\n".join(lines)


def arguments_page() -> str:
    """Return docs/reference/arguments.md without the part about `yolov12 plan` and `yolov12 check`."""
    lines = [
        "# Arguments",
        "",
        "Every argument is written `key=value` on the command line and `key=value` in a call of `model.train(...)`. "
        "Bytes are written with a unit: `16GiB` is 16 × 2^30 bytes, `16GB` is 16 × 10^9.",
    ]
    for group, title in _GROUPS.items():
        lines += ["", f"## {title}", ""]
        lines += ["| argument | default | values | effect | commands |", "|---|---|---|---|---|"]
        lines += [_row(each) for each in ARGUMENTS if each.group == group]
    lines += [
        "",
        "A resumed run keeps `bn_group` and `recipe` of its first start. The other arguments above may change, and "
        "`mas` may be switched on.",
        "",
        "## Arguments of Ultralytics",
        "",
        f"All arguments of Ultralytics {metadata.version('ultralytics')} work as they do there. Some have more values:",
        "",
        "| value | effect | commands |",
        "|---|---|---|",
        *(f"| `{value}` | {effect} | {_code(commands)} |" for value, (commands, effect) in _MORE_VALUES.items()),
        "",
        "On the command line of `yolov12`, these defaults differ:",
        "",
        *(f"- `yolov12 {command}`: {told}" for command, told in COMMANDS.items()),
        "- With `data=` and without `model=`, a training begins with `model=yolov12n.yaml`.",
        "",
        "These are Ultralytics' names and defaults. [It explains them](https://docs.ultralytics.com/usage/cfg).",
        "",
    ]
    for title, names in ultralytics_arguments().items():
        lines.append(f"- **{title}**: " + ", ".join(f"`{name}={default}`" for name, default in names.items()))
    return "\n".join([*lines, ""])


def ultralytics_arguments() -> dict[str, dict[str, Any]]:
    """Read the arguments of the installed Ultralytics: section of its file → argument name → default.

    Raises:
        ImportError: Ultralytics is not installed.
    """
    import yaml

    found = importlib.util.find_spec("ultralytics")
    if found is None or not found.submodule_search_locations:
        raise ImportError("Ultralytics is not installed")
    text = Path(found.submodule_search_locations[0], "cfg", "default.yaml").read_text("utf-8")
    defaults = yaml.safe_load(text)
    section, sections = "General", dict[str, dict[str, Any]]()
    for line in text.splitlines():
        if heading := re.match(r"# (.+?) (settings )?-{5,}", line):
            section = heading[1].replace(" config.yaml", " file")
        elif name := re.match(r"(\w+):", line):
            sections.setdefault(section, {})[name[1]] = defaults[name[1]]
    return sections


def _of_command(command: str) -> Iterator[tuple[str, Any]]:
    sections = ultralytics_arguments()
    everything = {name: default for names in sections.values() for name, default in names.items()}
    titles, more = _SECTIONS[command]
    names = dict.fromkeys([*_FOR_ALL, *(name for title in titles for name in sections[title]), *more])
    found = {**everything, **DEFAULTS.get(command, {})}
    return ((name, found[name]) for name in names)


def _row(argument: Argument) -> str:
    words = argument.name, argument.default, argument.values, argument.help, _code(argument.commands)
    return "| `{}` | `{}` | {} | {} | {} |".format(*words)


def _code(words: Iterable[str]) -> str:
    return ", ".join(f"`{word}`" for word in words)


def _wrapped(text: str, indent: int) -> list[str]:
    space = " " * indent
    options = {"break_long_words": False, "break_on_hyphens": False}
    return textwrap.wrap(text, _WIDTH, initial_indent=space, subsequent_indent=space, **options)  # type: ignore[arg-type]
