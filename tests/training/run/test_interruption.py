"""Signals in a training: they wait for what must not be cut, and handlers of the user's own decide."""

import os
import signal
import time

import pytest
from ultralytics.models.yolo.detect import DetectionTrainer

from yolov12.training.run import process_group, run_state
from yolov12.training.run.interruption import Interruption


@pytest.fixture
def signals():
    """Function that sets a handler, and puts all of them back at the end."""
    stock = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    yield signal.signal
    for number, handler in stock.items():
        signal.signal(number, handler)


def test_signals_wait_for_what_must_not_be_cut():
    interruption, stock = Interruption(), signal.getsignal(signal.SIGTERM)
    interruption.watch()
    done = []
    try:
        with pytest.raises(SystemExit, match="143"), interruption.deferred():  # noqa: PT012
            signal.raise_signal(signal.SIGTERM)
            done.append(1)
        with pytest.raises(SystemExit, match="143"):
            interruption.check()
    finally:
        interruption.stop()
    assert done
    assert signal.getsignal(signal.SIGTERM) is stock


def test_signals_that_are_ignored_stay_so_and_those_of_the_user_reach_their_handlers(signals):
    seen = []
    signals(signal.SIGINT, signal.SIG_IGN)
    signals(signal.SIGTERM, lambda number, frame: seen.append((number, frame is not None)))
    interruption = Interruption()
    interruption.watch()
    signal.raise_signal(signal.SIGINT)
    with interruption.deferred():
        signal.raise_signal(signal.SIGTERM)
        assert not seen
        assert not interruption.due
    assert seen == [(signal.SIGTERM, True)]
    interruption.at_once = False  # as with several ranks, which agree on an end
    signal.raise_signal(signal.SIGTERM)
    assert len(seen) == 2
    with interruption.deferred():
        signal.raise_signal(signal.SIGTERM)
        interruption.stop()
        assert len(seen) == 3


def test_a_handler_that_is_set_in_a_training_stays(signals):
    interruption = Interruption()
    interruption.watch()
    signals(signal.SIGTERM, print)
    interruption.stop()
    assert signal.getsignal(signal.SIGTERM) is print


def test_a_users_handler_does_not_hide_the_signal_that_ends_the_training(signals):
    """A job is terminated in an optimizer step, and its user, who counts presses of Ctrl-C, presses it then."""
    seen = []
    signals(signal.SIGINT, lambda *_: seen.append(1))
    signals(signal.SIGTERM, signal.SIG_DFL)
    interruption = Interruption()
    interruption.watch()
    with pytest.raises(SystemExit, match="143"), interruption.deferred():  # noqa: PT012
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
        assert interruption.due
    assert seen == [1]
    interruption.stop()


def test_a_users_handler_is_called_while_the_handlers_are_put_back(signals, monkeypatch):
    seen = []
    signals(signal.SIGTERM, lambda *_: seen.append(1))
    signals(signal.SIGINT, signal.default_int_handler)  # a job in the background ignores it
    interruption = Interruption()
    interruption.watch()
    monkeypatch.setattr(signal, "getsignal", lambda number: signal.raise_signal(signal.SIGTERM))
    interruption.stop()
    assert len(seen) == 2


def test_a_handler_that_a_user_has_put_around_reaches_the_first_one_also_after_the_training(signals):
    seen = []
    signals(signal.SIGTERM, lambda *_: seen.append("first"))
    interruption = Interruption()
    interruption.watch()
    before = signal.getsignal(signal.SIGTERM)
    signals(signal.SIGTERM, lambda *given: (seen.append("second"), before(*given)))
    interruption.at_once = False
    interruption.stop()
    signal.raise_signal(signal.SIGTERM)
    assert seen == ["second", "first"]


def test_a_handler_that_is_not_pythons_stays(monkeypatch):
    """Python cannot put back the handler of a library."""
    monkeypatch.setattr(signal, "getsignal", lambda number: None)
    monkeypatch.setattr(signal, "signal", lambda *_: pytest.fail("it was replaced"))
    interruption = Interruption()
    interruption.watch()
    interruption.stop()


def test_a_users_handler_decides_how_a_training_ends(trainings, signals, tmp_path):
    """The usual way to end a job of a cluster in time: the handler notes the signal, and a callback stops."""
    asked, batches = [], []
    signals(signal.SIGTERM, lambda *_: asked.append(1))

    def look(trainer):
        batches.append(trainer.epoch)
        if len(batches) == 2:
            signal.raise_signal(signal.SIGTERM)
        trainer.stop = bool(asked)

    run = trainings.train(tmp_path, callbacks=[("on_train_batch_end", look)])
    assert len(batches) == 2
    assert run.calls["on_train_end"] == 1
    assert len(run.results) == 1


def test_a_handler_that_raises_at_the_end_of_a_training_leaves_nothing_open(trainings, signals, monkeypatch, tmp_path):
    """The signal arrives in an optimizer step that fails."""
    order, disband = [], process_group.disband
    monkeypatch.setattr(process_group, "disband", lambda *error: (order.append("disband"), disband(*error)))

    def handle(*_):
        order.append("handler")
        raise InterruptedError

    def fail(*_):
        signal.raise_signal(signal.SIGTERM)
        raise ValueError

    signals(signal.SIGTERM, handle)
    begin = ("on_train_start", lambda trainer: trainer.optimizer.register_step_pre_hook(fail))
    trainings.train(tmp_path, callbacks=[begin], raises=InterruptedError)
    assert order == ["disband", "disband", "handler"]  # the first tells other processes of the error
    assert signal.getsignal(signal.SIGTERM) is handle


