"""Drawn images: boxes match their objects, and objects are visible."""

import numpy as np
import pytest

from yolov12.demo.board import CLASS_NAMES, Box, DrawConfig, Part, class_names
from yolov12.demo.draw import draw_board
from yolov12.demo.sprites import body, crack


def board(index: int, *, dense: bool = False, hold_back: tuple[str, ...] = ()) -> tuple[np.ndarray, list[Box]]:
    return draw_board(np.random.default_rng([0, index]), DrawConfig(320, dense, hold_back))


@pytest.mark.parametrize(("defect", "seen"), [("crack", 5), ("scratch", 5)])
def test_a_defects_box_is_where_the_picture_changes(defect: str, seen: int) -> None:
    """Holding a defect back changes nothing else. The blur of the lens may spread a change by one pixel."""
    for index in range(60):
        picture, boxes = board(index)
        names = [CLASS_NAMES[box.class_id] for box in boxes]
        if names.count(defect) != 1:
            continue
        sound_picture, sound = board(index, hold_back=(defect,))
        kept = class_names((defect,))
        assert [kept[box.class_id] for box in sound] == [name for name in names if name != defect]
        changed = (picture != sound_picture).any(2)
        ys, xs = np.nonzero(changed)
        box = boxes[names.index(defect)]
        found = np.array([xs.min(), ys.min(), xs.max() + 1, ys.max() + 1])
        assert np.abs(found - (box.x0, box.y0, box.x1, box.y1)).max() <= 1
        seen -= 1
    assert seen <= 0


def test_a_crack_is_as_thick_in_a_larger_image() -> None:
    looks = np.full(6, 0.3), np.linspace(0.2, 0.8, 6)

    def covered(scale: int) -> float:
        part = Part("resistor", 0, 0, 20 * scale, 10 * scale, 0, *looks, defect="crack")
        return float((crack(part, body(part), scale)[..., 3] > 0).mean())

    assert covered(2) > 0.9 * covered(1)
    assert covered(4) > 0.9 * covered(1)


@pytest.mark.parametrize("name", ["resistor", "capacitor", "ic", "led", "connector", "shifted"])
def test_parts_stand_out_from_what_surrounds_their_boxes(name: str) -> None:
    stands_out, rim_px = [], 4
    for index in range(30):
        picture, boxes = board(index)
        for box in (b for b in boxes if CLASS_NAMES[b.class_id] == name):
            top, left = max(0, box.y0 - rim_px), max(0, box.x0 - rim_px)
            patch = picture[top : box.y1 + rim_px, left : box.x1 + rim_px].astype(float)
            within = np.zeros(patch.shape[:2], bool)
            within[box.y0 - top : box.y1 - top, box.x0 - left : box.x1 - left] = True
            differs = np.abs(patch - np.median(patch[~within], 0)).mean(2)
            stands_out.append(differs[within].mean() > differs[~within].mean())
    assert len(stands_out) >= 10
    assert np.mean(stands_out) >= 0.8  # a black IC on a black board is hard to see, as in reality


@pytest.mark.parametrize("dense", [False, True])
def test_parts_do_not_cover_each_other_and_bridges_and_cracks_lie_on_parts(dense: bool) -> None:
    flush_px = 2  # on a panel, the corners of the boxes of turned parts may meet
    seen = 0
    for index in range(8):
        _, boxes = board(index, dense=dense)
        on_part = [b for b in boxes if CLASS_NAMES[b.class_id] in ("bridge", "crack")]
        solid = [b for b in boxes if b not in on_part and CLASS_NAMES[b.class_id] != "scratch"]
        starts = np.array([(b.x0, b.y0) for b in solid])
        ends = np.array([(b.x1, b.y1) for b in solid])
        overlap_px = (np.minimum(ends[:, None], ends) - np.maximum(starts[:, None], starts)).min(2)
        np.fill_diagonal(overlap_px, 0)
        assert overlap_px.max() <= flush_px
        for b in on_part:
            centre = (b.x0 + b.x1) / 2, (b.y0 + b.y1) / 2
            assert ((starts <= centre) & (ends >= centre)).all(1).any()
        seen += len(on_part)
    assert seen > 0
