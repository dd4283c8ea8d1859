"""Folders for caches and settings of a user whose home cannot be written to.

A container that runs as another user than root often has `HOME=/`, and a read-only image has no writable home at all.
matplotlib and Ultralytics would then warn or use a new folder in each process, and Triton would fail when it compiles
the first kernel. The `.pth` file calls this module in every Python process of the environment, so `python`, `yolo` and
`torchrun` need no script and no entrypoint around them.
"""

import os
import stat

__all__ = ["FOLDERS", "use_private_folder"]

FOLDERS = {
    "MPLCONFIGDIR": "matplotlib",
    "TORCHINDUCTOR_CACHE_DIR": "inductor",
    "TRITON_CACHE_DIR": "triton",
    "XDG_CACHE_HOME": "cache",
    "YOLO_CONFIG_DIR": "ultralytics",
}
"""Environment variable → folder inside the private one."""


def use_private_folder() -> None:
    """Set the variables of `FOLDERS` that are not set, if the home cannot be written to.

    They name folders in `.yolov12-UID`, which only this user can read. It is in TMPDIR, /tmp or the current folder. If
    it can be made nowhere, no variable is set.
    """
    names = [name for name in FOLDERS if not os.environ.get(name)]
    if os.name != "posix" or not names or os.access(os.path.expanduser("~"), os.W_OK):  # noqa: PTH111
        return
    for parent in (os.environ.get("TMPDIR"), "/tmp", os.curdir):
        if parent and _is_private(folder := os.path.abspath(f"{parent}/.yolov12-{os.getuid()}")):  # noqa: PTH100
            os.environ.update({name: f"{folder}/{FOLDERS[name]}" for name in names})
            return


def _is_private(folder: str) -> bool:
    """Make a folder if needed. Return whether it belongs to this user alone: others could put code into a cache."""
    try:
        os.mkdir(folder, 0o700)  # noqa: PTH102
    except FileExistsError:
        pass
    except OSError:
        return False
    found = os.lstat(folder)
    return stat.S_ISDIR(found.st_mode) and found.st_uid == os.getuid() and not found.st_mode & 0o077
