import pytest
import torch
from torch import nn

from yolov12.plan.roofline import Roofline


def test_the_longer_of_computing_and_moving():
    layers = {"product": nn.Linear(1000, 1000, bias=False), "sum": nn.Identity()}
    times = {}
    card = Roofline(teraflops=1, gigabytes_per_s=100)
    with torch.no_grad(), card, card.timing(layers, times):
        layers["product"](torch.rand(1000, 1000))
    # 2e9 operations at 0.45e9 a millisecond; 12 MB would be 0.27 ms.
    assert times["product"].device_ms == pytest.approx(2 / 0.45, rel=0.01)
    with card:
        before_ms = card.device_ms
        torch.add(torch.rand(1000), 1)
    assert card.device_ms - before_ms == pytest.approx(8e3 / 45e6, rel=0.01)
    assert "sum" not in times
