"""Images that the device renders are those of the host, in PyTorch and with the kernel."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from ultralytics.cfg import get_cfg
from ultralytics.data import augment

from tests.training.data.datasets import ARGUMENTS, assert_alike
from yolov12.training.data import device_rendering, packing
from yolov12.training.data.device_rendering import PackedTensor, rendered
from yolov12.training.data.packing import TABLES, pack
from yolov12.training.data.pixels import Recipe, Renderer
from yolov12.training.data.recipes import Later, samples


def empty(shape):
    return torch.full(shape, 200, dtype=torch.uint8)


def drawn(dataset, arguments, imgsz, seed, images=4):
    """Return recipes of images."""
    dataset.buffer[:] = []
    dataset.transforms = augment.v8_transforms(dataset, imgsz, get_cfg(overrides=arguments))
    dataset.transforms.append(augment.Format(bgr=arguments["bgr"]))
    random.seed(seed)
    np.random.seed(seed)  # noqa: NPY002
    indices = random.choices(range(len(dataset)), k=images)
    return [sample["img"] for sample in samples(dataset, Later(indices))]


def on_host(recipes):
    images = torch.empty((len(recipes), *recipes[0].shape), dtype=torch.uint8)
    for place, recipe in zip(images, recipes, strict=True):
        Renderer().render(recipe, place.numpy())
    return images


@settings(max_examples=settings.default.max_examples)
@given(
    arguments=ARGUMENTS,
    imgsz=st.sampled_from([64, 96, 75, 32]),
    channels=st.sampled_from([3, 3, 3, 1]),
    seed=st.integers(0, 10**6),
)
def test_every_pixel_is_that_of_the_host_to_one_of_255(data_sets, arguments, imgsz, channels, seed):
    recipes = drawn(data_sets[channels], arguments, imgsz, seed)
    assert all(isinstance(recipe, Recipe) for recipe in recipes)
    assert_alike(on_host(recipes), rendered(pack(recipes, Renderer(), empty, most=8.0)))


def mixed(data_sets, channels=3, imgsz=40):
    """Return recipes with everything that a kernel can do, and a finished image."""
    arguments = {
        "mosaic": 0.7, "mixup": 0.5, "degrees": 20.0, "scale": 0.5, "translate": 0.2, "perspective": 0.0,
        "fliplr": 0.5, "flipud": 0.5, "bgr": 0.5,
    }  # fmt: skip
    recipes = drawn(data_sets[channels], arguments, imgsz, 1, images=8)
    return [*recipes, torch.randint(0, 256, recipes[0].shape, dtype=torch.uint8)]


def test_a_buffer_has_a_largest_size(data_sets):
    recipes = drawn(data_sets[3], {"mosaic": 1.0, "mixup": 1.0, "scale": 0.9, "bgr": 0.0}, 64, 0, images=16)
    sizes = [len(pack(recipes, Renderer(), empty, most).pixels) - 16 * TABLES for most in (8.0, 2.0)]
    assert sizes[0] > 2.0 * 16 * 3 * 64 * 64 > sizes[1] > 1.5 * 16 * 3 * 64 * 64
    assert_alike(on_host(recipes), rendered(pack(recipes, Renderer(), empty, 1.0)))


def test_finished_images_travel_with_recipes_and_parts_are_parts(data_sets):
    images = mixed(data_sets)
    packed = pack(images, Renderer(), empty)
    whole = rendered(packed)
    assert torch.equal(whole[-1], images[-1])
    assert torch.equal(rendered(packed.part(3, 9).part(1, 4)), whole[4:7])
    assert not len(rendered(packed.part(2, 2)))
    half = rendered(packed, torch.float16)
    assert torch.equal(half, (whole.float() / 255).half())
    assert half.is_contiguous(memory_format=torch.channels_last)


def test_a_tensor_is_rendered_once_when_it_is_used(data_sets, monkeypatch):
    packed = pack(mixed(data_sets), Renderer(), empty)
    whole, counts = rendered(packed), []
    monkeypatch.setattr(device_rendering, "rendered", lambda part: counts.append(len(part.numbers)) or rendered(part))
    images = PackedTensor.of(packed)
    part = images.part(2, 5)
    assert (images.shape, len(part), part.dtype, counts) == (whole.shape, 3, torch.uint8, [])
    assert torch.equal(part.float(), whole[2:5].float())
    assert torch.equal(images[-1].float(), whole[-1].float())
    assert torch.equal(images[::2], whole[::2])
    assert counts == [3, 9]


def test_changes_of_images_are_kept(data_sets):
    """Code around the loader may write on images, and on views of them, as on any tensor."""
    packed = pack(mixed(data_sets), Renderer(), empty)
    images, expected = PackedTensor.of(packed), rendered(packed)
    for each in (images, expected):
        each[0].zero_()
        each[1:3][:, :, :8] = 0
        image = each[4]
        image[:, 5:9] = 255
        each[5] //= 2
    assert torch.equal(images.part(0, 6), expected[:6])
    assert torch.equal(images, expected)


def test_readers_on_the_host_get_images_if_the_device_has_no_memory_left(data_sets, monkeypatch):
    """They are outside of the engine's micro-batches, where nothing tries again."""
    packed, tries = pack(mixed(data_sets), Renderer(), empty), []
    whole = rendered(packed)

    def full(part):
        tries.append(len(part.numbers))
        if len(tries) == 2:
            raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
        return rendered(part)

    monkeypatch.setattr(device_rendering, "rendered", full)
    monkeypatch.setattr(device_rendering, "_AT_ONCE", 4)
    assert torch.equal(device_rendering._rendered_for_host(packed, torch.device("cpu")), whole)
    assert tries == [4, 4, 4, 1]


