"""Failed allocations: recovery imports nothing, for which memory may lack, and Ultralytics does not interfere."""

import json

import pytest
import torch
from ultralytics.utils.torch_utils import unwrap_model

from yolov12.errors import DoesNotFitError
from yolov12.mas import engine, room

_SCRIPT = """
import json, sys
import torch
from ultralytics import YOLO
from ultralytics.nn.tasks import BaseModel

before, after, stock, fails, engines = set(), set(), BaseModel.predict, [0], []

def predict(self, x, *args, **kwargs):
    if len(x) > 2 or (len(x) == 2 and torch.is_grad_enabled() and not engines[0]._planner.level):
        fails[0] += 1
        before.update(set() if before else sys.modules)
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")
    return stock(self, x, *args, **kwargs)

def break_it(trainer):
    if trainer.epoch:
        engines[:] = [trainer.yolov12_engine]
        BaseModel.predict = predict

def note(trainer):
    if trainer.epoch:
        after.clear()
        after.update(sys.modules)

yolo = YOLO(sys.argv[1])
yolo.add_callback("on_train_epoch_start", break_it)
yolo.add_callback("on_train_batch_end", note)
yolo.add_callback("on_train_epoch_end", note)
yolo.add_callback("on_val_batch_end", lambda validator: after.update(sys.modules if validator.training else ()))
yolo.train(**json.loads(sys.argv[2]))
print()
print(json.dumps([fails[0], "scipy.optimize" in before, sorted(after - before)]))
"""


def test_nothing_is_imported_after_a_failed_allocation(trainings, run_python, small_model, tmp_path):
    arguments = {**trainings.TINY, "project": str(tmp_path), "epochs": 2, "bn_group": 2, "disable_mas_layers": []}
    done = run_python("-c", _SCRIPT, small_model, json.dumps(arguments))
    assert done.returncode == 0, done.stderr
    failures, has_solver, new = json.loads(done.stdout.splitlines()[-1])
    assert failures > 2  # in training and in validation
    assert has_solver
    assert new == []
    events = (tmp_path / "train" / "memory.csv").read_text()
    assert "out-of-memory at" in events
    assert "plan 0 to" in events


def test_ultralytics_does_not_take_the_error_for_an_out_of_memory_of_its_own(trainings, tmp_path, capsys, monkeypatch):
    """It would halve the batch, and begin the epoch again with a loader that the engine does not know."""

    for place, name in ((engine, "WAIT_S"), (room, "WAIT_S"), (engine, "_PATIENCE_S")):
        monkeypatch.setattr(place, name, 0)

    def fail(module, inputs):
        raise torch.cuda.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    def fail_from_now_on(trainer):
        unwrap_model(trainer.model).model[0].register_forward_pre_hook(fail)

    with pytest.raises(DoesNotFitError, match="out of memory"):
        trainings.train(tmp_path, callbacks=[("on_train_batch_end", fail_from_now_on)], micro_batch=1, bn_group=1)
    assert "Reducing to batch" not in "".join(capsys.readouterr())
