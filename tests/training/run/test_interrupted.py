"""Trainings that are killed at any moment, any number of times, end as if they had not been interrupted."""

import os
import random
import signal
import time
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO

BATCHES = 4
LIFE = """
import os, signal, sys, time
from pathlib import Path
import torch
from ultralytics import YOLO

log, model_yaml = sys.argv[1:]
os.dup2(os.open(log, os.O_CREAT | os.O_WRONLY | os.O_APPEND), 2)
signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell lets what it starts in the background ignore it
ARGUMENTS = dict(
    data="demo:images=40,val=0.2", imgsz=64, batch=8, nbs=16, epochs={epochs}, close_mosaic=3, warmup_epochs=2.0,
    mixup=0.3, multi_scale=0.5, optimizer="AdamW", lr0=1e-3, bn_group=8, recipe=False, plots=False, device="cpu",
    deterministic=True, save_every=1, resume="auto", name="run", exist_ok=False,
)

def begin(trainer, project, most):
    updates = project / "updates"
    updates.write_text("")
    (project / "began").write_text(str(trainer.start_epoch))

    def updated(*_):
        with updates.open("a") as file:
            file.write(".")
        while updates.stat().st_size > most and not (project / "signalled").exists():
            time.sleep(0.01)

    trainer.optimizer.register_step_post_hook(updated)

def train(project, most):
    model = YOLO(model_yaml)
    model.add_callback("on_train_start", lambda trainer: begin(trainer, Path(project), most))
    model.train(project=project, **ARGUMENTS)
    trainer = model.trainer
    torch.save([trainer.model.state_dict(), trainer.ema.ema.state_dict()], Path(project, "final.pt"))

for line in sys.stdin:
    pid = os.fork()
    if not pid:
        os.dup2(2, 1)
        most, project = line.strip().split(" ", 1)
        train(project, int(most))
        os._exit(0)
    print(pid, flush=True)
    print(os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]), flush=True)
"""


class Lives:
    """Server that forks one training after another, so that libraries are loaded once."""

    def __init__(self, folder, start, model, epochs):
        script, self.log = folder / "life.py", folder / "log"
        script.write_text(LIFE.replace("{epochs}", str(epochs)))
        self.epochs = epochs
        self._server = start(script, self.log, model)

    def live(self, project, number=None, updates=0, delay_s=0.0):
        """Train and return the exit status; send a signal, if given, `delay_s` after so many updates.

        A training that is faster than this process waits for its signal in its next update.
        """
        project.mkdir(exist_ok=True)
        began, done, signalled = (project / name for name in ("began", "updates", "signalled"))
        for file in (began, signalled):
            file.unlink(missing_ok=True)
        most = 10**9 if number is None else updates
        self._server.stdin.write(f"{most} {project}\n")
        self._server.stdin.flush()
        pid = int(self._server.stdout.readline())
        if number is not None:
            while not began.exists() or done.stat().st_size < updates:
                time.sleep(0.01)
                assert Path(f"/proc/{pid}").exists(), self.log.read_text()[-3000:]
            time.sleep(delay_s)
            os.kill(pid, number)
            signalled.touch()
        return int(self._server.stdout.readline())


@pytest.fixture(scope="module")
def lives(start_script, tiny_model, tmp_path_factory, deep):
    return Lives(tmp_path_factory.mktemp("lives"), start_script, tiny_model, 20 if deep else 8)


@pytest.fixture(scope="module")
def undisturbed(lives, tmp_path_factory):
    """Folder of an uninterrupted run, and its seconds per update, validation included."""
    project = tmp_path_factory.mktemp("undisturbed")
    assert lives.live(project) == 0
    rows = (project / "run" / "results.csv").read_text().splitlines()[1:]
    return project, float(rows[-1].split(",")[1]) / lives.epochs / (BATCHES // 2)


def results(project):
    """Return the rows of results.csv without the columns of time and memory."""
    header, *rows = [line.split(",") for line in (project / "run" / "results.csv").read_text().splitlines()]
    kept = [index for index, name in enumerate(header) if name != "time" and not name.startswith("memory/")]
    return [[row[index] for index in kept] for row in [header, *rows]]


def test_kills_change_nothing(lives, undisturbed, tmp_path, deep):
    whole, step_s = undisturbed
    draw = random.Random(0)
    for _ in range(20 if deep else 6):
        assert lives.live(tmp_path, signal.SIGKILL, draw.randint(0, 3), draw.uniform(0, step_s)) == -signal.SIGKILL
    assert lives.live(tmp_path) == 0
    assert int((tmp_path / "began").read_text()) > 0  # the last process resumed a run
    assert [path.name for path in tmp_path.glob("run*")] == ["run"]
    for ours, expected in zip(torch.load(tmp_path / "final.pt"), torch.load(whole / "final.pt"), strict=True):
        assert all(torch.equal(ours[name], value) for name, value in expected.items())
    assert results(tmp_path) == results(whole)
    rows = [line.split(",") for line in (tmp_path / "run" / "memory.csv").read_text().splitlines()[1:]]
    assert [int(row[0]) for row in rows] == list(range(1, len(rows) + 1))
    assert sum(int(row[2]) for row in rows) <= lives.epochs * BATCHES * 8  # the last accumulation may lack its update
    assert not list((tmp_path / "run").rglob("*.unfinished"))
    assert not (tmp_path / "run" / "weights" / "state.pt").exists()


def test_a_terminated_run_leaves_a_checkpoint_soon(lives, tmp_path):
    assert lives.live(tmp_path, signal.SIGTERM, 5) == 143
    assert len(results(tmp_path)) <= lives.epochs  # with the header: the end was not waited for
    weights = tmp_path / "run" / "weights"
    assert torch.load(weights / "state.pt", weights_only=True)["loader"]["data"]["batches"] == BATCHES
    assert len(YOLO(weights / "last.pt").predict(torch.zeros(1, 3, 64, 64), verbose=False)) == 1


def test_control_c_is_a_keyboard_interrupt_that_loses_nothing(lives, tmp_path):
    assert lives.live(tmp_path, signal.SIGINT, 5) != 0
    log = lives.log.read_text()[-4000:]
    assert "KeyboardInterrupt" in log
    last = tmp_path / "run" / "weights" / "last.pt"
    assert f"this run is saved: it goes on with the same command and resume=auto, or with model={last}" in log
    assert (tmp_path / "run" / "weights" / "state.pt").exists()
