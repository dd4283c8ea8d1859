"""Every link in a Markdown file leads somewhere: to a file of the repository, and to a heading that it has."""

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
PAGES = [*sorted(ROOT.glob("*.md")), *sorted((ROOT / "docs").rglob("*.md"))]


def without_code(text):
    return re.sub(r"^```.*?^```", "", text, flags=re.DOTALL | re.MULTILINE)


def anchors(page):
    """Headings as GitHub and MkDocs name them; both agree on words, digits, and nothing else."""
    headings = re.findall(r"^#+ (.+)$", without_code(page.read_text("utf-8")), re.MULTILINE)
    return {re.sub(r"\s+", "-", re.sub(r"[^\w\s-]", "", heading.lower()).strip()) for heading in headings}


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page):
    for link in re.findall(r"\]\(([^)\s]+)\)", without_code(page.read_text("utf-8"))):
        if re.match(r"https?:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.is_file(), f"{page.name} links to {link}"
        assert not anchor or anchor in anchors(target), f"{page.name} links to {link}; there is {anchors(target)}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_files_that_are_named_exist(page):
    if page.name == "CHANGELOG.md":  # which tells of files that are gone
        return
    for name in re.findall(r"`((?:yolov12|tests|scripts|benchmarks|requirements|docker)/[\w./-]+)`", page.read_text()):
        assert (ROOT / name).exists(), f"{page.name} names {name}"


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_lists_and_tables_begin_after_an_empty_line(page):
    """MkDocs needs it, GitHub does not."""
    before = ""
    for line in without_code(page.read_text("utf-8")).splitlines():
        starts = re.match(r"\s*([-*|]|\d+\.) ?", line) is not None and line.strip() not in ("", "---")
        continues = re.match(r"\s*([-*|]|\d+\.) ?|\s{2,}|#", before) is not None
        assert not starts or not before.strip() or continues, f"{page.name}: {line[:60]}"
        before = line


def test_every_page_is_in_the_map():
    index = (ROOT / "docs" / "index.md").read_text("utf-8")
    for page in (ROOT / "docs").rglob("*.md"):
        name = page.relative_to(ROOT / "docs").as_posix()
        assert name == "index.md" or f"]({name}" in index, name
