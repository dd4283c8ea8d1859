"""Kernels that other processes compile: what they leave in Triton's cache, and who waits for whom."""

import importlib
import json
import subprocess
import sys
import time
from dataclasses import astuple
from types import SimpleNamespace

import pytest
import torch

pytest.importorskip("triton")

import triton.language as tl
from triton import JITFunction

from tests.driver import stand_in
from yolov12.mas import compile_ahead
from yolov12.mas.compile_ahead import Wanted
from yolov12.mas.compile_worker import COMPILED
from yolov12.mas.step import upsampling, upsampling_kernels

CARD = torch.device("cuda", 0)
HALF = torch.float16


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("driver"))


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch, driver):
    """Return an empty cache of Triton's. Whatever a test has begun ends with it."""
    for name, value in {**driver, "TRITON_CACHE_DIR": str(tmp_path)}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (9, 0))
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(is_integrated=False))
    yield tmp_path
    compile_ahead.end()


def kernels():
    """Return the two kernels of nearest upsampling, as noted on meta tensors."""
    x = torch.zeros(1, 128, 2, 2, dtype=HALF, device="meta").to(memory_format=torch.channels_last)
    with compile_ahead.noted() as found:
        upsampling._shrunk(upsampling._enlarged(x, 2), 2)
        upsampling._enlarged(x, 2)
    return list(found.values())


def names(cache):
    return sorted(path.stem for path in cache.rglob("*.cubin"))


def wait_for(wanted):
    compile_ahead.wait_for(getattr(upsampling_kernels, wanted.name), HALF, wanted.constants)


KERNELS = ["mas.batchnorm.kernels", "mas.step.upsampling_kernels", "models.loss_kernels", "models.matching_kernels"]
KERNELS += ["training.adapter.image_kernel", "training.data.render_kernel"]


def test_keys_of_the_cache_do_not_depend_on_what_ran_before():
    """Triton adds the global constants of a called function to the key only if that function has a key already."""
    modules = [importlib.import_module(f"yolov12.{name}") for name in KERNELS]
    own = [value for module in modules for value in vars(module).values()]
    assert not any(isinstance(value, tl.constexpr) for value in own)
    functions = list({id(each): each for each in own if isinstance(each, JITFunction)}.values())
    assert len(functions) > 40

    def keys(order):
        for each in functions:
            each.hash, each.used_global_vals = None, {}
        return {(each.__module__, each.__name__): each.cache_key for each in order}

    assert keys(functions) == keys(functions[::-1])


def test_launches_on_meta_tensors_are_noted_once_and_in_order():
    assert [each.name for each in kernels()] == ["enlarge", "gather"]
    assert {each.types for each in kernels()} == {("float16", "float16")}


def test_kernels_are_in_the_cache_once_they_were_waited_for(cache):
    enlarge, gather = kernels()
    compile_ahead.begin([enlarge, gather], CARD)
    wait_for(enlarge)
    assert "enlarge" in names(cache)
    wait_for(gather)
    assert names(cache) == ["enlarge", "gather"]


def test_kernels_that_are_in_the_cache_need_no_process(cache, monkeypatch):
    wanted = kernels()
    compile_ahead.begin(wanted, CARD)
    for each in wanted:
        wait_for(each)
    compile_ahead.end()
    compile_ahead.begin(wanted, CARD)
    assert compile_ahead._processes is None
    compile_ahead.begin(wanted[:1], CARD)
    assert compile_ahead._processes is not None, "nobody has noted that this one is there"
    monkeypatch.setattr("torch.cuda.get_device_capability", lambda device: (8, 0))
    compile_ahead.begin(wanted, CARD)
    assert compile_ahead._processes is not None, "another card needs other code"


def missing(gather):
    return Wanted(gather.module, "missing", gather.types, gather.numbers, gather.constants, gather.warps)


def test_a_kernel_that_fails_leaves_the_others(cache):
    enlarge, gather = kernels()
    compile_ahead.begin([missing(gather), enlarge], CARD)
    wait_for(enlarge)
    assert names(cache) == ["enlarge"]
    compile_ahead.end()
    assert not list(cache.glob("yolov12-*")), "the cache is not complete"


