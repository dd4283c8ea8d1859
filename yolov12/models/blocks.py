"""Ultralytics' blocks with the engine's operations, where the engine runs their BatchNorm layers.

BatchNorm's kernel then adds the residual that follows, and writes its output to the slice of the concatenation that
follows. In place of two or three passes over memory for an addition or a concatenation, there is one or none. In every
other case, and for every subclass or replaced part, a block runs Ultralytics' own forward pass.

`join` and `first` of the functions below are those of `batchnorm.grouped.GroupedBatchNorm.joined`. A function with a
`join` adds its result to it, whichever way the block ran.
"""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

__all__ = ["a2c2f_forward", "ablock_forward", "bottleneck_forward", "c2f_forward", "c3_forward"]
__all__ += ["is_code_of", "joins", "new_join", "normalized", "part"]

_Stock = Callable[[Any, Tensor], Tensor]


def a2c2f_forward(stock: _Stock) -> _Stock:
    """Return an `A2C2f.forward` that concatenates without copies where the engine runs the block."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if not _can_chain(self):
            return stock(self, x)
        out = _c2f(self, x)
        return out if self.gamma is None else x + self.gamma.view(1, -1, 1, 1) * out

    return forward


def c2f_forward(stock: _Stock) -> _Stock:
    """Return a `C2f.forward`, also for C3k2, that concatenates without copies where the engine runs the block."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return _c2f(self, x) if _can_chain(self) else stock(self, x)

    return forward


def c3_forward(stock: _Stock) -> _Stock:
    """Return a `C3.forward`, also for C3k, that concatenates without copies where the engine runs the block."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return _c3(self, x) if joins(self.cv2) and joins(self.cv3) else stock(self, x)

    return forward


def bottleneck_forward(stock: _Stock) -> _Stock:
    """Return a `Bottleneck.forward` that adds without a pass of its own where the engine runs the block."""

    def forward(self: Any, x: Tensor) -> Tensor:
        return _bottleneck(self, x) if joins(self.cv2) else stock(self, x)

    return forward


def ablock_forward(stock: _Stock) -> _Stock:
    """Return an `ABlock.forward` that adds without a pass of its own where the engine runs the block."""

    def forward(self: Any, x: Tensor) -> Tensor:
        if torch.compiler.is_compiling() or not _has_two_layers(self.mlp) or not joins(self.mlp[1]):
            return stock(self, x)
        return _ablock(self, x)

    return forward


def joins(block: nn.Module) -> bool:
    """Return whether the engine may add and concatenate in the BatchNorm of a convolution block."""
    return _joined(block) is not None


def normalized(
    block: Any, x: Tensor, residual: Tensor | None = None, join: Any = None, first: int | None = None
) -> Tensor:
    """Run a convolution block, add a residual, and make the sum the next part of a concatenation.

    Args:
        block: Ultralytics' `Conv`, or whatever is in its place.
        x: Its input.
        residual: Tensor to add; None for none.
        join: The concatenation; None for none.
        first: First channel that the caller uses; None if there are no other uses than the concatenation.

    Returns:
        The channels from `first` on, or all.
    """
    joined = _joined(block)
    if joined is None:
        out = block(x)
    else:
        x = block.conv(x)
        found: Tensor | None = joined(x, type(block.act) is nn.SiLU, residual, join, first)
        if found is not None:
            return found
        out = block.act(block.bn(x))
    if residual is not None:
        out = residual + out
    if join is not None:
        join.add(out)
    return out[:, first:] if first else out  # type: ignore[no-any-return]


def _joined(block: Any) -> Any:
    """Return the engine's function for the BatchNorm of a block; None if the block has to run as it is."""
    if torch.compiler.is_compiling():  # the engine runs no compiled model
        return None
    if type(block) is not _kinds()["Conv"] or "forward" in vars(block):
        return None
    if not is_code_of("ultralytics.", type(block).forward):  # its class was changed
        return None
    parts: dict[str, Any] = block._modules
    act = parts.get("act")
    if type(act) not in (nn.SiLU, nn.Identity) or (type(act) is nn.Identity and "forward" in vars(act)):
        return None
    forward = vars(parts["bn"]).get("forward") if "bn" in parts else None
    return forward.joined if getattr(forward, "joins", False) else None  # type: ignore[union-attr]


def is_code_of(package: str, function: Any) -> bool:
    """Return whether a function is a package's own code, and not a user's with the same name.

    Args:
        package: Name of the package with a dot after it.
        function: The function.
    """
    from yolov12.mas.modules import module_of

    return module_of(function).startswith(package)


