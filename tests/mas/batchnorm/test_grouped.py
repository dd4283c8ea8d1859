"""Grouped BatchNorm gives the results of many small batches, however groups are joined in micro-batches.

With a single group it gives PyTorch's results.
"""

import copy
import pickle

import pytest
import torch
from hypothesis import example, given
from hypothesis import strategies as st
from torch import nn

from yolov12.mas.batchnorm.grouped import GroupedBatchNorm
from yolov12.mas.batchnorm.statistics import Statistics
from yolov12.mas.scheduling.groups import split_groups


@example(3, 2)
@example(5, 4)
@given(st.integers(1, 600), st.integers(0, 64))
def test_cut_gives_groups_of_the_size_asked_for_and_none_that_is_noise(images, group):
    sizes = split_groups(images, group)
    assert sum(sizes) == images
    if not group:
        assert sizes == (images,)
        return
    three = group == 2 and images % 2 == 1 and images > 1  # the one exception
    assert max(sizes) <= group + three
    assert len(sizes) == -(-images // group) - three
    assert min(sizes) > 1 or 1 in (group, images)  # no image is alone
    assert all(size == group for size in sizes[:-2])
    assert 4 * min(sizes) >= min(group, images)


@given(st.integers(1, 600), st.integers(1, 64), st.data())
def test_what_is_left_of_a_batch_is_cut_as_it_was(images, group, data):
    """After a failure the remaining images are split again. Other groups would give another gradient."""
    sizes = split_groups(images, group)
    done = data.draw(st.integers(0, len(sizes) - 1))
    assert split_groups(images - sum(sizes[:done]), group) == sizes[done:]


def layer_and_copy(kind=nn.BatchNorm2d, channels=6, **options):
    torch.manual_seed(0)
    layer = kind(channels, **options).double()
    with torch.no_grad():
        for tensor in (layer.weight, layer.bias, layer.running_mean):
            if tensor is not None:
                tensor.normal_()
        layer.running_var.uniform_(0.5, 2.0)
    return layer, copy.deepcopy(layer)


def images(count, *shape, scale=1.0):
    return torch.randn(count, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1)) * scale + 3


SHAPES = {nn.BatchNorm1d: (6, 5), nn.BatchNorm2d: (6, 4, 5), nn.BatchNorm3d: (6, 2, 3, 4)}


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("affine", [True, False])
def test_one_group_is_pytorch_bit_for_bit(kind, affine):
    layer, plain = layer_and_copy(kind, affine=affine)
    norms, x = GroupedBatchNorm(layer), images(8, *SHAPES[kind])
    for _ in range(3):
        norms.begin()
        with norms.within((8,), 0):
            out = layer(x)
        norms.commit(norms.averages((8,), 8), 1)
        assert torch.equal(out, plain(x))
    torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=2**-52, atol=0)
    torch.testing.assert_close(layer.running_var, plain.running_var, rtol=2**-52, atol=0)
    assert layer.num_batches_tracked == plain.num_batches_tracked == 3


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("micro_batches", [((3, 2, 4),), ((3, 2), (4,)), ((3,), (2,), (4,))])
def test_groups_are_normalised_one_by_one(kind, micro_batches):
    layer, plain = layer_and_copy(kind)
    norms, x = GroupedBatchNorm(layer), images(9, *SHAPES[kind])
    groups = tuple(size for sizes in micro_batches for size in sizes)
    out, start, first = [], 0, 0
    norms.begin()
    for sizes in micro_batches:
        with norms.within(sizes, first):
            out.append(layer(x[start : start + sum(sizes)]))
        start, first = start + sum(sizes), first + len(sizes)
    norms.commit(norms.averages(groups, sum(groups)), len(groups))

    parts = x.split(groups)
    assert torch.equal(torch.cat(out), torch.cat([copy.deepcopy(plain)(part) for part in parts]))
    dims = [0, *range(2, x.ndim)]
    mean = sum(part.mean(dims) * len(part) for part in parts) / 9
    variance = sum(part.var(dims) * len(part) for part in parts) / 9
    for _ in groups:  # the statistics move once for each group
        plain.running_mean.lerp_(mean, 0.1)
        plain.running_var.lerp_(variance, 0.1)
    torch.testing.assert_close(layer.running_mean, plain.running_mean)
    torch.testing.assert_close(layer.running_var, plain.running_var)
    assert layer.num_batches_tracked == 3


