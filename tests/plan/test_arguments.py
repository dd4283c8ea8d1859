import pytest

from yolov12.errors import ConfigError
from yolov12.plan.arguments import parse

GIB = 2**30


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ("mem=16GiB", "no model= given"),
        ("model=yolov12s.yaml", "Give mem=16GiB, or a card"),
        ("model=yolov12s.yaml gpu=T5", "gpu=T5 is no card.*Did you mean T4"),
        ("gpu=?", "Known are .*T4, .*H200\\. Or give mem=16GiB"),
        ("model=yolov12s.yaml mem=16GiB bacth=3", "unknown argument 'bacth'. Did you mean 'batch'"),
        ("model=yolov12s.yaml mem=16GiB batch=0", "batch=0: give a number"),
        ("model=yolov12s.yaml mem=16GiB batch", "'batch' has no value"),
        ("model=yolov12s.yaml mem=16", "^mem=16 .*give a unit"),
        ("model=yolov12s.yaml mem=abc", "^mem=abc: give bytes"),
        ("model=yolov12s.yaml gpu=T4 mem=0", "^mem=0.0: give bytes"),
        ("model=yolov12s.yaml mem=0.5", "^mem=0.5 .*Give bytes"),
        ("model=yolov12s.yaml mem=1", "^mem=1 .*Give bytes"),
        ("model=yolov12s.yaml mem=16GiB amp=yes", "amp=yes: give True or False"),
        ("model=yolov12s.yaml mem=16GiB mem_safety_ratio=2", "mem_safety_ratio=2"),
    ],
)
def test_arguments_that_cannot_work(words, says):
    with pytest.raises(ConfigError, match=says):
        parse(words.split())


def test_budget_of_a_limit_and_of_a_card():
    assert parse(["model=x", "mem=16GiB"]).budget_bytes == int(0.9 * 16 * GIB)
    card = parse(["model=x", "gpu=T4"])
    assert card.budget_bytes == pytest.approx(0.9 * card.total_bytes, rel=0.04)  # minus the CUDA context
    assert card.budget_bytes < 0.9 * card.total_bytes
    assert parse(["model=x", "gpu=H100", "mem=0.5", "mem_safety_ratio=0"]).budget_bytes == pytest.approx(
        39.6 * GIB, rel=0.01
    )
    assert parse(["model=x", "gpu=T4", "mem=80GiB"]).total_bytes == card.total_bytes


def test_several_models_and_all():
    assert parse(["model=all", "mem=1GiB"]).models[-1] == "yolov12x.yaml"
    assert parse(["model=a.yaml,b.pt", "mem=1GiB", "--json"]).models == ("a.yaml", "b.pt")
