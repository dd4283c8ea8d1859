"""Report of an attempt: what a person of the line reads in it, and the pictures."""

import json
from dataclasses import replace

import pytest
from ultralytics import YOLO

from yolov12.watch import pictures, report
from yolov12.watch.comparison import ClassChange, decide
from yolov12.watch.pictures import Found

FELL = [ClassChange("ic", False, 40, 0.7, 0.71), ClassChange("crack", False, 9, 0.612, 0.431)]
BETTER = [FELL[0], ClassChange("crack", True, 9, None, 0.55)]
ATTEMPT = {
    "number": 3,
    "reason": "24 new images of 'crack'",
    "started": 1.8e9,
    "images": 24,
    "objects": {"crack": 31, "ic": 1},
    "set_aside": [{"file": "a|b.jpg", "reason": "the image is damaged"}],
}
RUN = {
    "epochs": 40,
    "epochs_wanted": 40,
    "seconds": 192.4,
    "batch": 128,
    "micro_batch_median": 32,
    "images": 120 * 40,
    "updates": 40,
    "peak_max_mib": 1740.8,
    "out_of_memories": 1,
}


def test_a_report_says_what_arrived_what_was_trained_and_why_it_was_promoted():
    text = report.as_markdown({**ATTEMPT, "outcome": "promoted"}, decide(BETTER, 0.02), RUN)
    for line in (
        "# Attempt 3: promoted",
        "24 new labelled images. The attempt began because of 24 new images of 'crack'.",
        "- crack: 31 objects",
        "- ic: 1 object",
        "1 file could not be used and was set aside:",
        "- a\\|b.jpg: the image is damaged",
        "Batches of up to 128 images ran in pieces of mostly 32, with the same result. "
        "The highest memory use was 1.70 GiB, and it ran out 1 time without any loss.",
        "- crack is new and has 0.550.",
        "| ic |  | 40 | 0.700 | 0.710 | +0.010 |",
        "| crack | new | 9 | - | 0.550 |  |",
    ):
        assert line in text.splitlines()
    assert "40 of 40 epochs in 3 min 12 s, begun on " in text
    assert "What to do next" not in text


def test_a_report_says_that_an_export_or_a_whole_attempt_is_tried_again():
    detail = "the export failed with status 1: no room"
    text = report.as_markdown({**ATTEMPT, "outcome": "promoted", "detail": detail}, decide(BETTER, 0.02), RUN)
    assert "serves now. It could not be exported, so an exported file is of an earlier model." in text
    assert detail in text
    text = report.as_markdown({**ATTEMPT, "outcome": "failed", "detail": "the training failed"}, None, {})
    assert "1. Read the reason above, and mend what it names. The watch tries again by itself: after an hour" in text


def test_a_report_of_a_worse_candidate_names_the_class_and_what_to_do():
    text = report.as_markdown(ATTEMPT, decide(FELL, 0.02), RUN)
    assert text.startswith("# Attempt 3: not promoted\n\nThe serving model is the same as before.")
    assert "- crack fell from 0.612 to 0.431, more than the margin of 0.02." in text.splitlines()
    assert "1. Look at the labels of the new images, above all at crack." in text
    assert "larger `margin` (now 0.02)" in text


@pytest.mark.parametrize("attempt", [{}, {"outcome": "failed", "detail": "the training failed with status 1: <b>"}])
def test_an_attempt_without_a_candidate_has_a_report(attempt, tmp_path):
    report.write(tmp_path / "new", attempt, None, tmp_path / "none.pt", None, [])
    text = (tmp_path / "new" / "report.md").read_text()
    assert "No epoch of a training was completed." in text
    assert "What to do next" in text
    if attempt:
        assert "the training failed with status 1: \\<b\\>" in text
    assert json.loads((tmp_path / "new" / "report.json").read_text())["verdict"] is None


def test_names_of_others_forge_nothing():
    row = ClassChange("a |\n# b\x1b[2K", False, 1, 0.5, 0.1)
    text = report.as_markdown({}, decide([row], 0.02), {})
    assert "| a \\|\\\\n\\# b\\\\x1b\\[2K |  | 1 | 0.500 | 0.100 | -0.400 |" in text.splitlines()


def test_boxes_are_the_same_object_by_class_and_place():
    here, near, far = (0.0, 0.0, 10.0, 10.0), (1.0, 0.0, 11.0, 10.0), (30.0, 0.0, 40.0, 10.0)
    one, other = Found("ic", 0.9, here), Found("led", 0.8, here)
    assert pictures.overlap(here, near) == pytest.approx(90 / 110)
    assert pictures.overlap(here, far) == 0.0
    assert pictures.only_in([one, other], [Found("ic", 0.4, near)]) == [other]
    assert pictures.only_in([one, replace(one, confidence=0.5)], [one]) == [replace(one, confidence=0.5)]
    assert pictures.only_in([one], [Found("ic", 0.9, far)]) == [one]


def test_pictures_show_what_only_the_candidate_finds(line, change_rows, tmp_path):
    images = sorted((line / "images").iterdir())
    serving = change_rows(YOLO(str(line / "serving.pt")), tmp_path / "serving.pt", ["EVEN"], [0])
    folder = tmp_path / "attempt"
    folder.mkdir()
    (folder / "found-9.png").touch()  # of an earlier call
    attempt = {"predict": {"imgsz": 64, "conf": 0.05, "device": "cpu"}}
    verdict = decide(BETTER, 0.02)
    for _ in range(2):  # also after a kill
        report.write(folder, attempt, verdict, serving, line / "serving.pt", [*images, tmp_path / "gone.png"])
        found = json.loads((folder / "report.json").read_text())
        assert found["pictures"]
        assert all(list(each["gained"]) == ["odd"] for each in found["pictures"])
        assert {path.name for path in folder.iterdir()} == {
            "report.md",
            "report.json",
            *(each["file"] for each in found["pictures"]),
        }
        assert f"]({found['pictures'][0]['file']})" in (folder / "report.md").read_text()


@pytest.mark.picture
def test_both_sides_of_a_picture_have_their_boxes_and_names(line, tmp_path):
    box = (10.0, 10.0, 30.0, 30.0)
    image = next((line / "images").iterdir())
    drawn = pictures.draw(
        image, [Found("ic", 0.9, box)], [Found("ic", 0.9, box), Found("$a", 0.5, (0.0, 40.0, 9.0, 60.0))]
    )
    serving, candidate = drawn.axes
    assert (serving.get_title(), candidate.get_title()) == ("serving model: 1 found", "candidate: 2 found")
    assert (len(serving.patches), len(candidate.patches)) == (1, 2)
    assert [text.get_text() for text in candidate.texts] == ["$a 50%"]
    drawn.savefig(tmp_path / "drawn.png")
    assert (tmp_path / "drawn.png").stat().st_size > 10_000
