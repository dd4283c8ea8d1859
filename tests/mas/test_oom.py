"""Recognition of failed allocations, and the message of the error that ends a run."""

import pytest
import torch

from yolov12.errors import DoesNotFitError
from yolov12.mas.oom import does_not_fit, is_out_of_memory, tried_to_allocate

MIB = 2**20


def raised_from(error, cause):
    error.__cause__ = cause
    return error


@pytest.mark.parametrize(
    "error",
    [
        torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB"),
        RuntimeError("CUDA error: out of memory\nCUDA kernel errors might be asynchronously reported"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        RuntimeError("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling `cublasCreate(handle)`"),
        RuntimeError("cuDNN error: CUDNN_STATUS_ALLOC_FAILED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_NOT_INITIALIZED"),
        RuntimeError("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR"),
        RuntimeError("GET was unable to find an engine to execute this computation"),
        RuntimeError("[enforce fail at alloc_cpu.cpp:114] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("could not create a primitive"),
        RuntimeError("std::bad_alloc"),
        RuntimeError(
            'NVML_SUCCESS == r INTERNAL ASSERT FAILED at "../c10/cuda/CUDACachingAllocator.cpp":838'
        ),  # Jetson
        MemoryError(),
        raised_from(TypeError("OBB dataset incorrectly formatted"), torch.cuda.OutOfMemoryError("CUDA out of memory.")),
    ],
    ids=str,
)
def test_failed_allocations(error):
    assert is_out_of_memory(error)


@pytest.mark.parametrize(
    "error",
    [
        RuntimeError("CUDA error: device-side assert triggered"),
        RuntimeError("cuDNN error: CUDNN_STATUS_EXECUTION_FAILED"),
        RuntimeError("Expected all tensors to be on the same device"),
        RuntimeError("could not create a primitive descriptor for a convolution forward propagation primitive"),
        ValueError("the label cache is out of memory order"),
        KeyboardInterrupt(),
        DoesNotFitError("one image needs 9 MiB"),
        raised_from(TypeError("OBB dataset incorrectly formatted"), RuntimeError("shapes do not match")),
    ],
    ids=str,
)
def test_other_errors(error):
    assert not is_out_of_memory(error)


@pytest.mark.parametrize(
    ("message", "count"),
    [
        ("CUDA out of memory. Tried to allocate 20.00 MiB. GPU 0 has a total capacity of 15 GiB", 20 * MIB),
        ("CUDA out of memory. Tried to allocate 1.50 GiB (GPU 0; 15 GiB total capacity)", 1536 * MIB),
        ("CUDA out of memory. Tried to allocate 512 bytes", 512),
        ("DefaultCPUAllocator: can't allocate memory: you tried to allocate 4096 bytes.", 4096),
        ("cuDNN error: CUDNN_STATUS_INTERNAL_ERROR", 0),
    ],
)
def test_requested_bytes_are_read_from_the_message(message, count):
    assert tried_to_allocate(message) == count


def test_the_error_names_bytes_needed_bytes_available_and_three_ways_out():
    error = does_not_fit(3000 * MIB, 2000 * MIB, 2500 * MIB, ["amp=True", "imgsz=320", "a smaller model", "a new card"])
    assert str(error) == (
        "one image needs 3,000 MiB at its peak, the budget is 2,000 MiB (2,500 MiB free). "
        "Ways out: amp=True; or imgsz=320; or a smaller model"
    )
    assert isinstance(error, DoesNotFitError)
