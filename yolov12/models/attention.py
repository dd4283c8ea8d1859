"""Scaled dot-product attention of both YOLOv12 layouts, with the fastest kernel available.

`attention(q, k, v)` is the interface. Each call chooses a back end by the device and dtype of its tensors. Nothing is
chosen at import, so one process can train on a GPU, validate on the CPU and export to ONNX.

flash   flash-attn 2 (Dao, 2023, https://arxiv.org/abs/2307.08691), for fp16 and bf16 from compute capability 8.0 on
sdpa    `torch.nn.functional.scaled_dot_product_attention`, which chooses its own kernel
math    MatMul -> Softmax -> MatMul, for exported graphs and for dtypes without a fused kernel

Ultralytics trains in PyTorch's deterministic mode. Every back end supports it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["Backend", "attention", "select_backend"]

_HALF = (torch.float16, torch.bfloat16)
_aten = torch.ops.aten


@dataclass(frozen=True)
class Backend:
    """Back end of the attention and the reason for it, as `yolov12 check` shows them."""

    name: str
    """`flash`, `sdpa` or `math`."""
    reason: str


def attention(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Compute softmax(q kᵀ / √head_dim) v.

    Args:
        q: Queries, (batch, tokens, heads, head_dim). The last dimension is contiguous.
        k: Keys. Shape, dtype and device are those of `q`.
        v: Values. Shape, dtype and device are those of `q`.

    Returns:
        (batch, tokens, heads, head_dim) in the dtype of `q`.
    """
    if torch.jit.is_tracing() or torch.onnx.is_in_onnx_export():
        return _math(q, k, v)  # an exported graph must not depend on the exporting machine
    deterministic = torch.are_deterministic_algorithms_enabled()
    if torch.compiler.is_compiling():  # the compiler can trace PyTorch's attention, not `select_backend`
        backend = "math" if deterministic and q.is_cuda else "sdpa"
    else:
        backend = select_backend(q.device, q.dtype).name
    if backend == "flash":
        out: Tensor = _flash_attn()(q, k, v, deterministic=deterministic)
        return out
    if backend == "math":
        return _math(q, k, v)
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    if deterministic and q.is_cuda:  # not reached while compiling
        fused = _DeterministicFlash if _has_flash_kernel(q.device, q.dtype) else _DeterministicEfficient
        out = fused.apply(q, k, v)  # type: ignore[no-untyped-call]
    else:
        out = F.scaled_dot_product_attention(q, k, v)
    return out.transpose(1, 2)


def select_backend(device: torch.device, dtype: torch.dtype) -> Backend:
    """Choose the back end of the attention.

    Args:
        device: Device of the tensors.
        dtype: Dtype of the tensors.

    Returns:
        The back end and the reason for it.
    """
    if device.type != "cuda":
        return Backend("sdpa", f"{device.type} tensors go through PyTorch's own attention")
    if dtype is torch.float64 or (dtype is torch.bfloat16 and _capability(device) < (8, 0)):
        return Backend("math", f"no fused kernel takes {dtype} on this GPU")
    if dtype not in _HALF:
        return Backend("sdpa", f"flash kernels need fp16 or bf16, not {dtype}")
    if not _has_flash_kernel(device, dtype):
        major, minor = _capability(device)
        return Backend("sdpa", f"flash kernels need compute capability 8.0, this GPU has {major}.{minor}")
    found = _flash_attn_or_reason()
    if isinstance(found, str):
        return Backend("sdpa", f"{found}; PyTorch has fused kernels of its own")
    return Backend("flash", "flash-attn is installed, and this GPU and dtype can use it")


def _math(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    q, k, v = (x.transpose(1, 2) for x in (q, k, v))
    weights = ((q * q.shape[-1] ** -0.5) @ k.transpose(-2, -1)).softmax(dim=-1)
    out: Tensor = (weights @ v).transpose(1, 2)
    return out


@functools.cache
def _capability(device: torch.device) -> tuple[int, int]:
    return torch.cuda.get_device_capability(device)


def _has_flash_kernel(device: torch.device, dtype: torch.dtype) -> bool:
    return dtype in _HALF and _capability(device) >= (8, 0)


@functools.cache
def _flash_attn_or_reason() -> Callable[..., Any] | str:
    try:
        func: Callable[..., Any] = importlib.import_module("flash_attn").flash_attn_func
    except ModuleNotFoundError:
        return "flash-attn is not installed"
    except (ImportError, OSError, AttributeError) as error:  # a build for another torch version fails here
        return f"flash-attn is installed but does not load ({error})"
    return func


def _flash_attn() -> Callable[..., Any]:
    found = _flash_attn_or_reason()
    assert not isinstance(found, str)
    return found


@contextmanager
def _strictly_deterministic() -> Iterator[None]:
    # Backward passes of fused kernels are deterministic only in strict mode. With `warn_only=True`, which Ultralytics
    # sets, they warn and stay non-deterministic. Strict mode is therefore on for this one kernel.
    warn_only = torch.is_deterministic_algorithms_warn_only_enabled()
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(True, warn_only=warn_only)


class _DeterministicFlash(torch.autograd.Function):
    """PyTorch's flash kernel with a deterministic backward pass. Shapes: (batch, heads, tokens, head_dim)."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, logsumexp, cum_q, cum_k, *max_tokens, seed, offset, _ = _aten._scaled_dot_product_flash_attention(q, k, v)
        ctx.save_for_backward(q, k, v, out, logsumexp, cum_q, cum_k, seed, offset)
        ctx.max_tokens = max_tokens
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        *tensors, seed, offset = ctx.saved_tensors
        with _strictly_deterministic():
            return _aten._scaled_dot_product_flash_attention_backward(
                grad, *tensors, *ctx.max_tokens, 0.0, False, seed, offset
            )


class _DeterministicEfficient(torch.autograd.Function):
    """PyTorch's memory-efficient kernel with a deterministic backward pass, for fp32 and for GPUs older than 8.0.

    Shapes: (batch, heads, tokens, head_dim).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out, *rest = _aten._scaled_dot_product_efficient_attention(q, k, v, None, compute_log_sumexp=True)
        ctx.save_for_backward(q, k, v, out, *rest)
        return out  # type: ignore[no-any-return]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, *rest = ctx.saved_tensors
        with _strictly_deterministic():
            *grads, _ = _aten._scaled_dot_product_efficient_attention_backward(
                grad, q, k, v, None, *rest, 0.0, [True, True, True, False]
            )
        return tuple(grads)
