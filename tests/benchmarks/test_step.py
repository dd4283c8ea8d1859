"""What benchmarks/step.py makes of times and kernels, and its small variant on the CPU."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.common.processes import ROOT, environment
from benchmarks.common.report import commit
from benchmarks.step import HERE, Child, kind_of, ratios

RESULT = json.loads((Path(HERE) / "results" / "step.json").read_text("utf-8"))


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("gradient_sums", "BatchNorm"),
        ("_gradient", "BatchNorm"),
        ("gather", "upsampling"),
        ("scale", "image"),
        ("render", "image"),
        ("entropy_gradient", "loss"),
        ("void at::native::(anonymous namespace)::CatArrayBatchedCopy<at::native::", "concatenation"),
        ("sm90_xmma_dgrad_implicit_gemm_f16f16_f16f32_f32_nhwckrsc_nhwc", "convolution"),
        ("Memcpy HtoD (Pinned -> Device)", "copy"),
        ("void at::native::vectorized_elementwise_kernel<8, at::native::CUDAFunctor_add<c10::Half>", "elementwise"),
        ("something", "other"),
    ],
)
def test_kinds_of_kernels(name, kind):
    assert kind_of(name) == kind


def test_ratios_compare_variants_of_one_round():
    assert ratios(RESULT["rows"]) == RESULT["ratios"]
    rows = [
        {"micro_batch": 8, "round": round_, "variant": variant, "images_per_s": rate}
        for round_, variant, rate in ((0, "now", 30.0), (0, "stock", 20.0), (1, "now", 10.0))
    ]
    assert ratios(rows) == [{"micro_batch": 8, "round": 0, "over": "stock", "ratio": 1.5}]


@pytest.mark.parametrize("variant", ["before", "now", "graphs"])
def test_only_one_variant_has_graphs(variant):
    """They are on by default with some versions of PyTorch."""
    child = object.__new__(Child)
    child.variant = variant
    assert child._settings() == {"cuda_graphs": variant == "graphs"}


@pytest.mark.deep
def test_the_small_variant_runs_on_a_cpu(tmp_path):
    words = ["step", "--before", ROOT, "--device", "cpu", "--small", "--out", tmp_path / "step.json"]
    subprocess.run([sys.executable, "-m", "benchmarks", *words], env=environment(), check=True, capture_output=True)
    found = json.loads((tmp_path / "step.json").read_text())
    assert [row["variant"] for row in found["rows"]] == ["before", "now", "stock"]
    assert found["before"] == commit()
    assert found["ratios"] == ratios(found["rows"])
    assert all(profile["launches"] > 0 for profile in found["profiles"].values())
