"""Run a benchmark, or list all of them.

    python -m benchmarks
    python -m benchmarks NAME --out FILE [its options]
    python -m benchmarks NAME --help

FILE gets the command, the machine, the versions, the commit, the date and all figures as JSON.
"""

from __future__ import annotations

import ast
import importlib
import re
import sys
from collections.abc import Sequence
from pathlib import Path

HERE = Path(__file__).parent


def benchmarks() -> dict[str, str]:
    """Return the first sentence of each benchmark's docstring by its name. Their docstrings have a command."""
    found = {}
    for file in sorted([*HERE.glob("*.py"), *HERE.glob("*/__main__.py")]):
        doc = ast.get_docstring(ast.parse(file.read_text("utf-8"))) or ""
        name = file.parent.name if file.parent != HERE else file.stem
        if re.search(rf"-m benchmarks {name} .*--out", doc):
            found[name] = doc.partition("\n\n")[0].replace("\n", " ")
    return found


def main(words: Sequence[str]) -> int:
    """Run a benchmark, and return its exit status.

    Args:
        words: Name of the benchmark and its arguments; nothing for a list.
    """
    known = benchmarks()
    if not words or words[0] in ("-h", "--help"):
        width = max(map(len, known))
        print(__doc__, *(f"{name:{width}}  {line}" for name, line in known.items()), sep="\n")
        return 0
    name, *rest = words
    if name not in known:
        print(f"There is no benchmark {name}. There are {', '.join(known)}.", file=sys.stderr)
        return 2
    module = f"benchmarks.{name}" + ".__main__" * (HERE / name).is_dir()
    sys.argv = [f"python -m benchmarks {name}", *rest]
    return int(importlib.import_module(module).main() or 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
