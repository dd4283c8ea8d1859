"""Checks the packages of the image and writes down what it was built from, for `yolov12 check`.

python docker/verify.py

Reads the build arguments of the Dockerfile from the environment.
"""

import json
import os
from importlib import metadata
from pathlib import Path

from yolov12.check.installation import IMAGE_FILE, pinned, read_gpu_packages, read_lock

ROOT = Path(__file__).parents[1]


def main() -> None:
    """Check the installed distributions, and write the description of the image.

    Raises:
        AssertionError: A version differs, or a package cannot be imported.
    """
    import torch

    argument = os.environ.get
    lock = read_lock()
    assert lock, "requirements/ has no lock"
    assert lock.name == argument("LOCK"), f"the packages are those of {lock.name}.txt, not of {argument('LOCK')}.txt"
    assert not lock.differing, f"not as {lock.name}.txt says: {lock.differing}"
    if lock.name == "lock":
        assert torch.__version__.startswith("2.3."), torch.__version__
        assert torch.version.cuda == "12.1", torch.version.cuda
    if gpu := argument("GPU_REQUIREMENTS"):
        wanted = pinned(ROOT / gpu)
        wrong = {name: metadata.version(name) for name in wanted if metadata.version(name) != wanted[name]}
        assert not wrong, f"not as {gpu} says: {wrong}"
        broken = [package for package in read_gpu_packages() if not package.works]
        assert not broken, broken
    image = {
        "version": argument("VERSION", ""),
        "revision": argument("REVISION", ""),
        "source": argument("SOURCE", ""),
        "bases": {name: argument(name, "") for name in ("CUDA_DEVEL", "CUDA_RUNTIME", "CONDA")},
        "flash_attn": argument("FLASH_ATTN", "") if gpu else "none",
    }
    IMAGE_FILE.write_text(json.dumps(image, indent=2) + "\n", "utf-8")
    packages = gpu or "no GPU packages"
    print(f"verified: {lock.locked} distributions of {lock.name}.txt, torch {torch.__version__}, {packages}")


if __name__ == "__main__":
    main()
