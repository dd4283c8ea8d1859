"""Import hook that joins this package to Ultralytics, whichever program imports Ultralytics.

A `.pth` file in site-packages calls `install()` when the interpreter starts. `install()` puts a finder at the beginning
of `sys.meta_path`. Ultralytics' modules are loaded as usual. After the code of such a module has run, the hook applies
the seams of this module, which `yolov12.seams` lists. The seams are therefore active after `from ultralytics import
YOLO`, in the `yolo` command, and in processes that Ultralytics starts.

If `YOLOV12_AUTOPATCH=0` is set before Ultralytics is imported, Ultralytics stays unpatched. `from yolov12 import YOLO`
applies the seams in any case.

Every Python process of the environment runs this module, so it imports only modules that are always loaded.
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
_MARK = "yolov12_joins"  # attribute of an `exec_module` that joins modules


class _Finder:
    """Finder that asks the finders after it for Ultralytics' modules. It changes their loaders to join the modules.

    One of these finders may itself ask all finders, including this one. The search would then never end. So this finder
    returns None if the same thread is already searching for the same module.
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
            self.stands_aside = _is_switched_off()  # decided once, so that either all modules are joined or none
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
        """Return the finders after this one. Those before it were asked already, or are asking this one now."""
        finders = list(sys.meta_path)
        return finders[finders.index(self) + 1 :] if self in finders else finders


class _Loader:
    """Wrapper of a loader whose attribute `exec_module` cannot be set."""

    def __init__(self, loader: "Any", exec_module: "Callable[[ModuleType], None]") -> None:
        self._loader, self.exec_module = loader, exec_module

    def __getattr__(self, name: str) -> "Any":
        return getattr(self._loader, name)


def _join_after_exec(spec: "ModuleSpec") -> None:
    execute = getattr(spec.loader, "exec_module", None)
    if execute is None or hasattr(execute, _MARK):  # one loader may load many modules, and is changed once
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
    """Give a user without a home folders for caches, and install the import hook unless `YOLOV12_AUTOPATCH=0`."""
    from yolov12 import caches

    caches.use_private_folder()
    if not _is_switched_off():
        _watch()


def apply() -> None:
    """Join all modules of Ultralytics, now or when they are imported, even if `YOLOV12_AUTOPATCH=0`.

    The variable is removed from the environment, so Ultralytics is joined in child processes as well. This is needed,
    because Ultralytics passes them arguments that only this package knows.
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
