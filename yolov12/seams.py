"""Every place where Ultralytics is joined, in one table, and the one function that joins it.

A seam is a name in an Ultralytics module and a function that turns what stands there into what should. Nothing here
imports Ultralytics: `join` is called with each of its modules right after that module has run (see autopatch.py).
"""

from __future__ import annotations

import functools
import inspect
import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from logging import LogRecord
from types import ModuleType
from typing import Any

from yolov12.errors import SeamError

__all__ = ["PINNED", "SEAMS", "forget", "join"]

PINNED = "8.4.190"
"""The Ultralytics release these seams are made for and tested with."""

_JOINED = "__yolov12_joined__"


def _arguments() -> Mapping[str, Any]:
    """Arguments this package adds, with their defaults."""
    from yolov12.export import options as export
    from yolov12.mas.config import DEFAULTS
    from yolov12.training.run import options as training

    return {**training.OPTIONS, **DEFAULTS, **export.OPTIONS}


def _add_arguments(defaults: Any) -> Any:
    (defaults if isinstance(defaults, dict) else vars(defaults)).update(_arguments())
    return defaults


def _add_switches(keys: frozenset[str]) -> frozenset[str]:
    return keys | {name for name, default in _arguments().items() if isinstance(default, bool)}


def _draw_demo_data(get_cfg: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_cfg)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from yolov12 import demo

        cfg = get_cfg(*args, **kwargs)
        if demo.is_demo(getattr(cfg, "data", None)):
            from pathlib import Path

            from ultralytics.utils import SETTINGS

            cfg.data = str(demo.ensure(cfg.data, Path(SETTINGS["datasets_dir"])))
        return cfg

    return wrapper


