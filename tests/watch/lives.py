"""A watch that is killed again and again: `python lives.py FOLDER SEED KILLS`. It forks, so libraries load once.

Each life is the real watch with a fake training and a fake comparison. It is killed (SIGKILL) before a random line of
the package's code, so that any two steps are torn apart; in each fourth life, that is a line of a certain phase. Images
arrive between the lives, and at random lines in them.
`python lives.py FOLDER SEED KILLS copy` lets no file be renamed from the inbox, as between two file systems. After each
kill, a line of JSON on stdout says what is in the folder.
"""

from __future__ import annotations

import errno
import hashlib
import io
import itertools
import json
import os
import random
import signal
import sys
from contextlib import redirect_stdout
from pathlib import Path

from PIL import Image

from yolov12 import files, watch
from yolov12.watch import arguments, moves
from yolov12.watch.loop import Line, Watch

PHASES = ("idle", "preparing", "training", "judging", "promoting", "reporting")
OURS = (str(Path(watch.__file__).parent), files.__file__)
NAMES = ["missing", "bridge", "crack"]


def deliver(inbox: Path, number: int) -> None:
    """Put a new image and its label into the inbox, each by a rename; some are damaged, some come twice."""
    image = io.BytesIO()
    twin = number - 5 if number % 13 == 12 else number
    Image.new("RGB", (16, 16), (twin % 256, twin // 256, 99)).save(image, "png")
    data = image.getvalue() if number % 11 != 10 else image.getvalue()[:60] + b"%d" % number
    label = b"%d 0.5 0.5 0.1 0.1\n" % (number % (4 if number % 7 == 6 else 3))
    for suffix, content in ((".txt", label), (".png", data)):
        part = inbox.parent / "part"
        part.write_bytes(content)
        part.replace(inbox / f"{number:05d}{suffix}")
    with (inbox.parent / "delivered.txt").open("a") as file:
        file.write(hashlib.sha256(data).hexdigest() + "\n")


def weights(images: list[str], name: str) -> bytes:
    """Weights that show whether they are whole."""
    body = json.dumps({"name": name, "images": images}).encode().ljust(3000)
    return hashlib.sha256(body).hexdigest().encode() + body


class Work:
    """Trains and compares at once."""

    def start(self, task, attempt, log):
        if task == "training":
            images = [path for split in ("train", "val") for path in (attempt / f"{split}.txt").read_text().split()]
            content = weights(images, attempt.name)
            files.write(attempt / "candidate.pt", lambda file: file.write(content))
        elif task == "judging":
            body = (attempt / "candidate.pt").read_bytes()
            assert hashlib.sha256(body[64:]).hexdigest().encode() == body[:64]
            promote = int(body[:2], 16) % 2 == 0
            validated = attempt.parents[1] / "validated.txt"
            if promote:
                with validated.open("a") as file:
                    file.write(hashlib.sha256(body).hexdigest() + "\n")
            digest = moves.digest(attempt / "candidate.pt")
            verdict = {"promote": promote, "reasons": ["it is better"], "classes": [], "candidate": digest}
            moves.save_text(attempt / "verdict.json", json.dumps(verdict))
        elif task == "reporting":
            moves.save_text(attempt / "report.md", "\n")
        return self

    def poll(self):
        return 0

    def stop(self):
        pass


def live(folder: Path, draw: random.Random, kill_at: float, numbers, phase: str) -> int:
    """Watch, until the line `kill_at`, counted in one phase or in all, or until the end of all work."""
    left, at_start = kill_at, draw.random() < 0.15
    arrive_at = sorted(draw.uniform(0, min(kill_at, 4000)) for _ in range(draw.choice([0, 0, 1, 2])))

    def trace(frame, event, argument):
        nonlocal left
        if not frame.f_code.co_filename.startswith(OURS):
            return None
        if phase and (loop is None or loop.state.phase.value != phase):
            return trace
        if event == "line":
            left -= 1
            if left <= 0:
                os.kill(os.getpid(), signal.SIGKILL)
            if arrive_at and kill_at - left > arrive_at[0]:
                arrive_at.pop(0)
                sys.settrace(None)
                deliver(folder / "inbox", next(numbers))
                sys.settrace(trace)
        return trace

    words = [f"data={folder / 'line.yaml'}", f"inbox={folder / 'inbox'}", f"model={folder / 'best.pt'}", "once"]
    request = arguments.parse([*words, f"work={folder / 'work'}", "min_images=2", "settle=0", "poll=0"])
    request.work.mkdir(exist_ok=True)
    is_killed, loop = kill_at < float("inf"), None
    with redirect_stdout(io.StringIO()):
        assert files.lock(request.work)
        if is_killed and at_start:
            sys.settrace(trace)
        loop = Watch(request, Line("line.yaml", NAMES, "detect"), Work())
        if is_killed:  # what it reads at its start grows with every image
            sys.settrace(trace)
        return loop.run()


def look(folder: Path) -> dict:
    """What is where: digests of images, and whether the serving model is one that was validated."""
    where = {
        "inbox": folder / "inbox",
        "train": folder / "work" / "dataset" / "images" / "train",
        "val": folder / "work" / "dataset" / "images" / "val",
        "rejected": folder / "work" / "rejected",
    }
    state = folder / "work" / "state.json"
    serving = hashlib.sha256((folder / "best.pt").read_bytes()).hexdigest()
    validated = folder / "work" / "validated.txt"
    valid = validated.read_text().split() if validated.exists() else []
    return {
        "places": {name: sorted(moves.digest(file) for file in path.glob("*.png")) for name, path in where.items()},
        "phase": json.loads(state.read_text())["phase"] if state.exists() else "",
        "serving_is_valid": serving in [*valid, hashlib.sha256(weights([], "first")).hexdigest()],
    }


def main(folder: Path, seed: int, kills: int, mode: str = "") -> None:
    draw = random.Random(seed)
    (folder / "inbox").mkdir(parents=True)
    (folder / "line.yaml").write_text("names: []\n")
    (folder / "best.pt").write_bytes(weights([], "first"))
    os.fsync = lambda descriptor: None  # for power loss, not for kills
    if mode == "copy":
        rename = os.rename

        def rename_here(source, target):
            if Path(source).parent == folder / "inbox":
                raise OSError(errno.EXDEV, "another file system")
            rename(source, target)

        os.rename = rename_here
    delivered = 0
    for life in itertools.count():
        for _ in range(draw.choice([0, 0, 1]) if life < kills else 0):
            deliver(folder / "inbox", delivered)
            delivered += 1
        phase = PHASES[life // 4 % len(PHASES)] if life % 4 == 3 else ""
        kill_at = 10 ** draw.uniform(0.5, 1.8 if phase else 3.9) if life < kills else float("inf")
        pid = os.fork()
        if not pid:
            status = 99
            try:
                status = live(folder, random.Random(f"{seed} {life}"), kill_at, itertools.count(delivered), phase)
            finally:
                os._exit(status)
        status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        delivered += 3  # numbers that this life may have used
        print(json.dumps({"status": status, **look(folder)}), flush=True)
        if life >= kills:
            break


if __name__ == "__main__":
    main(Path(sys.argv[1]).absolute(), int(sys.argv[2]), int(sys.argv[3]), *sys.argv[4:])
