"""A user without a home that can be written to has caches, in folders that nobody else can write to."""

import json
import os
from pathlib import Path

import pytest

from yolov12 import caches

LIBRARIES = """
import json, os, sys
import matplotlib
from ultralytics.utils import USER_CONFIG_DIR
from yolov12 import caches
variables = {name: os.environ[name] for name in caches.FOLDERS}
print(json.dumps([matplotlib.get_cachedir(), str(USER_CONFIG_DIR), variables]))
"""


@pytest.fixture
def user(monkeypatch, tmp_path):
    """A user whose home is missing, with a folder for temporary files."""
    for name in caches.FOLDERS:
        monkeypatch.setenv(name, "")  # so that it is taken away at the end, whoever sets it
        monkeypatch.delenv(name)
    monkeypatch.setenv("HOME", str(tmp_path / "missing"))
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    return tmp_path / f".yolov12-{os.getuid()}"


def found():
    return {name: os.environ.get(name) for name in caches.FOLDERS}


def test_plain_python_has_caches_in_a_private_folder(user, run_python):
    """The `.pth` file does it: no script of this package runs."""
    done = run_python("-c", LIBRARIES)
    assert done.returncode == 0, done.stderr
    assert "writable" not in done.stderr
    matplotlib, ultralytics, variables = json.loads(done.stdout.splitlines()[-1])
    assert (matplotlib, ultralytics) == (f"{user}/matplotlib", f"{user}/ultralytics/Ultralytics")
    assert variables == {name: f"{user}/{folder}" for name, folder in caches.FOLDERS.items()}
    assert user.stat().st_mode & 0o777 == 0o700
    assert not Path(os.environ["HOME"]).exists()


def test_a_home_that_can_be_written_to_is_used(user, monkeypatch, tmp_path):
    monkeypatch.setenv("HOME", str(tmp_path))
    caches.use_private_folder()
    assert set(found().values()) == {None}
    assert not user.exists()


def test_what_is_set_stays(user, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", "/work/triton")
    caches.use_private_folder()
    assert found()["TRITON_CACHE_DIR"] == "/work/triton"
    assert found()["MPLCONFIGDIR"] == f"{user}/matplotlib"


@pytest.mark.parametrize("kind", ["open to others", "a link", "a file", "another user's"])
def test_a_folder_that_others_could_write_to_is_not_used(user, monkeypatch, tmp_path, kind):
    """Triton loads code from its cache."""
    (tmp_path / "elsewhere").mkdir(mode=0o700)
    if kind == "a link":
        user.symlink_to(tmp_path / "elsewhere")
    elif kind == "a file":
        user.touch(mode=0o600)
    else:
        user.mkdir(mode=0o700)
    if kind == "open to others":
        user.chmod(0o770)
    if kind == "another user's":
        monkeypatch.setattr(os, "lstat", lambda path, real=os.lstat: _of_another_user(real(path), path == str(user)))
    caches.use_private_folder()
    assert not any(str(value).startswith(str(user)) for value in found().values())


def _of_another_user(status, is_theirs):
    values = list(status)
    values[4] += is_theirs
    return os.stat_result(values)
