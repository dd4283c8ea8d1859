"""The page on what the engine runs names the tasks and models that the code knows."""

import re
from pathlib import Path

from ultralytics.cfg import TASKS

from yolov12.training.adapter import known

DOCS = Path(__file__).parents[2] / "docs"
PAGE = DOCS / "reference" / "engine-or-stock.md"


def test_pages_agree_on_what_plain_ultralytics_can_do_with_our_files():
    for page in ("guides/resume.md", "reference/weights.md"):
        text = (DOCS / page).read_text("utf-8").replace("*", "")
        said = (
            r"loads, validates and fine-tunes .*v1\.0.*\. It cannot resume [^.]*does not know this package's arguments"
        )
        assert re.search(said, text), page


def test_the_table_of_tasks_is_what_the_code_knows():
    row = re.compile(r"^\| `(\w+)` \| `(\w+)` \| (\w+).*? \| (\w+) \| (\w+) \|$", re.MULTILINE)
    rows = row.findall(PAGE.read_text("utf-8"))
    assert {task for task, *_ in rows} == set(TASKS)
    assert {model for _, model, *_ in rows} == {*known._MODELS, *known._OTHERS}
    for _, model, training, validation, prediction in rows:
        wanted = "split" if model in known._MODELS else "stock"
        assert (training, validation, prediction) == (wanted, wanted, "split")
