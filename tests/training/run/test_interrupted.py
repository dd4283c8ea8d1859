"""Trainings that are killed at any moment, any number of times, end as if they had not been interrupted."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO

EPOCHS, BATCHES = 20, 4
LIFE = """
import os, sys
from pathlib import Path
import torch
from ultralytics import YOLO

ARGUMENTS = dict(
    data="demo:images=40,val=0.2", imgsz=64, batch=8, nbs=16, epochs={epochs}, close_mosaic=6, warmup_epochs=2.0,
    mixup=0.3, multi_scale=0.5, optimizer="AdamW", lr0=1e-3, bn_group=8, recipe=False, plots=False, device="cpu",
    deterministic=True, save_every=1, resume="auto", name="run", exist_ok=False,
)

def train(project):
    model = YOLO("yolov8n.yaml")
    model.add_callback("on_train_start", lambda trainer: Path(project, "began").write_text(str(trainer.start_epoch)))
    model.train(project=project, **ARGUMENTS)
    trainer = model.trainer
    torch.save([trainer.model.state_dict(), trainer.ema.ema.state_dict()], Path(project, "final.pt"))

for project in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        train(project.strip())
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Lives:
    """Server that forks one training after another, so that libraries are loaded once."""

    def __init__(self, folder):
        script = folder / "life.py"
        script.write_text(LIFE.replace("{epochs}", str(EPOCHS)))
        self.log = (folder / "log").open("w+")
        self._server = subprocess.Popen(
            [sys.executable, script], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.log, text=True
        )

    def live(self, project, number=None, delay_s=0.0):
        """Train and return the exit status; send a signal, if given, `delay_s` after the training has begun."""
        project.mkdir(exist_ok=True)
        (project / "began").unlink(missing_ok=True)
        self._server.stdin.write(f"{project}\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        if number is not None:
            while not (project / "began").exists():
                time.sleep(0.01)
                assert Path(f"/proc/{pid}").exists(), self.log.seek(0) or self.log.read()[-3000:]
            time.sleep(delay_s)
            os.kill(pid, number)
        return int(self._server.stdout.readline())

    def close(self):
        self._server.stdin.close()
        self._server.wait()
        self.log.close()


@pytest.fixture(scope="module")
def lives(tmp_path_factory):
    lives = Lives(tmp_path_factory.mktemp("lives"))
    yield lives
    lives.close()


@pytest.fixture(scope="module")
def undisturbed(lives, tmp_path_factory):
    """Folder of an uninterrupted run, and its seconds per update, validation included."""
    project = tmp_path_factory.mktemp("undisturbed")
    assert lives.live(project) == 0
    rows = (project / "run" / "results.csv").read_text().splitlines()[1:]
    return project, float(rows[-1].split(",")[1]) / EPOCHS / (BATCHES // 2)


def results(project):
    """Return the rows of results.csv without the columns of time and memory."""
    header, *rows = [line.split(",") for line in (project / "run" / "results.csv").read_text().splitlines()]
    kept = [index for index, name in enumerate(header) if name != "time" and not name.startswith("memory/")]
    return [[row[index] for index in kept] for row in [header, *rows]]


@pytest.mark.timeout(600)
def test_twenty_kills_change_nothing(lives, undisturbed, tmp_path):
    whole, step_s = undisturbed
    draw = random.Random(0)
    for _ in range(20):
        assert lives.live(tmp_path, signal.SIGKILL, draw.uniform(0, 3 * step_s)) == -signal.SIGKILL
    assert lives.live(tmp_path) == 0
    assert int((tmp_path / "began").read_text()) > 0  # the last process resumed a run
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]
    for ours, expected in zip(torch.load(tmp_path / "final.pt"), torch.load(whole / "final.pt"), strict=True):
        assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert results(tmp_path) == results(whole)
    rows = [line.split(",") for line in (tmp_path / "run" / "memory.csv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert sum(int(row[2]) for row in rows) <= EPOCHS * BATCHES * 8  # the last accumulation may lack its update
    assert not list((tmp_path / "run").rglob("*.unfinished"))
    assert not (tmp_path / "run" / "weights" / "state.pt").exists()


def test_a_terminated_run_leaves_a_checkpoint_soon(lives, undisturbed, tmp_path):
    _, step_s = undisturbed
    begin = time.monotonic()
    assert lives.live(tmp_path, signal.SIGTERM, 5 * step_s) == 143
    assert time.monotonic() - begin < 10 + 5 * step_s + 10  # 10 s of these are for the start
    weights = tmp_path / "run" / "weights"
    assert torch.load(weights / "state.pt", weights_only=True)["loader"]["data"]["batches"] == BATCHES
    assert len(YOLO(weights / "last.pt").predict(torch.zeros(1, 3, 64, 64), verbose=False)) == 1


def test_control_c_is_a_keyboard_interrupt_that_loses_nothing(lives, undisturbed, tmp_path):
    _, step_s = undisturbed
    assert lives.live(tmp_path, signal.SIGINT, 5 * step_s) != 0
    assert "KeyboardInterrupt" in (lives.log.seek(0) or lives.log.read())[-3000:]
    assert (tmp_path / "run" / "weights" / "state.pt").exists()
