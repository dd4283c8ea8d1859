"""A line whose trainings and comparisons end at once."""

import io
import json
import shutil
from collections import Counter

from PIL import Image

from yolov12.watch import moves
from yolov12.watch.arguments import parse
from yolov12.watch.loop import Line, Watch


class Work:
    """Fake work of attempts. `statuses` has the exit statuses of the next processes, 0 if it is empty."""

    def __init__(self, better=True):
        self.better, self.statuses, self.started = better, [], []

    def start(self, task, attempt, log):
        self.started.append(task)
        self.status = self.statuses.pop(0) if self.statuses else 0
        if self.status:
            with log.open("a") as output:
                output.write("yolov12: error: it did not work\nbye\n" if self.status > 0 else "all 9 138\n")
        elif task == "training":
            (attempt / "candidate.pt").write_text(f"candidate of {attempt.name}")
        elif task == "judging":
            digest = moves.digest(attempt / "candidate.pt")
            verdict = {"promote": self.better, "reasons": ["crack fell from 0.500 to 0.400"], "classes": []}
            verdict["candidate"] = digest
            (attempt / "verdict.json").write_text(json.dumps(verdict))
        elif task == "reporting":
            for name in ("report.json", "report.md"):
                shutil.copy(attempt / "outcome.json", attempt / name)
        return self

    def poll(self):
        return self.status

    def stop(self):
        self.started.append("stop")


class Factory:
    """A folder with an inbox and a serving model, and a watch of them with a clock of its own."""

    def __init__(self, folder):
        self.folder, self.inbox, self.serving, self.work = (
            folder,
            folder / "inbox",
            folder / "best.pt",
            folder / "best-watch",
        )
        self.inbox.mkdir()
        self.serving.write_text("first")
        self.count, self.now = 0, 2e9

    def deliver(self, number=1, label="0 0.5 0.5 0.1 0.1"):
        for _ in range(number):
            image = io.BytesIO()
            Image.new("RGB", (16, 16), (self.count, 0, 0)).save(image, "png")
            (self.inbox / f"{self.count}.png").write_bytes(image.getvalue())
            (self.inbox / f"{self.count}.txt").write_text(label)
            self.count += 1

    def request(self, *words):
        return parse(["data=demo", f"inbox={self.inbox}", f"model={self.serving}", "settle=0", "min_images=4", *words])

    def watch(self, work, *words, data="line.yaml", places=()):
        def sleep(seconds):
            self.now += seconds

        return Watch(
            self.request("once", *words),
            Line(str(data), ["missing", "crack"], "detect", places),
            work,
            lambda: self.now,
            sleep,
        )

    def attempts(self):
        return sorted((self.work / "history").iterdir()) if (self.work / "history").exists() else []

    def images(self):
        places = [self.inbox, *(self.work / "dataset" / "images" / split for split in ("train", "val"))]
        return Counter(file.read_bytes() for place in places for file in place.glob("*.png"))


def go_to(watch, phase):
    for _ in range(20):
        if watch.state.phase is phase:
            return
        watch.step()
    raise AssertionError(watch.state)


def put(factory, name, image=b"no image", label=""):
    (factory.inbox / f"{name}.png").write_bytes(image)
    (factory.inbox / f"{name}.txt").write_text(label)
