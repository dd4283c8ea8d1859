"""Layout of predictions: values, shapes and gradients are Ultralytics' own, and the loss has nothing to transpose."""

import pytest
import torch
from torch import nn
from ultralytics.nn.modules.head import Detect

from yolov12.models.predictions import anchors_first


class OwnDetect(Detect):
    """A head of a user's, which may look at its predictions."""


def head(kind=Detect):
    torch.manual_seed(0)
    return kind(nc=3, ch=(16, 24)).train().to(memory_format=torch.channels_last)


def maps():
    generator = torch.Generator().manual_seed(1)
    sizes = ((16, 6), (24, 3))
    found = [torch.randn(2, channels, side, side, generator=generator) for channels, side in sizes]
    return [each.contiguous(memory_format=torch.channels_last).requires_grad_() for each in found]


def test_values_and_gradients_are_ultralytics_own():
    found = []
    for wanted in (True, False):
        given, detect = maps(), head()
        with anchors_first(wanted):
            out = detect(given)
        read = [out[key].permute(0, 2, 1) for key in ("boxes", "scores")]
        assert all(each.is_contiguous() is wanted for each in read)
        sum(each.square().sum() for each in read).backward()
        assert all(one is two for one, two in zip(out["feats"], given, strict=True))
        found.append((*read, *(each.grad for each in (*given, *detect.cv2.parameters(), *detect.cv3.parameters()))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other)


@pytest.mark.parametrize("change", ["subclass", "hook", "hook on all modules", "evaluation", "outside"])
def test_whoever_may_see_predictions_gets_ultralytics_layout(change, monkeypatch):
    detect, seen = head(OwnDetect if change == "subclass" else Detect), []
    if change == "hook":
        detect.register_forward_hook(lambda module, inputs, out: seen.append(out))
    if change == "hook on all modules":
        hooks = nn.modules.module._global_forward_hooks
        monkeypatch.setitem(hooks, 0, lambda module, inputs, out: seen.append(out) if module is detect else None)
    if change == "evaluation":
        detect.stride = torch.tensor([8.0, 16.0])
        detect.eval()
    with anchors_first(change != "outside"):
        out = detect(maps())
    predictions = out[1] if change == "evaluation" else out
    assert predictions["boxes"].is_contiguous()
    assert predictions["scores"].is_contiguous()
    assert bool(seen) is ("hook" in change)
