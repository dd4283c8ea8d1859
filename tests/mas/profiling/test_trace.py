"""Bytes of tensors, compared with counts by hand."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

from yolov12.mas.profiling.trace import ByteTrace, rounded

KIB = 1024


def floats(kib: int) -> torch.Tensor:
    return torch.empty(kib * KIB // 4)


def test_blocks_of_512_bytes():
    assert [rounded(size) for size in (0, 1, 512, 513)] == [0, 512, 512, 1024]
    with ByteTrace() as trace:
        kept = torch.empty(1)
    assert trace.allocated_bytes == 512, kept


def test_what_is_freed_is_subtracted_and_the_peak_is_since_the_mark():
    with ByteTrace() as trace:
        one = floats(3)
        two = floats(2)
        del one
        assert (trace.allocated_bytes, trace.peak_bytes()) == (2 * KIB, 5 * KIB)
        assert trace.mark() == 2 * KIB
        assert trace.peak_bytes() == 2 * KIB
        three = floats(1)
    assert trace.peak_bytes() == 3 * KIB
    del two, three
    assert trace.allocated_bytes == 0


def test_views_and_tensors_from_before_do_not_count():
    before = floats(8)
    with ByteTrace() as trace:
        views = before[1:], before.view(2, -1), before.detach(), before.mul_(2), nn.Parameter(before)
        assert trace.allocated_bytes == 0, views
        made = floats(4)
        view = made[:1]
        del made
        assert trace.allocated_bytes == 4 * KIB, view
        del view
        assert trace.allocated_bytes == 0


def test_tensors_made_from_python_values_and_resized_ones_count():
    with ByteTrace() as trace:
        listed = torch.tensor([1.0] * 256)
        assert trace.allocated_bytes == KIB, listed
        listed.resize_(512)
        assert trace.allocated_bytes == 2 * KIB


@pytest.mark.parametrize("fake", [False, True])
def test_convolution_norm_and_activation_forward_and_backward(fake):
    with FakeTensorMode(allow_non_fake_inputs=True) if fake else torch.enable_grad():
        conv, norm = nn.Conv2d(1, 4, 3, padding=1, bias=False), nn.BatchNorm2d(4)
        image = torch.rand(2, 1, 16, 16)
        with ByteTrace() as trace:
            out = F.silu(norm(conv(image)))
            # 8 KiB each for the outputs of convolution, BatchNorm and activation; BatchNorm's mean and deviation.
            assert trace.allocated_bytes == 3 * 8 * KIB + 2 * 512
            total = out.sum()
            trace.mark()
            total.backward()
            # In BatchNorm's backward pass: `out`; BatchNorm's input; the gradients of its output, input, weight and
            # bias; its mean and deviation; `total` and its gradient, a single 1 (expanded for the sum, which takes no
            # bytes).
            assert trace.peak_bytes() == 4 * 8 * KIB + 2 * 512 + 2 * 512 + 2 * 512
            gradients = 3 * 512  # 36 weights of the convolution, twice four of BatchNorm
            del total
            assert trace.allocated_bytes == 8 * KIB + gradients  # `out`
            del out
            assert trace.allocated_bytes == gradients


def test_a_fake_pass_counts_what_a_real_one_does():
    def run(mode: torch.utils._python_dispatch.TorchDispatchMode) -> list[int]:
        with mode if mode is not None else torch.enable_grad():
            torch.manual_seed(0)
            model = nn.Sequential(
                nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.SiLU(inplace=True), nn.MaxPool2d(2), nn.Conv2d(8, 4, 1)
            )
            with ByteTrace() as trace, torch.autocast("cpu", torch.bfloat16):
                out = model(torch.rand(2, 3, 32, 32))
                after_forward = trace.allocated_bytes
                out.float().pow(2).sum().backward()
            return [after_forward, trace.peak_bytes(), trace.allocated_bytes]

    assert run(FakeTensorMode()) == run(None)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_backward_on_a_gpu_is_followed_and_agrees_with_the_allocator():
    layer = nn.Linear(1024, 1024, bias=False, device="cuda")  # with a bias, cuBLAS would allocate memory in each call
    image = torch.rand(1024, 1024, device="cuda")
    layer(image).relu().sum().backward()  # cuBLAS allocates its workspace here
    layer.zero_grad()
    torch.cuda.synchronize()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    with ByteTrace() as trace:
        layer(image).relu().sum().backward()
    assert trace.allocated_bytes == torch.cuda.memory_allocated() - before
    assert trace.peak_bytes() == torch.cuda.max_memory_allocated() - before
