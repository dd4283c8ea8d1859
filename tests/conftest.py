"""What every test needs: the seams applied, Ultralytics' folders in a temporary place, no network.

Four things keep the suite short. Other processes are forked from one that has loaded PyTorch. What several tests need
is made once for all of pytest's processes. A property is tried on few cases, and on many with `--deep`. Pictures are
not rendered, except in tests that look at them.
"""

from __future__ import annotations

import contextlib
import fcntl
import gc
import multiprocessing
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from multiprocessing import forkserver, resource_tracker
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, TextIO

import pytest
from hypothesis import settings

# Ultralytics reads these once, when it is imported, which happens while tests are collected.
# The folders of pytest-xdist's workers lie in that of the process that starts them: runs that several workers look at
# name a data set in the folder of one of them, which may end first.
HOME = Path(tempfile.mkdtemp(prefix="yolov12-tests-", dir=os.environ.get("YOLOV12_TESTS_HOME")))
os.environ.setdefault("YOLOV12_TESTS_HOME", str(HOME))
os.environ["YOLO_CONFIG_DIR"] = str(HOME)
os.environ["YOLO_OFFLINE"] = "1"
os.environ["YOLO_AUTOINSTALL"] = "0"
os.environ["TORCHINDUCTOR_COMPILE_THREADS"] = "1"  # processes of `torch.compile` would count as those of a training

from yolov12 import autopatch  # noqa: E402

autopatch.apply()

from ultralytics.utils import SETTINGS  # noqa: E402

from yolov12.mas.memory.process_tree import ChildProcesses  # noqa: E402

SETTINGS.update({f"{name}_dir": str(HOME / name) for name in ("datasets", "weights", "runs")})

# Number of cases that a property is tried on. A test asks for a part or a multiple of it:
# `settings(max_examples=settings.default.max_examples * 3)`.
_SAME_EVERY_TIME: Mapping[str, Any] = {"deadline": None, "derandomize": True, "database": None}
settings.register_profile("default", max_examples=50, **_SAME_EVERY_TIME)
settings.register_profile("deep", max_examples=500, **_SAME_EVERY_TIME)


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--deep", action="store_true", help="search longer: ten times the cases, and the tests marked deep"
    )


def pytest_configure(config: pytest.Config) -> None:
    settings.load_profile("deep" if config.getoption("deep") else "default")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    for item in items:
        if config.getoption("deep"):
            item.add_marker(pytest.mark.timeout(1800))
        elif item.get_closest_marker("deep"):
            item.add_marker(pytest.mark.skip(reason="--deep runs these"))
    # Here several processes wait for one another. Other tests run beside them, and none would at the end.
    items.sort(key=lambda item: item.path.name != "test_ranks.py")


def pytest_sessionfinish(session: pytest.Session) -> None:
    if not hasattr(session.config, "workerinput"):
        shutil.rmtree(HOME, ignore_errors=True)


@pytest.fixture(scope="session")
def home() -> Path:
    """The folder that holds this test run's Ultralytics settings, data sets, weights and runs."""
    return HOME


@pytest.fixture(scope="session")
def deep(pytestconfig: pytest.Config) -> bool:
    """True with `--deep`."""
    return bool(pytestconfig.getoption("deep"))


@pytest.fixture(autouse=True, scope="module")
def _what_was_imported_is_no_garbage() -> None:
    """Keep the garbage collector off what exists so far: a training calls it five times, for its own objects alone."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _pictures_are_blank(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Save figures as empty files, as rendering takes half a second; tests marked `picture` have real ones."""
    if not request.node.get_closest_marker("picture"):
        monkeypatch.setattr("matplotlib.figure.Figure.savefig", lambda figure, file, **_: Path(file).touch())


@pytest.fixture(autouse=True)
def _servers_of_tests_are_no_part_of_a_training(monkeypatch: pytest.MonkeyPatch) -> None:
    """Leave out the processes that serve all tests, where the child processes of a training are counted."""
    stock = ChildProcesses._children

    def children(counted: ChildProcesses) -> dict[int, list[int]]:
        servers = {forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid}
        return {parent: [pid for pid in pids if pid not in servers] for parent, pids in stock(counted).items()}

    monkeypatch.setattr(ChildProcesses, "_children", children)


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory, worker_id: str) -> Callable[..., Path]:
    """`made_once(name, make)` returns a folder that `make(folder)` filled, once for all of pytest's processes.

    Tests read it and write to copies.
    """
    base = tmp_path_factory.getbasetemp()
    base = (base if worker_id == "master" else base.parent) / "made-once"
    base.mkdir(exist_ok=True)

    def folder(name: str, make: Callable[[Path], object]) -> Path:
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not (base / f"{name}.made").exists():
                shutil.rmtree(base / name, ignore_errors=True)  # of one who failed
                (base / name).mkdir()
                make(base / name)
                (base / f"{name}.made").touch()
        return base / name

    return folder


@pytest.fixture(scope="session")
def tiny_models(made_once: Callable[..., Path]) -> Mapping[str, str]:
    """Task → path of the yaml of a model of ten small layers, for tests in which the model is not the point."""

    def write(folder: Path) -> None:
        for task, head in TINY_HEADS.items():
            (folder / f"tiny-{task}.yaml").write_text(f"{TINY_MODEL}  - [[3, 8, 5], 1, {head}]\n")

    folder = made_once("models", write)
    return {task: str(folder / f"tiny-{task}.yaml") for task in TINY_HEADS}