@pytest.fixture
def interpreted(monkeypatch):
    """Let the kernel run on the CPU."""
    pytest.importorskip("triton")
    from tests.interpreter import run_on_cpu

    run_on_cpu(monkeypatch, device_rendering.render_kernel)
    monkeypatch.setattr(device_rendering, "has_kernel", lambda device: True)


@pytest.mark.parametrize(("channels", "is_fine"), [(3, False), (1, False), (3, True)])
def test_the_kernel_renders_the_same_bytes(data_sets, interpreted, channels, is_fine, monkeypatch):
    monkeypatch.setattr(packing, "_is_fine", lambda: is_fine)
    packed = pack(mixed(data_sets, channels), Renderer(), empty).part(1, 9)
    bytes_, half = rendered(packed), rendered(packed, torch.float16)
    monkeypatch.setattr(device_rendering, "has_kernel", lambda device: False)
    assert torch.equal(bytes_, rendered(packed))
    assert torch.equal(half, rendered(packed, torch.float16))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")
@pytest.mark.parametrize(("channels", "imgsz"), [(3, 40), (1, 40), (3, 640)])
@pytest.mark.parametrize("is_fine", [False, True])
def test_on_a_gpu_the_kernel_renders_the_same_bytes(data_sets, channels, imgsz, is_fine, monkeypatch):
    monkeypatch.setattr(packing, "_is_fine", lambda: is_fine)
    assert device_rendering.has_kernel(torch.device("cuda", 0))
    packed = pack(mixed(data_sets, channels, imgsz), Renderer(), empty).part(1, 9)
    moved = packed._replace(pixels=packed.pixels.cuda(), numbers=packed.numbers.cuda())
    for dtype in (None, torch.float16, torch.bfloat16):
        found, expected = rendered(moved, dtype).cpu(), rendered(packed, dtype)
        # With all fractional bits, fused operations round the sums of some pixels to the other side.
        assert (found != expected).sum() <= (1e-3 * found.numel() if is_fine else 0)
    seen = PackedTensor.of(packed._replace(device=torch.device("cuda", 0))) + 0
    assert torch.equal(seen, rendered(moved).cpu())
