"""A stand-in for the CUDA driver, to which Triton links its launchers and helpers where no GPU is."""

import shutil
import subprocess

import pytest

_SYMBOLS = """
    cuLaunchKernel cuLaunchKernelEx cuGetErrorString cuPointerGetAttribute cuCtxGetCurrent cuCtxSetCurrent
    cuDeviceGet cuDevicePrimaryCtxRetain cuCtxGetLimit cuCtxSetLimit cuDeviceGetAttribute cuFuncGetAttribute
    cuFuncSetAttribute cuFuncSetCacheConfig cuModuleGetFunction cuModuleLoadData
"""


def stand_in(folder):
    """Build the library in a folder, and return the environment variables with which Triton finds it."""
    compiler = shutil.which("cc") or shutil.which("gcc")
    if compiler is None:
        pytest.skip("Triton needs a C compiler")
    code = "".join(f"int {name}(void) {{ return 0; }}" for name in _SYMBOLS.split())
    (folder / "driver.c").write_text(code)
    library = folder / "libcuda.so.1"
    command = [compiler, "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o", library, folder / "driver.c"]
    subprocess.run(command, check=True)
    (folder / "libcuda.so").symlink_to(library.name)
    return {"LD_LIBRARY_PATH": str(folder), "TRITON_LIBCUDA_PATH": str(folder)}
