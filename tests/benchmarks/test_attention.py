"""benchmarks/attention.py on a CPU: every variant takes a step, and the back ends agree with float64."""

import json

import pytest

from benchmarks.common.processes import ROOT

COMMITTED = json.loads((ROOT / "benchmarks/results/attention.json").read_text("utf-8"))


@pytest.mark.deep
def test_the_small_variant_measures_what_a_gpu_can_be_compared_with(run_small):
    found = run_small("attention")
    for part in ("steps", "ratios", "accuracy"):
        assert [set(row) for row in found[part]] == [set(COMMITTED[part][0])] * len(found[part])
    order = [(row["variant"], row["deterministic"]) for row in found["steps"]]
    assert order == [("stock", False), ("sdpa", False), ("stock", True), ("sdpa", True)]
    for row in found["steps"]:
        assert row["images_per_s"] * row["step_ms"]["median"] == pytest.approx(1e3 * row["batch"])
        assert row["peak_mib"] is row["mb_per_image"] is None  # a CPU has no allocator that could tell
    speeds = {(row["variant"], row["deterministic"]): row["images_per_s"] for row in found["steps"]}
    assert [row["images_per_s_over_stock"] for row in found["ratios"]] == [
        pytest.approx(speeds["sdpa", deterministic] / speeds["stock", deterministic]) for deterministic in (False, True)
    ]
    assert {(row["backend"], row["dtype"]) for row in found["accuracy"]} == {
        (backend, dtype) for backend in ("math", "sdpa") for dtype in ("torch.bfloat16", "torch.float32")
    }
    assert all(row["within"] and 0 < row["error_grad"] < 0.01 for row in found["accuracy"])
