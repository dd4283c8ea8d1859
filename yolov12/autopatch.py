"""Teaches Ultralytics about this package the moment it is imported, whoever imports it.

A `.pth` file in site-packages runs `install()` at interpreter start. That puts a finder in front of `sys.meta_path`
which lets Ultralytics load as always and, after each of its modules has run, applies the seams declared for it in
`yolov12.seams`. So `from ultralytics import YOLO`, the `yolo` command and the processes Ultralytics spawns all get
them. `YOLOV12_AUTOPATCH=0`, set before Ultralytics is imported, keeps it stock; `from yolov12 import YOLO` asks for the
seams and gets them.

This module runs in every Python process of the environment: it may import nothing but what is loaded anyway.
"""

import os
import sys
from _thread import get_ident

TYPE_CHECKING = False
if TYPE_CHECKING:
    from collections.abc import Callable, Sequence
    from importlib.machinery import ModuleSpec
    from types import ModuleType
    from typing import Any

__all__ = ["apply", "install"]

_UPSTREAM = "ultralytics"
_SWITCH = "YOLOV12_AUTOPATCH"
_MARK = "yolov12_joins"  # of a loader's `exec_module`


class _Finder:
    """Finds Ultralytics' modules through the finders behind it, so that they are joined when they have run.

    Other finders may do the same, and ask this one on their way: it answers each search of a thread once.
    """

    def __init__(self) -> None:
        self.stands_aside = False
        self._searches: set[tuple[int, str]] = set()

    def find_spec(
        self, name: str, path: "Sequence[str] | None" = None, target: "ModuleType | None" = None
    ) -> "ModuleSpec | None":
        if name.partition(".")[0] != _UPSTREAM:
            return None
        if name == _UPSTREAM and name not in sys.modules:
            self.stands_aside = _is_switched_off()  # decided once: half of Ultralytics joined would be neither
        search = get_ident(), name
        if self.stands_aside or search in self._searches:
            return None
        self._searches.add(search)
        try:
            for finder in self._behind():
                find = getattr(finder, "find_spec", None)
                spec: ModuleSpec | None = find and find(name, path, target)
                if spec is not None:
                    _join_after_exec(spec)
                    return spec
        finally:
            self._searches.discard(search)
        return None

    def _behind(self) -> "list[Any]":
        """Finders that come after this one; those before it have had their turn, or are asking."""
        finders = list(sys.meta_path)
        return finders[finders.index(self) + 1 :] if self in finders else finders


class _Loader:
    """Stands in for a loader that lets none of its attributes be set."""

    def __init__(self, loader: "Any", exec_module: "Callable[[ModuleType], None]") -> None:
        self._loader, self.exec_module = loader, exec_module

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)


def _join_after_exec(spec: "ModuleSpec") -> None:
    execute = getattr(spec.loader, "exec_module", None)
    if execute is None or hasattr(execute, _MARK):  # a loader may serve for many modules
        return

    def exec_and_join(module: "ModuleType") -> None:
        if module.__name__.partition(".")[0] != _UPSTREAM:
            execute(module)
            return
        from yolov12 import seams

        with seams.running(module):
            execute(module)

    setattr(exec_and_join, _MARK, True)
    try:
        spec.loader.exec_module = exec_and_join  # type: ignore[union-attr, method-assign]
    except (AttributeError, TypeError):
        spec.loader = _Loader(spec.loader, exec_and_join)  # type: ignore[assignment]


def install() -> None:
    """Watch for Ultralytics being imported, unless `YOLOV12_AUTOPATCH=0`."""
    if not _is_switched_off():
        _watch()


def apply() -> None:
    """Join Ultralytics whatever the environment says: what was imported already, and what will be.

    Processes started from here are joined too: Ultralytics hands them arguments that only this package knows.
    """
    os.environ.pop(_SWITCH, None)
    _watch()
    if _UPSTREAM in sys.modules:
        from yolov12 import seams

        seams.join_loaded(wait=True)


def _is_switched_off() -> bool:
    return os.environ.get(_SWITCH, "").lower() in ("0", "false", "no", "off")


def _watch() -> None:
    for finder in sys.meta_path:
        if isinstance(finder, _Finder):
            finder.stands_aside = False
            return
    sys.meta_path.insert(0, _Finder())
