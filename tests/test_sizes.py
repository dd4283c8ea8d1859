"""Amounts of memory as users write them. tests/mas/test_config.py has every way to write one."""

import pytest

from yolov12.errors import ConfigError
from yolov12.sizes import parse_memory_size


def test_an_amount_is_bytes_a_fraction_or_all():
    assert parse_memory_size("16GiB") == 16 * 2**30
    assert parse_memory_size("0.5") == 0.5
    assert parse_memory_size("1") is None
    assert parse_memory_size(None) is None


@pytest.mark.parametrize("value", ["lots", 0, "0GiB", "16", True])
def test_an_error_names_the_argument(value):
    with pytest.raises(ConfigError, match=r"^mem="):
        parse_memory_size(value, "mem")


def test_reading_an_amount_needs_no_torch(run_python):
    done = run_python("-c", "import sys, yolov12.sizes; print({'torch', 'ultralytics'} & set(sys.modules))")
    assert done.stdout.strip() == "set()", done.stderr
