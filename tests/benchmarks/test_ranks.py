"""What trainings benchmarks/ranks.py compares; the rest of it runs with `--device cpu --small`."""

import pytest

from benchmarks import ranks
from benchmarks.ranks_pressure import STILL, Setup


@pytest.mark.parametrize("still", [False, True])
def test_speed_is_that_of_augmented_images_by_default(monkeypatch, still):
    asked = []

    def timed(who, gpus, arguments, images, setup):
        asked.append(arguments)
        return {"who": who, "gpus": gpus, "images_per_s": 2.0 if who == "ours" else 1.0}

    monkeypatch.setattr(ranks, "_timed", timed)
    found = ranks.speed(Setup("cpu", small=True, gpus=0, **({"still": True} if still else {})), {})
    assert found["is_augmented"] is not still
    assert found["ours_over_stock"] == {"1": 2.0}
    assert len(asked) == 3  # ours and stock in one process, ours in two
    for arguments in asked:
        switched_off = {key: value for key, value in arguments.items() if key in STILL}
        assert switched_off == (dict.fromkeys(STILL, 0.0) if still else {})
