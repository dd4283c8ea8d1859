"""Tensors in nested containers are changed, and everything else stays as it was."""

from collections import OrderedDict
from typing import NamedTuple

import pytest
import torch
from torch import Tensor

from yolov12.mas.modules import each_tensor


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
