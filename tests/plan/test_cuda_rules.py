"""Autocast dtypes and tensors of fused attention, as on a GPU."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from yolov12.mas.profiling.trace import ByteTrace
from yolov12.plan.cuda_rules import HALF, cuda_rules


@pytest.mark.parametrize(
    ("operation", "dtype"),
    [
        (lambda x: F.conv2d(x, torch.rand(4, 4, 1, 1)), HALF),
        (lambda x: x @ x.transpose(-1, -2), HALF),
        (lambda x: x.to(HALF).softmax(1), torch.float32),
        (lambda x: x.to(HALF).sum(), torch.float32),
        (lambda x: x.to(HALF) ** 2, torch.float32),
        (lambda x: x.to(HALF).clone().pow_(2), HALF),
        (lambda x: torch.cat((x, x.to(HALF))), torch.float32),
        (lambda x: F.silu(x.to(HALF)), HALF),
        (lambda x: F.binary_cross_entropy_with_logits(x.to(HALF), x), torch.float32),
    ],
)
def test_dtypes(operation, dtype):
    x = torch.rand(1, 4, 8, 8)
    with cuda_rules():
        assert operation(x).dtype == dtype
    with cuda_rules(amp=False):
        assert operation(x).dtype in (torch.float32, HALF)


def test_a_weight_is_cast_once_and_gets_its_gradient():
    layer = nn.Conv2d(4, 4, 1, bias=False)
    with cuda_rules() as rules:
        layer(layer(torch.rand(1, 4, 8, 8))).sum().backward()
        assert rules.copies_bytes == 512
    assert layer.weight.grad.dtype == torch.float32


def test_attention_keeps_its_output_and_a_number_for_each_query():
    q = torch.rand(2, 4, 100, 32, dtype=HALF, requires_grad=True)
    with cuda_rules(), ByteTrace() as trace:
        out = F.scaled_dot_product_attention(q, q, q)
        # 800 queries, each with 32 values of 2 bytes and one of 4. The attention matrix would take 160,000 bytes.
        assert trace.allocated_bytes == 51_200 + 3_584
        torch.autograd.backward(out, torch.empty_like(out))
    assert q.grad.shape == q.shape


def test_temporary_tensors_within_operations_are_seen():
    flags = torch.ones(1000, dtype=torch.int8)
    with ByteTrace() as trace, cuda_rules():
        assert flags.sum() == 1000
    assert trace.peak_bytes() >= 8000  # the sum converts to 64-bit integers
