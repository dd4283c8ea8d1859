"""The seams: a table of all places in which this package changes Ultralytics, and the code that changes them.

A row names a place (an attribute of an Ultralytics module or class) and a function of ours. In an `around` row, our
function is called instead of Ultralytics' own, which is its first argument. Our function is imported at the first call.
In a `changed` row, our function is called once. It gets Ultralytics' value and returns the new value.

To join a module means to change all of its places. This is done whenever the code of the module has run (see
autopatch.py). Joined modules and new functions carry a mark, so that no place is changed twice.
"""

from __future__ import annotations

import importlib
import sys
import threading
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import ModuleType

from yolov12.joining import PINNED, Seam, around, changed, find, replace

__all__ = ["PINNED", "SEAMS", "Seam", "find", "join", "join_loaded", "running"]

_MODULE_MARK = "__yolov12_joined__"  # attribute of a module: False while its code runs, True when it is joined

SEAMS: Mapping[str, Mapping[str, Seam]] = {
    "ultralytics.utils": {
        **dict.fromkeys(("DEFAULT_CFG_DICT", "DEFAULT_CFG"), changed("cfg.arguments:add_arguments")),
        "LOGGER": changed("untrusted.names:clean_log"),
    },
    "ultralytics.utils.tqdm": {"TQDM._display": around("untrusted.names:display")},
    "ultralytics.utils.patches": {"torch_load": around("untrusted.torch_load:torch_load")},
    "ultralytics.utils.dist": {"generate_ddp_file": around("untrusted.torch_load:generate_ddp_file")},
    "ultralytics.utils.torch_utils": {"strip_optimizer": around("models.weights:strip_optimizer")},
    "ultralytics.utils.plotting": {"plot_images": around("training.data.host:plot_fewer_images")},
    "ultralytics.utils.downloads": {
        "GITHUB_ASSETS_STEMS": changed("models.weight_names:add_official"),
        "get_google_drive_file_info": around("untrusted.names:get_google_drive_file_info"),
    },
    "ultralytics.utils.export.engine": {"get_tensorrt_logger": around("export.seams:get_tensorrt_logger")},
    "ultralytics.cfg": {
        "CFG_BOOL_KEYS": changed("cfg.arguments:add_switches"),
        "get_cfg": around("cfg.configuration:get_cfg"),
        "get_save_dir": around("training.run.process_group:one_folder"),
    },
    "ultralytics.data.utils": {
        "check_det_dataset": around("untrusted.download:check_det_dataset"),
        "check_cls_dataset": around("untrusted.names:check_cls_dataset"),
        "load_dataset_cache_file": around("untrusted.label_cache:load_dataset_cache_file"),
        "save_dataset_cache_file": around("untrusted.label_cache:save_dataset_cache_file"),
    },
    "ultralytics.data.base": {"BaseDataset.check_cache_ram": around("training.data.host:cache_fits")},
    "ultralytics.nn.modules.block": {
        "AAttn.__init__": changed("models.layouts:attention_init"),
        "AAttn.forward": changed("models.layouts:attention_forward"),
        "A2C2f.__init__": changed("models.layouts:a2c2f_init"),
        "A2C2f.forward": changed("models.blocks:a2c2f_forward"),
        "ABlock.forward": changed("models.blocks:ablock_forward"),
        "Bottleneck.forward": changed("models.blocks:bottleneck_forward"),
        "C2f.forward": changed("models.blocks:c2f_forward"),
        "C3.forward": changed("models.blocks:c3_forward"),
    },
    "ultralytics.nn.modules.head": {"Detect.forward_head": changed("models.predictions:forward_head")},
    "ultralytics.nn.tasks": {
        "parse_model": around("models.layouts:parse_model"),
        "yaml_model_load": around("models.layouts:yaml_model_load"),
        "torch_safe_load": around("models.weights:torch_safe_load"),
        "BaseModel._predict_once": changed("models.necks:predict_once"),
        "BaseModel.__call__": changed("training.model_call:model_call"),
        "BaseModel.load": around("training.classes.head:load"),
        "YOLOEModel.get_text_pe": around("untrusted.torch_load:get_text_pe"),
    },
    "ultralytics.nn.autobackend": {"check_class_names": around("untrusted.names:check_class_names")},
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
        "BaseTrainer.setup_model": around("training.run.setup:setup_model"),
        "BaseTrainer._setup_train": around("training.run.setup:setup_train"),
        "BaseTrainer._setup_ddp": around("training.run.process_group:setup_group"),
        "BaseTrainer._build_train_pipeline": around("training.run.setup:build_loaders"),
    },
    "ultralytics.engine.validator": {"BaseValidator.__call__": around("training.seams:validate")},
    "ultralytics.engine.predictor": {"BasePredictor.inference": around("training.seams:inference")},
    "ultralytics.engine.results": {"Results.save_crop": around("untrusted.names:save_crop")},
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
            replace(module, path, row)
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


def _is_running(module: ModuleType) -> bool:
    return vars(module).get(_MODULE_MARK) is False or getattr(module.__spec__, "_initializing", False)
