"""The figures of README.md and docs/ are those of the JSON files; python -m scripts.figures writes them anew."""

import re

import pytest

from scripts.figures.__main__ import PAGES
from scripts.figures.exports import augmentation
from scripts.figures.measured_steps import made_alike
from scripts.figures.pages import ROOT, SECTIONS, Section, check, sentence, setting, table

PAGE = """# Page

## Speed (2026-11-24)

With a limit of 8 GiB, ours has 297 images/s and
stock 107, measured on 2026-11-24 on an H100 80 GB with torch 2.11.0 (`batch=256`).

| limit | ours |
|---|---|
| 8 | 297 |

## Other

It takes 30 s to wait.
"""


def problems(text, *passages, is_whole=True):
    return check("docs/page.md", text, [Section("docs/page.md", "Speed", lambda: passages, is_whole)])


def passages(speed=297.4):
    return (
        setting("limit of 8 GiB", "a setting"),
        sentence("ours has {:.0f} images/s and stock {:.0f}", speed, 106.8),
        table("| limit | ours |", [["8", f"{speed:.0f}"]]),
    )


@pytest.mark.parametrize("page", PAGES)
def test_every_figure_is_that_of_the_data(page):
    of_page = [each for each in SECTIONS if each.page == page]
    found, _ = check(page, (ROOT / page).read_text("utf-8"), of_page)
    assert found == []


@pytest.mark.parametrize("page", sorted({each.page for each in SECTIONS}))
def test_wrong_figures_are_found(page):
    """Change a figure of every section at a time."""
    text = (ROOT / page).read_text("utf-8")
    of_page = [each for each in SECTIONS if each.page == page]
    for each in of_page:
        passage = next((passage for passage in each.passages() if passage.parts), None)
        if passage is not None:
            start = passage.pattern.search(text).start(1)
            at = start + re.search(r"\d", text[start:]).start()
            wrong = text[:at] + str((int(text[at]) + 1) % 10) + text[at + 1 :]
            assert check(page, wrong, of_page)[0], passage.name


def test_a_page_that_agrees_has_no_problems():
    assert problems(PAGE, *passages()) == ([], PAGE)


def test_a_wrong_figure_is_a_problem_and_is_written_anew():
    found, text = problems(PAGE, *passages(speed=303.0))
    assert len(found) == 2
    assert "297 should be 303" in found[0]
    assert text == PAGE.replace("297", "303")
    assert problems(text, *passages(speed=303.0)) == ([], text)


def test_a_sentence_that_changed_is_a_problem():
    (found, *more), text = problems(PAGE.replace("ours has", "ours makes"), *passages())
    assert "found 0 times" in found
    assert text == PAGE.replace("ours has", "ours makes")
    assert more  # its numbers are tied to nothing


def test_a_new_figure_is_a_problem():
    text = PAGE.replace("(`batch=256`)", "(`batch=256`), 2.78 as many")
    (found,), _ = problems(text, *passages())
    assert "2.78 is not tied to data" in found
    assert problems(text, *passages(), is_whole=False)[0] == []


@pytest.mark.parametrize(
    "words",
    ["has 1,067 images/s", "is 1.5 times as fast", "has 9 images per\nsecond", "is 40 % faster", "is 2.5x as fast"],
)
def test_what_looks_measured_is_a_problem_on_every_page(words):
    (found,), _ = check("docs/guides/train.md", f"# Train\n\n## How\n\nIt {words}; `x = 5 images/s`, 64 pixels.\n", [])
    assert "is not tied to data" in found


@pytest.mark.parametrize("link", ["../reference/measurements.md#step-2026-11-24", "../../benchmarks/results/step.json"])
def test_every_number_of_a_sentence_that_cites_a_measurement_is_tied_on_every_page(link):
    text = f"""# Train

It keeps 4 images. In a [measurement]({link}), `x=3` left 0.03
of 0.23. Since 5 epochs it is `0.7`; 8 remain.

- Another has 6.
- A fifth, see [here]({link}): `a` takes 11, e.g. `b` takes 12.

It has 13. It has 14. [Measured]({link}).
"""
    found, _ = check("docs/guides/train.md", text, [])
    assert [problem.split(" is not")[0].strip(": ") for problem in found] == ["0.03", "0.23", "11", "12", "14"]


@pytest.mark.parametrize("words", ["and Ultralytics 442", "with torch 512", "saves 80 GB", "a change of -2.5"])
def test_versions_and_cards_hide_no_figures(words):
    (found,), _ = problems(PAGE.replace("(`batch=256`)", words), *passages())
    assert "is not tied to data" in found


@pytest.mark.parametrize(
    ("now", "wrong"), [("2026-11-24)", "2026-11-25)"), ("torch 2.11.0", "torch 2.12.0"), ("H200", "H100")]
)
def test_date_version_and_card_are_those_of_the_data(now, wrong):
    page = "docs/reference/measurements.md"
    text = (ROOT / page).read_text("utf-8").replace(now, wrong, 1)
    assert [
        problem for problem in check(page, text, [])[0] if problem.startswith("Attention: ") and "not in" in problem
    ]


def test_header_cards_and_links_of_the_readme_are_compared():
    (of_page,) = [each for each in SECTIONS if (each.page, each.heading) == ("README.md", "Figures")]
    text = (ROOT / "README.md").read_text("utf-8")
    for now, wrong in (
        ("| this package | Ultralytics | card", "| Ultralytics | this package | card"),
        ("| H200, [", "| H100, ["),
        ("results/training.json", "results/memory.json"),
    ):
        assert now in text
        assert any("card, data" in problem for problem in check("README.md", text.replace(now, wrong, 1), [of_page])[0])


def test_rows_that_were_added_or_lost_are_a_problem():
    for text in (
        PAGE.replace("| 8 | 297 |\n", "| 8 | 297 |\n| 9 | 300 |\n"),
        PAGE.replace("| 8 |", "| 7 |"),
        PAGE.replace("| 8 | 297 |\n", ""),  # a new table
    ):
        found, written = problems(text, *passages())
        assert len(found) == 1
        assert written == PAGE


def test_a_section_that_is_gone_is_a_problem():
    found, _ = problems(PAGE.replace("Speed", "Pace"), *passages())
    assert "0 sections are named 'Speed'" in found[0]


def test_rows_of_other_cards_or_commits_are_not_compared():
    old = {"device": "NVIDIA H100"}
    new = {"device": "NVIDIA H200", "commit": "abc"}
    made_alike(16, old, old)
    made_alike(16, new, new)
    with pytest.raises(AssertionError, match=r"16 GiB: rows of several devices: NVIDIA H100, NVIDIA H200"):
        made_alike(16, new, old)
    for other in ({**new, "commit": "def"}, {"device": "NVIDIA H200"}):
        with pytest.raises(AssertionError, match=r"8 GiB: rows of several commits: (None, abc|abc, def)"):
            made_alike(8, new, new, other)


@pytest.mark.parametrize(
    ("speed", "expected"),
    [
        ({}, "not augmented"),
        ({"is_augmented": False}, "not augmented"),
        ({"is_augmented": True}, "augmented as by default"),
    ],
)
def test_each_file_of_ranks_says_whether_images_are_augmented(speed, expected):
    assert augmentation(speed) == expected
