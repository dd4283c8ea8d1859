import pytest
import torch
from torch import nn

from yolov12.plan.roofline import Roofline, Times


def test_the_longer_of_computing_and_moving():
    layer = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.SiLU())
    times = Times()
    card = Roofline(teraflops=1, gigabytes_per_s=100)
    with torch.no_grad(), card, card.timing({"both": layer}, [layer[1]], times):
        layer(torch.rand(1000, 1000))
    # 2e9 operations at 0.45e9 a millisecond, where the 12 MB would be 0.27 ms; 8 MB at 45e6 bytes a millisecond.
    assert times.whole["both"].device_ms == pytest.approx(2 / 0.45 + 8 / 45, rel=0.01)
    assert times.cheap["both"].device_ms == pytest.approx(8 / 45, rel=0.01)


def test_an_activation_that_layers_share_counts_where_it_runs():
    shared = nn.SiLU()
    layers = {"small": nn.Sequential(shared), "large": nn.Sequential(shared)}
    times = Times()
    card = Roofline(teraflops=1, gigabytes_per_s=100)
    with torch.no_grad(), card, card.timing(layers, [shared], times):
        layers["small"](torch.rand(1000))
        layers["large"](torch.rand(3000))
    assert times.cheap["large"].device_ms == pytest.approx(3 * times.cheap["small"].device_ms)
