"""Triton kernels on the CPU.

Triton 2.3's own interpreter lacks `minimum`, barriers and constants. Here PyTorch stands in for Triton's language, and
runs the programs of a launch one after the other.
"""

import itertools
import types
from types import SimpleNamespace

import torch

from yolov12.mas import triton_launch


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
    int32, uint8, static_range = torch.int32, torch.uint8, range
    where, sigmoid, arange, sqrt = torch.where, torch.sigmoid, torch.arange, torch.sqrt
    exp, log, abs = torch.exp, torch.log, torch.abs

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

    def atomic_add(self, pointer, value, mask=None, sem="acq_rel"):
        memory, at = pointer.memory()
        if mask is not None:
            value = torch.where(mask, value, 0)
        before = memory[at].clone()
        memory[at] += value
        return before

    def atomic_max(self, pointer, value, mask):
        memory, at = pointer.memory()  # a block of one box, in which an anchor occurs once
        memory[at[mask]] = torch.maximum(memory[at[mask]], value[mask])

    def atomic_min(self, pointer, value, mask):
        memory, at = pointer.memory()
        memory[at[mask]] = torch.minimum(memory[at[mask]], value[mask].to(memory.dtype))

    def minimum(self, a, b):
        return torch.minimum(torch.as_tensor(a), torch.as_tensor(b))

    def maximum(self, a, b):
        return torch.maximum(torch.as_tensor(a), torch.as_tensor(b, dtype=torch.as_tensor(a).dtype))

    def zeros(self, shape, dtype):
        return torch.zeros(shape, dtype=dtype)

    def sum(self, block, axis):
        return block.sum(axis)

    def max(self, block, axis):
        return block.amax(axis)

    def min(self, block, axis):
        return block.amin(axis)

    def cdiv(self, a, b):
        return (a + b - 1) // b

    def debug_barrier(self):
        pass


class Interpreted:
    """Kernel whose programs run one after the other: `kernel[grid](...)`, as with Triton."""

    def __init__(self, function, language):
        self.fn = self._function = function
        self._language = language

    def __getitem__(self, grid):
        def launch(*arguments, num_warps):
            arguments = [Pointer(each) if isinstance(each, torch.Tensor) else each for each in arguments]
            self._language.grid = grid
            with torch.no_grad():  # autograd does not see what a kernel reads and writes
                for self._language.program in itertools.product(*map(range, grid)):
                    self._function(*arguments)

        return launch


def run_on_cpu(monkeypatch, module, **names):
    """Let the kernels of a module, named in its `__all__`, run on the CPU.

    Args:
        module: Module of kernels and of the functions that they call.
        names: Values that take the place of the module's own in the kernels.
    """
    language = Language()
    given, names = names, {**vars(module), "tl": language}
    for name, value in vars(module).items():
        if isinstance(function := getattr(value, "fn", None), types.FunctionType):
            names[name] = types.FunctionType(function.__code__, names)
    names |= given
    for name in module.__all__:
        monkeypatch.setattr(module, name, Interpreted(names[name], language))
    monkeypatch.setattr(triton_launch, "_HANDS_OUT_KERNELS", False)
    monkeypatch.setattr("torch.cuda.current_device", lambda: None)
