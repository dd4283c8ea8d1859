"""The kernels that normalise several groups at once, compared with PyTorch's BatchNorm group by group."""

from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yolov12.mas.batchnorm import fused as batchnorm_kernels
from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.scheduling.groups import split_groups

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here"),
]

SHAPES = [
    ((8, 8), 64, 40),
    ((3, 2, 3), 24, 20),
    ((1, 1), 512, 5),
    ((16, 15), 3, 33),
    ((32,) * 4, 128, 80),
    ((2, 2), 1, 1),
]


def by_group(x, weight, bias, sizes, eps):
    means, variances = [], []
    out = []
    for part in x.split(sizes):
        mean, variance = torch.zeros(2, x.shape[1], device="cuda", dtype=x.dtype)
        out.append(F.batch_norm(part, mean, variance, weight, bias, True, 1.0, eps))
        means.append(mean), variances.append(variance)
    return torch.cat(out), torch.stack(means), torch.stack(variances)


def off(a, b):
    a, b = a.detach(), b.detach()
    return float((a.double() - b.double()).norm() / b.double().norm().clamp(min=1e-30))


@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 2e-3), (torch.bfloat16, 1e-2), (torch.float32, 1e-5)])
@pytest.mark.parametrize(("sizes", "channels", "side"), SHAPES)
@pytest.mark.parametrize("silu", [False, True])
def test_same_as_group_by_group_in_float64(sizes, channels, side, dtype, tolerance, silu):
    torch.manual_seed(0)
    x = torch.randn(sum(sizes), channels, side, side, device="cuda") * 3
    x = (x + 10 * torch.randn(channels, 1, 1, device="cuda")).to(dtype)
    x = x.contiguous(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(channels, device="cuda", requires_grad=True)
    bias = torch.randn(channels, device="cuda", requires_grad=True)
    grad = torch.randn_like(x)
    rows = torch.full((2, len(sizes), channels + 7), float("nan"), device="cuda")[..., 3 : 3 + channels]
    out, again = batchnorm_kernels.batch_norm(x, weight, bias, rows[0], rows[1], sizes, 1e-3, silu)
    assert torch.equal(again(x.detach()), out)
    found = (out, *torch.autograd.grad(out, (x, weight, bias), grad))

    exact = [tensor.detach().double().requires_grad_() for tensor in (x, weight, bias)]
    reference, means, variances = by_group(*exact, sizes, 1e-3)
    reference = F.silu(reference) if silu else reference
    wanted = (reference, *torch.autograd.grad(reference, exact, grad.double()))
    assert out.dtype == dtype
    assert out.is_contiguous(memory_format=torch.channels_last)
    for name, a, b in zip(("output", "of x", "of weight", "of bias"), found, wanted, strict=True):
        if side * side * min(sizes) < 4 and name in ("of x", "of weight" if silu else ""):
            continue  # one or two values normalise to constants: the gradient is rounding noise
        assert off(a, b) < tolerance, name
    assert off(rows[0], means) < 1e-5
    if side * side * min(sizes) > 1:
        assert off(rows[1], variances) < 1e-4


@pytest.mark.parametrize("more", [64, 3])
def test_a_gradient_that_is_a_slice(more):
    torch.manual_seed(0)
    x = torch.randn(8, 64, 20, 20, device="cuda", dtype=torch.half).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 64, device="cuda")
    grad = torch.randn(8, 20, 20, 64 + more, device="cuda", dtype=torch.half).permute(0, 3, 1, 2)[:, more:]
    assert batchnorm_kernels.row_stride(grad) == 64 + more
    found = []
    for each in (grad, grad.contiguous(memory_format=torch.channels_last)):
        leaves = [tensor.clone().requires_grad_() for tensor in (x, weight, bias)]
        rows = torch.empty(2, 2, 64, device="cuda")
        out, _ = batchnorm_kernels.batch_norm(*leaves, rows[0], rows[1], (4, 4), 1e-3, True)
        found.append(torch.autograd.grad(out, leaves, each))
    assert all(off(a, b) < 1e-3 for a, b in zip(*found, strict=True))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
