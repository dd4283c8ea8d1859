"""Several processes on one GPU: NVIDIA's Multi-Process Service is started if it is there, and stopped in the end."""

import os

import pytest

from benchmarks.common.processes import gpu_shared


@pytest.fixture
def service(tmp_path, monkeypatch):
    """Return a function that puts a stand-in for the service on PATH, and the file of what it was told."""
    told = tmp_path / "told"

    def install(status):
        program = tmp_path / "nvidia-cuda-mps-control"
        program.write_text(
            f'#!/bin/sh\n[ "$1" ] || read line\necho "$1$line in $CUDA_MPS_PIPE_DIRECTORY" >> {told}\nexit {status}\n'
        )
        program.chmod(0o755)
        return told

    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.delenv("CUDA_MPS_PIPE_DIRECTORY", raising=False)
    monkeypatch.setenv("CUDA_MPS_LOG_DIRECTORY", "before")
    return install


def test_the_service_runs_within_the_context_and_no_longer(service):
    told = service(0)

    def train():
        with gpu_shared() as shared:
            assert shared
            assert told.read_text() == f"-d in {os.environ['CUDA_MPS_PIPE_DIRECTORY']}\n"
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train()
    start, stop = told.read_text().splitlines()
    assert stop == start.replace("-d", "quit")
    assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
    assert os.environ["CUDA_MPS_LOG_DIRECTORY"] == "before"


@pytest.mark.parametrize("there", [False, True])
def test_without_the_service_processes_share_the_gpu_as_they_always_do(service, monkeypatch, there):
    if there:
        service(1)  # it does not start
    else:
        monkeypatch.setenv("PATH", "")
    with gpu_shared() as shared:
        assert not shared
        assert "CUDA_MPS_PIPE_DIRECTORY" not in os.environ