@pytest.mark.parametrize("momentum", [0.0, 0.03, 1.0, None])
def test_statistics_move_as_far_as_pytorchs_in_a_pass_for_each_group(momentum):
    """In groups with the same images, their order makes no difference, so PyTorch's statistics are the same."""
    layer, plain = layer_and_copy(momentum=momentum)
    norms = GroupedBatchNorm(layer)
    for batch, (groups, on_other_ranks) in enumerate([(3, 0), (1, 0), (2, 5)]):
        x = images(4, 6, 4, 5, scale=1.0 + batch)
        norms.begin()
        for first in range(groups):
            with norms.within((4,), first):
                layer(x)
        sums = norms.averages((4,) * groups, 4 * groups)  # the averages of other ranks would be the same
        norms.commit(sums, groups + on_other_ranks)
        for _ in range(groups + on_other_ranks):
            plain(x)
        torch.testing.assert_close(layer.running_mean, plain.running_mean, rtol=1e-13, atol=0)
        torch.testing.assert_close(layer.running_var, plain.running_var, rtol=1e-13, atol=0)
        assert layer.num_batches_tracked == plain.num_batches_tracked


def test_statistics_of_every_layer_are_aligned():
    """At other addresses cuDNN's BatchNorm fails on a GPU, see `_ALIGNED`."""
    addresses = []

    class Kernels:
        @staticmethod
        def applies(x, weight, means):
            addresses.extend(row.data_ptr() for row in means)
            return False

    model = nn.ModuleList(nn.BatchNorm2d(channels) for channels in (3, 51, 1, 8))
    grouped = GroupedBatchNorm(model, kernels=Kernels)
    grouped.begin()
    with grouped.within((2, 3), 0):
        for layer in model:
            layer(torch.randn(5, layer.num_features, 4, 4))
    grouped.commit(grouped.averages((2, 3), 5), 2)
    assert len(addresses) == 8
    assert not any(address % 16 for address in addresses)


def test_group_that_runs_again_counts_once():
    layer, plain = layer_and_copy()
    norms, x = GroupedBatchNorm(layer), images(8, 6, 4, 5)
    norms.begin()
    with norms.within((4, 4), 0):
        layer(x * 100)  # a failed attempt
    with norms.within((4,), 0):
        layer(x[:4] + 50)
    for first in (0, 1):
        with norms.within((4,), first):
            layer(x[4 * first : 4 * first + 4])
            layer(x[4 * first : 4 * first + 4])  # recomputed during the backward pass
    norms.commit(norms.averages((4, 4), 8), 2)
    mean = (x[:4].mean((0, 2, 3)) + x[4:].mean((0, 2, 3))) / 2
    torch.testing.assert_close(layer.running_mean, 0.81 * plain.running_mean + 0.19 * mean)
    assert layer.num_batches_tracked == 2


def test_gradient_of_one_image_whatever_its_strides():
    """PyTorch 2.3 computes a wrong gradient on the CPU if that of one image has unusual strides, as from attention."""
    layer, _ = layer_and_copy(channels=16)
    norms, x = GroupedBatchNorm(layer), images(1, 16, 2, 2).requires_grad_()
    slope = torch.randn(1, 16, 2, 2, dtype=torch.float64)
    odd = torch.empty_strided((1, 16, 2, 2), (16, 1, 32, 16), dtype=torch.float64).copy_(slope)
    norms.begin()
    with norms.within((1,), 0):
        (gradient,) = torch.autograd.grad(layer(x), x, odd)
    mean, variance = x.mean((2, 3), keepdim=True), x.var((2, 3), unbiased=False, keepdim=True)
    by_hand = (x - mean) / (variance + layer.eps).sqrt() * layer.weight.view(1, -1, 1, 1) + layer.bias.view(1, -1, 1, 1)
    torch.testing.assert_close(gradient, torch.autograd.grad(by_hand, x, slope)[0])


