"""Batches with other numbers of boxes than the batches before them are validated as on stock."""

from pathlib import Path

import pytest


def test_validation_with_box_counts_that_differ_between_batches(trainings, small_model, tmp_path):
    """The second batch is crowded, and has images without boxes."""
    data = trainings.draw_data(tmp_path / "data", "detect", [(64, 64)] * 3)
    for index in range(24):
        boxes = 1 + index % 3 if index < 16 else 90 * (index % 3)
        file = Path(data).parent / "labels" / f"{index}.txt"
        places = [(0.2 + 0.6 * (box * 7 % boxes) / boxes, 0.2 + 0.6 * box / boxes) for box in range(boxes)]
        file.write_text("\n".join(f"{box % 2} {x} {y} 0.2 0.1" for box, (x, y) in enumerate(places)))
    run = trainings.train(tmp_path, small_model, data=data, epochs=1, mas=False, val=False, lr0=0.001)
    found, validator = [], run.trainer.get_validator()
    validator.args.plots = False
    for settings in ({"mas": False}, {"mas": True, "micro_batch": 3}):
        vars(validator.args).update(settings)
        found.append(validator(run.trainer))
    assert found[0]["val/cls_loss"] > 0
    assert found[1] == pytest.approx(found[0], abs=1.1e-5)  # values are rounded to five places
