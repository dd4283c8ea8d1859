"""The table of seams against the installed Ultralytics: every row's place and function, and what joining does to it."""

import copy
import functools
import importlib
import inspect
import pickle
import sys

import cloudpickle
import pytest
import torch
from ultralytics import cfg
from ultralytics.data import utils
from ultralytics.engine import trainer as upstream
from ultralytics.nn import tasks
from ultralytics.utils import patches, torch_utils

from yolov12 import seams

ROWS = [(module, path, row) for module, rows in seams.SEAMS.items() for path, row in rows.items()]
AROUND = [each for each in ROWS if not each[2].once]
MODULE_FUNCTIONS = [
    cfg.get_cfg,
    cfg.get_save_dir,
    tasks.parse_model,
    tasks.torch_safe_load,
    tasks.yaml_model_load,
    torch_utils.strip_optimizer,
    patches.torch_load,
    utils.load_dataset_cache_file,
    utils.save_dataset_cache_file,
    utils.check_det_dataset,
]


def stands_at(module: str, path: str):
    owner, attribute = seams.find(importlib.import_module(module), path)
    return getattr(owner, attribute)


def calls(stock) -> list[tuple[list, dict]]:
    """Arguments with which a function or method may be called: by position, and by name where it has names."""
    parameters = list(inspect.signature(stock).parameters.values())
    if [each.name for each in parameters] == ["args", "kwargs"]:
        decorated = [*filter(inspect.isfunction, inspect.getclosurevars(stock).nonlocals.values())]
        if decorated:  # by `try_export` or `threaded`
            return calls(decorated[0])
        parameters = [*inspect.signature(torch.load).parameters.values()]  # `torch_load` passes on what it is given
    plain = [each for each in parameters if each.kind is each.POSITIONAL_OR_KEYWORD]
    kinds = {each.kind for each in parameters}
    more = ["more"] if inspect.Parameter.VAR_POSITIONAL in kinds else []
    named = {"another": None} if inspect.Parameter.VAR_KEYWORD in kinds else {}
    first, rest = plain[:1], plain[1:]
    needed = [each for each in rest if each.default is each.empty]
    return [
        ([*plain, *more], named),
        ([*first, *needed], {}),
        (first, {**{each.name: each for each in rest}, **named}),
    ]


@pytest.mark.parametrize(("module", "path", "row"), ROWS, ids=[f"{module}.{path}" for module, path, _ in ROWS])
def test_every_row_names_a_place_and_a_function(module, path, row):
    stands_at(module, path)
    assert callable(row.target())


@pytest.mark.parametrize(("module", "path", "row"), AROUND, ids=[f"{module}.{path}" for module, path, _ in AROUND])
def test_functions_take_the_stock_one_and_whatever_it_takes(module, path, row):
    """Both as Ultralytics calls it and as a user might, by names."""
    wrapper = stands_at(module, path)
    stock = wrapper.__wrapped__
    assert not hasattr(stock, "__yolov12_seam__"), "joined twice"
    assert inspect.signature(wrapper) == inspect.signature(stock)
    assert (wrapper.__module__, wrapper.__qualname__) == (stock.__module__, stock.__qualname__)
    target = inspect.signature(row.target())
    for positional, named in calls(stock):
        target.bind(stock, *positional, **named)


@pytest.mark.parametrize("function", MODULE_FUNCTIONS, ids=lambda function: function.__name__)
def test_functions_are_pickled_by_their_names(function):
    """Ultralytics hands callbacks and trainers to the processes of several GPUs with cloudpickle."""
    for dumps in (pickle.dumps, cloudpickle.dumps):
        assert pickle.loads(dumps(function)) is function
        assert pickle.loads(dumps(functools.partial(function, 1))).func is function
        assert b"yolov12" not in dumps(function)
    assert copy.deepcopy(function) is function


def test_what_is_pickled_here_is_stock_in_a_stock_process(run_python, tmp_path):
    file = tmp_path / "functions.pkl"
    file.write_bytes(cloudpickle.dumps([cfg.get_cfg, upstream.BaseTrainer.train, upstream.BaseTrainer]))
    code = (
        f"import pickle; found = pickle.load(open({str(file)!r}, 'rb')); "
        "print([hasattr(each, '__wrapped__') for each in found[:2]], found[2].train is found[1])"
    )
    done = run_python("-c", code, YOLOV12_AUTOPATCH="0")
    assert done.stdout.split("\n")[-2] == "[False, False] True", done.stderr


def test_joining_again_changes_nothing():
    """Neither by asking for it, nor where the mark of the module is lost."""
    stood = [stands_at(module, path) for module, path, _ in ROWS]
    for name in seams.SEAMS:
        module = sys.modules[name]
        seams.join(module)
        with pytest.MonkeyPatch.context() as patch:
            patch.delattr(module, "__yolov12_joined__")
            seams.join(module)
            delattr(module, "__yolov12_joined__")  # what monkeypatch puts back
    seams.join_loaded()
    now = [stands_at(module, path) for module, path, _ in ROWS]
    for (_, path, row), before, after in zip(ROWS, stood, now, strict=True):
        assert after == before if row.once else after is before, path


def test_a_function_that_a_user_puts_over_ours_stays(monkeypatch):
    """Every `yolov12.YOLO` asks for the seams again."""
    ours = upstream.BaseTrainer.train

    def train(trainer):
        return ours(trainer)

    monkeypatch.setattr(upstream.BaseTrainer, "train", train)
    seams.join_loaded(wait=True)
    assert upstream.BaseTrainer.train is train


def test_the_function_is_imported_with_the_first_call(run_python):
    code = (
        "import sys; from ultralytics.cfg import get_cfg; "
        "before = 'yolov12.cfg.configuration' in sys.modules; get_cfg(); "
        "print(before, 'yolov12.cfg.configuration' in sys.modules)"
    )
    assert run_python("-c", code).stdout.split()[-2:] == ["False", "True"]
