"""The `download:` of a data set yaml: an address to download from, or code that downloads the data set."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from yolov12.errors import UntrustedDataError
from yolov12.untrusted import TRUST_DATA, is_set

__all__ = ["check_det_dataset", "find_yaml"]

_ARCHIVES = (".zip", ".tar", ".gz", ".tgz", ".xz", ".bz2", ".txz", ".tbz2")


def check_det_dataset(
    stock: Callable[..., Any], /, dataset: Any, autodownload: bool = True, split: str = ""
) -> dict[str, Any]:
    """Run Ultralytics' `check_det_dataset`, but run the code of a data set yaml only if it is trusted.

    A yaml that is the same, byte for byte, as one of the installed Ultralytics is trusted as that package is.

    Args:
        stock: Ultralytics' own function.
        dataset: Name, path or address of a data set yaml or of an archive with one.
        autodownload: False to never download the data set.
        split: A part of the data set that must be there, or empty.

    Returns:
        Description of the data set.

    Raises:
        UntrustedDataError: Images are missing, and the yaml has code to get them, which was not run.
    """
    if not autodownload or is_set(TRUST_DATA):
        return stock(dataset, autodownload, split)  # type: ignore[no-any-return]
    try:
        return stock(dataset, False, split)  # type: ignore[no-any-return]
    except FileNotFoundError as error:
        file = find_yaml(str(dataset)) if "missing path" in str(error) else None
        download = _download_of(file) if file else None
        if not file or not download:
            raise
        if not _is_address(download) and not _is_from_ultralytics(file):
            missing = str(error).strip().splitlines()[0]
            kind = "a shell command" if download.startswith("bash ") else "Python code"
            raise UntrustedDataError(
                f"{missing}. The 'download:' of {file} is {kind}, which was not run: "
                f"{' '.join(download.split())!r:.200}. Read it, and set {TRUST_DATA}=1 if you trust its author; or get "
                "the data set yourself."
            ) from error
    return stock(str(file), True, split)  # type: ignore[no-any-return]  # the file that was looked at, and no other


def find_yaml(dataset: str) -> Path | None:
    """Find the yaml of a data set as Ultralytics does.

    Args:
        dataset: Name, path or address of a data set yaml or of an archive with one.

    Returns:
        The yaml. None if there is none, or for an archive, from whose yaml Ultralytics downloads nothing.
    """
    from ultralytics.data.utils import find_dataset_yaml
    from ultralytics.utils.checks import check_file

    names = [dataset]
    if "://" not in dataset and not Path(dataset).exists() and Path(dataset).suffix not in (".yaml", ".yml"):
        names = [f"{dataset}.yaml", f"{dataset}.yml", dataset]
    found = next((path for name in names if (path := check_file(name, hard=False))), None)
    if found is None:
        return None
    file = find_dataset_yaml(Path(found)) if Path(found).is_dir() else Path(found)
    return file if file.suffix.lower() in (".yaml", ".yml") else None


def _download_of(file: Path) -> str | None:
    from ultralytics.utils import YAML

    download = YAML.load(file).get("download")
    return download if isinstance(download, str) else None


def _is_address(download: str) -> bool:
    """Return whether Ultralytics downloads from here, and does not run it."""
    from ultralytics.utils import clean_url

    return download.lower().startswith("http") and str(clean_url(download)).lower().endswith(_ARCHIVES)


def _is_from_ultralytics(file: Path) -> bool:
    from ultralytics.utils import ROOT

    original = Path(ROOT) / "cfg" / "datasets" / file.name
    return original.is_file() and original.read_bytes() == file.read_bytes()
