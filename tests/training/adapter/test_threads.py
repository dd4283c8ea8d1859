"""Two trainings at the same time, in threads of one process."""

import copy
import threading

from torch import nn
from ultralytics import YOLO
from ultralytics.nn.modules import Conv

from yolov12.models.activations import unshare

_WAIT_S = 60.0


def test_a_model_has_activations_of_its_own_with_the_hooks_of_the_shared_one(small_model):
    model = YOLO(small_model).model
    model.model[2].cv1.act = nn.ReLU()
    before = {name: type(module) for name, module in model.named_modules()}
    assert model.model[0].act is Conv.default_act
    unshare(model)
    assert model.model[0].act is model.model[1].act is not Conv.default_act
    assert {name: type(module) for name, module in model.named_modules()} == before
    own = copy.deepcopy(model)
    kept = own.model[0].act
    unshare(own)
    assert own.model[0].act is kept
    with Conv.default_act.register_forward_hook(lambda *_: None):
        assert model.model[0].act._forward_hooks


def test_trainings_that_overlap_leave_the_activation_of_all_models_alone(trainings, small_model, tmp_path):
    """The second training enters its first step within the first step of the first, and leaves it after that."""
    is_in, first_done = threading.Event(), threading.Event()
    found = {}

    def train(name, step, done):
        once = [step]

        def hook(*_):
            while once:
                once.pop()()

        def begin(trainer):
            trainer.model.model[0].register_forward_pre_hook(hook)

        callbacks = [("on_train_start", begin), ("on_train_batch_end", lambda _: done())]
        found[name] = trainings.train(tmp_path / name, small_model, epochs=1, bn_group=8, callbacks=callbacks)

    def second_steps():
        is_in.set()
        assert first_done.wait(_WAIT_S)

    second = threading.Thread(target=train, args=("second", second_steps, lambda: None))

    def first_steps():
        second.start()
        assert is_in.wait(_WAIT_S)

    train("first", first_steps, first_done.set)
    second.join(_WAIT_S)
    assert "forward" not in vars(Conv.default_act)
    assert all(len(run.results) == 1 for run in found.values())
    assert len(found) == 2