def _build_layout(parse_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(parse_model)
    def wrapper(d: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        from yolov12.models import layouts, weights

        weights.check_yaml(d)
        with layouts.building(layouts.layout_of(d)):
            return parse_model(d, *args, **kwargs)

    return wrapper


def _find_our_yaml(yaml_model_load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(yaml_model_load)
    def wrapper(path: Any) -> Any:
        from yolov12.models import layouts

        found = layouts.packaged_yaml(path)
        if found is None:
            return yaml_model_load(path)
        from ultralytics.utils import YAML

        file, scale = found
        return {**YAML.load(file), "scale": scale, "yaml_file": str(path)}

    return wrapper


def _load_safely(torch_safe_load: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(torch_safe_load)
    def wrapper(weight: Any, *args: Any, **kwargs: Any) -> Any:
        from yolov12.models import layouts, weights

        checkpoint, file = weights.load(weight, trusted_loader=torch_safe_load)
        for key in ("model", "ema"):
            if checkpoint.get(key) is not None:
                layouts.mark_layout(checkpoint[key])
        return checkpoint, file

    return wrapper


def _check_before_stripping(strip_optimizer: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(strip_optimizer)
    def wrapper(f: Any = "best.pt", *args: Any, **kwargs: Any) -> Any:
        from yolov12.models import weights

        weights.read(f)  # it loads without any restriction, and a resumed run folder may be a stranger's
        if args or "s" in kwargs:
            return strip_optimizer(f, *args, **kwargs)
        from yolov12 import files

        with files.replacing(f) as unfinished, _unnamed_in_log(f" saved as {unfinished},"):
            return strip_optimizer(f, str(unfinished), **kwargs)

    return wrapper


@contextmanager
def _unnamed_in_log(words: str) -> Iterator[None]:
    """Return a context in which Ultralytics' log lines leave out some words, such as the name of a temporary file."""
    from ultralytics.utils import LOGGER

    def leave_out(record: LogRecord) -> bool:
        record.msg = str(record.msg).replace(words, "")
        return True

    LOGGER.addFilter(leave_out)
    try:
        yield
    finally:
        LOGGER.removeFilter(leave_out)


def _attention_init(stock: Callable[..., None]) -> Callable[..., None]:
    from yolov12.models import layouts

    return layouts.attention_init(stock)


def _attention_forward(stock: Callable[..., Any]) -> Callable[..., Any]:
    from yolov12.models import layouts

    return layouts.attention_forward(stock)


def _a2c2f_init(stock: Callable[..., None]) -> Callable[..., None]:
    from yolov12.models import layouts

    return layouts.a2c2f_init(stock)


def _check_container_before_caching(check_cache_ram: Callable[..., bool]) -> Callable[..., bool]:
    @functools.wraps(check_cache_ram)
    def wrapper(self: Any, *args: Any) -> bool:
        from yolov12.training.data import host

        return host.cache_fits(check_cache_ram, self, *args)

    return wrapper


def _plot_what_is_drawn(plot_images: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(plot_images)
    def wrapper(labels: Any, images: Any = None, *args: Any, **kwargs: Any) -> Any:
        from yolov12.training.data import host

        return host.fewer_pictures(plot_images, labels, images, *args, **kwargs)

    return wrapper


def _add_official_stems(stems: frozenset[str]) -> frozenset[str]:
    from yolov12.models import weights

    return stems | {name.removesuffix(".pt") for name in weights.OFFICIAL}


def _prepare_training(train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(train)
    def wrapper(self: Any, trainer: Any = None, **kwargs: Any) -> Any:
        from yolov12.training.run import session

        return session.train(train, self, trainer, kwargs)

    return wrapper


def _clear_false_starts(method: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(method)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        from yolov12.training.run import session

        try:
            return method(self, *args, **kwargs)
        except BaseException:
            session.remove_false_start(getattr(self, "save_dir", None))
            raise

    return wrapper


def _find_the_others(init: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(init)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        from ultralytics.cfg import get_cfg

        from yolov12.training.run import team

        given = inspect.signature(init).bind(self, *args, **kwargs)
        given.apply_defaults()
        cfg, overrides = given.arguments["cfg"], given.arguments["overrides"] or {}
        settings = {**vars(get_cfg(cfg)), **overrides}
        team.gather(functools.partial(init, self, *args, **kwargs), self, settings)

    return _clear_false_starts(wrapper)


def _hand_signals_on(train: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(train)
    def wrapper(self: Any) -> None:
        from yolov12.training.run import team

        team.launch(functools.partial(train, self), self)

    return _clear_false_starts(wrapper)


def _share_one_folder(get_save_dir: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(get_save_dir)
    def wrapper(*args: Any, **kwargs: Any) -> Any:
        from yolov12.training.run import team

        return team.one_folder(get_save_dir, *args, **kwargs)

    return wrapper


def _join_the_others(setup_ddp: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(setup_ddp)
    def wrapper(self: Any) -> None:
        from yolov12.training.run import team

        team.setup_group(functools.partial(setup_ddp, self), self)

    return wrapper


def _share_batches(build: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(build)
    def wrapper(self: Any) -> None:
        from yolov12.training.run import team

        team.build_loaders(functools.partial(build, self), self)

    return wrapper


def _resume_with_our_arguments(check_resume: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(check_resume)
    def wrapper(self: Any, overrides: dict[str, Any]) -> None:
        from yolov12.training.run import session

        session.check_resume(check_resume, self, overrides)

    return wrapper


def _attach_engine(setup_train: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(setup_train)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> None:
        from yolov12 import files
        from yolov12.training.adapter import attach as memory
        from yolov12.training.data import host
        from yolov12.training.run import team

        if self.args.mas:
            host.limit_workers(self)
        with team.setting_up(functools.partial(memory.why_not, self)):
            setup_train(self, *args, **kwargs)
        if self.args.mas:
            host.draw_less_ahead(self)
        files.make_atomic(self)
        memory.attach(self)

    return wrapper


def _run_logical_batches(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        from yolov12.training.adapter import logical_batch

        return logical_batch.call(call, self, *args, **kwargs)

    return wrapper


def _resume_in_mid_epoch(resume_training: Callable[..., None]) -> Callable[..., None]:
    @functools.wraps(resume_training)
    def wrapper(self: Any, ckpt: Any) -> None:
        from yolov12.training.adapter import attach as memory

        memory.resume(resume_training, self, ckpt)

    return wrapper


def _save_when_interrupted(do_train: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(do_train)
    def wrapper(self: Any) -> Any:
        from yolov12.training.adapter import attach as memory

        return memory.do_train(do_train, self)

    return wrapper


def _validate_in_slices(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(self: Any, trainer: Any = None, model: Any = None, **kwargs: Any) -> Any:
        from yolov12.training.adapter import validation

        return validation.validate(call, self, trainer, model, **kwargs)

    return wrapper


def _predict_in_slices(inference: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(inference)
    def wrapper(self: Any, im: Any, *args: Any, **kwargs: Any) -> Any:
        from yolov12.training.adapter import validation

        return validation.predict(inference, self, im, *args, **kwargs)

    return wrapper


def _check_before_exporting(call: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(call)
    def wrapper(self: Any, model: Any) -> Any:
        from yolov12.export import session

        session.before_export(self)
        return call(self, model)

    return wrapper


def _cut_to_fit(export_onnx: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(export_onnx)
    def wrapper(self: Any, *args: Any, **kwargs: Any) -> Any:
        from yolov12.export import session

        return session.export_onnx(export_onnx, self, *args, **kwargs)

    return wrapper


def _build_to_fit(export_engine: Callable[..., Any]) -> Callable[..., Any]:
    from ultralytics.engine.exporter import try_export
    from ultralytics.utils import colorstr

    def wrapper(self: Any, prefix: str = colorstr("TensorRT:")) -> Any:
        from yolov12.export import session

        return session.export_engine(export_engine, self, prefix)

    return functools.wraps(export_engine)(try_export(wrapper))


def _one_logger(get_tensorrt_logger: Callable[[], Any]) -> Callable[[], Any]:
    @functools.wraps(get_tensorrt_logger)
    def wrapper() -> Any:
        import tensorrt

        from yolov12.export import engine

        return getattr(tensorrt, "yolov12_logger", None) or engine.logger(tensorrt)

    return wrapper


def _load_with_its_library(load_model: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(load_model)
    def wrapper(self: Any, weight: Any) -> Any:
        from yolov12.export import engine

        return engine.load(load_model, self, weight)

    return wrapper


SEAMS: Mapping[str, Mapping[str, Callable[[Any], Any]]] = {
    "ultralytics.utils": {"DEFAULT_CFG_DICT": _add_arguments, "DEFAULT_CFG": _add_arguments},
    "ultralytics.utils.torch_utils": {"strip_optimizer": _check_before_stripping},
    "ultralytics.utils.plotting": {"plot_images": _plot_what_is_drawn},
    "ultralytics.data.base": {"BaseDataset.check_cache_ram": _check_container_before_caching},
    "ultralytics.utils.downloads": {"GITHUB_ASSETS_STEMS": _add_official_stems},
    "ultralytics.cfg": {"CFG_BOOL_KEYS": _add_switches, "get_cfg": _draw_demo_data},
    "ultralytics.nn.modules.block": {
        "AAttn.__init__": _attention_init,
        "AAttn.forward": _attention_forward,
        "A2C2f.__init__": _a2c2f_init,
    },
    "ultralytics.nn.tasks": {
        "BaseModel.__call__": _run_logical_batches,
        "parse_model": _build_layout,
        "yaml_model_load": _find_our_yaml,
        "torch_safe_load": _load_safely,
    },
    "ultralytics.engine.trainer": {
        "get_save_dir": _share_one_folder,
        "BaseTrainer.__init__": _find_the_others,
        "BaseTrainer.train": _hand_signals_on,
        "BaseTrainer.check_resume": _resume_with_our_arguments,
        "BaseTrainer.resume_training": _resume_in_mid_epoch,
        "BaseTrainer._do_train": _save_when_interrupted,
        "BaseTrainer._setup_train": _attach_engine,
        "BaseTrainer._setup_ddp": _join_the_others,
        "BaseTrainer._build_train_pipeline": _share_batches,
    },
    "ultralytics.engine.validator": {"BaseValidator.__call__": _validate_in_slices},
    "ultralytics.engine.predictor": {"BasePredictor.inference": _predict_in_slices},
    "ultralytics.engine.exporter": {
        "Exporter.__call__": _check_before_exporting,
        "Exporter.export_onnx": _cut_to_fit,
        "Exporter.export_engine": _build_to_fit,
    },
    "ultralytics.utils.export.engine": {"get_tensorrt_logger": _one_logger},
    "ultralytics.nn.backends.tensorrt": {"TensorRTBackend.load_model": _load_with_its_library},
    "ultralytics.engine.model": {"Model.train": _prepare_training},
}


def join(module: ModuleType) -> None:
    """Apply the seams of one Ultralytics module, once.

    Raises:
        SeamError: The installed Ultralytics has no such name; the message says which.
    """
    name = module.__name__
    if vars(module).get(_JOINED):
        return
    if name == "ultralytics.utils" and module.__version__ != PINNED:
        module.LOGGER.warning(
            f"yolov12 is made for ultralytics {PINNED}, {module.__version__} is installed: "
            f"pip install ultralytics=={PINNED}, or YOLOV12_AUTOPATCH=0 to use it unpatched"
        )
    for path, change in SEAMS.get(name, {}).items():
        _replace(module, path, change)
    setattr(module, _JOINED, True)


def forget(module: ModuleType) -> None:
    """Take a module as new: it has just been run, perhaps again."""
    vars(module).pop(_JOINED, None)


def _replace(module: ModuleType, path: str, change: Callable[[Any], Any]) -> None:
    *parents, attribute = path.split(".")
    owner: Any = module
    for parent in parents:
        owner = getattr(owner, parent, None)
    if not hasattr(owner, attribute):
        raise SeamError(
            f"ultralytics has no {module.__name__}.{path}, which yolov12 joins: install ultralytics=={PINNED}, "
            "or set YOLOV12_AUTOPATCH=0 to use Ultralytics unpatched"
        )
    old = getattr(owner, attribute)
    new = change(old)
    setattr(owner, attribute, new)
    if owner is module and new is not old:
        _rebind(old, new)


def _rebind(old: Any, new: Any) -> None:
    # Only for a module that others imported names from before we came: `apply()` after `import ultralytics`.
    for name, module in list(sys.modules.items()):
        if name.partition(".")[0] == "ultralytics":
            for key, value in list(vars(module).items()):
                if value is old:
                    setattr(module, key, new)
