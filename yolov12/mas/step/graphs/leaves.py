"""Leaves of autograd for a capture: other tensors than the parameters, in the same memory."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import nn

__all__ = ["Leaves"]


class Leaves:
    """Stand in for the parameters of a model while it is captured.

    Autograd keeps one last node per parameter while any graph has it, and the stream on which the node was made waits
    for its gradient. Autocast's copies of weights are such graphs, and they live as long as its context. Their nodes
    are those of the default stream, which must not wait for a capture ("operation would make the legacy stream depend
    on a capturing blocking stream", https://github.com/pytorch/pytorch/issues/164302). The nodes of other leaves are
    made in the capture, whatever else has those of the parameters.

    Args:
        model: Model.
        parameters: Those of its parameters that get gradients.
    """

    def __init__(self, model: nn.Module, parameters: Sequence[nn.Parameter]) -> None:
        self.parameters = list(parameters)
        """Parameters of the model."""
        self.leaves = [nn.Parameter(parameter.detach()) for parameter in parameters]
        """Leaf for each parameter."""
        leaf_of = dict(zip(self.parameters, self.leaves, strict=True))
        self._places: list[tuple[dict[str, Any], str, nn.Parameter, nn.Parameter]] = [
            (module._parameters, name, parameter, leaf_of[parameter])
            for module in model.modules()
            for name, parameter in module._parameters.items()
            if parameter is not None and parameter in leaf_of
        ]

    @contextmanager
    def within(self) -> Iterator[None]:
        """Let the model use the leaves inside the context, and its parameters after it."""
        for held, name, _, leaf in self._places:
            held[name] = leaf
        try:
            yield
        finally:
            for held, name, parameter, _ in self._places:
                held[name] = parameter
