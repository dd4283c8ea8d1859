"""Reads what is installed and where it came from: the image, the lock, and the packages that need a GPU."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import json
import os
import re
from importlib import metadata
from pathlib import Path

from yolov12.check.host_info import installed_version
from yolov12.check.report import GpuPackage, Image, Lock

__all__ = ["IMAGE_FILE", "pinned", "read_gpu_packages", "read_image", "read_lock"]

IMAGE_FILE = Path("/etc/yolov12-image.json")
"""Description of the image, written by docker/verify.py when the image is built."""
DIGEST = "YOLOV12_IMAGE_DIGEST"
_REQUIREMENTS = Path(__file__).parents[2] / "requirements"
_MODULES = {"flash-attn": "flash_attn", "tensorrt": "tensorrt"}


def read_image(file: Path = IMAGE_FILE) -> Image | None:
    """Read the description of the image that this process runs in.

    Args:
        file: The description.

    Returns:
        The description and the digest, or None if there is no such file.
    """
    if not file.exists():
        return None
    return Image(digest=os.environ.get(DIGEST) or None, **json.loads(file.read_text("utf-8")))


def pinned(file: Path) -> dict[str, str]:
    """Read the pinned distributions of a requirements file.

    Args:
        file: A requirements file with lines such as `numpy==1.26.4`.

    Returns:
        Distribution → version, for those that apply to this Python and platform.
    """
    from packaging.requirements import Requirement

    lines = re.findall(r"^[\w.-]+==[^\\\n]+", file.read_text("utf-8"), re.MULTILINE)
    found = [Requirement(line.strip()) for line in lines]
    return {each.name: str(each.specifier)[2:] for each in found if each.marker is None or each.marker.evaluate()}


def read_lock(folder: Path = _REQUIREMENTS) -> Lock | None:
    """Find the lock that the installed distributions match best.

    Args:
        folder: Folder with the locks.

    Returns:
        The lock with the fewest differing distributions, or None if the folder has no lock.
    """
    found = [_compare(file) for name in ("lock", "current") if (file := folder / f"{name}.txt").exists()]
    return min(found, key=lambda lock: len(lock.differing), default=None)


def read_gpu_packages() -> tuple[GpuPackage, ...]:
    """Read the versions of flash-attn and TensorRT, and import each package that is installed.

    Returns:
        Both packages, also if they are not installed.
    """
    return tuple(_read_gpu_package(name, module) for name, module in _MODULES.items())


def _read_gpu_package(name: str, module: str) -> GpuPackage:
    if importlib.util.find_spec(module) is None:
        return GpuPackage(name, None, None)
    try:
        version = str(importlib.import_module(module).__version__)
    except Exception as error:  # such as ImportError of a CUDA library, or what the package's own checks raise
        return GpuPackage(name, installed_version(name) or "unknown", f"{type(error).__name__}: {error}")
    return GpuPackage(name, version, None)


def _compare(file: Path) -> Lock:
    wanted = pinned(file)
    installed = {name: _version(name) for name in wanted}
    if installed.get("opencv-python", "") is None:  # scripts/env.sh replaces it on a server
        installed["opencv-python"] = _version("opencv-python-headless")
    return Lock(
        name=file.stem,
        sha256=hashlib.sha256(file.read_bytes()).hexdigest(),
        locked=len(wanted),
        differing={name: has for name, has in installed.items() if (has or "").partition("+")[0] != wanted[name]},
    )


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None
