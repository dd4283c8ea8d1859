"""Applies CUDA's rules for autocast, attention and BatchNorm to fake CPU tensors.

PyTorch's autocast depends on the device, and fake CUDA tensors need a driver. A forward pass therefore runs on fake CPU
tensors, and this mode casts what autocast casts on a GPU:
https://pytorch.org/docs/stable/amp.html#cuda-op-specific-behavior
bfloat16 also represents float16: it has the same size, and the CPU supports it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from yolov12.mas.batchnorm.fused import row_stride
from yolov12.mas.profiling.trace import rounded

__all__ = ["HALF", "CudaRules", "FusedBatchNorm", "cuda_rules"]

HALF = torch.bfloat16

_TO_HALF = """conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d linear matmul rmatmul mm mv bmm
    addmm addmv addbmm baddbmm einsum prelu multi_dot scaled_dot_product_attention"""
_TO_FLOAT = """
    acos asin cosh erfinv exp expm1 log log10 log2 log1p reciprocal rsqrt sinh tan pow rpow softplus layer_norm
    group_norm norm normalize cosine_similarity poisson_nll_loss cosine_embedding_loss nll_loss cross_entropy
    hinge_embedding_loss kl_div l1_loss smooth_l1_loss huber_loss mse_loss margin_ranking_loss
    multilabel_margin_loss soft_margin_loss triplet_margin_loss multi_margin_loss binary_cross_entropy_with_logits
    dist pdist cdist renorm logsumexp prod softmax softmin log_softmax cumprod cumsum sum"""
_TO_WIDEST = "cat concat stack addcdiv addcmul atan2 bilinear cross dot index_put scatter_add"
_RESIZE = "interpolate upsample"


@contextmanager
def cuda_rules(amp: bool = True) -> Iterator[CudaRules]:
    """Cast like autocast on a GPU, and keep the tensors that fused attention kernels keep.

    Args:
        amp: True for mixed precision.

    Yields:
        The active mode.
    """
    with CudaRules(amp) as rules, _HiddenOperations():  # type: ignore[no-untyped-call]
        yield rules


class CudaRules(TorchFunctionMode):
    """The function mode of `cuda_rules`. Like autocast, it keeps half precision copies of weights until it ends.

    Args:
        amp: True for mixed precision.
    """

    def __init__(self, amp: bool) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._copies: dict[int, tuple[Tensor, Tensor]] = {}
        # Whether CUDA's autocast resizes in fp32 depends on the version of PyTorch.
        resizes = torch._C._dispatch_has_kernel_for_dispatch_key("aten::upsample_nearest2d", "AutocastCUDA")
        rules = {HALF: _TO_HALF, torch.float32: f"{_TO_FLOAT} {_RESIZE if resizes else ''}"}
        self._rules = {name: dtype for dtype, names in rules.items() for name in names.split()} if amp else {}
        self._to_widest = frozenset(_TO_WIDEST.split() if amp else ())

    @property
    def copies_bytes(self) -> int:
        """Bytes of the half precision copies of weights so far."""
        return sum(rounded(copy.numel() * copy.element_size()) for _, copy in self._copies.values())

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        name = getattr(func, "__name__", "")
        if name.startswith("__"):  # an operator such as `__matmul__`; the in-place `pow_` keeps its name
            name = name.strip("_")
        dtype = self._rules.get(name)
        if name == "interpolate" and kwargs.get("mode", "nearest") == "nearest":
            dtype = None  # see `mas.step.upsampling`
        if name in self._to_widest and _has_float(args):
            dtype = torch.float32
        if dtype is not None:
            args, kwargs = self._cast((args, kwargs), dtype)
        if name == "scaled_dot_product_attention":
            return _FusedAttention.apply(*args[:3])  # type: ignore[no-untyped-call]
        temporary = _temporary(name, args)
        result = func(*args, **kwargs)
        del temporary
        return result

    def _cast(self, nest: Any, dtype: torch.dtype) -> Any:
        return tree_map(lambda leaf: self._cast_one(leaf, dtype) if _counts(leaf) else leaf, nest)

    def _cast_one(self, tensor: Tensor, dtype: torch.dtype) -> Tensor:
        if tensor.dtype == dtype:
            return tensor
        if not (dtype == HALF and tensor.is_leaf and tensor.requires_grad):
            return tensor.to(dtype)
        if id(tensor) not in self._copies:
            self._copies[id(tensor)] = tensor, tensor.to(dtype)
        return self._copies[id(tensor)][1]


def _temporary(name: str, args: Any) -> Tensor | None:
    """Allocate the large temporary tensor of an operation. None if the operation uses none."""
    if not args or not isinstance(args[0], Tensor):
        return None
    if name == "binary_cross_entropy_with_logits":  # holds the logarithm of a sigmoid
        return torch.empty_like(args[0])
    if name == "sum" and not args[0].is_floating_point() and args[0].dtype != torch.int64:  # converts to int64
        return torch.empty_like(args[0], dtype=torch.int64)
    return None


def _has_float(nest: Any) -> bool:
    return any(_counts(leaf) and leaf.dtype == torch.float32 for leaf in tree_leaves(nest))


def _counts(leaf: Any) -> bool:
    return isinstance(leaf, Tensor) and leaf.dtype in (torch.float32, torch.float16, torch.bfloat16)


class _HiddenOperations(TorchDispatchMode):
    """Hides from the function mode what fake tensors run internally to find shapes."""

    def __torch_dispatch__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        if func is torch.ops.prim.device.default:  # called several times per operation, and slow otherwise
            return args[0].fake_device if isinstance(args[0], FakeTensor) else args[0].device
        with torch._C.DisableTorchFunction():
            return func(*args, **(kwargs or {}))


class _FusedAttention(torch.autograd.Function):
    """Allocates the tensors of flash and memory-efficient attention, without values.

    Shapes: (batch, heads, tokens, head_dim).
    """

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        out = torch.empty_like(q.transpose(1, 2), memory_format=torch.contiguous_format).transpose(1, 2)
        logsumexp = q.new_empty(q.shape[:3], dtype=torch.float32)
        ctx.save_for_backward(q, k, v, out, logsumexp)
        return out

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Any:
        q, k, v, *_ = ctx.saved_tensors
        sums = torch.empty_like(q, dtype=torch.float32)  # accumulates the gradient of q
        gradients = tuple(torch.empty_like(each) for each in (q, k, v))
        del sums
        return gradients


class FusedBatchNorm:
    """Allocates the tensors of the engine's fused BatchNorm (`batchnorm.grouped.Kernels`), without values."""

    @staticmethod
    def applies(x: Tensor, weight: Tensor, means: Tensor) -> bool:
        """Return True if the fused kernels support these tensors, as on a GPU."""
        return (
            weight.dtype == means.dtype == torch.float32
            and x.ndim == 4
            and x.is_contiguous(memory_format=torch.channels_last)
        )

    @staticmethod
    def batch_norm(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        means: Tensor,
        variances: Tensor,
        sizes: Sequence[int],
        eps: float,
        silu: bool = False,
    ) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
        """Allocate the tensors of one call. The arguments are those of the fused kernels.

        Returns:
            The output, and a function that allocates the output again, as rebuilding does.
        """
        statistics = torch.empty(2, len(sizes), x.shape[1])
        out: Tensor = _FusedBatchNorm.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, None, statistics, (), None
        )
        return out, torch.empty_like

    @staticmethod
    def writes_into(device: torch.device) -> bool:
        """Return True, as on a GPU."""
        return True

    @staticmethod
    def batch_norm_into(
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        means: Tensor,
        variances: Tensor,
        sizes: Sequence[int],
        eps: float,
        silu: bool = False,
        residual: Tensor | None = None,
        part: Tensor | None = None,
        first: int | None = None,
    ) -> tuple[Tensor, Tensor | None]:
        """Allocate the tensors of one call. The arguments are those of the fused kernels.

        Returns:
            The output, and its copy from channel `first` on.
        """
        statistics = torch.empty(2, len(sizes), x.shape[1])
        slices = () if part is None else (part,)
        found = _FusedBatchNorm.apply(  # type: ignore[no-untyped-call]
            x, weight, bias, residual, statistics, slices, first
        )
        return found if first is not None else (found, None)


class _FusedBatchNorm(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        bias: Tensor,
        residual: Tensor | None,
        statistics: Tensor,
        slices: tuple[Tensor, ...],
        first: int | None,
    ) -> Tensor | tuple[Tensor, Tensor]:
        ctx.save_for_backward(x, weight, bias, statistics)
        ctx.adds = residual is not None
        out = slices[0] if slices else torch.empty_like(x)
        return out if first is None else (out, torch.empty_like(x[:, first:], memory_format=torch.channels_last))

    @staticmethod
    def backward(ctx: Any, grad: Tensor, of_tail: Tensor | None = None) -> Any:
        x, weight, bias, statistics = ctx.saved_tensors
        if ctx.adds and of_tail is not None:
            grad = torch.empty_like(x)
        if row_stride(grad) is None:
            grad = grad.contiguous(memory_format=torch.channels_last)
        sums = torch.empty_like(statistics)
        gradients = tuple(torch.empty_like(each) for each in (x, weight, bias))
        del sums
        return *gradients, grad if ctx.adds else None, None, None, None
