"""Checks a model yaml before Ultralytics evaluates it.

`ultralytics.nn.tasks.parse_model` passes `activation` to `eval`, and calls any global that the row of a layer names.
The yaml may come from an untrusted weight file, so both are checked first.
"""

from __future__ import annotations

import ast
import importlib
from collections.abc import Mapping
from typing import Any

from torch import nn

from yolov12.errors import UntrustedWeightsError


def check_yaml(model_yaml: Mapping[str, Any]) -> None:
    """Check that building a model from a yaml runs only constructors of layers.

    Types are compared exactly, because a subclass of `str` or `list` could show `parse_model` another content.

    Args:
        model_yaml: A parsed model yaml: `activation` (optional), and `backbone` and `head`, whose rows are
            [from, number, module, arguments].

    Raises:
        UntrustedWeightsError: `activation` is not a call of a `torch.nn` class with literal arguments, or a row does
            not name a layer.
    """
    activation = model_yaml.get("activation")
    if activation and not _is_activation(activation):
        raise UntrustedWeightsError(
            f"The model yaml has activation {activation!r:.120}, which is not a torch.nn class called with plain "
            "values. It was not run. Write it like 'nn.SiLU()' or 'nn.LeakyReLU(0.1)'."
        )
    for part in ("backbone", "head"):
        rows = model_yaml.get(part)
        for number, row in enumerate(rows if type(rows) is list else [rows]):
            if type(row) not in (list, tuple) or len(row) != 4 or not _is_layer(row[2]) or type(row[3]) is not list:
                raise UntrustedWeightsError(
                    f"Row {number} of '{part}' in the model yaml is {row!r:.120}, which is not [from, number, layer, "
                    "[arguments]] with a layer that Ultralytics, torch.nn or torchvision.ops has. It was not built."
                )


def _is_activation(text: Any) -> bool:
    try:
        call = ast.parse(text.lstrip(" \t"), mode="eval").body if type(text) is str else None
        if not isinstance(call, ast.Call) or not isinstance(call.func, ast.Attribute):
            return False
        for value in (*call.args, *(keyword.value for keyword in call.keywords)):
            ast.literal_eval(value)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return False
    return ast.unparse(call.func.value) in ("nn", "torch.nn") and _is_module_class(getattr(nn, call.func.attr, None))


def _is_layer(name: Any) -> bool:
    if type(name) is not str:
        return False
    if name.startswith("nn."):
        return _is_module_class(getattr(nn, name[3:], None))
    if name.startswith("torchvision.ops."):
        ops = importlib.import_module("torchvision.ops")
        return _is_module_class(getattr(ops, name[16:], None))
    from ultralytics.nn import tasks

    return _is_module_class(vars(tasks).get(name))


def _is_module_class(found: Any) -> bool:
    return isinstance(found, type) and issubclass(found, nn.Module)
