"""A watch that is killed at any moment, any number of times, loses no image and serves a validated model."""

import json
from collections import Counter
from pathlib import Path

import pytest

LIVES = Path(__file__).with_name("lives.py")


@pytest.mark.parametrize(("kills", "mode"), [(200, ()), (40, ("copy",))], ids=["rename", "copy"])
def test_kills_lose_no_image_and_no_model(kills, mode, tmp_path, run_python):
    folder = tmp_path / "line"
    done = run_python(str(LIVES), str(folder), "0", str(kills), *mode)
    assert done.returncode == 0, done.stderr
    *killed, last = map(json.loads, done.stdout.splitlines())
    delivered = Counter((folder / "delivered.txt").read_text().split())
    assert len(killed) == kills
    assert last["status"] == 0, done.stderr
    assert {life["status"] for life in killed} <= {-9, 0}
    assert sum(life["status"] == -9 for life in killed) > kills / 2
    attempts = [json.loads(file.read_text()) for file in sorted((folder / "work" / "history").glob("*/attempt.json"))]
    if kills >= 200:
        assert len(attempts) > 10
        assert last["places"]["rejected"]
        phases = {"idle", "preparing", "training", "judging", "promoting", "reporting"}
        assert phases <= {life["phase"] for life in killed}

    for life in (*killed, last):
        assert life["serving_is_valid"]
        places = Counter(digest for digests in life["places"].values() for digest in digests)
        assert places.keys() <= delivered.keys()
        if not mode:  # a rename is never half done; a copy may be in both places until the next start
            assert all(count <= delivered[digest] for digest, count in places.items())
    assert Counter(digest for digests in last["places"].values() for digest in digests) == delivered
    assert not last["places"]["inbox"]
    assert not [*(folder / "inbox").iterdir()]

    assert [attempt["number"] for attempt in attempts] == [*range(1, len(attempts) + 1)]
    used = Counter(image for attempt in attempts for image in attempt["new_images"])
    assert set(used.values()) == {1}
    collected = len(last["places"]["train"]) + len(last["places"]["val"])
    assert collected - len(used) < 2 * 3  # fewer than min_images of each of three classes are left
    for split in ("train", "val"):
        stems = {file.stem for file in (folder / "work" / "dataset" / "images" / split).iterdir()}
        assert stems == {file.stem for file in (folder / "work" / "dataset" / "labels" / split).iterdir()}


def test_a_watch_does_not_load_torch_which_would_take_memory_from_its_trainings(run_python):
    code = "import sys, yolov12.watch.command; sys.exit('torch' in sys.modules)"
    assert run_python("-c", code).returncode == 0