@pytest.mark.parametrize("impatient", [False, True])
@pytest.mark.parametrize(("number", "error"), [(signal.SIGINT, KeyboardInterrupt), (signal.SIGTERM, SystemExit)])
def test_a_run_that_a_signal_ends_says_how_it_goes_on_and_tells_the_other_processes(
    trainings, signals, monkeypatch, tmp_path, number, error, impatient
):
    """It is saved after the signal, as it was not just before. A second signal does not cut that short."""
    batches, told = [], []
    save, disband = run_state.RunSaver._save, process_group.disband

    def saved(saver):
        if impatient:
            signal.raise_signal(number)
        save(saver)

    def look(_):
        batches.append(1)
        if len(batches) == 2:
            signal.raise_signal(number)

    signals(signal.SIGINT, signal.default_int_handler)
    signals(signal.SIGTERM, signal.SIG_DFL)
    monkeypatch.setattr(run_state.RunSaver, "_save", saved)
    monkeypatch.setattr(process_group, "disband", lambda *errors: (told.extend(errors), disband(*errors)))
    run = trainings.train(tmp_path, save_every="5min", callbacks=[("on_train_batch_end", look)], raises=error)
    assert len(batches) == 2
    assert (run.folder / "weights" / "state.pt").exists()
    assert run.log.count("this run is saved: it goes on with") == 1
    assert [type(each) for each in told] == [error]
    assert signal.getsignal(number) in (signal.default_int_handler, signal.SIG_DFL)


def test_signals_that_are_kept_raise_nothing_until_they_are_asked_for(signals):
    interruption, seen = Interruption(), []
    signals(signal.SIGTERM, signal.SIG_DFL)
    signals(signal.SIGINT, lambda *_: seen.append(1))
    interruption.watch()
    with interruption.kept():
        signal.raise_signal(signal.SIGTERM)
        signal.raise_signal(signal.SIGINT)
    assert not seen
    with pytest.raises(SystemExit, match="143"):
        interruption.check()
    assert seen == [1]
    with pytest.raises(SystemExit, match="143"):
        signal.raise_signal(signal.SIGTERM)  # one that comes later is heeded as always
    interruption.stop()


def test_a_signal_that_was_kept_to_the_end_is_raised_then(signals):
    """Such as one that came while a run that had failed was saved."""
    for number, error in ((signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)):
        signals(signal.SIGINT, signal.default_int_handler)
        signals(signal.SIGTERM, signal.SIG_DFL)
        interruption = Interruption()
        interruption.watch()
        with interruption.kept():
            signal.raise_signal(number)
        with pytest.raises(error):
            interruption.stop()
        interruption.stop()  # once
        assert signal.getsignal(signal.SIGTERM) == signal.SIG_DFL


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_in_the_last_save_of_a_run_that_failed_is_not_lost(trainings, signals, monkeypatch, tmp_path, number):
    save = run_state.RunSaver._save

    def saved(saver):
        signal.raise_signal(number)
        save(saver)

    def fail(_):
        monkeypatch.setattr(run_state.RunSaver, "_save", saved)
        raise RuntimeError("a callback failed")

    signals(signal.SIGINT, signal.default_int_handler)
    signals(signal.SIGTERM, signal.SIG_DFL)
    error = SystemExit if number == signal.SIGTERM else KeyboardInterrupt
    run = trainings.train(tmp_path, save_every="5min", callbacks=[("on_train_batch_end", fail)], raises=error)
    assert (run.folder / "weights" / "state.pt").exists()


def test_a_ctrl_c_that_a_callback_catches_does_not_end_the_training(trainings, signals, tmp_path):
    signals(signal.SIGINT, signal.default_int_handler)
    caught = []

    def wait(_):
        try:
            if not caught:
                signal.raise_signal(signal.SIGINT)
        except KeyboardInterrupt:
            caught.append(1)

    run = trainings.train(tmp_path, callbacks=[("on_train_batch_end", wait)])
    assert caught == [1]
    assert run.calls["on_train_end"] == 1


def test_a_sigterm_that_a_callback_swallows_ends_the_training(trainings, signals, tmp_path):
    """Without this package, nothing could swallow it."""
    signals(signal.SIGTERM, signal.SIG_DFL)

    def swallow(_):
        try:
            signal.raise_signal(signal.SIGTERM)
        except BaseException:
            return

    trainings.train(tmp_path, callbacks=[("on_train_batch_end", swallow)], raises=SystemExit)


@pytest.mark.parametrize("defers", [False, True])
def test_a_forked_process_is_no_part_of_the_training(signals, tmp_path, defers):
    signals(signal.SIGTERM, signal.SIG_DFL)
    interruption = Interruption()
    interruption.watch()
    interruption._deferrals = int(defers)  # another thread forks in an optimizer step
    child = os.fork()
    if not child:
        try:
            time.sleep(60)
        finally:
            os._exit(3)
    os.kill(child, signal.SIGTERM)
    _, status = os.waitpid(child, 0)
    interruption._deferrals = 0
    interruption.stop()
    assert os.WTERMSIG(status) == signal.SIGTERM
    assert not interruption.due


def test_to_look_at_the_loaders_of_a_training_takes_no_signals(trainings, signals, tiny_model, tmp_path):
    signals(signal.SIGINT, signal.default_int_handler)
    signals(signal.SIGTERM, signal.SIG_DFL)
    trainer = DetectionTrainer(overrides={**trainings.TINY, "model": tiny_model, "project": str(tmp_path)})
    trainer._setup_train()
    assert len(trainer.train_loader)
    assert signal.getsignal(signal.SIGINT) is signal.default_int_handler
    seen = []
    trainer.add_callback("on_train_batch_end", lambda _: seen.append(signal.getsignal(signal.SIGTERM)))
    trainer.train()
    assert seen
    assert signal.SIG_DFL not in seen
    assert signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
