"""The probes work on this machine and detect broken kernels."""

import pytest
import torch

from yolov12.check import probe

needs_gpu = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch sees no CUDA device here")


def test_cpu_probes_work_and_leave_no_trace():
    (result,) = probe.probe_attention("cpu")
    assert result.failure is None
    assert result.relative_error < probe.MAX_RELATIVE_ERROR
    assert result.kernel in ("flash", "math")
    assert not torch.are_deterministic_algorithms_enabled()
    step = probe.probe_training("cpu")
    assert step.failure is None
    assert step.step_ms > 0


@pytest.mark.parametrize("wrong", [lambda q, k, v: v + 0 * q * k, lambda q, k, v: q * k * v * float("nan")])
def test_broken_attention_is_found(monkeypatch, wrong):
    monkeypatch.setattr(probe, "attention", wrong)
    (result,) = probe.probe_attention("cpu")
    assert "off by" in result.failure


def test_attention_that_raises_is_reported(monkeypatch):
    def attention(q, k, v):
        raise RuntimeError("no kernel image\nis available")

    monkeypatch.setattr(probe, "attention", attention)
    (result,) = probe.probe_attention("cpu")
    assert result.failure == "RuntimeError: no kernel image"


def test_training_step_that_fails_is_reported():
    assert probe.probe_training("meta").failure


@pytest.mark.gpu
@needs_gpu
def test_cuda_probes_work():
    results = probe.probe_attention("cuda:0")
    assert [result.failure for result in results] == [None] * len(results)
    assert {result.dtype for result in results} == {"fp16", "fp32"}
    assert all(result.kernel for result in results if result.backend == "sdpa")
    assert probe.probe_training("cuda:0").failure is None
