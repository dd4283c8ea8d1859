import contextlib
import importlib
import types

import pytest
import torch

from yolov12.models import attention as module
from yolov12.models.attention import attention, select_backend

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")


def qkv(dtype=torch.float32, device="cpu", tokens=50, grad=False):
    """Make q, k and v as strided views of one tensor, like the v1 layout."""
    torch.manual_seed(0)
    x = torch.randn(3, tokens, 4, 3 * 32, dtype=torch.float64).to(device, dtype).requires_grad_(grad)
    return x, x.split(32, dim=3)


def reference(q, k, v):
    q, k, v = (x.double() for x in (q, k, v))
    scores = torch.einsum("bnhd,bmhd->bhnm", q, k) / q.shape[-1] ** 0.5
    return torch.einsum("bhnm,bmhd->bnhd", scores.softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_output_and_gradient_agree_with_the_definition(dtype):
    x, parts = qkv(dtype, grad=True)
    out = attention(*parts)
    assert out.dtype == dtype
    torch.testing.assert_close(out.double(), reference(*parts), rtol=1e-5, atol=1e-5)
    grad = torch.randn_like(out)
    (mine,) = torch.autograd.grad(out, x, grad, retain_graph=True)
    (theirs,) = torch.autograd.grad(reference(*parts), x, grad.double())
    torch.testing.assert_close(mine.double(), theirs.double(), rtol=1e-4, atol=1e-5)


def test_deterministic_mode_repeats_bit_for_bit_on_cpu():
    x, _ = qkv(grad=True)
    torch.use_deterministic_algorithms(True, warn_only=True)
    try:
        grads = [torch.autograd.grad(attention(*x.split(32, dim=3)).square().sum(), x)[0] for _ in range(5)]
    finally:
        torch.use_deterministic_algorithms(False)
    assert all(torch.equal(grads[0], other) for other in grads[1:])


class Kernels:
    """Stands in for PyTorch's fused kernels, which run on a GPU only; notes the mode of their backward passes."""

    def __init__(self, fails):
        self.fails, self.strict = fails, []

    def _scaled_dot_product_flash_attention(self, q, k, v):
        return q + k + v, q, q, q, 1, 1, q, q, None

    def _scaled_dot_product_efficient_attention(self, q, k, v, bias, compute_log_sumexp):
        return q + k + v, q, q, q

    def _backward(self, grad, *_):
        self.strict.append(not torch.is_deterministic_algorithms_warn_only_enabled())
        if self.fails:
            raise RuntimeError("CUDA out of memory")
        return grad, grad, grad, None

    def _scaled_dot_product_flash_attention_backward(self, *given):
        return self._backward(*given)[:3]

    _scaled_dot_product_efficient_attention_backward = _backward


@pytest.mark.parametrize("fails", [False, True])
@pytest.mark.parametrize("warn_only", [True, False])
@pytest.mark.parametrize("kernel", [module._DeterministicFlash, module._DeterministicEfficient])
def test_strict_mode_is_on_for_one_kernel_and_then_as_before(monkeypatch, kernel, warn_only, fails):
    kernels = Kernels(fails)
    monkeypatch.setattr(module, "_aten", kernels)
    _, parts = qkv(grad=True)
    torch.use_deterministic_algorithms(True, warn_only=warn_only)
    try:
        out = kernel.apply(*parts)
        with pytest.raises(RuntimeError, match="out of memory") if fails else contextlib.nullcontext():
            out.sum().backward()
        assert kernels.strict == [True]
        assert torch.are_deterministic_algorithms_enabled()
        assert torch.is_deterministic_algorithms_warn_only_enabled() is warn_only
    finally:
        torch.use_deterministic_algorithms(False)


def fake_gpu(monkeypatch, capability, flash_attn):
    monkeypatch.setattr(module, "_capability", lambda device: capability)
    monkeypatch.setattr(module, "_flash_attn_or_reason", lambda: flash_attn)


@pytest.mark.parametrize(
    ("capability", "flash_attn", "dtype", "expected", "reason"),
    [
        ((9, 0), print, torch.float16, "flash", "flash-attn is installed"),
        ((8, 0), print, torch.bfloat16, "flash", "flash-attn is installed"),
        ((9, 0), print, torch.float32, "sdpa", "fp16 or bf16"),
        ((7, 5), print, torch.float16, "sdpa", "this GPU has 7.5"),
        ((7, 5), print, torch.bfloat16, "math", "no fused kernel"),
        ((9, 0), print, torch.float64, "math", "no fused kernel"),
        ((8, 6), "flash-attn is not installed", torch.float16, "sdpa", "flash-attn is not installed"),
    ],
)
def test_backend_is_chosen_by_device_and_dtype(monkeypatch, capability, flash_attn, dtype, expected, reason):
    fake_gpu(monkeypatch, capability, flash_attn)
    backend = select_backend(CUDA, dtype)
    assert backend.name == expected
    assert reason in backend.reason


def test_cpu_never_uses_flash_attn_even_where_it_is_installed(monkeypatch):
    fake_gpu(monkeypatch, (9, 0), print)
    assert select_backend(CPU, torch.float16).name == "sdpa"


@pytest.mark.parametrize(
    ("error", "reason"),
    [
        (ModuleNotFoundError("No module named 'flash_attn'"), "flash-attn is not installed"),
        (ImportError("undefined symbol: _ZN3c10"), "does not load (undefined symbol: _ZN3c10)"),
    ],
)
def test_a_flash_attn_that_cannot_be_used_is_reported_and_passed_over(monkeypatch, error, reason):
    def import_module(name):
        raise error

    monkeypatch.setattr(importlib, "import_module", import_module)
    module._flash_attn_or_reason.cache_clear()
    try:
        assert reason in module._flash_attn_or_reason()
    finally:
        module._flash_attn_or_reason.cache_clear()


def test_flash_attn_is_called_with_its_own_layout_and_the_deterministic_flag(monkeypatch):
    calls = []

    def flash_attn_func(q, k, v, deterministic):
        calls.append((q.shape, q.dtype, deterministic))
        return q

    fake_gpu(monkeypatch, (9, 0), flash_attn_func)
    monkeypatch.setattr(module, "select_backend", lambda device, dtype: select_backend(CUDA, dtype))
    _, parts = qkv(torch.bfloat16)
    assert attention(*parts) is parts[0]
    assert calls == [((3, 50, 4, 32), torch.bfloat16, False)]


def test_traced_graph_is_matmul_softmax_matmul():
    _, parts = qkv()
    traced = torch.jit.trace(attention, parts)
    kinds = [node.kind() for node in traced.inlined_graph.nodes()]
    assert [kind for kind in kinds if kind in ("aten::matmul", "aten::softmax")] == [
        "aten::matmul",
        "aten::softmax",
        "aten::matmul",
    ]
    assert "aten::scaled_dot_product_attention" not in kinds
    assert "aten::max" not in kinds  # TensorRT does not fuse attention with an explicit maximum
    torch.testing.assert_close(traced(*parts), attention(*parts), rtol=1e-5, atol=1e-5)


@pytest.mark.gpu
@needs_cuda
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 2e-2), (torch.float32, 1e-3)])
def test_gpu_backends_agree_with_float64(dtype, tolerance, deterministic):
    x, parts = qkv(dtype, "cuda", tokens=400, grad=True)
    torch.use_deterministic_algorithms(deterministic, warn_only=True)
    try:
        out = attention(*parts)
        grad = torch.randn_like(out)
        (mine,) = torch.autograd.grad(out, x, grad, retain_graph=True)
        (again,) = torch.autograd.grad(attention(*x.split(32, dim=3)), x, grad)
        assert torch.is_deterministic_algorithms_warn_only_enabled()  # strict mode ended with the backward pass
    finally:
        torch.use_deterministic_algorithms(False)
    expected = reference(*parts)
    (theirs,) = torch.autograd.grad(expected, x, grad.double())
    assert (out - expected).norm() / expected.norm() < tolerance
    assert (mine - theirs).norm() / theirs.norm() < tolerance
    if deterministic:
        assert torch.equal(mine, again)


@pytest.mark.parametrize("device", ["cpu", pytest.param("cuda", marks=[pytest.mark.gpu, needs_cuda])])
@pytest.mark.parametrize("name", ["yolov12n.yaml", pytest.param("yolo12n.yaml", marks=pytest.mark.deep)])
def test_a_compiler_sees_one_graph(name, device):
    """`train(compile=True)` loses speed with each graph break: kernels are not fused across it."""
    from ultralytics.nn.tasks import DetectionModel

    model = DetectionModel(name, verbose=False).to(device)
    torch._dynamo.reset()
    found = torch._dynamo.explain(model)(torch.rand(1, 3, 64, 64, device=device))
    assert (found.graph_count, found.graph_break_count) == (1, 0)


def test_nothing_is_chosen_at_import(monkeypatch):
    fresh = types.ModuleType("fresh_attention")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: pytest.fail("asked for CUDA at import"))
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: pytest.fail("asked at import"))
    monkeypatch.setitem(__import__("sys").modules, "fresh_attention", fresh)
    spec = importlib.util.spec_from_file_location("fresh_attention", module.__file__)
    importlib.util.module_from_spec(spec)
    spec.loader.exec_module(fresh)
