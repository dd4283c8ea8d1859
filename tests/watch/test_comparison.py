"""Comparison of a candidate with the serving model: what is promoted, and what two models are measured on."""

import math
import re
from pathlib import Path
from types import SimpleNamespace

import pytest
import yaml
from ultralytics import YOLO

from yolov12.watch import comparison
from yolov12.watch.comparison import ClassChange, compare, decide


def known(name, serving, candidate):
    return ClassChange(name, False, 10, serving, candidate)


def new(name, candidate):
    return ClassChange(name, True, 10, None, candidate)


def test_a_candidate_that_knows_more_and_forgets_nothing_is_promoted():
    verdict = decide([known("ic", 0.7, 0.69), known("led", 0.6, 0.61), new("crack", 0.55)], 0.02)
    assert verdict.promote
    assert verdict.reasons == (
        "No known class fell by more than the margin of 0.02. The largest fall is that of ic, from 0.700 to 0.690.",
        "crack is new and has 0.550.",
        "The mean over 3 classes rose from 0.433 to 0.617.",
    )
    assert verdict.classes[2].name == "crack"


def test_a_class_that_fell_by_more_than_the_margin_is_named_with_its_numbers():
    rows = [known("led", 0.5, 0.47), known("crack", 0.612, 0.431), known("ic", 0.5, 0.99), new("dent", 0.9)]
    verdict = decide(rows, 0.02)
    assert not verdict.promote
    assert verdict.reasons == (
        "crack fell from 0.612 to 0.431, more than the margin of 0.02.",
        "led fell from 0.500 to 0.470, more than the margin of 0.02.",
    )


def test_many_small_falls_are_not_promoted():
    verdict = decide([known("ic", 0.5, 0.49), known("led", 0.5, 0.49)], 0.02)
    assert not verdict.promote
    assert verdict.reasons == ("The mean over 2 classes fell from 0.500 to 0.490.",)
    verdict = decide([known("ic", 0.5, 0.4998)], 0.02)
    assert verdict.reasons == ("The mean over 1 class fell from 0.500000 to 0.499800.",)


@pytest.mark.parametrize(
    ("rows", "promote"),
    [
        ([known("ic", 0.5, 0.5)], True),  # the same
        ([known("ic", 0.612, 0.592), new("crack", 0.1)], True),  # exactly the margin
        ([known("ic", 0.5, math.nan), new("crack", 0.9)], False),
        ([known("ic", 0.5, 0.5), new("crack", math.nan)], False),
        ([known("ic", None, None), new("crack", 0.9)], False),  # nothing shows that ic is as good
        ([known("rare", None, None), known("ic", 0.5, 0.5), ClassChange("crack", True, 0, None, None)], True),
        ([new("crack", 0.1)], True),  # the serving model knows no class of these names
        ([], False),
    ],
)
def test_edges(rows, promote):
    assert decide(rows, 0.02).promote is promote


@pytest.mark.parametrize("file", ["docs/guides/watch.md", "docs/reference/arguments.md", "README.md", "CHANGELOG.md"])
def test_no_page_says_that_only_a_better_candidate_is_promoted(file):
    """One that is as good is promoted. Whatever names the rule names both of its halves."""
    assert decide([known("ic", 0.5, 0.5)], 0.02).promote
    text = " ".join((Path(__file__).parents[2] / file).read_text("utf-8").split())
    assert not re.search(r"\b(better (one|candidate)|(candidate|model) that is (not )?better)\b", text)
    rules = re.findall(r"\bpromote[^.]*\bno known class\b.{,100}", text)
    assert rules
    assert all(re.search(r"\bmean\b", rule) for rule in rules)


def test_control_characters_of_a_name_are_not_printed():
    verdict = decide([known("a\x1b[2K", 0.5, 0.1)], 0.02)
    assert verdict.reasons[0].startswith("a\\x1b[2K fell")


def test_models_and_data_with_other_class_ids_are_compared_by_name(line, change_rows, tmp_path):
    serving, old = line / "serving.pt", line / "data.yaml"
    new_data = tmp_path / "new.yaml"  # of the same images, but `even` is a new class there
    new_data.write_text(yaml.safe_dump({**yaml.safe_load(old.read_text()), "names": {0: "new", 1: "odd", 2: "none"}}))
    val_args = {"imgsz": 64, "batch": 4, "device": "cpu", "workers": 0, "rect": False, "mem_limit": "8GiB"}

    candidate = change_rows(YOLO(str(serving)), tmp_path / "candidate.pt", ["odd", "new", "Even", "none"], [1, 0, 0, 1])
    verdict = compare(serving, candidate, old, new_data, 0.02, val_args=val_args)
    assert [(row.name, row.is_new, row.objects > 0) for row in verdict.classes] == [
        ("even", False, True),
        ("odd", False, True),
        ("new", True, True),
        ("none", True, False),
    ]
    even, odd, new_class, none = verdict.classes
    assert even.serving > 0.5
    assert odd.serving > 0.5
    assert odd.candidate == pytest.approx(odd.serving, abs=0.01)
    assert even.candidate == pytest.approx(even.serving, abs=0.01)
    assert new_class.candidate == pytest.approx(even.serving, abs=0.01)
    assert none.candidate is None
    assert verdict.promote

    worse = change_rows(YOLO(str(serving)), tmp_path / "worse.pt", ["even", "new"], [0, 1], factor=-1.0)
    verdict = compare(serving, worse, old, new_data, 0.02, val_args=val_args)
    assert not verdict.promote
    assert f"odd fell from {odd.serving:.3f} to 0.000, more than the margin of 0.02." in verdict.reasons
    assert verdict.classes[0].candidate < 0.5


def test_a_new_class_that_only_the_old_data_shows_is_measured_there(monkeypatch):
    models = {"serving.pt": {0: "ic"}, "candidate.pt": {0: "ic", 1: "dent", 2: "crack"}}
    monkeypatch.setattr("ultralytics.YOLO", lambda path: SimpleNamespace(names=models[path]))
    shown = {"old.yaml": {0: 5, 1: 4}, "new.yaml": {0: 3, 2: 2}}  # somebody has added `dent` to the old data

    def measure(yolo, data, val_args):
        objects = {index: count for index, count in shown[str(data)].items() if index in yolo.names}
        return comparison._Measured(objects, dict.fromkeys(objects, 0.5))

    monkeypatch.setattr(comparison, "_measure", measure)
    paths = (Path(name) for name in ("serving.pt", "candidate.pt", "old.yaml", "new.yaml"))
    rows = compare(*paths, 0.02, val_args={}).classes
    assert [(row.name, row.objects, row.candidate) for row in rows] == [
        ("ic", 5, 0.5),
        ("dent", 4, 0.5),
        ("crack", 2, 0.5),
    ]
