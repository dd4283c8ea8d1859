"""Settings of the engine, as users write them."""

import pytest

from yolov12.errors import ConfigError
from yolov12.mas import Config

GIB = 2**30


def test_defaults():
    assert Config.parse({}) == Config(safety_ratio=0.1, limit=None, bn_group=None, micro_batch=None)


@pytest.mark.parametrize(
    ("written", "limit"),
    [
        ("16GiB", 16 * GIB),
        ("16 GiB", 16 * GIB),
        ("16gib", 16 * GIB),
        ("16G", 16 * 10**9),
        ("1.5GB", 1_500_000_000),
        ("800MiB", 800 * 2**20),
        ("512K", 512_000),
        ("1TiB", 2**40),
        (17179869184, 16 * GIB),
        ("17179869184", 16 * GIB),
        ("0.5", 0.5),
        (0.25, 0.25),
        (1, None),
        ("1.0", None),
        (None, None),
        ("None", None),
        ("", None),
    ],
)
def test_limit(written, limit):
    assert Config.parse({"mem_limit": written}).limit == limit
    assert type(Config.parse({"mem_limit": written}).limit) is type(limit)


@pytest.mark.parametrize(
    ("name", "value", "group"),
    [("bn_group", "auto", None), ("bn_group", 0, 0), ("bn_group", "16", 16), ("bn_group", 16.0, 16)],
)
def test_group(name, value, group):
    assert Config.parse({name: value}).bn_group == group


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("mem_limit", "lots"),
        ("mem_limit", "16GiBs"),
        ("mem_limit", "-1GiB"),
        ("mem_limit", 0),
        ("mem_limit", -5),
        ("mem_limit", True),
        ("mem_limit", "16 apples"),
        ("cuda_graphs", "maybe"),
        ("mem_safety_ratio", 0.95),
        ("mem_safety_ratio", -0.1),
        ("mem_safety_ratio", "a tenth"),
        ("mem_safety_ratio", float("nan")),
        ("mem_safety_ratio", True),
        ("mem_safety_ratio", None),
        ("bn_group", -1),
        ("bn_group", 2.5),
        ("bn_group", "many"),
        ("bn_group", float("inf")),
        ("bn_group", False),
        ("micro_batch", 0),
        ("micro_batch", -4),
        ("micro_batch", "4.5"),
        ("micro_batch", float("inf")),
        ("micro_batch", [8]),
    ],
)
def test_wrong_values_are_refused_by_name(name, value):
    with pytest.raises(ConfigError, match=name):
        Config.parse({name: value})


def test_micro_batch_below_a_group_is_refused():
    with pytest.raises(ConfigError, match=r"micro_batch=8 is smaller than bn_group=16.*set bn_group=8"):
        Config.parse({"micro_batch": 8, "bn_group": 16})
    assert Config.parse({"micro_batch": 8, "bn_group": 0}).micro_batch == 8
    assert Config.parse({"micro_batch": 8}).bn_group is None


@pytest.mark.parametrize("limit", ["16", "1.5", 16, "5i"])
def test_a_limit_of_a_few_bytes_is_refused_as_a_forgotten_unit(limit):
    with pytest.raises(ConfigError, match="as in 16GiB"):
        Config.parse({"mem_limit": limit})


def test_a_limit_may_be_written_as_users_write_it():
    assert Config(limit="16GiB") == Config.parse({"mem_limit": "16GiB"}) == Config(limit=16 * 2**30)
