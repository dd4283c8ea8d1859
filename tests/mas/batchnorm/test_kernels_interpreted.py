"""The BatchNorm kernels on the CPU, compared with PyTorch's BatchNorm group by group.

Triton 2.3's own interpreter lacks `minimum`, barriers and constants. Here PyTorch stands in for Triton's language, and
runs the programs of a launch one after the other.
"""

import itertools
import types
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F

pytest.importorskip("triton")

from yolov12.mas.batchnorm import kernels as batchnorm_kernels


class Pointer:
    """Address, or a block of addresses, in the memory of a tensor."""

    def __init__(self, tensor, at=0):
        self.tensor, self.at = tensor, at
        self.dtype = SimpleNamespace(element_ty=tensor.dtype)

    def __add__(self, offset):
        return Pointer(self.tensor, self.at + offset)

    def memory(self):
        size = self.tensor.untyped_storage().nbytes() // self.tensor.element_size()
        return torch.as_strided(self.tensor, (size,), (1,), 0), self.tensor.storage_offset() + torch.as_tensor(self.at)


class Language:
    """What the kernels use of `triton.language`."""

    float32, int64, constexpr = torch.float32, torch.int64, object()
    program, grid = (0, 0, 0), (1, 1, 1)
    where, sigmoid, arange, sqrt = torch.where, torch.sigmoid, torch.arange, torch.sqrt

    def program_id(self, axis):
        return torch.tensor(self.program[axis])

    def num_programs(self, axis):
        return self.grid[axis]

    def load(self, pointer, mask=None, other=0.0, cache_modifier=""):
        memory, at = pointer.memory()
        if mask is None:
            return memory[at]
        mask = mask.expand(torch.broadcast_shapes(mask.shape, at.shape))
        return torch.where(mask, memory[torch.where(mask, at, 0)], torch.tensor(other, dtype=memory.dtype))

    def store(self, pointer, value, mask=None):
        memory, at = pointer.memory()
        mask = torch.ones_like(at, dtype=torch.bool) if mask is None else mask.expand(at.shape)
        memory[at[mask]] = torch.as_tensor(value).to(memory.dtype).expand(at.shape)[mask]

    def atomic_add(self, pointer, value, sem):
        memory, at = pointer.memory()
        before = memory[at].clone()
        memory[at] += value
        return before

    def minimum(self, a, b):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    def maximum(self, a, b):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype))

    def zeros(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    def sum(self, block, axis):
        return block.sum(axis)

    def cdiv(self, a, b):
        return (a + b - 1) // b

    def debug_barrier(self):
        pass


class Interpreted:
    """Kernel whose programs run one after the other: `kernel[grid](...)`, as with Triton."""

    def __init__(self, function, language):
        self._function, self._language = function, language

    def __getitem__(self, grid):
        def launch(*arguments, num_warps):
            arguments = [Pointer(each) if isinstance(each, torch.Tensor) else each for each in arguments]
            self._language.grid = grid
            for self._language.program in itertools.product(*map(range, grid)):
                self._function(*arguments)

        return launch


@pytest.fixture
def kernels(monkeypatch):
    """Return the module of the kernels, which run on the CPU."""
    language = Language()
    names = {**vars(batchnorm_kernels), "tl": language}
    for name in ("_rows", "_is_last", "_total", "_slope"):
        names[name] = types.FunctionType(getattr(batchnorm_kernels, name).fn.__code__, names)
    for name in ("_statistics", "_normalize", "_gradient_sums", "_gradient"):
        function = types.FunctionType(getattr(batchnorm_kernels, name).fn.__code__, names)
        monkeypatch.setattr(batchnorm_kernels, name, Interpreted(function, language))
    monkeypatch.setattr(batchnorm_kernels, "_BLOCK", 256)  # several chunks, also of small tensors
    monkeypatch.setattr(batchnorm_kernels, "_plan", batchnorm_kernels._Plan)
    monkeypatch.setattr(batchnorm_kernels, "_stream", lambda device: 0)
    monkeypatch.setattr(batchnorm_kernels, "_HANDS_OUT_KERNELS", False)
    monkeypatch.setattr(batchnorm_kernels, "_scratches", {})
    monkeypatch.setattr("torch.cuda.current_device", lambda: None)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda device: SimpleNamespace(multi_processor_count=2))
    return batchnorm_kernels


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
