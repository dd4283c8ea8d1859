"""How the text of a page is tied to data: sentences with holes, whole tables, and numbers that are no measurements."""

from __future__ import annotations

import json
import re
import string
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
RESULTS = ROOT / "benchmarks" / "results"
NUMBER = r"[-+]?\d+(?:,\d{3})*(?:\.\d+)?(?:e[-+]?\d+)?"
_LOOSE = re.compile(r"(?<![\w.,/])(?<!\w-)\d[\d,.]*(?:e-?\d+)?")
_NO_FIGURES = re.compile(
    r"```.*?```|`[^`]*`|\]\([^)]*\)|<!--.*?-->|^#[^\n]*$"  # code, targets of links, comments, headings
    r"|20\d\d-\d\d-\d\d|AP50-95|H100\s80 GB|\d[\d.]*\+cu\d+"  # dates, metrics, names of cards, builds of PyTorch
    r"|(?:torch|PyTorch|Python|CUDA|OpenCV|flash-attn|nvcc|TensorRT-RTX) \d+\.\d[\w.+]*"
    r"|(?:Ultralytics|version) \d+\.\d+\.\d+",
    re.DOTALL | re.MULTILINE,
)


_MADE_WITH = re.compile(r"20\d\d-\d\d-\d\d|(?<=torch )\d[\d.]*\d|(?<=NVIDIA )\w+")
"""How a measurement was made: date, version of PyTorch, card."""


@cache
def result(name: str) -> Any:
    """Return the content of a JSON file in `benchmarks/results`."""
    return json.loads((RESULTS / f"{name}.json").read_text("utf-8"))


class _Format(string.Formatter):
    """`str.format`, with 7e-4 instead of 7e-04."""

    def format_field(self, value: Any, format_spec: str) -> str:
        return re.sub(r"e([-+])0", r"e\1", super().format_field(value, format_spec)).replace("e+", "e")


def say(template: str, *values: Any, **named: Any) -> str:
    """Fill the holes of a template."""
    return _Format().format(template, *values, **named)


@dataclass(frozen=True)
class Passage:
    """Place in a section whose figures come from data.

    `pattern` finds it, with a group for each of `parts`, which are what the text has to say there.
    """

    name: str
    pattern: re.Pattern[str]
    parts: tuple[str, ...]


def sentence(template: str, *values: Any) -> Passage:
    """Return a passage of prose.

    Args:
        template: Words of the page, with a hole for each figure, as for `str.format`. Line breaks do not matter.
        values: Figures, and texts.
    """
    holes = [part for part in string.Formatter().parse(template) if part[1] is not None]
    assert len(holes) == len(values), template
    parts = [say(f"{{:{hole[2]}}}", value) for hole, value in zip(holes, values, strict=True)]
    pattern = ""
    for index, (words, field, _, _) in enumerate(string.Formatter().parse(template)):
        pattern += re.sub(r"(?:\\ |\s)+", r"\\s+", re.escape(words))
        if field is not None:
            is_text = isinstance(values[index], str) and not re.fullmatch(NUMBER, values[index])
            pattern += "([^|]*?)" if is_text else f"({NUMBER})"
    return Passage(template, re.compile(rf"(?<![\d.,]){pattern}(?!\d)"), tuple(parts))


def setting(words: str, why: str) -> Passage:
    """Return a passage whose numbers are no measurements.

    Args:
        words: Words of the page.
        why: What the numbers are instead.
    """
    assert why
    return sentence(words.replace("{", "{{").replace("}", "}}"))


def table(header: str, rows: Iterable[Sequence[str]], after: str = "") -> Passage:
    """Return a passage that is all rows of a table.

    Args:
        header: First line of the table.
        rows: Cells of the lines below the separator.
        after: Text just before the table, if the section has another one with this header.
    """
    lines = [f"| {' | '.join(row)} |".replace("|  |", "| |").replace("|  |", "| |") for row in rows]
    pattern = rf"^{re.escape(after)}[ \t]*{re.escape(header)}\n[ \t]*\|[-:| ]+\n((?:[ \t]*\|.*(?:\n|\Z))*)"
    return Passage(header, re.compile(pattern, re.MULTILINE), ("\n".join(lines) + "\n",))


@dataclass(frozen=True)
class Section:
    """Section of a page, and what makes its passages."""

    page: str
    heading: str
    passages: Callable[[], Iterable[Passage]]
    is_whole: bool
    """True if every number of the section must be in a passage."""


SECTIONS: list[Section] = []
WHOLE_PAGES = ("docs/reference/measurements.md",)
"""Pages of which every number of every section must be in a passage, and how it was made in the JSON file."""
_LOOKS_MEASURED = re.compile(
    r"\s*(images/s|images\s+(?:a|per)\s+second|times\b|x\b|× as\b|%\s+(?:faster|slower|more|less)\b)"
)
"""What follows a number that is a measurement wherever it stands."""
_SENTENCE = re.compile(r"(?:(?!(?<=[.!?])(?<!e\.g\.)(?<!i\.e\.)\s+[A-Z`*\[]|。|\n\n|\n[-|#]).)+", re.DOTALL)
"""A sentence, an item of a list or a row of a table."""
_CITES = re.compile(r"(?:\]\(|href=\")[^)\"]*(?:measurements\.md|benchmarks/results/)")
"""Link to a measurement: every number of a sentence that has one is from there."""
_ONLY_CITES = re.compile(r"\W*\[[^\]]*\]\([^)]*\)\W*")
"""A sentence that is nothing but a link, and so is about the one before."""