def test_nobody_waits_for_a_process_that_has_ended(cache):
    enlarge, gather = kernels()
    compile_ahead.begin([enlarge, gather], CARD)
    for process in compile_ahead._processes._all:
        process._process.kill()
    for each in (enlarge, gather):
        wait_for(each)
    compile_ahead.end()
    assert not list(cache.glob("yolov12-*"))


def test_what_others_print_is_no_answer(cache, monkeypatch, tmp_path):
    """Compilers write where the process writes, and Python may when it starts."""
    enlarge, gather = kernels()
    (tmp_path / "sitecustomize.py").write_text(
        "print('\\n', end='no end')\n"
        "import subprocess\nstock = subprocess.run\n"
        "subprocess.run = lambda *a, **k: (stock(['echo', 'ptxas info'], close_fds=False), stock(*a, **k))[1]\n"
    )
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    compile_ahead.begin([enlarge, gather], CARD)
    wait_for(enlarge)
    wait_for(gather)
    assert names(cache) == ["enlarge", "gather"]


def test_processes_that_have_begun_go_on_without_those_that_cannot(cache, monkeypatch):
    first, second = kernels()
    monkeypatch.setattr(compile_ahead, "usable_cores", lambda: 4)
    begun, stock = [], subprocess.Popen

    def begin(*args, **kwargs):
        if begun:
            raise BlockingIOError
        begun.append(stock(*args, **kwargs))
        return begun[0]

    monkeypatch.setattr(compile_ahead.subprocess, "Popen", begin)
    compile_ahead.begin([first, second], CARD)
    wait_for(first)
    wait_for(second)
    assert names(cache) == [first.name]
    compile_ahead.end()
    assert not list(cache.glob("yolov12-*"))
    assert begun[0].returncode is not None


@pytest.mark.parametrize(
    ("place", "name", "value"),
    [
        (torch.version, "hip", "6.0"),
        (sys, "executable", None),
        (sys, "frozen", True),
        (compile_ahead, "triton", None),
        (torch.cuda, "get_device_properties", lambda device: SimpleNamespace(is_integrated=True)),
    ],
)
def test_where_nothing_can_begin(monkeypatch, place, name, value):
    assert compile_ahead.can_begin(CARD)
    assert not compile_ahead.can_begin(torch.device("cpu"))
    monkeypatch.setattr(place, name, value, raising=False)
    assert not compile_ahead.can_begin(CARD)


def test_the_end_leaves_no_process(cache):
    compile_ahead.begin(kernels(), CARD)
    processes = [each._process for each in compile_ahead._processes._all]
    begin = time.monotonic()
    compile_ahead.end()
    assert all(process.poll() is not None for process in processes)
    assert time.monotonic() - begin < 5
    assert not list(cache.glob("yolov12-*"))


def test_a_launch_waits_for_its_kernel(monkeypatch):
    from tests.interpreter import run_on_cpu

    told = []
    run_on_cpu(monkeypatch, upsampling_kernels)
    monkeypatch.setattr(compile_ahead, "wait_for", lambda kernel, *rest: told.append((kernel.fn.__name__, *rest)))
    (wanted,) = [each for each in kernels() if each.name == "enlarge"]
    x = torch.ones(1, 128, 2, 2, dtype=torch.float32).to(memory_format=torch.channels_last)
    assert upsampling._enlarged(x, 2).sum() == 4 * 128 * 4
    assert told == [("enlarge", torch.float32, wanted.constants)]


def test_a_process_imports_no_pytorch(cache):
    """It would take seconds, 300 MB in each process, and memory of the GPU for a context."""
    code = (
        "import sys; from yolov12.mas.compile_worker import main; main(); sys.exit(hasattr(sys.modules['torch'], 'nn'))"
    )
    given = json.dumps({"capability": 90, "kernels": [astuple(each) for each in kernels()]})
    run = subprocess.run([sys.executable, "-c", code], input=given, text=True, capture_output=True, check=True)
    assert run.stdout == 2 * COMPILED
    assert names(cache) == ["enlarge", "gather"]
