"""Pages of docs/ that show code: the code runs."""

import re
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from yolov12 import mas

PAGE = Path(__file__).parents[1] / "docs" / "engine.md"


@pytest.fixture
def blocks():
    return re.findall(r"```python\n(.*?)```", PAGE.read_text("utf-8"), re.DOTALL)


def test_twenty_lines_train_a_model_of_ones_own(blocks, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    code = [line for line in blocks[0].splitlines() if line.strip()]
    assert len(code) <= 20
    names = {}
    exec(compile(blocks[0], str(PAGE), "exec"), names)
    assert "20 of 20 updates" in capsys.readouterr().out
    assert {"memory.csv", "memory.png", "memory.json"} <= {file.name for file in tmp_path.iterdir()}
    assert names["engine"].journal is not None


def test_a_loss_with_a_normaliser_of_its_own_is_exact(blocks):
    names = {"F": F, "mas": mas}
    exec(compile(blocks[1], str(PAGE), "exec"), names)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4).double()
    batch = torch.randn(16, 8).double(), (torch.rand(16, 4) < 0.2).double()

    def gradient(**settings):
        model.zero_grad()
        engine = mas.Engine(model, mas.TensorTask(names["loss"], floor=1), mas.Config(**settings))
        assert engine.step(batch).micro_batches == (settings["micro_batch"],) * (16 // settings["micro_batch"])
        return model.weight.grad.clone()

    torch.testing.assert_close(gradient(micro_batch=2, bn_group=2), gradient(micro_batch=16, bn_group=2))
