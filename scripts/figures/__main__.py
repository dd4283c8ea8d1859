"""Compare the figures of README.md and docs/ with the JSON files of the benchmarks, or write them anew.

    python -m scripts.figures              writes the figures that the data has
    python -m scripts.figures --check      lists what disagrees; the exit status is 1 if anything does

A page stays ordinary Markdown. The modules beside this one repeat its sentences with holes, and say which value of
which file stands in each hole; tables are written as a whole. A sentence that was changed must be changed there, too.
Every number of a section of measurements must be in such a sentence, in a table, or in a `setting` with the reason.
"""

from __future__ import annotations

import sys

from scripts.figures import (  # noqa: F401 - they register their sections
    cards,
    cards_long,
    explanation,
    exports,
    measured_accuracy,
    measured_endurance,
    measured_kernels,
    measured_loaders,
    measured_steps,
    measured_trainings,
    readme,
)
from scripts.figures.pages import ROOT, SECTIONS, check

PAGES = ("README.md", "README.zh-CN.md", *sorted(str(file.relative_to(ROOT)) for file in ROOT.glob("docs/**/*.md")))


def main(only_checks: bool) -> int:
    """Check or write all pages, and return the exit status.

    Args:
        only_checks: True to write nothing.
    """
    failed = False
    for page in PAGES:
        file = ROOT / page
        of_page = [each for each in SECTIONS if each.page == page]
        problems, text = check(page, file.read_text("utf-8"), of_page)
        if not only_checks:
            file.write_text(text, "utf-8")
            problems, _ = check(page, text, of_page)
        for problem in problems:
            print(f"{page}: {problem}")
        failed |= bool(problems)
    return int(failed)


if __name__ == "__main__":
    if "--help" in sys.argv:
        print(__doc__)
    else:
        sys.exit(main("--check" in sys.argv))
