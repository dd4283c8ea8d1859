"""The command `yolov12 check`: arguments, output and exit status."""

import json

import pytest

from yolov12 import check
from yolov12.errors import ConfigError


def test_command_on_the_cpu(capsys):
    assert check.main(["device=cpu"]) == 0
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "Training on device=cpu can work."
    for word in ("Attention", "cpu fp32, training: sdpa", "/dev/shm", "ultralytics"):
        assert word in out


def test_json_is_all_that_is_on_stdout(capsys):
    assert check.main(["--json", "device=4096"]) == 1
    printed = capsys.readouterr()
    told = json.loads(printed.out)
    assert told["can_train"] is False
    assert printed.err.strip().splitlines()[-1].startswith("Training on device=4096 cannot work: ")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        (["devcie=0"], "Did you mean 'device'"),
        (["--jsn"], "Did you mean 'json'"),
        (["data=coco"], "unknown argument 'data=coco'"),
        (["device"], "device=0"),
        (["device=gpu"], "device=gpu"),
    ],
)
def test_arguments_that_cannot_work(words, says):
    with pytest.raises(ConfigError, match=says):
        check.main(words)
