"""The README's table of what was verified where is made from what scripts/smoke.sh recorded."""

import pytest

from scripts.verified import READMES, read_records, replaced, table

TESTS = {
    "test_the_flash_kernel_computes_attention[dtype0]": "skipped",
    "test_the_flash_kernel_computes_attention[dtype1]": "skipped",
    "test_trains_under_pressure": "passed",
    "test_validates": "passed",
    "test_onnx_finds_the_same": "passed",
    "test_tensorrt_finds_the_same": "skipped",
}


def record(bases=None, gpu=None, flash=None, tensorrt=None, **outcomes):
    """A record as scripts/smoke.sh writes it, as far as the table reads it."""
    packages = [{"name": "flash-attn", "version": flash}, {"name": "tensorrt", "version": tensorrt}]
    check = {
        "image": bases and {"bases": {"CUDA_RUNTIME": bases}},
        "gpus": [{"index": 0, "name": gpu}] if gpu else [],
        "versions": {"torch": "2.3.1+cu121"},
        "gpu_packages": packages,
    }
    return {"check": check, "outcomes": TESTS | outcomes}


def row(*args, **kwargs):
    (found,) = table("en", {"verified_x.json": record(*args, **kwargs)}).splitlines()[2:]
    return [cell.strip() for cell in found.split("|")[1:-1]]


@pytest.mark.parametrize("language", READMES)
def test_table_is_up_to_date(language):
    text = READMES[language].read_text("utf-8")
    assert text == replaced(text, table(language, read_records())), "python scripts/verified.py writes it anew"


def test_a_row_says_where_it_was():
    link = "](benchmarks/results/verified_x.json)"
    assert row()[0] == f"[outside of the image, CPU{link}"
    assert row("localhost/stand-in", "NVIDIA H200")[0] == f"[Docker image on substitute bases, NVIDIA H200{link}"
    assert row("nvidia/cuda:12.1.1@sha256:1", "Tesla T4")[0] == f"[Docker image, Tesla T4{link}"


def test_only_what_ran_and_passed_is_said_to_have_passed():
    assert row()[1:] == ["2.3.1+cu121", "passed", "passed", "not installed", "not installed"]
    assert row(flash="2.7.4", tensorrt="10.9")[4:] == ["2.7.4 not run", "10.9 not run"]
    flash = {f"test_the_flash_kernel_computes_attention[dtype{i}]": "passed" for i in (0, 1)}
    done = row(flash="2.7.4", tensorrt="10.9", test_tensorrt_finds_the_same="failed", **flash)
    assert done[4:] == ["2.7.4 passed", "10.9 failed"]
    assert row(test_validates="failed")[2] == "failed"
    assert row(test_validates="skipped")[2] == "not run"


def test_both_languages_have_the_same_rows():
    records = {f"verified_{name}.json": record(gpu=name) for name in ("b", "a")}
    english, chinese = (table(language, records).splitlines() for language in ("en", "zh"))
    assert len(english) == len(chinese) == 4
    assert english[2].startswith("| [outside of the image, a](")
    assert chinese[2].startswith("| [镜像之外，a](")
