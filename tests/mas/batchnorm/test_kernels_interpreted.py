"""The BatchNorm kernels on the CPU, compared with PyTorch's BatchNorm group by group."""

import dataclasses
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from tests.interpreter import run_on_cpu
from yolov12.mas.batchnorm import fused, launch_grid
from yolov12.mas.batchnorm import kernels as batchnorm_kernels


@pytest.fixture
def kernels(monkeypatch):
    """Return the module that runs the kernels, which are on the CPU here."""
    run_on_cpu(monkeypatch, batchnorm_kernels, _sigmoid=torch.sigmoid)
    # Several blocks, also of small tensors, and several programs.
    monkeypatch.setattr(fused, "_SUMS", dataclasses.replace(fused._SUMS, values=128, unroll=2, programs=4))
    monkeypatch.setattr(fused, "_EACH", dataclasses.replace(fused._EACH, values=256))
    monkeypatch.setattr(fused, "_grids", fused._grids.__wrapped__)
    monkeypatch.setattr(launch_grid, "stream", lambda device: 0)
    monkeypatch.setattr(launch_grid, "_scratches", {})
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    return fused


@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize(("sizes", "channels", "side"), [((3, 1, 2), 5, 7), ((1, 4), 70, 3), ((2,), 16, 6)])
def test_statistics_outputs_and_gradients_are_those_of_each_group(kernels, sizes, channels, side, silu):
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), channels, side, side) * 3 + 10 * torch.randn(channels, 1, 1)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight, bias = torch.randn(2, channels)
    weight, bias, slope = weight.requires_grad_(), bias.requires_grad_(), torch.randn_like(x)
    rows = torch.full((2, len(sizes), channels + 7), float("nan"))
    means, variances = rows[..., 3 : 3 + channels]
    out, again = kernels.batch_norm(x, weight, bias, means, variances, sizes, 1e-3, silu)
    assert torch.equal(again(x.detach()), out)
    found = (out, *torch.autograd.grad(out, (x, weight, bias), slope))
    wide = torch.randn(len(x), side, side, channels + 5).permute(0, 3, 1, 2)
    part = wide[:, 2 : 2 + channels].copy_(slope)
    assert kernels.row_stride(part) == channels + 5  # a slice of a concatenation is read where it is
    out, _ = kernels.batch_norm(x, weight, bias, means, variances, sizes, 1e-3, silu)
    found_again = torch.autograd.grad(out, (x, weight, bias), part)
    assert all(torch.equal(one, other) for one, other in zip(found[1:], found_again, strict=True))

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    parts, statistics = [], torch.zeros(2, len(sizes), channels, dtype=torch.float64)
    for group, part in enumerate(exact[0].split(sizes)):
        parts.append(F.batch_norm(part, *statistics[:, group], *exact[1:], True, 1.0, 1e-3))
    reference = F.silu(torch.cat(parts)) if silu else torch.cat(parts)
    wanted = (reference, *torch.autograd.grad(reference, exact, slope.double()))
    for one, other in zip(found, wanted, strict=True):
        assert (one - other).norm() <= 1e-5 * other.norm()
    torch.testing.assert_close(torch.stack((means, variances)).double(), statistics, rtol=1e-5, atol=1e-5)
    assert rows[..., :3].isnan().all()
    assert rows[..., 3 + channels :].isnan().all()


@pytest.mark.parametrize(("silu", "adds", "first"), [(True, True, None), (False, True, 0), (True, False, 2)])
@pytest.mark.parametrize(("sizes", "channels", "side"), [((3, 1, 2), 5, 7), ((1, 4), 70, 3)])
def test_a_residual_a_slice_and_what_is_beside_it(kernels, sizes, channels, side, silu, adds, first):
    torch.manual_seed(0)
    x, residual, slope = torch.randn(3, sum(sizes), channels, side, side)
    x, residual = (each.contiguous(memory_format=torch.channels_last).requires_grad_() for each in (x, residual))
    weight, bias = torch.randn(2, channels)
    leaves = x, weight.requires_grad_(), bias.requires_grad_(), *[residual] * adds
    rows = torch.empty(2, len(sizes), channels)
    wide = torch.full((len(x), side, side, channels + 5), 7.0).permute(0, 3, 1, 2)
    out, tail = kernels.batch_norm_into(
        x, weight, bias, *rows, sizes, 1e-3, silu, residual if adds else None, wide.data[:, 3 : 3 + channels], first
    )
    plain, _ = kernels.batch_norm(x, weight, bias, *rows, sizes, 1e-3, silu)
    wanted = plain + residual if adds else plain
    assert torch.equal(out, wanted)
    assert torch.equal(wide[:, 3 : 3 + channels], wanted)
    assert (wide[:, :3] == 7).all()
    assert (wide[:, 3 + channels :] == 7).all()
    results, slopes = [out], [slope]
    if first is not None:
        assert torch.equal(tail, wanted[:, first:])
        assert tail.is_contiguous(memory_format=torch.channels_last)
        results.append(tail), slopes.append(torch.randn_like(tail))
        slope = slope.clone()
        slope[:, first:] += slopes[1]
    found = torch.autograd.grad(results, leaves, slopes)
    for one, other in zip(found, torch.autograd.grad(wanted, leaves, slope), strict=True):
        torch.testing.assert_close(one, other)


def test_deterministic_mode_fills_nothing(kernels, monkeypatch):
    """PyTorch's default in this mode is a launch and a pass over memory for every new tensor."""
    mode, fills, launch = torch.utils.deterministic, [], launch_grid.launch

    def look_and_launch(*arguments):
        fills.append(mode.fill_uninitialized_memory)
        launch(*arguments)

    monkeypatch.setattr(launch_grid, "launch", look_and_launch)
    x = torch.randn(2, 4, 3, 3).contiguous(memory_format=torch.channels_last).requires_grad_()
    rows = torch.empty(2, 1, 4)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        out, again = kernels.batch_norm(x, torch.ones(4), torch.zeros(4), *rows, (2,), 1e-3, True)
        assert torch.equal(again(x.detach()), out)
        out.sum().backward()
        assert mode.fill_uninitialized_memory
    finally:
        torch.use_deterministic_algorithms(False)
    assert fills == [False] * 5


@pytest.mark.parametrize(
    ("x", "stride"),
    [
        (torch.empty(2, 3, 4, 5).contiguous(memory_format=torch.channels_last), 3),
        (torch.empty(2, 4, 5, 8).permute(0, 3, 1, 2)[:, 2:5], 8),
        (torch.empty(1, 1, 1, 8).permute(0, 3, 1, 2)[:, 2:5], 3),
        (torch.empty(2, 3, 4, 5), None),
        (torch.empty(2, 4, 6, 8).permute(0, 3, 1, 2)[:, 2:5, :, :5], None),
        (torch.empty(4, 4, 5, 8).permute(0, 3, 1, 2)[::2], None),
        (torch.empty(1, 1, 1, 1).expand(2, 3, 4, 5), None),
    ],
)
def test_layouts_that_are_read_where_they_are(x, stride):
    assert fused.row_stride(x) == stride
