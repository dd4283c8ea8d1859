"""The drawings of docs/: what they name is there."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
SOURCE = {file: file.read_text("utf-8") for file in (ROOT / "yolov12").rglob("*.py")}


def drawing(page, after):
    text = (ROOT / "docs" / page).read_text("utf-8").partition(after)[2]
    return re.search(r"```text\n(.*?)```", text, re.DOTALL)[1]


def test_the_layout_is_that_of_the_tree():
    folders, listed = [ROOT], set()
    for line in drawing("design.md", "## Layout").splitlines():
        indent, names, meaning = re.match(r"( *)(\S+(?: \S+)*?)(?: {2,}(.*))?$", line).groups()
        folders[len(indent) // 2 + 1 :] = []
        base = folders[len(indent) // 2]
        for name in names.split():
            path = base / name
            assert path.exists(), f"{line}: there is no {path.relative_to(ROOT)}"
            if name.endswith("/"):
                listed.add(path)
                folders.append(path)
        here = folders[-1] if names.endswith("/") else base
        for file in re.findall(r"\b\w+\.py\b", meaning or ""):
            assert (here / file).exists() or (base / file).exists(), f"{line}: there is no {file}"
    packages = {file.parent for file in SOURCE if file.name == "__init__.py"} - {ROOT / "yolov12"}
    missing = packages - listed
    assert not missing, f"not in the drawing: {sorted(str(each.relative_to(ROOT)) for each in missing)}"


def test_a_batch_has_at_most_ten_stations_and_each_is_in_the_code():
    text = drawing("explanation/engine.md", "## The way of one batch")
    stations = re.findall(r"^ ?(\d+)  (\S+)", text, re.MULTILINE)
    assert [int(number) for number, _ in stations] == [*range(1, len(stations) + 1)]
    assert 5 <= len(stations) <= 10
    for name in [*(name for _, name in stations), "TrainerAdapter._run"]:
        owner, _, method = name.partition(".")
        if owner == "BaseModel":
            from ultralytics.nn.tasks import BaseModel

            assert hasattr(BaseModel, method)
            continue
        homes = [source for source in SOURCE.values() if re.search(rf"^class {owner}\b", source, re.MULTILINE)]
        assert homes, f"there is no class {owner}"
        assert not method or any(f"def {method}(" in source for source in homes), f"there is no {name}"
