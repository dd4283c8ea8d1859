import pytest
import torch
from torch import nn

from yolov12.plan.roofline import LayerTimes, Roofline


def test_the_longer_of_computing_and_moving():
    layer = nn.Sequential(nn.Linear(1000, 1000, bias=False), nn.SiLU())
    times = LayerTimes()
    card = Roofline(teraflops=1, gigabytes_per_s=100)
    with torch.no_grad(), card, card.timing({"both": layer}, [layer[1]], times):
        layer(torch.rand(1000, 1000))
    # Linear: 2e9 operations at 0.45e9 per ms (its 12 MB take only 0.27 ms). SiLU: 8 MB at 45e6 bytes per ms.
    assert times.whole["both"].device_ms == pytest.approx(2 / 0.45 + 8 / 45, rel=0.01)
    assert times.cheap["both"].device_ms == pytest.approx(8 / 45, rel=0.01)


def test_an_activation_that_layers_share_counts_where_it_runs():
    shared = nn.SiLU()
    layers = {"small": nn.Sequential(shared), "large": nn.Sequential(shared)}
    times = LayerTimes()
    card = Roofline(teraflops=1, gigabytes_per_s=100)
    with torch.no_grad(), card, card.timing(layers, [shared], times):
        layers["small"](torch.rand(1000))
        layers["large"](torch.rand(3000))
    assert times.cheap["large"].device_ms == pytest.approx(3 * times.cheap["small"].device_ms)