@functools.cache
def _kinds() -> dict[str, Any]:
    from ultralytics.nn.modules import block, conv

    names = ("A2C2f", "AAttn", "ABlock", "Bottleneck", "C2f", "C3k", "C3k2")
    return {"Conv": conv.Conv, **{name: getattr(block, name) for name in names}}


def new_join(channels: int) -> Any:
    """Return a concatenation, see `batchnorm.joined.Join`."""
    from yolov12.mas.batchnorm.joined import Join

    return Join(channels)


def _join(block: Any) -> Any:
    """Return a concatenation for the input of a convolution block; of no channels if their number is not known."""
    return new_join(getattr(block.conv, "in_channels", 0))


def part(block: Any, x: Tensor, join: Any, first: int | None) -> Tensor:
    """Run a block whose output is the next part of a concatenation.

    Args:
        block: Any module.
        x: Its input.
        join, first: See `normalized`.

    Returns:
        The channels from `first` on, or all.
    """
    kind, kinds = type(block), _kinds()
    if "forward" in vars(block):  # the engine's own, or a user's
        # If others read its output, too, it gets a tensor of its own: a layer may write on the concatenation.
        if first is None and kind is nn.Upsample and hasattr(vars(block)["forward"], "part_of"):
            return vars(block)["forward"].part_of(join, x)  # type: ignore[no-any-return]
    elif kind is nn.Sequential and len(block):
        *before, last = block
        for each in before:
            x = each(x)
        return part(last, x, join, first)
    elif kind is kinds["Conv"]:
        return normalized(block, x, join=join, first=first)
    elif not is_code_of("yolov12.", kind.forward):  # a block of another kind, or its class was changed
        pass
    elif kind is kinds["Bottleneck"]:
        return _bottleneck(block, x, join, first)
    elif kind is kinds["C3k"] and joins(block.cv2) and joins(block.cv3):
        return _c3(block, x, join, first)
    elif kind is kinds["ABlock"] and _has_two_layers(block.mlp):
        return _ablock(block, x, join, first)
    elif kind in (kinds["A2C2f"], kinds["C2f"], kinds["C3k2"]) and _ends_with_cv2(block) and _can_chain(block):
        return _c2f(block, x, join, first)
    out: Tensor = block(x)
    join.add(out)
    return out


def _ends_with_cv2(block: Any) -> bool:
    return getattr(block, "gamma", None) is None


def _can_chain(block: Any) -> bool:
    return joins(block.cv1) and joins(block.cv2) and len(block.m) > 0


def _c2f(block: Any, x: Tensor, join: Any = None, first: int | None = None) -> Tensor:
    """Run C2f, C3k2 or A2C2f: a chain of blocks, all of whose outputs are concatenated."""
    inner, last = _join(block.cv2), len(block.m) - 1
    # C2f continues with the second half of the channels, A2C2f with all.
    half = -(-block.cv1.bn.num_features // 2) if hasattr(block, "c") else 0
    x = normalized(block.cv1, x, join=inner, first=half)
    for index, each in enumerate(block.m):
        x = part(each, x, inner, first=0 if index < last else None)
    return normalized(block.cv2, inner.result(), join=join, first=first)


def _c3(block: Any, x: Tensor, join: Any = None, first: int | None = None) -> Tensor:
    inner = _join(block.cv3)
    part(block.m, block.cv1(x), inner, first=None)
    normalized(block.cv2, x, join=inner)
    return normalized(block.cv3, inner.result(), join=join, first=first)


def _bottleneck(block: Any, x: Tensor, join: Any = None, first: int | None = None) -> Tensor:
    return normalized(block.cv2, block.cv1(x), x if block.add else None, join, first)


def _ablock(block: Any, x: Tensor, join: Any = None, first: int | None = None) -> Tensor:
    kind = type(block.attn)
    is_ours = kind is _kinds()["AAttn"] and is_code_of("yolov12.", kind.forward)
    if is_ours and "forward" not in vars(block.attn):
        from yolov12.models.layouts import add_attention

        x = add_attention(block.attn, x)
    else:
        x = x + block.attn(x)
    return normalized(block.mlp[1], block.mlp[0](x), x, join, first)


def _has_two_layers(mlp: nn.Module) -> bool:
    return type(mlp) is nn.Sequential and len(mlp) == 2 and "forward" not in vars(mlp)
