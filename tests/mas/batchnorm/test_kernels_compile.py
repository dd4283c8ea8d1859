"""The kernels compile for older and newer cards that are not in this machine, with the installed Triton."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.driver import stand_in

pytest.importorskip("triton")

SCRIPT = """
import json, sys
import triton
from triton.compiler import ASTSource
from yolov12.mas.batchnorm import kernels
from yolov12.mas.step import upsampling_kernels
from yolov12.models import loss_kernels, matching_kernels
from yolov12.training.adapter import image_kernel
from yolov12.training.data import render_kernel

TYPES = {"eps": "fp32", "ends": "*i32", "counters": "*i32", "images": "*u8", "taken": "*u8"}
TYPES |= {"numbers": "*i32", "buffer": "*u8"}
TYPES |= dict.fromkeys(("x", "grad", "out", "tail", "residual", "scores", "boxes"), "*fp16")
TYPES |= dict.fromkeys(("anchor_of", "rectangles", "spans", "takers", "pair_of", "box"), "*i32")
NUMBERS = "pixels", "width", "groups", "splits", "stride", "units", "anchors", "classes", "base", "height"
CONSTANTS = {"silu": True, "unit": 16, "row_block": 16, "channel_block": 64, "unroll": 4, "factor": 2}
CONSTANTS |= {"channels": 3, "block": 4096, "bins": 16, "most": 10, "tile": 16, "has_tail": True, "adds": True}
CONSTANTS |= {"is_planar": False, "pixel_block": 512}

def ptx(kernel, capability):
    names = list(kernel.arg_names)
    scalar = {name: "i32" for name in names if name.split("_")[-1] in NUMBERS}
    types = {name: TYPES.get(name, scalar.get(name, "*fp32")) for name in names if name not in CONSTANTS}
    aligned = [i for i, name in enumerate(names) if types.get(name, "").startswith("*")]
    constants = {names.index(name): value for name, value in CONSTANTS.items() if name in names}
    if triton.__version__ < "3":
        from triton.compiler import AttrsDescriptor
        from triton.runtime.driver import UnsupportedDriver
        UnsupportedDriver.binary_ext = "cubin"
        source = ASTSource(kernel, {names.index(name): kind for name, kind in types.items()}, constants,
                           AttrsDescriptor(divisible_by_16=aligned, equal_to_1=[]))
        target = "cuda", capability
    else:
        from triton.backends.compiler import GPUTarget
        source = ASTSource(kernel, {name: types.get(name, "constexpr") for name in names},
                           {(i,): value for i, value in constants.items()},
                           {(i,): [["tt.divisibility", 16]] for i in aligned})
        target = GPUTarget("cuda", capability, 32)
    compiled = triton.compile(source, target=target, options={"num_warps": 4})
    assert compiled.asm["cubin"]
    return compiled.asm["ptx"]

layers = [kernels, upsampling_kernels, image_kernel, render_kernel]
modules = layers if sys.argv[2] == "layers" else [loss_kernels, matching_kernels]
if sys.argv[2] == "loss":
    TYPES["grad"], CONSTANTS["block"] = "*fp32", 128
found = {name: ptx(getattr(module, name), int(sys.argv[1])) for module in modules for name in module.__all__}
json.dump(found, sys.stdout)
"""


@pytest.fixture(scope="module")
def driver(tmp_path_factory):
    return stand_in(tmp_path_factory.mktemp("driver"))


def compiled(kernels, capability, driver, folder):
    """Return the PTX of each kernel for a card."""
    environment = {
        **os.environ, **driver, "TRITON_CACHE_DIR": str(folder), "PYTHONPATH": str(Path(__file__).parents[3]),
    }  # fmt: skip
    command = [sys.executable, "-c", SCRIPT, str(capability), kernels]
    run = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=800)
    assert run.returncode == 0, run.stderr[-2000:]
    return json.loads(run.stdout)


@pytest.mark.deep
@pytest.mark.parametrize("capability", [75, 90])
def test_kernels_of_the_loss_compile(driver, capability, tmp_path):
    """No atomic operation adds numbers whose sum depends on their order."""
    for name, code in compiled("loss", capability, driver, tmp_path).items():
        assert "atom.global.gpu.acq_rel.add.f" not in code, name


@pytest.mark.parametrize("capability", [75, pytest.param(80, marks=pytest.mark.deep), 90])
def test_kernels_compile(driver, capability, tmp_path):
    ptx = compiled("layers", capability, driver, tmp_path)
    for name, code in ptx.items():
        lines = code.splitlines()
        # 16 bytes at a time; rendering reads single bytes, from anywhere
        assert name == "render" or any(
            ("st.global.v4" if name == "scale" else "ld.global.v4") in line for line in lines
        ), name
        atomics = [index for index, line in enumerate(lines) if "atom.global.gpu.acq_rel" in line]
        if name not in ("statistics", "gradient_sums"):
            assert not atomics
            continue
        # Order: store the sums, synchronise the threads, count the chunk, then load other chunks' sums without the
        # cache.
        (counted,) = atomics
        stored = [index for index, line in enumerate(lines) if "st.global" in line and index < counted]
        assert any("bar.sync" in line for line in lines[stored[-1] : counted])
        read = [index for index, line in enumerate(lines) if "ld.global.cg" in line]
        assert read
        assert min(read) > counted
