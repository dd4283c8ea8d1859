"""Runs commands in the image as `docker run` does, with whatever tool built it."""

import json
import os
import subprocess
import uuid
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import psutil
import pytest

_READ_ONLY = """
root=$0 work=$1 user=$2 home=$3
shift 3
mount --bind "$root" "$root"
mount --bind "$work" "$root/work"
mount --bind /dev "$root/dev"
mount --bind /proc "$root/proc"
mount -o remount,ro,bind "$root"
exec chroot --userspec="$user" "$root" env -i HOME="$home" PWD=/work "$@"
"""

IMAGE, TOOL = os.environ.get("YOLOV12_IMAGE", "yolov12"), os.environ.get("YOLOV12_IMAGE_TOOL")


@dataclass(frozen=True)
class Running:
    """A command that runs in a container."""

    process: subprocess.Popen
    name: str

    def kill(self, number):
        """Send a signal to the container's first process, as `docker stop` does.

        With docker, the daemon sends it: the processes may belong to root, and this test to another user.
        """
        if TOOL == "buildah":
            os.kill(_first_process(self.process.pid), number)
        else:
            subprocess.run([TOOL, "kill", "--signal", str(int(number)), self.name], check=True, capture_output=True)


def _first_process(pid):
    """Find `tini` below buildah, which starts it through processes of its own that hand no signal on."""
    return next(each.pid for each in psutil.Process(pid).children(recursive=True) if each.name() == "tini")


@dataclass(frozen=True)
class Container:
    """One container, which keeps what is written from run to run."""

    name: str

    def run(
        self, *command, entrypoint=None, user=None, mounts=(), folder=None, stdin=subprocess.DEVNULL, check=None, env=()
    ):
        """Run a command by the image's entrypoint, or by another; `env` has words such as HOME=/."""
        words = [*(self.entrypoint() if entrypoint is None else entrypoint), *command]
        done = subprocess.run(
            [*self.prefix(user, mounts, folder, environment=env), *words],
            stdin=stdin,
            capture_output=True,
            text=True,
            timeout=280,
        )
        if check is not None:
            assert done.returncode == check, f"{done.returncode}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
        return done

    def run_read_only(self, *command, work, user="0:0", home="/root", entrypoint=None):
        """Run a command where nothing but a folder at /work can be written to, as Apptainer does with a user's home."""
        words = [*(self.entrypoint() if entrypoint is None else entrypoint), *command]
        if TOOL != "buildah":
            mount = ["--read-only", "--volume", f"{work}:/work", "--workdir", "/work", "--entrypoint", ""]
            words = [TOOL, "run", "--rm", *mount, "--user", user, "--env", f"HOME={home}", self.name, *words]
        else:  # which has no such option
            root = subprocess.check_output(["buildah", "mount", self.name], text=True).strip()
            Path(root, "work").mkdir(exist_ok=True)
            place = [root, str(work), user, home]
            words = ["unshare", "--mount", "sh", "-euc", _READ_ONLY, *place, *self.config()["Env"], *words]
        return subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=280)

    def start(self, *command, mounts=(), folder=None):
        """Start a command by the image's entrypoint, for a test to send signals to with `kill`."""
        name = f"yolov12-test-{uuid.uuid4().hex[:12]}"
        process = subprocess.Popen(
            [*self.prefix(None, mounts, folder, name), *self.entrypoint(), *command],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        return Running(process, name)

    def prefix(self, user, mounts, folder, name=None, environment=()):
        options = [option for mount in mounts for option in ("--volume", mount)]
        options += ["--user", user] if user else []
        options += [option for each in environment for option in ("--env", each)]
        if TOOL == "buildah":
            options += ["--workingdir", folder] if folder else []
            return ["buildah", "run", *options, self.name, "--"]
        options += ["--workdir", folder] if folder else []
        options += ["--name", name] if name else []
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
