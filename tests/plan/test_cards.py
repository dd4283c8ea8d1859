import pytest

from yolov12.errors import ConfigError
from yolov12.plan.cards import CARDS, card


@pytest.mark.parametrize(
    ("written", "name"),
    [
        ("T4", "T4"),
        ("tesla-t4", "T4"),
        ("NVIDIA GeForce RTX 3090", "RTX 3090"),
        ("3060", "RTX 3060"),
        ("a100", "A100 40GB"),
        ("A100-80GB", "A100 80GB"),
        ("A10", "A10"),
        ("h200", "H200"),
        ("orin 32gb", "Jetson Orin 32GB"),
    ],
)
def test_names_as_people_write_them(written, name):
    assert card(written).name == name


def test_near_matches_are_offered():
    with pytest.raises(ConfigError, match=r"gpu=RTX 4900 is no card that is known\. Did you mean RTX 4090.*mem=16GiB"):
        card("RTX 4900")


def test_cards_have_less_than_is_printed_on_the_box_and_know_their_attention():
    for each in CARDS:
        assert 4e9 < each.total_bytes < 151e9
        assert each.attention.startswith("flash") == (each.capability >= (8, 0))
    assert card("T4").total_bytes < 16e9
