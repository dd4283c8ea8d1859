"""Runs that are interrupted, at a moment that a test chooses."""

import shutil
from types import SimpleNamespace

import pytest


class PowerCutError(Exception):
    """Power cut at a moment that a test chooses."""


def cut(*_):
    """Cut the power now."""
    raise PowerCutError


def cut_at(batch):
    """Return callbacks that end a run after a number of batches."""
    done = []

    def callback(trainer):
        done.append(trainer.epoch)
        if len(done) == batch:
            cut()

    return [("on_train_batch_end", callback)]


@pytest.fixture(scope="session")
def power():
    """Return the error of a power cut, a function that raises it, and one for callbacks that do after some batches."""
    return SimpleNamespace(CutError=PowerCutError, cut=cut, cut_at=cut_at)


@pytest.fixture
def interrupted(trainings, made_once, tmp_path):
    """Lay a copy of a run that was cut in its second epoch into a folder, by default this test's: the copy's folder."""

    def make(folder):
        trainings.train(folder, bn_group=8, name="line", callbacks=cut_at(6), raises=PowerCutError)

    original = made_once("interrupted", make) / "line"
    return lambda project=tmp_path, name="line": shutil.copytree(original, project / name)


@pytest.fixture(name="cut")
def cut_run(trainings, power):
    """Train until a power cut, by default in the second epoch."""
    return lambda folder, batch=6, **arguments: trainings.train(
        folder, bn_group=8, callbacks=power.cut_at(batch), raises=power.CutError, **arguments
    )
