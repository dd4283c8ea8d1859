from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from torch import nn
from ultralytics.utils import ROOT, YAML

from yolov12.errors import UntrustedWeightsError
from yolov12.models import weights

ROWS: dict[str, Any] = {"backbone": [[-1, 1, "Conv", [8, 3, 2]]], "head": [[[0], 1, "Detect", ["nc"]]]}

CODE = "__import__('os').system('touch CANARY')"


@pytest.mark.parametrize("file", sorted((ROOT / "cfg" / "models").rglob("*.yaml")), ids=lambda file: file.stem)
def test_every_yaml_of_ultralytics_passes(file: Path) -> None:
    weights.check_yaml(YAML.load(file))


@pytest.mark.parametrize(
    "activation", ["nn.SiLU()", " torch.nn.LeakyReLU(0.1)", "nn.LeakyReLU(negative_slope=-0.1, inplace=True)", "", None]
)
def test_activations_that_are_layers_pass(activation: str | None) -> None:
    weights.check_yaml({**ROWS, "activation": activation})


@pytest.mark.parametrize(
    "activation",
    [
        CODE,
        "nn.SiLU",
        "nn.SiLU()()",
        "nn.SiLU() or exec('x')",
        "nn.LeakyReLU(exec('x'))",
        "nn.LeakyReLU(*[exec('x')])",
        "nn.LeakyReLU(**{'inplace': exec('x')})",
        "nn.LeakyReLU(negative_slope=(lambda: 0)())",
        "nn.init.zeros_(1)",
        "nn.functional.relu(1)",
        "nn.SiLU().__class__.__init__.__globals__.get('x')",
        "torch.load('x')",
        "torch.nn.modules.activation.SiLU()",
        "os.nn.SiLU()",
        "SiLU()",
        "nn.SiLU(); x",
        "(" * 500,
        b"nn.SiLU()",
        compile("1", "x", "eval"),
    ],
)
def test_other_activations_are_refused(activation: Any) -> None:
    with pytest.raises(UntrustedWeightsError, match="activation"):
        weights.check_yaml({**ROWS, "activation": activation})


@pytest.mark.parametrize(
    "layer",
    ["check_requirements", "load_checkpoint", "Path", "torch", "nn.init", "nn.functional", "nn.modules.conv.Conv2d",
     "torchvision.ops.nms", "torchvision.ops.boxes", "os.system", "Convolution", "__builtins__", "nn.", 3, None],
)  # fmt: skip
@pytest.mark.parametrize("part", ["backbone", "head"])
def test_rows_that_name_no_layer_are_refused(part: str, layer: Any) -> None:
    with pytest.raises(UntrustedWeightsError, match=f"Row 1 of '{part}'"):
        weights.check_yaml({**ROWS, part: [*ROWS[part], [-1, 1, layer, []]]})


@pytest.mark.parametrize("rows", [None, "Conv", nn.ModuleList(), [["Conv"]], [[-1, 1, "Conv", "x"]]])
def test_a_yaml_of_another_shape_is_refused(rows: Any) -> None:
    with pytest.raises(UntrustedWeightsError):
        weights.check_yaml({**ROWS, "head": rows})
