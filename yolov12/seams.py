"""The seams: a table of all places in which this package changes Ultralytics, and the code that changes them.

A row names a place (an attribute of an Ultralytics module or class) and a function of ours. In an `around` row, our
function is called instead of Ultralytics' own, which is its first argument. Our function is imported at the first call.
In a `changed` row, our function is called once. It gets Ultralytics' value and returns the new value.

To join a module means to change all of its places. This is done whenever the code of the module has run (see
autopatch.py). Joined modules and new functions carry a mark, so that no place is changed twice.
"""

from __future__ import annotations

import functools
import importlib
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from types import ModuleType
from typing import Any

from yolov12.errors import SeamError

__all__ = ["PINNED", "SEAMS", "Seam", "find", "join", "join_loaded", "running"]

PINNED = "8.4.190"
"""Ultralytics release that these seams are made for and tested with."""

_MODULE_MARK = "__yolov12_joined__"  # attribute of a module: False while its code runs, True when it is joined
_MARK = "__yolov12_seam__"  # attribute of a function that replaces a function of Ultralytics


@dataclass(frozen=True)
class Seam:
    """One row of the table."""

    reference: str
    """Function of this package, as `module:name` below `yolov12`."""
    once: bool = False  # True if the function is called when the module is joined, not when the place is called

    def target(self) -> Callable[..., Any]:
        """Import and return the function."""
        module, _, name = self.reference.partition(":")
        return getattr(importlib.import_module(f"yolov12.{module}"), name)  # type: ignore[no-any-return]

    def replace(self, stock: Any) -> Any:
        """Return the replacement of Ultralytics' function or value."""
        if self.once:
            return self.target()(stock)

        @functools.wraps(stock)  # sets module and name as well: pickle stores a function by these
        def wrapper(*args: Any, **kwargs: Any) -> Any:
            return self.target()(stock, *args, **kwargs)

        return wrapper


around, changed = Seam, functools.partial(Seam, once=True)

SEAMS: Mapping[str, Mapping[str, Seam]] = {
    "ultralytics.utils": dict.fromkeys(("DEFAULT_CFG_DICT", "DEFAULT_CFG"), changed("cfg.arguments:add_arguments")),
    "ultralytics.utils.torch_utils": {"strip_optimizer": around("models.weights:strip_optimizer")},
    "ultralytics.utils.plotting": {"plot_images": around("training.data.host:plot_fewer_images")},
    "ultralytics.utils.downloads": {"GITHUB_ASSETS_STEMS": changed("models.weight_names:add_official")},
    "ultralytics.utils.export.engine": {"get_tensorrt_logger": around("export.seams:get_tensorrt_logger")},
    "ultralytics.cfg": {
        "CFG_BOOL_KEYS": changed("cfg.arguments:add_switches"),
        "get_cfg": around("demo.on_demand:get_cfg"),
        "get_save_dir": around("training.run.process_group:one_folder"),
    },
    "ultralytics.data.base": {"BaseDataset.check_cache_ram": around("training.data.host:cache_fits")},
    "ultralytics.nn.modules.block": {
        "AAttn.__init__": changed("models.layouts:attention_init"),
        "AAttn.forward": changed("models.layouts:attention_forward"),
        "A2C2f.__init__": changed("models.layouts:a2c2f_init"),
    },
    "ultralytics.nn.tasks": {
        "parse_model": around("models.layouts:parse_model"),
        "yaml_model_load": around("models.layouts:yaml_model_load"),
        "torch_safe_load": around("models.weights:torch_safe_load"),
        "BaseModel.__call__": changed("training.model_call:model_call"),
    },
    "ultralytics.nn.backends.tensorrt": {"TensorRTBackend.load_model": around("export.seams:load_model")},
    "ultralytics.engine.model": {
        "Model.train": around("training.run.session:train"),
        "Model.save": around("models.weights:save"),
    },
    "ultralytics.engine.trainer": {
        "BaseTrainer.__init__": around("training.run.setup:make"),
        "BaseTrainer.train": around("training.run.setup:train"),
        "BaseTrainer.check_resume": around("training.run.session:check_resume"),
        "BaseTrainer.resume_training": around("training.run.setup:resume_training"),
        "BaseTrainer._do_train": around("training.adapter.attach:do_train"),
        "BaseTrainer._setup_train": around("training.run.setup:setup_train"),
        "BaseTrainer._setup_ddp": around("training.run.process_group:setup_group"),
        "BaseTrainer._build_train_pipeline": around("training.run.setup:build_loaders"),
    },
    "ultralytics.engine.validator": {"BaseValidator.__call__": around("training.seams:validate")},
    "ultralytics.engine.predictor": {"BasePredictor.inference": around("training.seams:inference")},
    "ultralytics.engine.exporter": {
        "Exporter.__call__": around("export.seams:export"),
        "Exporter.export_onnx": around("export.session:export_onnx"),
        "Exporter.export_engine": around("export.seams:export_engine"),
    },
}
"""Ultralytics module → place (attribute, or `Class.attribute`) → row."""

