"""Official training values of each model scale, for users who have not chosen their own."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

_FILE = Path(__file__).parents[2] / "cfg" / "recipes.yaml"


def recipe_for(model_yaml: Mapping[str, Any], chosen: Collection[str]) -> tuple[str, dict[str, float]]:
    """Return the values of the official recipe that the user has not set.

    Args:
        model_yaml: Yaml of the model. `yaml_file` tells whether it is a `yolov12*` model; `scale` selects the recipe.
        chosen: Names of the arguments that the user has set.

    Returns:
        The scale letter, and argument name → value; both empty for any other model.
    """
    if not Path(str(model_yaml.get("yaml_file", ""))).name.startswith("yolov12"):
        return "", {}
    from ultralytics.utils import YAML

    scale = model_yaml.get("scale") or next(iter(model_yaml.get("scales", {})), "")  # as parse_model chooses
    recipe: dict[str, float] = YAML.load(_FILE).get(scale, {})
    return scale, {key: value for key, value in recipe.items() if key not in chosen}