def section(
    page: str, heading: str, *, is_whole: bool = True
) -> Callable[[Callable[[], Iterable[Passage]]], Callable[[], Iterable[Passage]]]:
    """Register a function that makes the passages of a section.

    Args:
        page: Path of the page in the repository.
        heading: Its heading, without the date behind it; empty for the text above the first one.
        is_whole: True if every number of the section must be in a passage.
    """

    def register(passages: Callable[[], Iterable[Passage]]) -> Callable[[], Iterable[Passage]]:
        SECTIONS.append(Section(page, heading, passages, is_whole))
        return passages

    return register


def split(text: str) -> list[tuple[str, int, int]]:
    """Return heading, start and end of each section of a page; the first one has no heading."""
    code = [match.span() for match in re.finditer(r"```.*?```", text, re.DOTALL)]
    found = [("", 0)]
    for match in re.finditer(r"^##+ (.+)$", text, re.MULTILINE):
        if not any(start <= match.start() < end for start, end in code):
            found.append((re.sub(r" \(20\d\d-\d\d-\d\d\)$", "", match[1]), match.start()))
    ends = [start for _, start in found[1:]] + [len(text)]
    return [(heading, start, end) for (heading, start), end in zip(found, ends, strict=True)]


def check(page: str, text: str, of_page: Sequence[Section]) -> tuple[list[str], str]:
    """Compare a page with the data.

    Args:
        page: Path of the page in the repository.
        text: Its text.
        of_page: Its sections that have passages.

    Returns:
        Problems, and the text with the figures that the data has.
    """
    problems: list[str] = []
    changes: list[tuple[int, int, str]] = []
    places = split(text)
    for each in of_page:
        found = [(start, end) for heading, start, end in places if heading == each.heading]
        if len(found) != 1:
            problems.append(f"{len(found)} sections are named {each.heading!r}")
            continue
        ((start, end),) = found
        problems += _compare(text, start, end, each, changes)
    known = {each.heading for each in of_page}
    for heading, start, end in places:
        problems += _made_otherwise(heading, text[start:end]) if page in WHOLE_PAGES else ()
        if heading not in known:
            problems += _untied(text, start, end, Section(page, heading, tuple, page in WHOLE_PAGES), ())
    for begin, end, part in sorted(changes, reverse=True):
        text = text[:begin] + part + text[end:]
    return problems, text


def _made_otherwise(heading: str, part: str) -> Iterator[str]:
    """Yield dates, versions and cards of a section that are in no JSON file to which it links."""
    files = sorted(set(re.findall(r"benchmarks/results/(\w+)\.json\)", part)))
    data = "".join((RESULTS / f"{name}.json").read_text("utf-8") for name in files)
    for said in sorted(set(_MADE_WITH.findall(re.sub(r"\]\([^)]*\)", "", part)))):
        if files and said not in data:
            yield f"{heading}: {said} is not in {', '.join(files)}"


def _compare(text: str, start: int, end: int, of: Section, changes: list[tuple[int, int, str]]) -> Iterator[str]:
    covered: list[tuple[int, int]] = []
    for passage in of.passages():
        matches = list(passage.pattern.finditer(text, start, end))
        if len(matches) != 1:
            yield f"{of.heading}: found {len(matches)} times: {passage.name}"
            continue
        covered.append(matches[0].span())
        for group, part in enumerate(passage.parts, 1):
            now, indent = matches[0][group], ""
            if part.startswith("|"):
                indent = " " * (len(now) - len(now.lstrip()))
                part = "".join(f"{indent}{line}\n" for line in part.splitlines())
            if now != part:
                changes.append((*matches[0].span(group), part))
                yield f"{of.heading}: {passage.name}: {_difference(now, part)}"
    yield from _untied(text, start, end, of, covered)


def _untied(text: str, start: int, end: int, of: Section, covered: Sequence[tuple[int, int]]) -> Iterator[str]:
    cited = list(_cited(text, start, end))
    for number in loose(text, start, end, covered):
        is_cited = any(begin <= number.start() < stop for begin, stop in cited)
        if of.is_whole or is_cited or _LOOKS_MEASURED.match(text, number.end()):
            around = text[max(number.start() - 40, start) : min(number.end() + 40, end)]
            yield f"{of.heading}: {number[0].rstrip('.,')} is not tied to data: …{' '.join(around.split())}…"


def _cited(text: str, start: int, end: int) -> Iterator[tuple[int, int]]:
    before = start
    for match in _SENTENCE.finditer(text, start, end):
        if _CITES.search(match[0]):
            yield before if _ONLY_CITES.fullmatch(match[0]) else match.start(), match.end()
        before = match.start()


def _difference(now: str, part: str) -> str:
    pairs = zip(now.splitlines(), part.splitlines(), strict=False)
    return next((f"{a.strip()} should be {b.strip()}" for a, b in pairs if a != b), "there are other rows")


def loose(text: str, start: int, end: int, covered: Sequence[tuple[int, int]] = ()) -> Iterator[re.Match[str]]:
    """Yield the numbers of a part of a page that are in no passage, code, link, name or date.

    Args:
        text: Text of the page.
        start: Begin of the part.
        end: End of the part.
        covered: Begin and end of each passage.
    """
    spared = [*covered, *(match.span() for match in _NO_FIGURES.finditer(text, start, end))]
    for match in _LOOSE.finditer(text, start, end):
        if not any(begin <= match.start() < stop for begin, stop in spared):
            yield match
