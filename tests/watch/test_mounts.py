"""Folders between which no rename works, such as two volumes of a container on one disk: moves are copies."""

import errno
import os
from pathlib import Path

import pytest

from tests.watch.factory import Work, put
from yolov12.watch import moves


class KilledError(BaseException):
    """Stands for SIGKILL."""


@pytest.fixture
def _bind_mounts(factory, monkeypatch):
    """Let no file be renamed between the inbox and other folders, which are on the same device."""
    stock = os.rename

    def rename(source, target):
        if (factory.inbox in Path(source).parents) != (factory.inbox in Path(target).parents):
            raise OSError(errno.EXDEV, "Invalid cross-device link", str(source))
        stock(source, target)

    monkeypatch.setattr(os, "rename", rename)


@pytest.mark.usefixtures("_bind_mounts")
@pytest.mark.parametrize("is_damaged", [False, True], ids=["dataset", "rejected"])
def test_a_copy_that_was_killed_before_it_removed_the_image_is_completed(is_damaged, factory, monkeypatch):
    factory.deliver(3)
    if is_damaged:
        put(factory, "0", b"no image")
    delivered = factory.images()
    stock = Path.unlink

    def unlink(path, missing_ok=False):
        if path == factory.inbox.resolve() / "0.png":
            raise KilledError
        stock(path, missing_ok)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", unlink)
        with pytest.raises(KilledError):
            factory.watch(Work()).run()
    (factory.inbox / "1.txt").unlink()  # this image waits for its label
    assert factory.watch(Work()).run() == 0
    assert [file.name for file in factory.inbox.iterdir()] == ["1.png"]
    kept = {file.read_bytes(): 1 for folder in (factory.inbox, factory.work) for file in folder.rglob("*.png")}
    assert kept == delivered


@pytest.mark.usefixtures("_bind_mounts")
def test_folders_on_one_device_are_not_taken_for_one_file_system(factory):
    assert factory.inbox.stat().st_dev == factory.folder.stat().st_dev
    assert not moves.can_rename(factory.inbox, factory.folder)
    assert [*factory.inbox.iterdir()] == []


def test_what_a_kill_within_a_trial_has_left_is_removed(factory):
    (factory.inbox / ".yolov12-watch.probe").touch()
    factory.watch(Work()).step()
    assert [*factory.inbox.iterdir()] == []


def test_a_trial_leaves_nothing_behind_and_follows_no_link(factory):
    other, victim = factory.folder / "other", factory.folder / "victim"
    other.mkdir()
    victim.write_text("content")
    (factory.inbox / ".yolov12-watch.probe").symlink_to(victim)
    assert moves.can_rename(factory.inbox, other)
    assert ([*factory.inbox.iterdir()], [*other.iterdir()], victim.read_text()) == ([], [], "content")
    assert not moves.can_rename(factory.inbox, factory.folder / "missing")
    assert not moves.can_rename(factory.folder / "missing", other)
    assert [*factory.inbox.iterdir()] == []
