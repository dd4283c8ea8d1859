"""The JSON file of a benchmark: how it was made, on which machine, and its figures."""

from __future__ import annotations

import argparse
import datetime
import json
import math
import os
import platform
import subprocess
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from benchmarks.common.processes import ROOT


def parser(doc: str | None, *, parts: Iterable[str] = (), small: str = "") -> argparse.ArgumentParser:
    """Return a parser of the options that benchmarks have in common.

    Args:
        doc: Docstring of the benchmark.
        parts: Names of its parts, for `--only`.
        small: What `--small` does; with it, `--device` is an option, too.
    """
    made = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    made.add_argument("--out", type=Path, required=True, help="JSON file to write")
    if parts := list(parts):
        help_ = "parts to run; the file keeps its other parts"
        made.add_argument("--only", nargs="+", choices=parts, default=parts, help=help_)
    if small:
        made.add_argument("--small", action="store_true", help=f"{small}, to try the benchmark")
        made.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    return made


def machine(device: str = "cuda") -> dict[str, Any]:
    """Describe this machine, its software and the commit.

    Args:
        device: `cpu` for a measurement that needs no GPU.
    """
    import torch
    import ultralytics

    from yolov12.mas.memory.cgroups import usable_cores

    cores = usable_cores()  # `taskset` may give the others to another measurement
    gpus = torch.cuda.device_count() if device != "cpu" else 0
    return {
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "device": torch.cuda.get_device_name() if gpus else f"{cores} CPU cores",
        "gpus": gpus,
        "cores": cores,
        "python": platform.python_version(),
        "torch": torch.__version__,
        "ultralytics": ultralytics.__version__,
        "commit": commit(),
    }


def commit(folder: Path | None = None) -> str | None:
    """Return the commit, with `-dirty` after it if files differ; BENCHMARKS_COMMIT names that of a copy without git.

    Args:
        folder: Another checkout, for which the result is None if it is without git.
    """
    command = ["git", "-C", str(folder or ROOT), "describe", "--always", "--dirty", "--abbrev=7"]
    try:
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return os.environ.get("BENCHMARKS_COMMIT") if folder is None else None


def command(words: Iterable[str]) -> str:
    """Return a command line without the paths of this machine.

    Args:
        words: `sys.argv`, whose first word is the file of a script if it was started directly.
    """
    first, *rest = words
    first = f"python benchmarks/{Path(first).name}" if first.endswith(".py") else first
    return " ".join([first, *(Path(word).name if "/" in word else word for word in rest)])


def write(out: Path, content: Mapping[str, Any]) -> None:
    """Write a JSON file in such a way that no reader sees half of it.

    Args:
        out: The file.
        content: Its content.

    Raises:
        ValueError: A figure is infinite or not a number. A file that exists stays as it is.
    """
    if places := list(_not_finite(content)):
        raise ValueError(f"{out.name} is not written: " + ", ".join(places))
    unfinished = out.with_suffix(".new")
    unfinished.write_text(json.dumps(content, indent=1) + "\n")
    unfinished.replace(out)


def _not_finite(content: Any, place: str = "") -> Iterator[str]:
    if isinstance(content, float) and not math.isfinite(content):
        yield f"{place} is {content}"
    elif isinstance(content, Mapping):
        for key, value in content.items():
            yield from _not_finite(value, f"{place}.{key}" if place else str(key))
    elif isinstance(content, list | tuple):
        for index, value in enumerate(content):
            yield from _not_finite(value, f"{place}[{index}]")


class Report(dict[str, Any]):
    """Content of the JSON file.

    Args:
        out: The file.
        device: `cpu` for a measurement that needs no GPU.
        keep: True to keep the parts that the file has already.
        more: Further fields of the head.
    """

    def __init__(self, out: Path, device: str = "cuda", *, keep: bool = False, **more: Any) -> None:
        super().__init__(json.loads(out.read_text()) if keep and out.exists() else {})
        self._out, self._device = out.absolute(), device
        self |= {"command": command(sys.argv), **machine(device), **more}

    def add(self, part: str, found: Any, **more: Any) -> None:
        """Write a part, with its command and the machine that it was measured on.

        Args:
            part: Name of the part.
            found: Its content.
            more: Further fields of the description of the machine.

        Raises:
            ValueError: A figure of the part is infinite or not a number. The report and its file stay as they are.
        """
        head = {"command": self["command"], **machine(self._device), **more}
        content = {**self, part: found, "measured_on": {**self.get("measured_on", {}), part: head}}
        write(self._out, content)
        self |= content

    def write(self) -> None:
        """Write the whole file."""
        write(self._out, self)
