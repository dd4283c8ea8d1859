"""Checks the packages of the image: the locked versions, torch 2.3 for CUDA 12.1, and imports of GPU packages.

python docker/verify.py [requirements/gpu.txt]
"""

import importlib
import re
import sys
from importlib import metadata
from pathlib import Path

LOCK = Path(__file__).parents[1] / "requirements" / "lock.txt"
MODULES = {"flash-attn": "flash_attn", "tensorrt-cu12": "tensorrt"}


def pinned(file: Path) -> dict[str, str]:
    """Read the pinned distributions of a requirements file.

    Args:
        file: A requirements file with lines such as `numpy==1.26.4`.

    Returns:
        Distribution → version, for those that apply to this Python and platform.
    """
    from packaging.requirements import Requirement

    lines = re.findall(r"^[\w.-]+==[^\\\n]+", file.read_text(), re.MULTILINE)
    found = [Requirement(line.strip()) for line in lines]
    return {each.name: str(each.specifier)[2:] for each in found if each.marker is None or each.marker.evaluate()}


def main(files: list[str]) -> None:
    """Check the installed distributions.

    Args:
        files: Requirements files to check in addition to the lock. The modules that they install are also imported.

    Raises:
        AssertionError: A version differs.
    """
    import torch

    for file in [LOCK, *map(Path, files)]:
        wrong = {name: metadata.version(name) for name, wanted in pinned(file).items() if _base(name) != wanted}
        assert not wrong, f"not as {file.name} says: {wrong}"
    assert torch.__version__.startswith("2.3."), torch.__version__
    assert torch.version.cuda == "12.1", torch.version.cuda
    for name in (name for file in files for name in pinned(Path(file))):
        importlib.import_module(MODULES.get(name, name))
    print(f"verified: {len(pinned(LOCK))} locked distributions, torch {torch.__version__}, {files or 'no GPU extras'}")


def _base(name: str) -> str:
    return metadata.version(name).partition("+")[0]


if __name__ == "__main__":
    main(sys.argv[1:])
