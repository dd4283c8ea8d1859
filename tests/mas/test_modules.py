"""Tensors in nested containers are changed, and everything else stays as it was."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from yolov12.mas.modules import Structure, each_tensor, module_of


class Pair(NamedTuple):
    """A named tuple of any two objects."""

    first: object
    second: object


class Words(list):
    """List class of a user's own, which is not searched."""


WORDS = Words(["a"])


@pytest.mark.parametrize(
    ("nest", "changed"),
    [
        (torch.tensor(1), 2),
        ([torch.tensor(1), "a", 3], [2, "a", 3]),
        ((torch.tensor(1), (2.5, None, True)), (2, (2.5, None, True))),
        (OrderedDict(a=torch.tensor(1), b={"c": [torch.tensor(4)]}), {"a": 2, "b": {"c": [5]}}),
        (Pair(torch.tensor(1), b"x"), Pair(2, b"x")),
        (WORDS, WORDS),
    ],
)
def test_tensors_are_changed_wherever_they_are(nest, changed):
    found = each_tensor(nest, lambda tensor: int(tensor) + 1)
    assert found == changed
    assert type(found) in (type(changed), dict)


def test_other_leaves_can_be_asked_for():
    assert each_tensor(["a", (1, "b")], str.upper, str) == ["A", (1, "B")]
    assert isinstance(each_tensor([torch.tensor(1)], str.upper, str)[0], Tensor)


def _replace_parameter(model):
    model[0].weight = nn.Parameter(model[0].weight.detach().clone())


def _replace_layer(model):
    model[1][0] = nn.Conv2d(4, 4, 1)


def _add_layer(model):
    model.append(nn.ReLU())


def _remove_layer(model):
    del model[-1]


@pytest.mark.parametrize("change", [_replace_parameter, _replace_layer, _add_layer, _remove_layer])
def test_a_changed_structure_is_noticed_once(change):
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.Sequential(nn.Conv2d(4, 4, 1)), nn.ReLU())
    structure = Structure(model)
    assert not structure.changed()
    change(model)
    assert structure.changed()
    assert not structure.changed()


def test_the_module_of_code_without_one_is_nobodys():
    """`exec` gives functions the namespace that it is called with, which may have no name."""
    for names in ({}, {"__name__": None}, {"__name__": "ultralytics.engine"}):
        exec("def function(): ...\nclass Kind:\n    def method(self): ...", names)
        expected = names.get("__name__") or ""
        assert [module_of(each) for each in (names["function"], names["Kind"]().method)] == [expected] * 2
    function = type(module_of)(module_of.__code__, {})  # one whose namespace is empty
    assert module_of(function) == ""
