"""From the name of a weight file to a file: as given, in Ultralytics' weights folder, or from the official releases."""

from __future__ import annotations

import tempfile
from pathlib import Path

from yolov12.errors import WeightsError

_RELEASES = "https://github.com/sunsmarterjie/yolov12/releases/download"

OFFICIAL = {f"yolov12{scale}.pt": f"{_RELEASES}/turbo/yolov12{scale}.pt" for scale in "nsmlx"} | {
    f"yolov12{scale}-v1.pt": f"{_RELEASES}/v1.0/yolov12{scale}.pt" for scale in "nsmlx"
}
"""Address of each official weight file, by our name for it. Both releases use the same names, so v1.0 gets a suffix."""


def add_official(stems: frozenset[str]) -> frozenset[str]:
    """Add the official weight files to the names that Ultralytics completes with `.pt`."""
    return stems | {name.removesuffix(".pt") for name in OFFICIAL}


def resolve(name: str | Path) -> str:
    """Find the weight file `name` stands for, downloading it if it is an official or an Ultralytics one.

    Raises:
        WeightsError: There is no such file, or the download failed; names the address and where to put the file.
    """
    from ultralytics.utils import SETTINGS

    given = str(name).strip().strip("'")  # as upstream, for names that come through a shell
    weights_dir = Path(SETTINGS["weights_dir"])
    for file in (Path(given), weights_dir / given):
        if file.is_file():
            return str(file)
    if given in OFFICIAL:
        return _download(OFFICIAL[given], weights_dir / given)
    return _upstream(given)


def _download(url: str, target: Path) -> str:
    from ultralytics.utils.downloads import safe_download

    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        # In a folder of its own, which goes whatever happens: half a file must never stand under the final name.
        with tempfile.TemporaryDirectory(dir=target.parent, prefix=".download-") as folder:
            part = safe_download(url, file=target.name, dir=folder, unzip=False, min_bytes=1e5)
            Path(part).replace(target)
    except Exception as e:
        raise WeightsError(
            f"{target.name} is not in {target.parent} and could not be downloaded ({_line(e)}). "
            f"Download {url} by hand and save it as {target}."
        ) from e
    return str(target)


def _upstream(given: str) -> str:
    from ultralytics.utils import checks, downloads

    asset = Path(checks.check_yolov5u_filename(given.replace("'", ""), verbose=False)).name
    # For other names upstream would ask GitHub for a list of its releases, minutes where there is no network.
    if asset in downloads.GITHUB_ASSETS_NAMES or given.lower().startswith(("http:/", "https:/")):
        # Its errors stay its own: the mixed-precision check of training expects them when it is offline.
        found: str = downloads.attempt_download_asset(given)
        if Path(found).is_file():
            return found
    raise WeightsError(
        f"{given} does not exist (here: {Path.cwd()}). Check the path, or use an official name such as yolov12s.pt."
    )


def _line(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"{type(error).__name__}: {text[0]}" if text else type(error).__name__
