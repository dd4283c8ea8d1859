"""A tensor of a batch that is not made yet behaves as the tensor, and is made once at most."""

import copy
import io
import pickle

import numpy as np
import pytest
import torch
from torch.nn.functional import interpolate

from yolov12.training.adapter.deferred_tensor import DeferredTensor, TensorFacts


def facts(tensor):
    """Everything that tells two tensors apart."""
    return type(tensor.detach()), tensor.shape, tensor.dtype, tensor.device, tensor.requires_grad, tensor.tolist()


class Twice(torch.autograd.Function):
    """Does not go through Python's functions of tensors."""

    @staticmethod
    def forward(ctx, images):
        return images * 2


def _in_place(tensor):
    tensor += 1
    return tensor


def _set_item(tensor):
    tensor[0] = 5
    return tensor


def _out(tensor):
    return torch.add(torch.zeros_like(tensor), 1, out=tensor)


OPERATIONS = {
    "index": lambda tensor: tensor[0],
    "slice": lambda tensor: tensor[:, 1:, ..., ::2],
    "mask": lambda tensor: tensor[tensor > 0.1],
    "arithmetic": lambda tensor: tensor * 2 - 1,
    "reflected": lambda tensor: 1 - tensor,
    "both": lambda tensor: tensor @ tensor,
    "compare": lambda tensor: tensor == tensor.clone(),
    "in place": _in_place,
    "method in place": lambda tensor: tensor.mul_(3),
    "set item": _set_item,
    "out": _out,
    "stack": lambda tensor: torch.stack([tensor, tensor]),
    "cat": lambda tensor: torch.cat((tensor, torch.ones_like(tensor))),
    "numpy": lambda tensor: torch.from_numpy(tensor.numpy()),
    "asarray": lambda tensor: torch.from_numpy(np.asarray(tensor)),
    "array": lambda tensor: torch.from_numpy(np.array(tensor, dtype=np.float64)),
    "numpy function": lambda tensor: torch.from_numpy(np.stack([tensor, tensor])),
    "torch.tensor": lambda tensor: torch.tensor(tensor),
    "torch.as_tensor": lambda tensor: torch.as_tensor(tensor) + 0,
    "to": lambda tensor: tensor.to(torch.float64),
    "cpu": lambda tensor: tensor.cpu(),
    "detach": lambda tensor: tensor.detach(),
    "data": lambda tensor: tensor.data,
    "interpolate": lambda tensor: interpolate(tensor, size=(8, 8), mode="bilinear"),
    "conv": lambda tensor: torch.nn.Conv2d(3, 1, 1).requires_grad_(False)(tensor) * 0,
    "iteration": lambda tensor: torch.stack(list(tensor)),
    "unpack": lambda tensor: [*tensor][1],
    "tolist": lambda tensor: torch.tensor(tensor.tolist()),
    "item": lambda tensor: torch.tensor(float(tensor.sum()) + tensor[0, 0, 0, 1].item()),
    "print": lambda tensor: torch.tensor([ord(letter) for letter in f"{tensor} {tensor!r} {tensor.sum():.3f}"]),
    "save": lambda tensor: _saved(tensor),
    "pickle": lambda tensor: pickle.loads(pickle.dumps(tensor)),
    "copy": lambda tensor: copy.copy(tensor),
    "deepcopy": lambda tensor: copy.deepcopy(tensor),
    "autograd function": lambda tensor: Twice.apply(tensor),
    "script": lambda tensor: torch.jit.script(_scripted)(tensor),
    "operator": lambda tensor: torch.ops.aten.add(tensor, 1),
    "dlpack": lambda tensor: torch.from_dlpack(tensor),
    "vmap": lambda tensor: torch.vmap(lambda each: each * 2)(tensor),
    "gradient": lambda tensor: torch.autograd.grad((tensor.requires_grad_() ** 2).sum(), tensor)[0],
}


def _saved(tensor):
    file = io.BytesIO()
    torch.save(tensor, file)
    file.seek(0)
    return torch.load(file)


def _scripted(tensor: torch.Tensor) -> torch.Tensor:
    return tensor + 1


def values():
    """Facts of the tensor."""
    return torch.arange(2 * 3 * 4 * 4).view(2, 3, 4, 4).float() / 255


@pytest.mark.parametrize("operation", OPERATIONS)
@pytest.mark.filterwarnings("ignore:To copy construct from a tensor")
def test_a_deferred_tensor_behaves_as_the_tensor(operation):
    made = []

    def make():
        made.append(values())
        return made[-1]

    tensor = DeferredTensor(TensorFacts(values().shape, torch.float32, torch.device("cpu")), make)
    found, expected = OPERATIONS[operation](tensor), OPERATIONS[operation](values())
    assert facts(found) == facts(expected)
    assert len(made) == 1
    written = values()
    OPERATIONS[operation](written)
    assert facts(tensor) == facts(written)
