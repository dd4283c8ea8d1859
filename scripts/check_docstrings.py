"""Fails if a docstring does not stand alone: `python scripts/check_docstrings.py FILE...`.

A docstring is shown without the name above it, as in a tool-tip. So it must not begin with a word that needs one.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FRAGMENTS = ("Of ", "That ", "Which ", "Whose ", "And ", "As ", "Where ", "In which ")


def docstrings(tree: ast.Module) -> Iterator[tuple[int, str]]:
    """Yield the line and the text of every docstring, also those below attributes and constants."""
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        for statement in body if isinstance(body, list) else []:
            value = statement.value if isinstance(statement, ast.Expr) else None
            if isinstance(value, ast.Constant) and isinstance(value.value, str):
                yield value.lineno, value.value


def main(files: list[str]) -> int:
    """Print every docstring that is a fragment, and return the exit status."""
    found = [
        f"{file}:{line}: a docstring begins with '{text.split()[0]}': write a sentence or noun phrase that stands alone"
        for file in files
        for line, text in docstrings(ast.parse(Path(file).read_text("utf-8")))
        if text.lstrip().startswith(FRAGMENTS)
    ]
    print("\n".join(found), end="\n" if found else "")
    return int(bool(found))


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]) if sys.argv[1:] else "give files: git ls-files -z '*.py' | xargs -0 python " + __file__)
