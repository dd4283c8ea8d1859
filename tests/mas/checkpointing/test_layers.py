"""The layers that a checkpoint plan may name, and their names."""

import pytest
from torch import nn

from yolov12.errors import ConfigError
from yolov12.mas.checkpointing.layers import candidates, outermost
from yolov12.models.layer_names import layer_names


def block(channels=4):
    return nn.Sequential(nn.Conv2d(channels, channels, 1), nn.Sequential(nn.BatchNorm2d(channels), nn.SiLU()))


@pytest.fixture(scope="module")
def detector(tools):
    return tools.build("detect", "yolov12n.yaml")


def test_children_of_the_only_child_that_has_any():
    model = nn.Sequential(nn.Sequential(block(), block(), nn.Flatten()))
    assert list(candidates(model)) == ["0", "0.1", "1", "1.1", "2"]
    assert outermost(candidates(model)) == ["0", "1", "2"]


def test_names_are_those_of_the_yaml(detector):
    names = layer_names(detector)
    assert list(names)[:2] == ["backbone.0", "backbone.1"]
    assert list(names)[8:11] == ["backbone.8", "neck.0", "neck.1"]
    assert list(names)[-1] == "head"
    assert names["head"] is detector.model[-1]
    found = candidates(detector, names)
    assert found["backbone.2.cv1"] is detector.model[2].cv1
    assert found["head.cv2.0"] is detector.model[-1].cv2[0]
    assert "backbone.6.m" not in found  # a list, which is never called
    assert outermost(found) == list(names)


@pytest.mark.parametrize("name", ["backbone.4", "model.4"])
def test_layer_left_alone_is_no_candidate_nor_is_what_is_inside(detector, name):
    names = layer_names(detector)
    found = candidates(detector, names, [name])
    assert not any(each == "backbone.4" or each.startswith("backbone.4.") for each in found)
    assert found.keys() >= names.keys() - {"backbone.4"}


def test_layer_around_one_that_is_left_alone_is_no_candidate_either(detector):
    found = candidates(detector, layer_names(detector), ["backbone.4.cv1"])
    assert {"backbone.4", "backbone.4.cv1"}.isdisjoint(found)
    assert "backbone.4.cv2" in found


@pytest.mark.parametrize(
    ("name", "hint"),
    [("backbone.44", "Did you mean backbone.4"), ("nek.2", "Did you mean neck.2"), ("zzz", "Layers are backbone.0, ")],
)
def test_unknown_layer_is_refused_with_near_names(detector, name, hint):
    with pytest.raises(ConfigError, match=f"there is no layer '{name}'. {hint}"):
        candidates(detector, layer_names(detector), [name])
