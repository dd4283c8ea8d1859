"""Pages of docs/ that show code: the code runs."""

import re
import shlex
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from yolov12 import cli, mas
from yolov12.plan.arguments import parse as parse_plan
from yolov12.watch.arguments import split as split_words

DOCS = Path(__file__).parents[1] / "docs"
PAGE = DOCS / "guides" / "python.md"
GUIDES = sorted((DOCS / "guides").glob("*.md"))


def blocks_of(page, kind):
    return re.findall(rf"```{kind}\n(.*?)```", page.read_text("utf-8"), re.DOTALL)


def block_with(text):
    (found,) = (block for block in blocks_of(PAGE, "python") if text in block)
    return found


def test_twenty_lines_train_a_model_of_ones_own(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    block = block_with("mas.Engine(")
    code = [line for line in block.splitlines() if line.strip()]
    assert len(code) <= 20
    names = {}
    exec(compile(block, str(PAGE), "exec"), names)
    assert "20 of 20 updates" in capsys.readouterr().out
    assert {"memory.csv", "memory.png", "memory.json"} <= {file.name for file in tmp_path.iterdir()}
    assert names["engine"].journal is not None


@pytest.mark.parametrize("normaliser", ["positives", "counts"])
def test_a_loss_with_normalisers_of_its_own_is_exact(normaliser):
    names = {"F": F, "mas": mas, "torch": torch}
    exec(compile(block_with(f"normaliser={normaliser})"), str(PAGE), "exec"), names)
    torch.manual_seed(0)
    model = torch.nn.Linear(8, 4).double()
    batch = torch.randn(16, 8).double(), (torch.rand(16, 4) < 0.2).double()

    def gradient(**settings):
        model.zero_grad()
        engine = mas.Engine(model, mas.TensorTask(names["loss"], floor=1), mas.Config(**settings))
        assert engine.step(batch).micro_batches == (settings["micro_batch"],) * (16 // settings["micro_batch"])
        return model.weight.grad.clone()

    torch.testing.assert_close(gradient(micro_batch=2, bn_group=2), gradient(micro_batch=16, bn_group=2))


def runs_here(block):
    """Blocks that need a GPU, COCO, or a run of the reader's own are only compiled."""
    return not re.search(r"coco|device=\"0|runs/|mas\.|F\.", block)


@pytest.mark.parametrize(
    ("page", "block"),
    [(page, block) for page in GUIDES for block in blocks_of(page, "python")],
    ids=lambda value: value.stem if isinstance(value, Path) else value.strip().splitlines()[-1][:40],
)
def test_code_of_guides_runs(page, block, tmp_path, monkeypatch, capsys):
    code = compile(block, str(page), "exec")
    if runs_here(block):
        monkeypatch.chdir(tmp_path)
        exec(code, {"__name__": "__main__"})
        assert "memory.csv" in capsys.readouterr().out or "memory.csv" not in block


def commands():
    pages = [*DOCS.rglob("*.md"), DOCS.parent / "README.md", DOCS.parent / "README.zh-CN.md"]
    for page in sorted(pages):
        for block in blocks_of(page, "bash"):
            for line in block.replace("\\\n", " ").splitlines():
                words = shlex.split(line, comments=True)
                if "yolov12" in words:
                    yield page, words[words.index("yolov12") + 1 :]


@pytest.mark.parametrize(
    ("page", "words"), [*commands()], ids=lambda value: value.stem if isinstance(value, Path) else " ".join(value)[:50]
)
def test_commands_have_arguments_that_exist(page, words):
    command, *arguments = words or ["check"]
    if command == "plan" and "format=onnx" not in arguments:
        parse_plan(arguments)
    elif command in cli.VERBS:
        cli.parse(arguments)
    elif command == "watch":
        split_words(arguments)
    else:
        assert command in ("plan", "check", "monitor", "."), f"{page.name}: {command}"
