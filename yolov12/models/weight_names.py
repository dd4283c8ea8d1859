"""Finds the file of a weight name: a path, a file in Ultralytics' weights folder or this package, or a download."""

from __future__ import annotations

import tempfile
from pathlib import Path

from yolov12.errors import MissingWeightsError

_RELEASES = "https://github.com/sunsmarterjie/yolov12/releases/download"

OFFICIAL = {f"yolov12{scale}.pt": f"{_RELEASES}/turbo/yolov12{scale}.pt" for scale in "nsmlx"} | {
    f"yolov12{scale}-v1.pt": f"{_RELEASES}/v1.0/yolov12{scale}.pt" for scale in "nsmlx"
}
"""Weight name → address of the official file. Both releases use the same file names, so v1.0 has a suffix here."""


DEMO = "yolov12n-demo.pt"
"""Name of the weights that come with this package, see benchmarks/demo_model.py."""

_PACKAGED = Path(__file__).parents[1] / "demo"


def add_official(stems: frozenset[str]) -> frozenset[str]:
    """Add the official weight files and those of this package to the names that Ultralytics completes with `.pt`."""
    return stems | {name.removesuffix(".pt") for name in (*OFFICIAL, DEMO)}


def is_packaged(file: str | Path) -> bool:
    """Return whether a weight file is in the folder of this package, to which users may not write.

    Args:
        file: Its path.
    """
    return Path(file).absolute().parent == _PACKAGED.absolute()


def resolve(name: str | Path) -> str:
    """Find a weight file. Official files and those of Ultralytics are downloaded if needed.

    Args:
        name: A path, `DEMO`, or the name of official weights such as `yolov12s.pt`.

    Returns:
        The path of the file.

    Raises:
        MissingWeightsError: The file does not exist, or the download failed. After a failed download, the message gives
            the address and the path to save the file to.
    """
    from ultralytics.utils import SETTINGS

    given = str(name).strip().strip("'")  # as Ultralytics does, for names with quotes from a shell
    weights_dir = Path(SETTINGS["weights_dir"])
    for file in (Path(given), weights_dir / given):
        if file.is_file():
            return str(file)
    if given == DEMO:
        return str(_PACKAGED / DEMO)
    if given in OFFICIAL:
        return _download(OFFICIAL[given], weights_dir / given)
    return _upstream(given)


def _download(url: str, target: Path) -> str:
    from ultralytics.utils.downloads import safe_download

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # A temporary folder, so that an incomplete file never has the final name.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            part = safe_download(url, file=target.name, dir=folder, unzip=False, min_bytes=1e5)
            Path(part).replace(target)
    except Exception as e:
        raise MissingWeightsError(
            f"{target.name} is not in {target.parent} and could not be downloaded ({_line(e)}). "
            f"Download {url} by hand and save it as {target}."
        ) from e
    return str(target)


def _upstream(given: str) -> str:
    from ultralytics.utils import checks, downloads

    asset = Path(checks.check_yolov5u_filename(given.replace("'", ""), verbose=False)).name
    # For other names Ultralytics would ask GitHub for its releases, which takes minutes without a network.
    if asset in downloads.GITHUB_ASSETS_NAMES or given.lower().startswith(("http:/", "https:/")):
        # Ultralytics' errors are not replaced: its mixed-precision check catches them if it is offline.
        found: str = downloads.attempt_download_asset(given)
        if Path(found).is_file():
            return found
    raise MissingWeightsError(
        f"{given} does not exist (folder: {Path.cwd()}). Check the path, or use an official name such as yolov12s.pt."
    )


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
