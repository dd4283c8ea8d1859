"""The layout of docs/design.md: which room imports which, how long files are, and how many stand beside the rooms."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

import yolov12

PACKAGE = Path(yolov12.__file__).parent
FILES = {path: path.relative_to(PACKAGE).with_suffix("").parts for path in PACKAGE.rglob("*.py")}

# Room of the engine → rooms it may import. `files` are the modules beside the rooms that everything stands on.
GROUND = {"config", "task", "oom", "modules", "memory", "triton_launch"}
ROOMS = {
    "memory": {"config"},
    "batchnorm": GROUND,
    "checkpointing": GROUND | {"batchnorm"},
    "distributed": GROUND,
    "journal": GROUND,
    "scheduling": GROUND,
    "step": GROUND | {"batchnorm", "checkpointing", "distributed"},
    "profiling": GROUND | {"batchnorm", "checkpointing", "step", "scheduling"},
    "inference": GROUND | {"scheduling"},
    "config": set(),
    "task": set(),
    "oom": set(),
    "modules": set(),
    "triton_launch": {"oom", "compile_ahead"},
    "compile_ahead": {"memory", "compile_worker"},
    "compile_worker": set(),
}
PURE = (
    "scheduling/scheduler",
    "scheduling/candidates",
    "scheduling/peak_law",
    "scheduling/time_law",
    "journal/journal",
)


def imports(path: Path) -> set[str]:
    """Every module that a file imports, at its top or in a function, by full name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module is not None and not node.level:
            found.add(node.module)
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def rooms_of(path: Path) -> set[str]:
    """Rooms of the engine, and files beside them, that a file imports."""
    return {name.split(".")[2] for name in imports(path) if name.startswith("yolov12.mas.")}


def of_room(*parts: str) -> list[Path]:
    return [path for path, place in FILES.items() if place[: len(parts)] == parts]


@pytest.mark.parametrize("room", ROOMS)
def test_a_room_of_the_engine_imports_only_what_it_stands_on(room):
    paths = of_room("mas", room)
    assert paths
    for path in paths:
        known = {name for name in rooms_of(path) if (PACKAGE / "mas" / name).exists() or _is_module(name)}
        assert known - {room} <= ROOMS[room], path


def _is_module(name: str) -> bool:
    return (PACKAGE / "mas" / f"{name}.py").exists()


def test_the_engine_imports_no_ultralytics_and_nothing_of_what_stands_on_it():
    for path in of_room("mas"):
        names = imports(path)
        assert not any(name.partition(".")[0] == "ultralytics" for name in names), path
        ours = {name.split(".")[1] for name in names if name.startswith("yolov12.")}
        assert ours <= {"mas", "errors", "cfg", "sizes", "files"}, path


@pytest.mark.parametrize(("room", "other"), [("plan", "training"), ("training", "plan"), ("models", "training")])
def test_rooms_that_do_not_know_each_other(room, other):
    for path in of_room(room):
        assert not any(name.startswith(f"yolov12.{other}") for name in imports(path)), path


@pytest.mark.parametrize("name", PURE)
def test_decisions_import_no_torch(name):
    assert not any(each.partition(".")[0] == "torch" for each in imports(PACKAGE / "mas" / f"{name}.py"))


def test_no_file_is_longer_than_a_concept():
    lengths = {path: len(path.read_text("utf-8").splitlines()) for path in FILES}
    assert not {str(path.relative_to(PACKAGE)): lengths[path] for path in FILES if lengths[path] > 350}
    assert lengths[PACKAGE / "seams.py"] <= 200


def test_few_files_stand_beside_the_rooms_of_the_engine():
    assert len(list((PACKAGE / "mas").glob("*.py"))) <= 14
