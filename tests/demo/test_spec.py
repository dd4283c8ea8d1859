"""Parsing `demo:key=value,...`, and the error messages for mistakes in it."""

from pathlib import Path

import pytest

from yolov12.demo import DemoSpec, dataset, ensure, is_demo, parse
from yolov12.demo.board import HELD_BACK
from yolov12.errors import ConfigError


def test_parse_reads_every_setting() -> None:
    spec = parse("demo:images=2000,seed=1,hold_back=True,imgsz=640,val=0.25")
    assert spec == DemoSpec(images=2000, seed=1, imgsz=640, val=0.25, hold_back=HELD_BACK)
    assert parse("demo") == DemoSpec()
    assert parse("demo: images=50, hold_back=false") == DemoSpec(images=50)
    assert parse("demo:hold_back=scratch+missing") == DemoSpec(hold_back=("missing", "scratch"))
    assert parse("demo:hold_back=crack+shifted") == parse("demo:hold_back=True")


def test_different_specs_never_share_a_folder() -> None:
    specs = [
        "demo",
        "demo:seed=1",
        "demo:images=161",
        "demo:imgsz=640",
        "demo:val=0.25",
        "demo:hold_back=True",
        "demo:hold_back=missing",
        "demo:hold_back=missing+scratch",
    ]
    assert len({parse(spec).folder for spec in specs}) == len(specs)


def test_a_changed_generator_draws_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    before = DemoSpec().folder
    monkeypatch.setattr(dataset, "GENERATOR_VERSION", dataset.GENERATOR_VERSION + 1)
    assert DemoSpec().folder != before


@pytest.mark.parametrize(
    ("spec", "says"),
    [
        ("demo:image=5", "did you mean images"),
        ("demo:colour=red", "valid: images, seed, imgsz, val, hold_back"),
        ("demo:images=many", "whole number from 2 to"),
        ("demo:images=1", "whole number from 2 to"),
        ("demo:images", "whole number from 2 to"),
        ("demo:seed=-1", "whole number from 0 to"),
        ("demo:imgsz=64", "pixels from 256 to"),
        ("demo:val=1.0", "fraction between 0 and 1"),
        ("demo:val=nan", "fraction between 0 and 1"),
        ("demo:hold_back=maybe", "True, False, or defects joined by"),
        ("demo:hold_back=led", "of missing, bridge, scratch, shifted, crack"),
        ("demo:seed=1,seed=2", "given twice"),
        ("demo:images=4", "images=5 or more"),
        ("coco8.yaml", "not the embedded data set"),
    ],
)
@pytest.mark.parametrize("argument", ["data", "replay"])
def test_a_bad_spec_is_refused_in_one_helpful_line(spec: str, says: str, argument: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=says) as refusal:
        ensure(spec, tmp_path, argument)
    assert "\n" not in str(refusal.value)
    assert str(refusal.value).startswith(f"{argument}=")
    assert list(tmp_path.iterdir()) == []


def test_is_demo_tells_the_embedded_data_set_from_files() -> None:
    assert is_demo("demo")
    assert is_demo("demo:images=5")
    for other in ("demo.yaml", "demos", "data/demo", Path("demo"), None, {"names": {}}):
        assert not is_demo(other)
