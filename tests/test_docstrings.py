"""The linter for docstrings: what it fails on, and what it lets through."""

import runpy
from pathlib import Path

import pytest

SCRIPT = runpy.run_path(str(Path(__file__).parents[1] / "scripts" / "check_docstrings.py"))


@pytest.mark.parametrize(
    ("code", "lines"),
    [
        ('"""Of a module."""\n', [1]),
        ('def f():\n    """Which of them."""\n', [2]),
        ('class C:\n    """A class."""\n\n    x: int\n    """That of the class."""\n', [5]),
        ('X = 1\n"""In which unit."""\n', [2]),
        ('def f():\n    """Offset of a row. As in NumPy."""\n    return "Of a string"\n', []),
    ],
)
def test_a_docstring_that_is_a_fragment_is_found(tmp_path, capsys, code, lines):
    file = tmp_path / "code.py"
    file.write_text(code)
    assert SCRIPT["main"]([str(file)]) == bool(lines)
    assert [int(line.split(":")[1]) for line in capsys.readouterr().out.splitlines()] == lines