def test_frozen_layers_are_left_alone():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6), nn.Conv2d(6, 6, 1), nn.BatchNorm2d(6)).double()
    norms, x = GroupedBatchNorm(model), images(6, 3, 4, 4)
    model[1].eval()
    frozen = copy.deepcopy(model[1])
    norms.begin()
    with norms.within((3, 3), 0):
        inner = model[1](model[0](x))
        model[3](model[2](inner))
    norms.commit(norms.averages((3, 3), 6), 2)
    assert torch.equal(inner, frozen(model[0](x)))
    assert torch.equal(model[1].running_mean, frozen.running_mean)
    assert (model[1].num_batches_tracked, model[3].num_batches_tracked) == (0, 2)
    model[1].train()  # a schedule may unfreeze a layer
    norms.begin()
    with norms.within((6,), 0):
        model(x)
    norms.commit(norms.averages((6,), 6), 1)
    assert (model[1].num_batches_tracked, model[3].num_batches_tracked) == (1, 3)


def test_layer_that_gets_each_image_as_several():
    layer, plain = layer_and_copy()
    norms, x = GroupedBatchNorm(layer), images(12, 6, 4, 5)  # 4 images with 3 crops each
    norms.begin()
    with norms.within((1, 3), 0):
        out = layer(x)
    assert torch.equal(out, torch.cat([copy.deepcopy(plain)(x[:3]), copy.deepcopy(plain)(x[3:])]))


def test_model_can_be_copied_and_pickled_between_batches():
    model = nn.Sequential(nn.Conv2d(3, 6, 1), nn.BatchNorm2d(6)).double()
    norms, x = GroupedBatchNorm(model), images(4, 3, 4, 4)
    norms.begin()
    with norms.within((2, 2), 0):
        model(x)
    norms.commit(norms.averages((2, 2), 4), 2)
    model.eval()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other(x), model(x))
        assert "forward" not in vars(other[1])


def test_model_is_as_it_was_after_an_error():
    layer, plain = layer_and_copy()
    norms, x = GroupedBatchNorm(layer), images(4, 6, 4, 4)
    norms.begin()
    with pytest.raises(RuntimeError, match="2 elements not 6"), norms.within((2, 2), 0):
        layer(x[:, :2])
    assert torch.equal(layer(x), plain(x))
    assert torch.equal(layer.running_mean, plain.running_mean)


def test_batch_without_numbers_does_not_spoil_the_next():
    layer, _ = layer_and_copy()
    norms, x = GroupedBatchNorm(layer), images(4, 6, 4, 4)
    norms.begin()
    with norms.within((2, 2), 0):
        layer(x * float("nan"))  # a batch that is given up: no commit
    norms.begin()
    with norms.within((2, 2), 0):
        assert layer(x).isfinite().all()
    norms.commit(norms.averages((2, 2), 4), 2)
    assert layer.running_mean.isfinite().all()
    assert layer.running_var.isfinite().all()


def test_model_without_batchnorm():
    model = nn.Linear(3, 3)
    norms = GroupedBatchNorm(model)
    norms.begin()
    with norms.within((2, 2), 0):
        model(torch.ones(4, 3))
    norms.commit(norms.averages((2, 2), 4), 2)


def test_room_for_many_groups_is_made_a_few_times():
    """Each time takes a second for 256 groups of a detector, as there is a view of each group and layer."""
    statistics = Statistics([slice(0, 3)], torch.zeros(0, 4))
    made = []
    for groups in range(1, 257):
        statistics.reserve(groups)
        made.append(statistics.views)
        assert len(statistics.views) >= groups
    assert len({id(views) for views in made}) <= 9
