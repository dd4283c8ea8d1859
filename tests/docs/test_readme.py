"""README.md is short, each result has its command and its explanation, and README.zh-CN.md says the same."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
ENGLISH, CHINESE = (ROOT / name for name in ("README.md", "README.zh-CN.md"))
NUMBER = re.compile(r"\d+(?:[.,]\d+)*(?:e-?\d+)?")


def parts(file):
    """Headings with their levels, code blocks without comments, links, and the numbers of each row of a table."""
    text = file.read_text("utf-8")
    blocks = re.findall(r"```(\w+)\n(.*?)```", text, re.DOTALL)
    prose = re.sub(r"```.*?```", "", text, flags=re.DOTALL)
    code = [(kind, [re.sub(r"\s*# .*", "", line) for line in block.splitlines()]) for kind, block in blocks]
    links = re.findall(r"\]\(([^)]+)\)", prose)
    rows = [line for line in prose.splitlines() if line.startswith("|")]
    return {
        "headings": [len(marks) for marks in re.findall(r"^(#+) ", prose, re.MULTILINE)],
        "code": code,
        "links": sorted(link for link in links if not link.startswith("README")),
        "figures": [sorted(NUMBER.findall(re.sub(r"\]\([^)]*\)", "]", row))) for row in rows],
    }


@pytest.mark.parametrize("kind", ["headings", "code", "links", "figures"])
def test_both_languages_say_the_same(kind):
    assert parts(CHINESE)[kind] == parts(ENGLISH)[kind]


@pytest.mark.parametrize("file", [ENGLISH, CHINESE], ids=lambda file: file.name)
def test_it_is_short_and_the_other_language_is_one_click_away(file):
    text = file.read_text("utf-8")
    assert len(text.splitlines()) <= 130
    other = CHINESE if file == ENGLISH else ENGLISH
    assert f"]({other.name})" in text
    assert file != ENGLISH or "emory-aware scheduling (MAS)" in text


@pytest.mark.parametrize("file", sorted((ROOT / "benchmarks" / "results").glob("*.json")), ids=lambda file: file.name)
def test_every_result_says_how_it_was_made(file):
    text = file.read_text()
    commands = re.findall(r'"command": "([^"]+)"', text)
    assert commands
    for command in commands:
        script = re.match(r"python (-m )?([\w./]+)|(scripts/\w+\.sh)", command)
        name = script[3] or (f"{script[2].replace('.', '/')}" if script[1] else script[2])
        assert (ROOT / name).exists() or name == "pytest", command


PAGES = [*sorted((ROOT / "docs").rglob("*.md")), ENGLISH]


def test_every_result_is_explained_somewhere():
    text = "\n".join(page.read_text("utf-8") for page in PAGES)
    for file in (ROOT / "benchmarks" / "results").glob("*.json"):
        assert f"benchmarks/results/{file.name}" in text, file.name
