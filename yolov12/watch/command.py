"""`yolov12 watch`: checks first, then the watch, until a signal ends it."""

from __future__ import annotations

import json
import signal
import subprocess
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from types import FrameType
from typing import Any

from yolov12 import files
from yolov12.errors import ConfigError, FolderInUseError
from yolov12.printable import printable
from yolov12.training.classes.names import listed, match
from yolov12.watch import moves, state_file
from yolov12.watch.arguments import Request, check_inbox, parse
from yolov12.watch.children import Processes, command
from yolov12.watch.log import tell
from yolov12.watch.loop import Line, Watch
from yolov12.watch.phases import Phase

__all__ = ["main"]


def main(words: list[str]) -> int:
    """Run `yolov12 watch`: see `yolov12.watch.main`."""
    with _signals():
        request = parse(words)
        status, found = _check(request)
        if found is None:
            return status
        check_inbox(request.inbox, found["folders"])
        request.work.mkdir(parents=True, exist_ok=True)
        with ExitStack() as stack:
            for folder in (request.work, request.inbox):
                stack.callback(_lock(folder).release)
            line = Line(found["data"], found["names"], found["task"], [found["data"], *found["folders"]])
            watch = Watch(request, line, Processes())
            _warn_of_lost_classes(found["known"], watch.collection.names)
            tell(f"watching {request.inbox} for {request.model}; everything is in {request.work}")
            return watch.run()


def _check(request: Request) -> tuple[int, dict[str, Any] | None]:
    """Check what needs PyTorch in a process of its own, so that this one stays small.

    In the middle of an attempt, the result of the last check with the same arguments counts. A watch that was killed
    then goes on at once.
    """
    text = json.dumps({"model": str(request.model), "data": request.data, "training": request.training})
    file, yaml = request.work / "checked.json", Path(request.data)
    # Class ids in the inbox may mean what the data set says, so it must be the same.
    key = [text, moves.digest(yaml) if yaml.is_file() else ""]
    if found := _checked_before(request.work, file, key):
        return 0, found
    done = subprocess.run(command("check", text), stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        return done.returncode, None
    found = json.loads(done.stdout.splitlines()[-1])
    request.work.mkdir(parents=True, exist_ok=True)
    moves.save_text(file, json.dumps({"request": key, "found": found}) + "\n")
    return 0, found


def _checked_before(work: Path, file: Path, key: list[str]) -> dict[str, Any] | None:
    state = state_file.load(work / "state.json")
    if state is None or state.phase is Phase.IDLE:
        return None
    try:
        last = json.loads(file.read_text("utf-8"))
        found: dict[str, Any] | None = last["found"] if last["request"] == key else None
    except (FileNotFoundError, ValueError, KeyError, TypeError):
        return None
    return found


def _lock(folder: Path) -> files.FolderLock:
    try:
        lock = files.lock(folder)
    except OSError as error:
        raise ConfigError(f"{folder} cannot be written to, and the watch moves images: {error.strerror}") from error
    if lock is None:
        raise FolderInUseError(f"another watch uses {folder}: stop it, or give another work= and inbox=")
    return lock


def _warn_of_lost_classes(known: list[str], names: list[str]) -> None:
    old = dict(enumerate(known))
    lost = [old[index] for index in set(old) - set(match(old, dict(enumerate(names))))]
    if lost:
        tell(f"warning: the model knows classes that the data does not have: {printable(listed(lost))}")


@contextmanager
def _signals() -> Iterator[None]:
    """Return a context in which SIGTERM and SIGINT raise SystemExit. A watch may end at any moment."""

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    before = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
