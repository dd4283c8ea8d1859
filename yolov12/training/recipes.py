"""The official per-scale training values, for users who have not chosen their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parents[1] / "cfg" / "recipes.yaml"


def recipe_for(model_yaml: Mapping[str, Any], chosen: Collection[str]) -> dict[str, float]:
    """Values of the official recipe that the user has not set.

    Args:
        model_yaml: The model's yaml; its `yaml_file` tells a `yolov12*` model, its `scale` which recipe.
        chosen: Names of the arguments the user has set.

    Returns:
        Argument name → value; empty for any other model.
    """
    name = Path(str(model_yaml.get("yaml_file", ""))).name
    scale = model_yaml.get("scale")
    if not name.startswith("yolov12") or not scale:
        return {}
    from ultralytics.utils import YAML

    recipe: dict[str, float] = YAML.load(_FILE).get(scale, {})
    return {key: value for key, value in recipe.items() if key not in chosen}
