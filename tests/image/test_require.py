"""`YOLOV12_REQUIRE`: a green smoke run means that the machine had what it ought to have. And what a run records."""

import importlib.util
from pathlib import Path

import pytest

CONFTEST = Path(__file__).parents[1] / "smoke" / "conftest.py"


@pytest.fixture(scope="module")
def smoke():
    spec = importlib.util.spec_from_file_location("smoke_conftest", CONFTEST)
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture(scope="module")
def check_required(smoke):
    return smoke.check_required


def test_nothing_is_required_unless_asked_for(check_required):
    check_required("", {"gpu": "no driver", "flash-attn": "not installed", "tensorrt": "not installed"})


@pytest.mark.parametrize("words", ["gpu", "gpu,flash-attn,tensorrt", " flash-attn , gpu ,"])
def test_a_missing_part_is_an_error_that_says_why(check_required, words):
    with pytest.raises(pytest.UsageError, match=r"YOLOV12_REQUIRE asks for .*gpu \(no driver\)"):
        check_required(words, {"gpu": "no driver"})


def test_a_machine_with_all_parts_is_tested(check_required):
    check_required("gpu,flash-attn,tensorrt", {})
    check_required("gpu", {"tensorrt": "not installed"})


@pytest.mark.parametrize("words", ["GPU", "gpu,flash_attn", "cuda", "gpu tensorrt"])
def test_an_unknown_word_is_one_clear_error(check_required, words):
    with pytest.raises(pytest.UsageError, match=r"YOLOV12_REQUIRE does not know .* It knows gpu, flash-attn, tensorrt"):
        check_required(words, {})


def test_a_record_says_of_which_commit_on_which_machine_it_is(smoke, monkeypatch, tmp_path):
    monkeypatch.setattr("benchmarks.common.report.ROOT", tmp_path)  # as in an image: no git
    monkeypatch.setenv("BENCHMARKS_COMMIT", "1234567")
    record = smoke.recorded({"test_validates": "passed"})
    assert (record["commit"], record["outcomes"]) == ("1234567", {"test_validates": "passed"})
    assert record["check"]["versions"]["torch"]
