"""The section and the tables that are written from benchmarks/results/cards.json, with made-up data."""

import pytest

from scripts.figures import cards
from scripts.figures.pages import Section, check

SECTION = f"""# Measurements

## {cards.HEADING} (2026-12-01)

`python -m benchmarks cards --out cards.json` on one GPU. Only the memory is that of the imitated cards; the speed is
that of the GPU. Label-dense data: 1 images of 640 pixels. 2 % of the images have 300 to 900 boxes; augmentation is
mosaic 1.0 and copy_paste 0.1. All trainings have 1 epochs, which are 1 images, the same loader, and an optimizer step
for about 256 images. A T4 and an A10 without the CUDA context are limits of 1 MiB.

{cards.MEASURED}
|---|---|---|---|---|---|---|---|---|

Ours ÷ Ultralytics at its largest stable batch:

{cards.RATIOS}
|---|---|---|---|---|

Batches that were tried:

{cards.SEARCH}
|---|---|---|---|---|
"""


def run(batch, speed, **more):
    peaks = {"peak_mean_mib": 12000.4, "peak_sd_mib": 900.0, "peak_mean_all_mib": 11000.0, "peak_sd_all_mib": 950.0}
    speeds = {"images_per_s_all": speed, "images_per_s_after_first": speed + 50}
    ran = {"started_at": batch, "ran_at": batch, "halvings": 0, "assigner_fallbacks": 0}
    return {"batch": batch, "failure": None, "memory_csv": [], **ran, **peaks, **speeds, **more}


def card(usable_mib):
    died = run(256, 0.0, ran_at=32, halvings=3, assigner_fallbacks=1, failure="RuntimeError: CUDA out of memory")
    for key in ("images_per_s_all", "images_per_s_after_first"):
        del died[key]
    journal = ["step,micro_batches,peak_mib", "1,32 32,1.0", "2,128,1.0"]
    ours = run(256, 600.0, memory_csv=journal, summary={"out_of_memories": 0})
    ratios = {"images_per_s_all": 3.004, "images_per_s_after_first": 2.5, "peak_sd_mib": 0.0834, "peak_sd_all_mib": 0.9}
    attempts = [(24, True), (32, True), (40, True), (48, False), (40, False), (32, True)]
    return {
        "images_an_epoch": 1536,
        "epochs": 16,
        "memory": {"usable_mib": usable_mib},
        "rows": {"stock": run(32, 199.7), "ours": ours, "autobatch": run(-1, 150.0, started_at=22), "halving": died},
        "search": {"stock": [{"batch": batch, "held": held} for batch, held in attempts]},
        "summary": {f"{key}_over_stock": ratio for key, ratio in ratios.items()},
    }


@pytest.fixture
def found():
    return {"t4": card(14464), "a10": card(22142), "device": "NVIDIA H200"}


def test_the_section_is_written_from_the_data(found):
    of_page = [Section("docs/page.md", cards.HEADING, lambda: cards.passages(found), True)]
    problems, text = check("docs/page.md", SECTION, of_page)
    assert not any("is not tied" in problem or "times:" in problem for problem in problems)
    assert check("docs/page.md", text, of_page) == ([], text)
    assert "1,536 images of 640 pixels" in text
    assert "limits of 14,464, 22,142 MiB" in text
    lines = text.splitlines()
    peaks = "12,000 ± 900 | 11,000 ± 950"
    assert f"| T4 | this package | 256 (32 to 128 at once) | 600 | 650 | {peaks} | 0 | 0 |" in lines
    assert f"| T4 | {cards.ROWS['stock']} | 32 | 200 | 250 | {peaks} | 0 | 0 |" in lines
    assert f"| A10 | {cards.ROWS['halving']} | 256 → 32 | | | {peaks} | 5 | 4 |" in lines
    assert "| A10 | 3.00 | 2.50 | 0.083 | 0.900 |" in lines
    assert "| T4 | 24, 32 | 40, 48 | | |" in lines


def test_rows_of_the_readme_have_the_figures_of_all_cards(found):
    long = {"t4": found["t4"]}
    found["t4"]["rows"] |= {
        "autobatch": run(-1, 150.0, ran_at=22),
        "all": run(64, 300.0),
        "halving": run(256, 220.0, ran_at=32),
    }
    found["again"] = {"t4": {"ours": run(256, 700.0)}}
    found["earlier"] = {"a10": {"ours": run(256, 500.0)}}
    rows = dict(zip(cards.README, cards.readme_rows(found, long), strict=True))
    assert list(rows.values()) == [
        ("cards_100", ["600", "200"]),
        ("cards", ["600, 600", "200, 200"]),
        ("cards", ["650, 650", "250, 250"]),
        ("cards", ["700", "150, 300, 220"]),
        ("cards", ["256, 256", "32, 32 (22, 64, 32)"]),
        ("cards_100 cards", ["900; 900, 900 (900, 900)", "900; 900, 900"]),
        ("cards_100 cards", ["950; 950, 950", "950; 950, 950"]),
    ]
