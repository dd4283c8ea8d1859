"""Runs commands in the image as `docker run` does, with whatever tool built it."""

import json
import os
import subprocess
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import pytest

_READ_ONLY = """
root=$0 work=$1
shift
mount --bind "$root" "$root"
mount --bind "$work" "$root/work"
mount --bind /dev "$root/dev"
mount --bind /proc "$root/proc"
mount -o remount,ro,bind "$root"
exec chroot "$root" env -i HOME=/root PWD=/work "$@"
"""

IMAGE, TOOL = os.environ.get("YOLOV12_IMAGE", "yolov12"), os.environ.get("YOLOV12_IMAGE_TOOL")


@dataclass(frozen=True)
class Container:
    """One container, which keeps what is written from run to run."""

    name: str

    def run(self, *command, entrypoint=None, user=None, mounts=(), folder=None, stdin=subprocess.DEVNULL, check=None):
        """Run a command by the image's entrypoint, or by another."""
        words = [*(self.entrypoint() if entrypoint is None else entrypoint), *command]
        done = subprocess.run(
            [*self.prefix(user, mounts, folder), *words], stdin=stdin, capture_output=True, text=True, timeout=280
        )
        if check is not None:
            assert done.returncode == check, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done

    def run_read_only(self, *command, work):
        """Run a command by the entrypoint where nothing but a folder at /work can be written to."""
        words = [*self.entrypoint(), *command]
        if TOOL != "buildah":
            mount = ["--read-only", "--volume", f"{work}:/work", "--workdir", "/work", "--entrypoint", ""]
            words = [TOOL, "run", "--rm", *mount, self.name, *words]
        else:  # which has no such option
            root = subprocess.check_output(["buildah", "mount", self.name], text=True).strip()
            Path(root, "work").mkdir(exist_ok=True)
            words = ["unshare", "--mount", "sh", "-euc", _READ_ONLY, root, str(work), *self.config()["Env"], *words]
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280)

    def start(self, *command, mounts=(), folder=None):
        """Start a command by the image's entrypoint, for a test to send signals to."""
        return subprocess.Popen(
            [*self.prefix(None, mounts, folder), *self.entrypoint(), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )

    def prefix(self, user, mounts, folder):
        options = [option for mount in mounts for option in ("--volume", mount)]
        options += ["--user", user] if user else []
        if TOOL == "buildah":
            options += ["--workingdir", folder] if folder else []
            return ["buildah", "run", *options, self.name, "--"]
        options += ["--workdir", folder] if folder else []
        return [TOOL, "run", "--rm", "--entrypoint", "", *options, self.name]

    def entrypoint(self):
        """What the tools that run an image put before a command."""
        return self.config()["Entrypoint"]

    def config(self):
        """Configuration of the image, as the tool that runs it shows it."""
        kind = "container" if TOOL == "buildah" else "image"
        found = json.loads(subprocess.check_output([TOOL, "inspect", "--type", kind, self.name], text=True))
        return found["OCIv1"]["config"] if TOOL == "buildah" else found[0]["Config"]


@contextmanager
def a_container():
    if TOOL is None:
        pytest.skip("scripts/image.sh test runs these")
    if TOOL != "buildah":
        yield Container(IMAGE)
        return
    name = subprocess.check_output(["buildah", "from", IMAGE], text=True).strip()
    try:
        yield Container(name)
    finally:
        subprocess.run(["buildah", "rm", name], check=True, capture_output=True)


@pytest.fixture(scope="session")
def image():
    """A container of the image; `scripts/image.sh test` names both."""
    with a_container() as container:
        yield container


@pytest.fixture
def fresh_image():
    """One that nothing has run in."""
    with a_container() as container:
        yield container
