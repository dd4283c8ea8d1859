"""The table of classes, as a file, a text and a picture."""

from types import SimpleNamespace

import pytest

from yolov12.training.classes import head, picture, table
from yolov12.training.classes.table import ClassRow

ROWS = [
    ClassRow("a, b", True, 12, (0.5, 0.25), (0.75, 0.5)),
    ClassRow("crack", False, 3, None, (0.125, 0.0625)),
    ClassRow("rare", True, 0, None, None),
]


def test_a_table_is_read_as_it_was_written(tmp_path):
    table.write(tmp_path / "classes.csv", ROWS)
    assert table.read(tmp_path / "classes.csv") == ROWS
    assert (tmp_path / "classes.csv").read_text().splitlines() == [
        "class,known,objects,before_AP50,before_AP50-95,after_AP50,after_AP50-95",
        '"a, b",yes,12,0.50000,0.25000,0.75000,0.50000',
        "crack,no,3,,,0.12500,0.06250",
        "rare,yes,0,,,,",
    ]


def test_the_text_has_a_line_for_each_class():
    assert table.as_text(ROWS).splitlines()[1:] == [
        "  class       objects      AP50   AP50-95      AP50   AP50-95",
        "  a, b             12     0.500     0.250     0.750     0.500",
        "  crack  new        3         -         -     0.125     0.062",
        "  rare              0         -         -         -         -",
    ]


def test_of_many_classes_the_new_ones_and_the_most_changed_are_shown():
    many = [ClassRow(f"class {index}", index != 70, 1, (0.5, 0.0), (0.5, index / 100)) for index in range(80)]
    names = [row.name for row in table.shown(many)]
    assert names == [f"class {index}" for index in range(40, 80)]
    assert "and 40 more" in table.as_text(many)


@pytest.mark.parametrize("rows", [ROWS, ROWS[1:2], ROWS[2:]])
def test_the_picture_has_a_bar_for_each_number(rows):
    axes = picture.draw(rows).axes[0]
    assert [label.get_text() for label in axes.get_yticklabels()] == [
        row.name if row.known else f"{row.name} (new)" for row in rows
    ]
    widths = sorted(bar.get_width() for bar in axes.patches)
    assert widths == sorted(pair[1] for row in rows for pair in (row.before, row.after) if pair)


def test_a_validator_with_metrics_of_its_own_makes_no_table(tmp_path):
    trainer = SimpleNamespace(save_dir=tmp_path, resume=False, final_eval=None, get_validator=lambda: object())
    table.begin(trainer, head.ClassChange({0: "a", 1: "b"}, (None, 0), ()), wanted=False)
    assert trainer.final_eval is None
    assert not list(tmp_path.iterdir())


@pytest.mark.picture
def test_a_name_may_have_dollar_signs(tmp_path):
    picture.save([ClassRow("$_{ and $x", True, 1, None, (0.5, 0.25))], tmp_path / "classes.png")
    assert (tmp_path / "classes.png").stat().st_size > 1000
