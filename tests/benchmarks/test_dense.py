"""benchmarks/dense.py on a CPU: images that get smaller, a named limit, and saves."""

import csv
import json
from types import SimpleNamespace

import pytest

from benchmarks import dense
from benchmarks.dense import HOST_MIB


@pytest.mark.deep
def test_the_small_variant_has_all_parts(run_small):
    found = run_small("dense")
    auto = found["ladder"]["auto"]
    rows = list(csv.DictReader(auto["memory_csv"]))
    assert auto["failure"] is None
    assert (len(rows), auto["summary"]["images_lost"]) == (24, 0)
    free_mib, least_mib = float(rows[0]["budget_mib"]), found["ladder"]["budget_mib"]
    assert least_mib < float(rows[0]["peak_mib"]) < free_mib == pytest.approx(0.9 * HOST_MIB, rel=0.01)
    short = [row for row in rows if float(row["budget_mib"]) < 0.5 * free_mib]
    assert any(row["plan"] or row["image_size"] != "416x416" for row in short)
    assert float(rows[-1]["budget_mib"]) == free_mib  # the other process has released its memory

    assert found["off"][0]["mem_limit_mib"] == round(least_mib / 0.9)
    assert found["off"][-1]["failure"] is None
    (saved,) = found["saving"]
    assert saved["model"] == "yolov12n"
    assert 0 < min(saved["saves_s"]) <= saved["median_s"] <= max(saved["saves_s"])
    assert saved["file_mib"] > 1


def test_another_process_takes_memory_until_images_are_smaller_and_releases_it(tmp_path):
    file, need_mib = tmp_path / "memory.csv", 700.0
    rows, held = [], [0.0]

    def is_over():
        """Return whether the training has ended; each question lets it take a step."""
        budget_mib = 2000.0 - held[0]
        size = "416x416" if budget_mib >= need_mib else "384x384"
        rows.append({"image_size": size, "peak_mib": 800.0, "budget_mib": budget_mib})
        with file.open("w") as out:
            writer = csv.DictWriter(out, list(rows[0]))
            writer.writeheader()
            writer.writerows(rows)
        return len(rows) > 200

    class Other(dense._ImitatedProcess):
        def _write(self):
            super()._write()
            held[0] = json.loads((tmp_path / "held").read_text())["bytes"] / 2**20

    least_mib = dense._come_and_go(file, SimpleNamespace(ready=is_over), Other(tmp_path / "held"))
    assert need_mib - Other.step_mib <= least_mib < need_mib
    assert held == [0.0]