_lock = threading.RLock()


def join(module: ModuleType) -> None:
    """Join one Ultralytics module, unless it is joined already.

    Raises:
        SeamError: The installed Ultralytics does not have one of the places. The message names it.
    """
    name = module.__name__
    with _lock:
        if vars(module).get(_MODULE_MARK):
            return
        if name == "ultralytics.utils" and module.__version__ != PINNED:
            module.LOGGER.warning(
                f"yolov12 is made for ultralytics {PINNED}, but {module.__version__} is installed: "
                f"install ultralytics=={PINNED}, or set YOLOV12_AUTOPATCH=0 to use Ultralytics unpatched"
            )
        for path, row in SEAMS.get(name, {}).items():
            _replace(module, path, row)
        setattr(module, _MODULE_MARK, True)


def join_loaded(wait: bool = False) -> None:
    """Join modules whose import was not seen, because the import hook came later or another hook loaded them.

    Args:
        wait: True to wait for modules that another thread is importing.
    """
    for name in SEAMS:
        if wait and name in sys.modules:
            importlib.import_module(name)
        module = sys.modules.get(name)
        if module is not None and not _is_running(module):
            join(module)


@contextmanager
def running(module: ModuleType) -> Iterator[None]:
    """Return a context for running the code of a module, for the first time or again. At its end, join the module."""
    setattr(module, _MODULE_MARK, False)
    try:
        yield
    except BaseException:
        vars(module).pop(_MODULE_MARK, None)
        raise
    join(module)
    join_loaded()


def find(module: ModuleType, path: str) -> tuple[Any, str]:
    """Return the module or class that a place is in, and the name of the attribute.

    Raises:
        SeamError: There is no such place.
    """
    *parents, attribute = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent, None)
    if not hasattr(owner, attribute):
        raise SeamError(
            f"ultralytics has no {module.__name__}.{path}, which yolov12 patches: install ultralytics=={PINNED}, "
            "or set YOLOV12_AUTOPATCH=0 to use Ultralytics unpatched"
        )
    return owner, attribute


def _is_running(module: ModuleType) -> bool:
    return vars(module).get(_MODULE_MARK) is False or getattr(module.__spec__, "_initializing", False)


def _replace(module: ModuleType, path: str, row: Seam) -> None:
    owner, attribute = find(module, path)
    old = getattr(owner, attribute)
    if getattr(old, _MARK, False):
        return
    new = row.replace(old)
    if callable(new):
        setattr(new, _MARK, True)
    setattr(owner, attribute, new)
    if owner is module and new is not old:
        _rebind(old, new)


def _rebind(old: Any, new: Any) -> None:
    # If `apply()` is called after `import ultralytics`, other modules have imported the old value by its name.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ultralytics":
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
