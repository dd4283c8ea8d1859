"""The page on troubleshooting quotes messages exactly: each is looked for in the source."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGE = ROOT / "docs" / "guides" / "troubleshooting.md"
LEAST = 12
"""Characters of a message that must be fixed: below, it could be any."""


def pattern(node):
    """A string with placeholders as a regular expression, and how many of its characters are fixed."""
    parts = node.values if isinstance(node, ast.JoinedStr) else [node]
    fixed = [part.value for part in parts if isinstance(part, ast.Constant)]
    words = [re.escape(part.value) if isinstance(part, ast.Constant) else ".*?" for part in parts]
    return "".join(words), sum(map(len, fixed))


def patterns():
    found = set()
    for file in (ROOT / "yolov12").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text("utf-8"))):
            if isinstance(node, ast.JoinedStr) or (isinstance(node, ast.Constant) and isinstance(node.value, str)):
                text, fixed = pattern(node)
                if fixed >= LEAST:
                    found.add(text)
    for file in (ROOT / "docker").glob("*.sh"):
        for line in re.findall(r'say "(.*)"$', file.read_text("utf-8"), re.MULTILINE):
            parts = re.split(r"\$\(\([^)]*\)\)|\$\([^)]*\)|\$\w+", line)
            found.add(".*?".join(map(re.escape, parts)))
    return [re.compile(text, re.DOTALL) for text in found]


@pytest.fixture(scope="module")
def known():
    return patterns()


def messages():
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE.read_text("utf-8"), re.DOTALL | re.MULTILINE)
    return [line for block in blocks for line in block.splitlines()]


def is_printed(known, message):
    """Whether a message is one string of the source, or one after the other: details are added to some."""
    if any(each.fullmatch(message) for each in known):
        return True
    rests = {message[found.end() :] for each in known if (found := each.match(message)) and found.end()}
    return any(each.fullmatch(rest) for rest in rests for each in known)


@pytest.mark.parametrize("message", messages())
def test_message_is_one_that_the_software_prints(known, message):
    assert is_printed(known, message) or is_printed(known, message.removeprefix("yolov12: error: "))


@pytest.mark.parametrize("message", messages())
def test_a_message_that_nobody_prints_is_found_out(known, message):
    words = re.findall(r"[a-z]+", message)
    assert not is_printed(known, " ".join(reversed(words)))


@pytest.mark.parametrize(
    "symptom", ["CUDA out of memory", "Bus error", "does not fit", "UntrustedWeightsError", "DataLoader worker"]
)
def test_symptoms_are_in_the_page(symptom):
    assert symptom in PAGE.read_text("utf-8")


def test_every_section_is_reached_from_the_table():
    text = PAGE.read_text("utf-8")
    links = set(re.findall(r"\]\(#([\w-]+)\) \|", text))
    headings = {re.sub(r"[^\w\s-]", "", each.lower()).replace(" ", "-") for each in re.findall(r"^## (.+)", text, re.M)}
    assert links == headings
