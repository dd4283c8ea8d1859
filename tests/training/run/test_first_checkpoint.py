"""A run that is saved before its first epoch is complete, by a trainer whose `save_model` is the user's own."""

import math
import signal

import torch
from ultralytics.models.yolo.detect import DetectionTrainer


class Noted(DetectionTrainer):
    """Notes for what it is called."""

    def save_model(self):
        self.noted = [*getattr(self, "noted", []), (self.epoch, math.isnan(self.fitness))]
        return super().save_model()


def test_a_save_model_of_the_users_own_is_called_at_the_ends_of_epochs_only(trainings, tmp_path):
    for settings in ({"mas": False}, {"save_every": 1}):
        run = trainings.train(tmp_path, trainer=Noted, **settings)
        assert run.trainer.noted == [(0, False), (1, False)]


def test_a_run_of_such_a_trainer_is_resumed_in_its_first_epoch(trainings, power, tmp_path):
    part = trainings.train(tmp_path, trainer=Noted, callbacks=power.cut_at(2), raises=power.CutError, bn_group=8)
    last = part.folder / "weights" / "last.pt"
    assert not hasattr(part.trainer, "noted")
    again = trainings.train(tmp_path, last, trainer=Noted, resume=True)
    assert "epoch 1, after batch 2 of" in again.log
    assert again.trainer.noted == [(0, False), (1, False)]


class OfAnotherForm(DetectionTrainer):
    """Writes weights in a form of its own."""

    def save_model(self):
        torch.save(self.model.state_dict(), self.wdir / "mine.pth")
        return True


def test_no_checkpoint_stays_that_the_users_code_has_not_written(trainings, tmp_path):
    for settings in ({"mas": False}, {"save_every": 1}):
        folders = []
        trainings.train(
            tmp_path, trainer=OfAnotherForm, raises=FileNotFoundError,
            callbacks=[("on_fit_epoch_end", lambda trainer, folders=folders: folders.append(trainer.wdir))], **settings,
        )  # fmt: skip
        assert "mine.pth" in {file.name for file in folders[0].iterdir()}
        assert not (folders[0] / "last.pt").exists()


def test_nor_does_one_stay_that_was_resumed_from(trainings, power, tmp_path):
    part = trainings.train(
        tmp_path, trainer=OfAnotherForm, callbacks=power.cut_at(2), raises=power.CutError, save_every=1
    )
    last, there = part.folder / "weights" / "last.pt", []
    trainings.train(
        tmp_path, last, trainer=OfAnotherForm, resume=True, raises=FileNotFoundError,
        callbacks=[
            ("on_train_epoch_end", lambda _: there.append(last.exists())),
            ("on_fit_epoch_end", lambda _: there.append((last.parent / "mine.pth").exists())),
        ],
    )  # fmt: skip
    assert there[:2] == [True, True]
    assert not last.exists()


def test_a_model_that_cannot_be_pickled_ends_no_training_before_its_epoch_does(trainings, tmp_path):
    def make_local(trainer):
        trainer.ema.ema.of_a_user = lambda: None

    left = []

    def mend(trainer):
        left.extend(file.name for file in trainer.wdir.iterdir() if file.suffix == ".pt")
        del trainer.ema.ema.of_a_user

    run = trainings.train(
        tmp_path, epochs=1, save_every=1,
        callbacks=[("on_train_start", make_local), ("on_train_epoch_end", mend)],
    )  # fmt: skip
    assert "state.pt could not be written, nor" in run.log
    assert left == []  # as the line says
    assert len(run.results) == 1


class OwnLoop(DetectionTrainer):
    """A training loop that keeps no running loss."""

    def _do_train(self):
        self._setup_train()
        self.losses = []
        for epoch in range(self.epochs):
            self.epoch = epoch
            self._model_train()
            for batch in self.train_loader:
                self.run_callbacks("on_train_batch_start")
                batch = self.preprocess_batch(batch)
                self.loss, _ = self.model(batch)
                self.loss = self.loss.sum()
                self.scaler.scale(self.loss).backward()
                self.optimizer_step()
                self.losses.append(float(self.loss))


def test_a_training_loop_of_the_users_own_runs_without_being_saved(trainings, tiny_model, tmp_path):
    before, losses = signal.getsignal(signal.SIGTERM), []
    for settings in ({"mas": False}, {"save_every": 1, "bn_group": 8, "micro_batch": 8}):
        arguments = {**trainings.TINY, **settings, "model": tiny_model, "project": str(tmp_path)}
        trainer = OwnLoop(overrides=arguments)
        trainer.train()
        losses.append(trainer.losses)
        assert not list(trainer.wdir.iterdir())
        assert signal.getsignal(signal.SIGTERM) is before
    assert len(losses[0]) == 2 * trainings.BATCHES
    assert all(math.isfinite(loss) for loss in losses[1])
