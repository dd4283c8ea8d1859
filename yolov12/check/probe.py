"""Probes a device: runs attention and one small training step, and checks the results."""

from __future__ import annotations

import contextlib
import time
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode

from yolov12.check.report import AttentionProbe, TrainingProbe
from yolov12.models.attention import attention, select_backend

__all__ = ["probe_attention", "probe_training"]

# fp16 and TF32 have 10 mantissa bits, so one rounding error is 2^-10 of the value. A correct kernel accumulates at most
# about twenty of them in the output and the gradients. The error of a broken kernel is as large as the values.
MAX_RELATIVE_ERROR = 0.02

# The shape of area attention at 640 pixels: (batch, 20 x 20 tokens, heads, head_dim).
_SHAPE = (2, 400, 2, 32)

# Columns: dtype; deterministic mode; the Ultralytics call that uses both; True if training needs it by default.
_CPU_USES = ((torch.float32, True, "training", True),)
_CUDA_USES = (
    (torch.float16, True, "training", True),
    (torch.float16, False, "training, deterministic=False", False),
    (torch.float32, True, "training, amp=False", False),
    (torch.float32, False, "predict and val", False),
)

_KERNELS = {
    "_scaled_dot_product_flash_attention": "flash",
    "_scaled_dot_product_flash_attention_for_cpu": "flash",
    "_scaled_dot_product_efficient_attention": "memory-efficient",
    "_scaled_dot_product_cudnn_attention": "cuDNN",
    "_scaled_dot_product_attention_math_for_mps": "math",
    "bmm": "math",
}


def probe_attention(device: str) -> tuple[AttentionProbe, ...]:
    """Run the model's attention forward and backward on a device and compare it with a float32 reference.

    Args:
        device: A PyTorch device, such as `cpu` or `cuda:0`.

    Returns:
        One result for each combination of dtype and deterministic mode that Ultralytics uses on this device.
    """
    uses = _CUDA_USES if device.startswith("cuda") else _CPU_USES
    return tuple(_probe(torch.device(device), *use) for use in uses)


def probe_training(device: str) -> TrainingProbe:
    """Run forward and backward pass of two convolutions and a BatchNorm, on CUDA in mixed precision.

    Args:
        device: A PyTorch device, such as `cpu` or `cuda:0`.

    Returns:
        The time in milliseconds, or the reason for a failure.
    """
    mixed = device.startswith("cuda")
    start_s = time.perf_counter()
    failure = None
    try:
        layers = nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 16, 3, 1, 1))
        layers.to(device)
        with torch.autocast("cuda", torch.float16, enabled=mixed):
            out = layers(_noise(2, 3, 64, 64).to(device))
        out.float().square().sum().backward()
        if not all(torch.isfinite(p.grad).all() and p.grad.any() for p in layers.parameters() if p.grad is not None):
            failure = "its gradients are not finite, or zero"
    except Exception as error:  # any error is the result of the probe
        failure = _first_line(error)
    step_ms = (time.perf_counter() - start_s) * 1000
    return TrainingProbe(device, "fp16" if mixed else "fp32", None if failure else round(step_ms, 1), failure)


def _probe(device: torch.device, dtype: torch.dtype, deterministic: bool, use: str, needed: bool) -> AttentionProbe:
    name = {torch.float16: "fp16", torch.float32: "fp32"}[dtype]
    backend = select_backend(device, dtype)
    inputs = [_noise(*_SHAPE, seed=seed).to(dtype) for seed in range(4)]  # q, k, v, gradient of the output
    kernel = relative_error = failure = None
    seen = _Operations()
    try:
        with _deterministic(deterministic):
            with seen:
                results = _forward_and_backward(inputs, device)
            relative_error = max(
                ((ours.float().cpu() - right).abs().max() / right.abs().max()).item()
                for ours, right in zip(results, _reference(inputs), strict=True)
            )
        if not relative_error <= MAX_RELATIVE_ERROR:  # also true if the error is NaN
            failure = f"it is off by {relative_error:.2g} of the largest value ({MAX_RELATIVE_ERROR} is allowed)"
    except Exception as error:  # any error is the result of the probe
        failure = _first_line(error)
    if backend.name == "sdpa":
        kernel = next((_KERNELS[name] for name in seen.names if name in _KERNELS), None)
    return AttentionProbe(str(device), name, use, needed, backend.name, backend.reason, kernel, relative_error, failure)


def _forward_and_backward(inputs: list[Tensor], device: torch.device) -> list[Tensor]:
    *qkv, grad = (x.to(device) for x in inputs)
    for x in qkv:
        x.requires_grad_()
    out = attention(*qkv)
    return [out.detach(), *torch.autograd.grad(out, qkv, grad)]


def _reference(inputs: list[Tensor]) -> list[Tensor]:
    # Runs on the CPU and uses the formula itself, so that it shares no code with the tested kernel.
    q, k, v, grad = (x.float().transpose(1, 2) for x in inputs)
    for x in (q, k, v):
        x.requires_grad_()
    out = (q @ k.transpose(-2, -1) * q.shape[-1] ** -0.5).softmax(-1) @ v
    return [x.transpose(1, 2) for x in (out.detach(), *torch.autograd.grad(out, (q, k, v), grad))]


class _Operations(TorchDispatchMode):
    """Records the names of the operations that run, which shows the kernel that was used."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call,unused-ignore]
        self.names: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(func.__name__.partition(".")[0])
        return func(*args, **(kwargs or {}))


@contextlib.contextmanager
def _deterministic(on: bool) -> Iterator[None]:
    # Ultralytics trains with warn_only, too: if PyTorch has no deterministic kernel, it warns and does not raise.
    before = torch.are_deterministic_algorithms_enabled(), torch.is_deterministic_algorithms_warn_only_enabled()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.use_deterministic_algorithms(on, warn_only=True)
        try:
            yield
        finally:
            torch.use_deterministic_algorithms(before[0], warn_only=before[1])


def _noise(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def _first_line(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".strip().split("\n")[0]
