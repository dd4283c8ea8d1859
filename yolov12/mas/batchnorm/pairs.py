"""Pairs of a BatchNorm layer and the SiLU after it, which run as one operation."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from yolov12.mas.modules import module_of

__all__ = ["Pairs"]


class Pairs:
    """Pairs of BatchNorm and SiLU of a model. A pair is dropped for good when one of its neighbours is replaced.

    Args:
        activations: BatchNorm → activation that alone uses its output.
    """

    def __init__(self, activations: Mapping[nn.Module, nn.Module]) -> None:
        self._pairs = {norm: act for norm, act in activations.items() if type(act) is nn.SiLU}
        self._siblings: dict[nn.Module, tuple[nn.Module | None, ...]] = {}
        self._parents: dict[nn.Module, nn.Module] = {}
        self._forwards: dict[nn.Module, Callable[..., Any]] = {}  # of the parents, when the pairs were found

    def find(self, modules: Sequence[nn.Module]) -> None:
        """Look for the pairs among the modules of the model, which may have been replaced."""
        parents = {child: module for module in modules for child in module._modules.values() if child is not None}
        siblings = {child: tuple(parent._modules.values()) for child, parent in parents.items()}
        if before := self._siblings:  # beside what was replaced, an activation may follow another layer now
            self._pairs = {norm: act for norm, act in self._pairs.items() if before.get(norm) == siblings.get(norm)}
        else:
            self._forwards = {norm: parents[norm].forward for norm in self._pairs if norm in parents}
        self._siblings, self._parents = siblings, parents

    def unwatched(self) -> dict[nn.Module, nn.Module]:
        """Return the pairs for which no code of the user's own comes between BatchNorm and activation now."""
        if not module_of(nn.SiLU.forward).startswith("torch."):
            return {}
        return {norm: act for norm, act in self._pairs.items() if self._is_unchanged(norm) and not _watched(norm, act)}

    def _is_unchanged(self, norm: nn.Module) -> bool:
        """Return whether the layer that calls a pair has the forward pass that it had at first."""
        parent = self._parents.get(norm)
        return parent is None or parent.forward == self._forwards.get(norm)


def _watched(norm: nn.Module, activation: nn.Module) -> bool:
    """Return whether a user's code would see the tensor between a BatchNorm and its activation, or its gradient."""
    return "forward" in vars(activation) or any(
        (
            norm._forward_hooks, norm._backward_hooks, norm._backward_pre_hooks,
            activation._forward_pre_hooks, activation._forward_hooks,
            activation._backward_hooks, activation._backward_pre_hooks,
        )
    )  # fmt: skip
