"""Both YOLOv12 layouts, turbo and v1, in Ultralytics' own classes.

Checkpoints must hold stock classes only, so there is no class `TurboAttention`. `AAttn` and `A2C2f` stay the stock
classes and get another `__init__` and `forward`. The submodules of an instance tell its layout.

turbo  official weights since 2025: `qk` and `v` projections, 5x5 `pe` on v, MLP ratio 1.5 for scales l and x
v1     the paper and Ultralytics' `yolo12`: one `qkv` projection, 7x7 `pe` on v, MLP ratio 1.2 for scales l and x

Source: https://github.com/sunsmarterjie/yolov12 and https://arxiv.org/abs/2502.12524
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from yolov12.errors import ConfigError
from yolov12.models.attention import attention
from yolov12.models.blocks import joins, normalized
from yolov12.models.yaml_check import check_yaml

TURBO, V1 = "turbo", "v1"
TURBO_MLP_RATIO = 1.5
MODEL_DIR = Path(__file__).parents[1] / "cfg" / "models"

_MODEL_YAML = re.compile(r"(?P<family>yolov12)(?P<scale>[nsmlx])?(?P<variant>-v1)?\.ya?ml")
_building: ContextVar[str] = ContextVar("yolov12_layout", default=V1)


def layout_of(model_yaml: Mapping[str, Any]) -> str:
    """Find the layout that a model yaml describes.

    The `layout` key decides. The official yamls do not have it: in the turbo one, the first strided convolutions are
    grouped, in the v1 one they are not.

    Args:
        model_yaml: A parsed model yaml.

    Returns:
        `turbo` or `v1`.

    Raises:
        ConfigError: The `layout` key has another value.
    """
    if layout := model_yaml.get("layout"):
        if layout not in (TURBO, V1):
            raise ConfigError(
                f"layout: {layout} in the model yaml is not known. Write {TURBO} or {V1}, or leave it out"
            )
        return str(layout)
    early = [args for _, _, module, args in model_yaml.get("backbone", [])[:5] if module == "Conv"]
    return TURBO if any(len(args) > 4 and args[4] != 1 for args in early) else V1


def mark_layout(model: nn.Module) -> None:
    """Write the layout of a loaded model into its yaml, so that a rebuilt model has the same layout."""
    kinds = {TURBO if hasattr(m, "qk") else V1 for m in model.modules() if type(m).__name__ == "AAttn"}
    if kinds and isinstance(model_yaml := getattr(model, "yaml", None), dict):
        model_yaml["layout"] = TURBO if TURBO in kinds else V1


@contextmanager
def building(layout: str) -> Iterator[None]:
    """Build new `AAttn` and `A2C2f` modules with this layout, `turbo` or `v1`, inside the `with` block."""
    token = _building.set(layout)
    try:
        yield
    finally:
        _building.reset(token)


def packaged_yaml(path: str | Path) -> tuple[Path, str] | None:
    """Find the model yaml of this package for a name such as `yolov12s.yaml` or `yolov12s-v1.yaml`.

    Args:
        path: The name that a user gave as `model=`.

    Returns:
        The file and the scale letter, which is empty if the name has none. None for any other name, and if the current
        folder has a file of this name, with or without the scale letter: that file has priority.
    """
    match = _MODEL_YAML.fullmatch(str(path))
    if match is None:
        return None
    own = f"{match['family']}{match['variant'] or ''}.yaml"
    if Path(path).exists() or Path(own).exists():
        return None
    return MODEL_DIR / own, match["scale"] or ""


def parse_model(stock: Callable[..., Any], /, d: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
    """Run Ultralytics' `parse_model` on a checked yaml, so that modules get the layout that it describes.

    Args:
        stock: Ultralytics' own function.
        d: The model yaml.
        args: Positional arguments for `stock`.
        kwargs: Keyword arguments for `stock`.

    Raises:
        ConfigError: The `layout` key names no layout.
        UntrustedWeightsError: Building the model could run more than constructors of layers.
    """
    check_yaml(d)
    with building(layout_of(d)):
        return stock(d, *args, **kwargs)


def yaml_model_load(stock: Callable[..., Any], /, path: Any) -> Any:
    """Run Ultralytics' `yaml_model_load`, or read the model yaml of this package for names such as `yolov12s.yaml`.

    Args:
        stock: Ultralytics' own function.
        path: Name or path of a model yaml.
    """
    found = packaged_yaml(path)
    if found is None:
        return stock(path)
    from ultralytics.utils import YAML

    file, scale = found
    return {**YAML.load(file), "scale": scale, "yaml_file": str(path)}


def attention_init(stock_init: Callable[..., None]) -> Callable[..., None]:
    """Return an `AAttn.__init__` that builds the turbo layout inside `building(TURBO)` and else calls the stock one."""

    def init(self: Any, dim: int, num_heads: int, area: int = 1) -> None:
        if _building.get() != TURBO:
            stock_init(self, dim, num_heads, area)
            return
        from ultralytics.nn.modules.conv import Conv

        nn.Module.__init__(self)
        self.area, self.num_heads, self.head_dim = area, num_heads, dim // num_heads
        self.all_head_dim = hidden = self.head_dim * num_heads
        self.qk = Conv(dim, hidden * 2, 1, act=False)
        self.v = Conv(dim, hidden, 1, act=False)
        self.proj = Conv(hidden, dim, 1, act=False)
        self.pe = Conv(hidden, dim, 5, 1, 2, g=dim, act=False)

    return init


def a2c2f_init(stock_init: Callable[..., None]) -> Callable[..., None]:
    """Return an `A2C2f.__init__` that sets the MLP ratio 1.5 for scales l and x of the turbo layout.

    Only these scales are residual. Ultralytics gives them 1.2.
    """

    def init(
        self: Any,
        c1: int,
        c2: int,
        n: int = 1,
        a2: bool = True,
        area: int = 1,
        residual: bool = False,
        mlp_ratio: float = 2.0,
        *args: Any,
        **kwargs: Any,
    ) -> None:
        if residual and _building.get() == TURBO:
            mlp_ratio = TURBO_MLP_RATIO
        stock_init(self, c1, c2, n, a2, area, residual, mlp_ratio, *args, **kwargs)

    return init


def attention_forward(stock_forward: Callable[..., Tensor]) -> Callable[..., Tensor]:
    """Return an `AAttn.forward` for both layouts.

    Training v1 on the CPU calls the stock method, so the weights equal those of stock Ultralytics bit for bit.
    """

    def forward(self: Any, x: Tensor) -> Tensor:
        if self.training and x.device.type == "cpu" and x.is_contiguous() and not hasattr(self, "qk"):
            return stock_forward(self, x)
        return _attention_forward(self, x)

    return forward


def add_attention(block: Any, x: Tensor) -> Tensor:
    """Return x + attention of x for Ultralytics' `AAttn`. Shapes: (batch, channels, height, width)."""
    if joins(block.proj):
        return _attention_forward(block, x, residual=x)
    return x + block(x)  # type: ignore[no-any-return]


def _attention_forward(self: Any, x: Tensor, residual: Tensor | None = None) -> Tensor:
    """Map (batch, channels, height, width) to the same shape. `area` must divide height × width."""
    batch, _, height, width = x.shape
    tokens = height * width
    heads, head_dim = self.num_heads, self.head_dim

    def split_heads(y: Tensor, *parts: int) -> Tensor:
        # Fused kernels need the channels of a head to be contiguous. In channels_last they already are.
        return y.flatten(2).transpose(1, 2).contiguous().view(batch * self.area, tokens // self.area, *parts)

    def to_image(y: Tensor) -> Tensor:
        y = y.reshape(batch, height, width, heads * head_dim).permute(0, 3, 1, 2)
        return y if x.is_contiguous(memory_format=torch.channels_last) else y.contiguous()

    if hasattr(self, "qk"):
        v_image = self.v(x)
        q, k = split_heads(self.qk(x), 2, heads, head_dim).unbind(2)
        v = split_heads(v_image, heads, head_dim)
    else:
        q, k, v = split_heads(self.qkv(x), heads, 3 * head_dim).split(head_dim, dim=3)
        v_image = to_image(v)
    return normalized(self.proj, normalized(self.pe, v_image, to_image(attention(q, k, v))), residual)