@pytest.fixture(scope="session")
def tiny_model(tiny_models: Mapping[str, str]) -> str:
    """Path of the yaml of a tiny detection model."""
    return tiny_models["detect"]


TINY_HEADS = {
    "detect": "Detect, [nc]",
    "segment": "Segment, [nc, 8, 16]",
    "pose": "Pose, [nc, kpt_shape]",
    "obb": "OBB, [nc, 1]",
}
TINY_MODEL = """nc: 10
kpt_shape: [17, 3]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, C2f, [8, True]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [-1, 1, nn.Upsample, [None, 2, nearest]]
  - [[-1, 4], 1, Concat, [1]]
  - [-1, 1, C2f, [16]]
"""


# -- other processes --------------------------------------------------------------------------------------------------


@pytest.fixture
def run_python() -> Callable[..., subprocess.CompletedProcess[str]]:
    """Run `python ARGUMENTS...` in this environment; keywords set environment variables, `cwd` the folder."""

    def run(*arguments: str, cwd: Path | None = None, **environment: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            cwd=cwd,
            env={**os.environ, **environment},
            capture_output=True,
            text=True,
            timeout=800,
        )

    return run


# New processes are forked from one that has imported these: seconds each time. Ultralytics is not among them, as it
# reads the environment (RANK, WORLD_SIZE) when it is imported.
FORKS = multiprocessing.get_context("forkserver")
FORKS.set_forkserver_preload(
    ["torch", "torchvision", "cv2", "matplotlib.pyplot", "polars", "scipy.optimize", "requests", "yolov12.mas"]
)
_SCRIPT = """
import atexit, faulthandler, gc, multiprocessing, os, runpy, signal, sys
gc.freeze()
multiprocessing.set_start_method("fork", force=True)  # as in a process that was not forked itself
for number, end in enumerate(ends):
    os.dup2(end.fileno(), number)
    end.close()
sys.stdin, sys.stdout, sys.stderr = (open(number, mode, buffering=1) for number, mode in enumerate("rww"))
faulthandler.register(signal.SIGUSR1)
os.environ.clear()
os.environ.update(environment)
sys.argv = arguments
try:
    runpy.run_path(arguments[0], run_name="__main__")
finally:
    atexit._run_exitfuncs()  # which multiprocessing leaves out
"""


class Script:
    """A Python script in a process of its own, used like a `subprocess.Popen` whose stderr goes to its stdout."""

    def __init__(self, arguments: Sequence[object], environment: Mapping[str, str]) -> None:
        ends = [os.pipe(), os.pipe()]
        self.stdin: TextIO = os.fdopen(ends[0][1], "w")
        self.stdout: TextIO = os.fdopen(ends[1][0])
        names = {
            "arguments": list(map(str, arguments)),
            "environment": {**os.environ, "OMP_NUM_THREADS": "1", **environment},
            "ends": [Connection(ends[0][0]), Connection(end := ends[1][1]), Connection(os.dup(end))],
        }
        self._process = FORKS.Process(target=exec, args=(_SCRIPT, names))
        self._process.start()
        for each in names["ends"]:
            each.close()
        self.pid = self._process.pid

    @property
    def returncode(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        assert self.pid is not None
        os.kill(self.pid, number)

    def wait(self, timeout: float | None = None) -> int:
        self._process.join(timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired("a script", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float = 800) -> tuple[str, None]:
        """Close its stdin, read all that it writes and wait for its end."""
        self.stdin.close()
        watch = threading.Timer(timeout, self._give_up)
        watch.start()
        output = self.stdout.read()
        watch.cancel()
        self.wait(60)  # it has closed its output: this is its last moment
        return output, None

    def _give_up(self) -> None:
        """Kill a process that hangs, after it has shown where."""
        with contextlib.suppress(ProcessLookupError):
            self.send_signal(signal.SIGUSR1)
            time.sleep(2)
        self._process.kill()

    def end(self) -> None:
        if self.returncode is None:
            self._process.kill()
        self._process.join()
        for file in (self.stdin, self.stdout):
            with contextlib.suppress(OSError):
                file.close()


@pytest.fixture(scope="module")
def start_script() -> Iterator[Callable[..., Script]]:
    """Start `python ARGUMENTS...` in a process that has loaded PyTorch; keywords set environment variables."""
    started: list[Script] = []

    def start(*arguments: object, **environment: str) -> Script:
        started.append(Script(arguments, environment))
        return started[-1]

    yield start
    for script in started:
        script.end()


@pytest.fixture(scope="session")
def forks() -> Any:
    """`multiprocessing` context whose processes have loaded PyTorch."""
    return FORKS


@pytest.fixture(scope="session")
def reserve_port() -> Callable[[], int]:
    """Reserve a port for a server that must be told a number: `reserve_port()` returns it.

    It is none of the ports that the system gives to those who ask for any, also to connections that go out. A closed
    connection stays there for a minute (TIME_WAIT): until then nobody gets it but a server that asks for this number
    with SO_REUSEADDR, as PyTorch's does.
    """
    lowest, highest = map(int, Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split())
    all_ports = range(5000, 2**16)
    numbers = [port for port in all_ports if not lowest <= port <= highest] or [*all_ports]
    random.SystemRandom().shuffle(numbers)

    def reserve() -> int:
        while True:
            with socket.socket() as server, contextlib.suppress(OSError):  # in use, or reserved by another process
                port = numbers.pop()
                server.bind(("127.0.0.1", port))
                server.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                server.listen(1)
                with socket.create_connection(("127.0.0.1", port)):
                    server.accept()[0].close()  # first, so that it is the one that lingers
                return port

    return reserve
