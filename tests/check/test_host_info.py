"""The host readers, with simulated control groups and on this machine."""

import pytest
import torch

from yolov12.check import host_info


def test_cgroup_limits(tmp_path):
    membership = tmp_path / "cgroup"
    root = tmp_path / "fs"
    for folder, limit in ((root, "max"), (root / "a", "1000"), (root / "a/b", "max"), (root / "memory/docker", "700")):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text("600\n")
        (folder / "memory.stat").write_text("anon 1\ninactive_file 150\n")
    membership.write_text("0::/a/b\n")
    assert host_info.read_cgroup_memory(root, membership) == (1000, 550)
    membership.write_text("4:memory:/docker/of-the-host\n")
    assert host_info.read_cgroup_memory(root, membership) == (700, 250)
    membership.write_text("0::/\n")
    assert host_info.read_cgroup_memory(root, membership) is None
    assert host_info.read_cgroup_memory(tmp_path / "none", tmp_path / "none") is None


def test_cgroup_v1(tmp_path):
    (tmp_path / "memory").mkdir()
    (tmp_path / "memory/memory.limit_in_bytes").write_text("500")
    (tmp_path / "memory/memory.usage_in_bytes").write_text("100")
    (tmp_path / "cgroup").write_text("3:cpuset:/x\n4:memory:/x\n")
    assert host_info.read_cgroup_memory(tmp_path, tmp_path / "cgroup") == (500, 400)


def test_host_and_versions_of_this_machine():
    here = host_info.read_host()
    assert here.cpu_count >= 1
    assert 0 < here.ram_available_bytes <= here.ram_total_bytes
    versions = host_info.read_versions()
    assert versions["torch"] == str(torch.__version__)
    assert versions["ultralytics"]


@pytest.mark.parametrize(("number", "text"), [(8902, "8.9.2"), (90100, "9.1.0"), (91002, "9.10.2"), (None, None)])
def test_cudnn_version(monkeypatch, number, text):
    monkeypatch.setattr(torch.backends.cudnn, "version", lambda: number)
    assert host_info.read_versions()["cuDNN"] == text
