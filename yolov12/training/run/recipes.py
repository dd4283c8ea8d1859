"""The official per-scale training values, for users who have not chosen their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parents[2] / "cfg" / "recipes.yaml"


def recipe_for(model_yaml: Mapping[str, Any], chosen: Collection[str]) -> tuple[str, dict[str, float]]:
    """Values of the official recipe that the user has not set.

    Args:
        model_yaml: The model's yaml; its `yaml_file` tells a `yolov12*` model, its `scale` which recipe.
        chosen: Names of the arguments the user has set.

    Returns:
        The scale letter, and argument name → value; both empty for any other model.
    """
    if not Path(str(model_yaml.get("yaml_file", ""))).name.startswith("yolov12"):
        return "", {}
    from ultralytics.utils import YAML

    scale = model_yaml.get("scale") or next(iter(model_yaml.get("scales", {})), "")  # as parse_model chooses
    recipe: dict[str, float] = YAML.load(_FILE).get(scale, {})
    return scale, {key: value for key, value in recipe.items() if key not in chosen}
