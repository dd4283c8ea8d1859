"""Writes the pages of docs/reference that are made from tables in the code. A test fails if a page is out of date.

python scripts/reference.py
"""

from __future__ import annotations

import ast
import inspect
from collections.abc import Mapping
from pathlib import Path

from yolov12 import check, cli, monitor, plan, watch
from yolov12.cfg import reference
from yolov12.mas.journal.columns import COLUMNS, EVENTS
from yolov12.mas.journal.summary import Summary
from yolov12.plan import exported

FOLDER = Path(__file__).parents[1] / "docs" / "reference"


def pages() -> dict[str, str]:
    """Return the text of each page by the name of its file."""
    made = {"arguments.md": _arguments(), "journal.md": _journal(), "exit-status.md": _exit_status()}
    return {name: f"<!-- Made by scripts/reference.py: do not edit. -->\n{text}" for name, text in made.items()}


def _arguments() -> str:
    parts = [reference.arguments_page(), "## `yolov12 plan`, `yolov12 watch`, `yolov12 monitor` and `yolov12 check`\n"]
    own = {"plan": plan, "plan format=onnx": exported, "watch": watch, "monitor": monitor, "check": check}
    for command, module in own.items():
        parts.append(f"`yolov12 {command} --help`\n\n```text\n{inspect.cleandoc(module.__doc__ or '')}\n```\n")
    return "\n".join(parts)


def _journal() -> str:
    columns = "\n".join(f"| `{each.name}` | {each.unit} | {each.meaning} |" for each in COLUMNS)
    events = "\n".join(f"| `{event}` | {meaning} |" for event, meaning in EVENTS.items())
    fields = "\n".join(f"| `{name}` | {_cell(meaning)} |" for name, meaning in _documented_fields(Summary).items())
    return f"""# Journal of a run

The engine writes three files into the run folder. They show what it decided and what it measured.

| file | content |
|---|---|
| `memory.csv` | a row for each optimizer step |
| `memory.png` | these rows as a picture, with the conclusion as its title |
| `memory.json` | the figures of the whole run, as the last lines of the log say them |

With several ranks, `memory.csv` is the journal of rank 0, and `memory.rank1.csv` and so on are those of the others.
`memory.json` and `memory.png` cover all of them.

Rows reach the file about once a second. `yolov12 monitor` draws them while the run goes on, see
[Watch a training](../guides/reduce-memory.md#watch-a-training).

memory.png shows the budget, the peak of each step, the micro-batches and the speed. Labels say what happened. Where
the budget changed by a tenth or more, they say that other processes took or released memory: data workers are such
processes, too. If no peak was above half of the budget and nothing happened, a bar shows the highest peak in per cent
of the budget, instead of a line far above the peaks.

## Columns of memory.csv

| column | unit | meaning |
|---|---|---|
{columns}

## Events

| event | meaning |
|---|---|
{events}

## Fields of memory.json

| field | meaning |
|---|---|
{fields}
"""


def _exit_status() -> str:
    statuses = "\n".join(f"| {status} | {meaning} |" for status, meaning in cli.EXIT_STATUSES.items())
    variables = "\n".join(f"| `{name}` | {effect} |" for name, effect in cli.ENVIRONMENT.items())
    return f"""# Exit statuses and environment variables

## Exit statuses

| status | meaning |
|---|---|
{statuses}

`yolov12`, `python -m yolov12`, the scripts, the commands of the image and `python -m yolov12.torchrun` have these
statuses. PyTorch's own `torchrun` has status 1 whatever its processes ended with, after a signal too. `yolo` and Python
scripts have status 1 after any error, and the same statuses as `yolov12` after a signal.

A status of 137 does not come from this package: the process was killed from outside (SIGKILL). On Linux the usual
reason is that the memory of the host or of the container ran out.

## Environment variables

| variable | effect |
|---|---|
{variables}
"""


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


def _documented_fields(owner: type) -> Mapping[str, str]:
    """Return the fields of a dataclass with the strings below them."""
    (tree,) = ast.parse(inspect.getsource(owner)).body
    assert isinstance(tree, ast.ClassDef)
    found, name = dict[str, str](), ""
    for node in tree.body:
        if isinstance(node, ast.AnnAssign) and isinstance(node.target, ast.Name):
            name = node.target.id
        elif isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and name:
            found[name] = " ".join(str(node.value.value).split())
    return found


if __name__ == "__main__":
    FOLDER.mkdir(parents=True, exist_ok=True)
    for name, text in pages().items():
        (FOLDER / name).write_text(text, encoding="utf-8")
        print(f"docs/reference/{name}")