@pytest.mark.parametrize(
    ("channels", "first", "adds"), [(64, 0, True), (96, 32, False), (24, 3, False), (64, None, True)]
)
def test_a_residual_a_slice_and_what_is_beside_it(channels, first, adds, dtype):
    torch.manual_seed(0)
    x, residual = torch.randn(2, 8, channels, 20, 20, device="cuda", dtype=dtype)
    x, residual = (each.contiguous(memory_format=torch.channels_last).requires_grad_() for each in (x, residual))
    weight, bias = (each.requires_grad_() for each in torch.randn(2, channels, device="cuda"))
    leaves = x, weight, bias, *[residual] * adds
    rows = torch.empty(2, 2, channels, device="cuda")
    wide = torch.empty(8, 20, 20, channels + 32, device="cuda", dtype=dtype).permute(0, 3, 1, 2)
    part = wide.data[:, 16 : 16 + channels]
    out, tail = batchnorm_kernels.batch_norm_into(
        x, weight, bias, rows[0], rows[1], (4, 4), 1e-3, True, residual if adds else None, part, first
    )
    plain, _ = batchnorm_kernels.batch_norm(x, weight, bias, rows[0], rows[1], (4, 4), 1e-3, True)
    wanted = plain + residual if adds else plain
    results = [out] if first is None else [out, tail]
    slopes = [torch.randn_like(each) for each in results]
    slope = slopes[0].float().clone()  # in fp32, `float` returns the tensor itself
    if first is not None:
        assert off(tail, wanted[:, first:]) < 1e-3
        slope[:, first:] += slopes[1]
    assert off(out, wanted) < 1e-3
    found = torch.autograd.grad(results, leaves, slopes)
    for one, other in zip(found, torch.autograd.grad(wanted, leaves, slope.to(dtype)), strict=True):
        assert off(one, other) < (2e-3 if dtype is torch.half else 1e-5)


def test_repeats_bit_for_bit():
    x = torch.randn(64, 96, 40, 40, device="cuda", dtype=torch.half).contiguous(memory_format=torch.channels_last)
    weight, bias = torch.randn(2, 96, device="cuda")
    runs = []
    for _ in range(3):
        leaf = x.clone().requires_grad_()
        rows = torch.empty(2, 2, 96, device="cuda")
        out, _ = batchnorm_kernels.batch_norm(leaf, weight, bias, rows[0], rows[1], (32, 32), 1e-3, True)
        runs.append((out, rows, torch.autograd.grad(out.square().sum(), leaf)[0]))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_a_large_mean_cancels_nothing():
    x = 1000 + torch.randn(16, 8, 64, 64, device="cuda")
    x[0, :, 0, 0] = 2000  # an outlier, such as a padded corner
    x = x.contiguous(memory_format=torch.channels_last)
    rows = torch.empty(2, 2, 8, device="cuda")
    batchnorm_kernels.batch_norm(
        x, torch.ones(8, device="cuda"), torch.zeros(8, device="cuda"), rows[0], rows[1], (8, 8), 0.0
    )
    assert off(rows[1], torch.stack([part.double().var((0, 2, 3)) for part in x.split(8)])) < 1e-5


@pytest.mark.parametrize("fused", [False, True])
def test_layers_use_them_and_keep_the_same_statistics(monkeypatch, fused):
    monkeypatch.setattr(torch.backends.cudnn, "allow_tf32", False)
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(3, 16, 3), nn.BatchNorm2d(16), nn.SiLU(), nn.Conv2d(16, 8, 3), nn.BatchNorm2d(8))
    model = model.cuda().to(memory_format=torch.channels_last)
    x = torch.randn(20, 3, 32, 32, device="cuda").contiguous(memory_format=torch.channels_last)
    state = {key: value.clone() for key, value in model.state_dict().items()}
    results = []
    never = SimpleNamespace(applies=lambda *_: False)
    pairs = {model[1]: model[2]} if fused else None
    for plan, kernels in (
        ([split_groups(20, 8)], batchnorm_kernels),
        ([(size,) for size in split_groups(20, 8)], batchnorm_kernels),
        ([split_groups(20, 8)], never),
    ):
        model.load_state_dict(state)
        norms = GroupedBatchNorm(model, pairs, kernels)
        norms.begin()
        first, outs, start = 0, [], 0
        for groups in plan:
            with norms.within(groups, first):
                outs.append(model(x[start : start + sum(groups)]))
            first, start = first + len(groups), start + sum(groups)
        norms.commit(norms.averages(split_groups(20, 8), 20), 3)
        results.append((torch.cat(outs), {key: value.clone() for key, value in model.state_dict().items()}))
        assert norms.fused == fused * (kernels is not never)
    (a, buffers_a), *others = results
    for b, buffers_b in others:
        assert off(a, b) < 1e-5
        assert all(off(buffers_a[key], buffers_b[key]) < 1e-5 for key in buffers_a)
