"""What `yolov12 check` says of the image, of the lock and of the packages that need a GPU."""

import json
import sys
from importlib import metadata

import pytest

from yolov12.check.installation import pinned, read_gpu_packages, read_image, read_lock
from yolov12.check.render import as_json, as_text
from yolov12.check.report import GpuPackage, Lock

DESCRIPTION = {
    "version": "0.1.0",
    "revision": "abc",
    "source": "",
    "bases": {"CUDA_RUNTIME": "nvidia/cuda:12.1.1", "CONDA": "localhost/x"},
    "flash_attn": "source",
}


@pytest.fixture
def locks(tmp_path):
    """A folder with a lock whose versions are those that are installed, and one with others."""
    here = {name: metadata.version(name) for name in ("numpy", "packaging", "pytest")}
    lines = [f"{name}=={version} \\\n    --hash=sha256:0\n" for name, version in here.items()]
    (tmp_path / "lock.txt").write_text("".join(lines) + "other==1 ; python_version < '3'\n")
    (tmp_path / "current.txt").write_text("".join(lines[1:]) + "numpy==99\nno-such-distribution==1\n")
    return tmp_path


def test_pins_are_those_of_this_python(locks):
    assert pinned(locks / "lock.txt").keys() == {"numpy", "packaging", "pytest"}


def test_the_lock_is_the_one_whose_versions_are_installed(locks):
    lock = read_lock(locks)
    assert (lock.name, lock.locked, lock.differing, len(lock.sha256)) == ("lock", 3, {}, 64)
    (locks / "lock.txt").unlink()
    lock = read_lock(locks)
    assert lock.name == "current"
    assert lock.differing == {"numpy": metadata.version("numpy"), "no-such-distribution": None}


def test_without_a_clone_there_is_no_lock(tmp_path):
    assert read_lock(tmp_path) is None


def test_opencv_without_windows_is_as_good(locks, monkeypatch):
    installed = {"opencv-python-headless": "4.11.0", **{name: metadata.version(name) for name in ("numpy", "pytest")}}

    def version(name):
        if name not in installed:
            raise metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(metadata, "version", version)
    (locks / "lock.txt").write_text("opencv-python==4.11.0\n")
    assert read_lock(locks).differing == {}


def test_the_image_is_described_by_its_build_and_its_digest_by_who_started_it(tmp_path, monkeypatch):
    file = tmp_path / "image.json"
    assert read_image(file) is None
    file.write_text(json.dumps(DESCRIPTION))
    monkeypatch.delenv("YOLOV12_IMAGE_DIGEST", raising=False)
    assert read_image(file).digest is None
    monkeypatch.setenv("YOLOV12_IMAGE_DIGEST", "sha256:12")
    image = read_image(file)
    assert (image.digest, image.revision, image.bases) == ("sha256:12", "abc", DESCRIPTION["bases"])


def test_a_gpu_package_that_is_installed_is_imported(tmp_path, monkeypatch):
    monkeypatch.syspath_prepend(tmp_path)
    for name in ("flash_attn", "tensorrt"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    (tmp_path / "flash_attn.py").write_text("__version__ = '2.7.4.post1'\n")
    (tmp_path / "tensorrt.py").write_text("raise OSError('libnvinfer.so.10: cannot open shared object file')\n")
    flash, tensorrt = read_gpu_packages()
    assert (flash.name, flash.version, flash.works) == ("flash-attn", "2.7.4.post1", True)
    assert tensorrt.failure == "OSError: libnvinfer.so.10: cannot open shared object file"
    assert not tensorrt.works
    monkeypatch.delitem(sys.modules, "flash_attn")


def test_report_says_it_as_text_and_as_json(machine, h100, tmp_path):
    file = tmp_path / "image.json"
    file.write_text(json.dumps(DESCRIPTION))
    report = machine(
        h100,
        image=read_image(file),
        lock=Lock("lock", "f" * 64, 79, {"numpy": "2.0"}),
        gpu_packages=(GpuPackage("flash-attn", "2.7.4.post1", None), GpuPackage("tensorrt", None, None)),
    )
    text = as_text(report)
    assert "revision abc, built on nvidia/cuda:12.1.1, localhost/x, digest unknown" in text
    assert (
        "lock          requirements/lock.txt, sha256 ffffffffffff: 1 of 79 distributions differ, such as numpy 2.0"
        in text
    )
    assert "flash-attn    2.7.4.post1, can be imported" in text
    assert "tensorrt      not installed" in text
    told = json.loads(as_json(report))
    assert told["image"]["revision"] == "abc"
    assert told["lock"]["differing"] == {"numpy": "2.0"}
    assert [each["version"] for each in told["gpu_packages"]] == ["2.7.4.post1", None]
    assert "this is no image of this project" in as_text(machine(h100))
