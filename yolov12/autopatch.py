"""Teaches Ultralytics about this package the moment it is imported, whoever imports it.

A `.pth` file in site-packages runs `install()` at interpreter start. That puts a finder in front of `sys.meta_path`
which lets Ultralytics load as always and, after each of its modules has run, applies the seams declared for it in
`yolov12.seams`. So `from ultralytics import YOLO`, the `yolo` command and the processes Ultralytics spawns all get
them. `YOLOV12_AUTOPATCH=0` keeps an environment stock; `from yolov12 import YOLO` asks for the seams and gets them.

This module runs in every Python process of the environment: it may import nothing but what is loaded anyway.
"""

import os
import sys

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType

__all__ = ["apply", "install"]

_UPSTREAM = "ultralytics"


class _Finder:
    """Finds Ultralytics' modules through the other finders and adds our seams after they have run."""

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name.partition(".")[0] != _UPSTREAM:
            return None
        for finder in sys.meta_path:
            if finder is self or (find := getattr(finder, "find_spec", None)) is None:
                continue
            spec: ModuleSpec | None = find(name, path, target)
            if spec is not None:
                _join_after_exec(spec)
                return spec
        return None


def _join_after_exec(spec: "ModuleSpec") -> None:
    loader = spec.loader
    if loader is None:
        return
    exec_module = loader.exec_module

    def exec_and_join(module: "ModuleType") -> None:
        exec_module(module)
        from yolov12 import seams

        seams.forget(module)
        seams.join(module)

    loader.exec_module = exec_and_join  # type: ignore[method-assign]


def install() -> None:
    """Watch for Ultralytics being imported, unless `YOLOV12_AUTOPATCH=0`."""
    if os.environ.get("YOLOV12_AUTOPATCH") != "0":
        _watch()


def apply() -> None:
    """Join Ultralytics whatever the environment says: what was imported already, and what will be.

    Processes started from here are joined too: Ultralytics hands them arguments that only we know.
    """
    os.environ.pop("YOLOV12_AUTOPATCH", None)
    _watch()
    if _UPSTREAM in sys.modules:
        from yolov12 import seams

        for name in seams.SEAMS:
            if name in sys.modules:
                seams.join(sys.modules[name])


def _watch() -> None:
    if not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())
