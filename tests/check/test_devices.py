"""Parsing `device=` and resolving it to PyTorch devices."""

from dataclasses import replace

import pytest

from yolov12.check.devices import parse_device, resolve_device
from yolov12.errors import ConfigError

GIB = 2**30


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", ()),
        ("None", ()),
        ("CPU", "cpu"),
        ("mps:0", "mps"),
        ("0", (0,)),
        ("cuda", (0,)),
        ("cuda:1", (1,)),
        ("[0, 1]", (0, 1)),
        ("0,,01", (0, 1)),
        ("-1,-1", (-1, -1)),
    ],
)
def test_device_grammar(text, wanted):
    assert parse_device(text) == wanted


@pytest.mark.parametrize("text", ["gpu", "0;1", "-2", "cuda:x", "0,cpu", "1,1", "xpu"])
def test_malformed_device(text):
    with pytest.raises(ConfigError, match="device="):
        parse_device(text)


def test_device_resolution(h100):
    gpus = [h100, replace(h100, index=1, free_bytes=80 * GIB), replace(h100, index=None)]
    assert resolve_device((), gpus, None) == ("cuda:0",)
    assert resolve_device((-1,), gpus, None) == ("cuda:1",)
    assert resolve_device((-1, 1), gpus, None) == ("cuda:0", "cuda:1")
    assert resolve_device((-1,), [], None) == ("cpu",)
    # Ultralytics also accepts the numbers in CUDA_VISIBLE_DEVICES.
    assert resolve_device((5,), gpus, "4,5") == ("cuda:1",)
    assert resolve_device((1,), gpus, "4,1") == ("cuda:1",)
    assert resolve_device((7,), gpus, None) == ("cuda:7",)
