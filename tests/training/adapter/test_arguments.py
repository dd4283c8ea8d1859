"""Arguments of the engine, from the command line and from Python."""

import gc

import pytest
import yaml
from ultralytics import YOLO

from yolov12 import cli
from yolov12.errors import ConfigError

BAD = [
    ("mem_limit=banana", "mem_limit=banana: give bytes, as in 16GiB, or a fraction of the device, as in 0.5"),
    ("mem_limit=-1", "mem_limit=-1: give bytes"),
    ("mem_safety_ratio=2", "mem_safety_ratio=2.0: give a fraction of the memory from 0 to 0.9"),
    ("mem_safety_ratio=much", "mem_safety_ratio=much is not a number"),
    ("bn_group=-1", "bn_group=-1: give auto, a number of images, or 0"),
    ("bn_group=2.5", "bn_group=2.5 is not a number: give auto"),
    ("micro_batch=0", "micro_batch=0: give a number of images"),
    ("micro_batch=2 bn_group=4", "micro_batch=2 is smaller than bn_group=4"),
    ("augment_on=gpu", "augment_on=gpu: give one of host, device, auto"),
    ("disable_mas_layers=backbone.4,,neck.2", "disable_mas_layers=backbone.4,,neck.2: give names of layers"),
]


@pytest.mark.parametrize(("words", "message"), BAD)
def test_a_value_that_cannot_work_is_refused_before_anything_is_made(tiny_model, tmp_path, capsys, words, message):
    given = cli.parse(words.split())
    status = cli.main(["train", f"model={tiny_model}", "data=demo", f"project={tmp_path / 'runs'}", *words.split()])
    error = capsys.readouterr().err.strip().splitlines()
    assert status == 2
    assert error[-1].startswith("yolov12: error: ")
    assert message in error[-1]
    with pytest.raises(ConfigError, match=message.replace(".", r"\.")):
        YOLO(tiny_model).train(data="demo", project=tmp_path / "runs", device="cpu", **given)
    assert not (tmp_path / "runs").exists()


def test_a_switch_is_on_or_off(tiny_model, tmp_path, capsys):
    words = ["train", f"model={tiny_model}", "data=demo", f"project={tmp_path / 'runs'}"]
    assert cli.main([*words, "mas=perhaps"]) != 0
    assert "'mas=perhaps' is of invalid type str" in capsys.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_a_misspelt_argument_is_helped(tiny_model, tmp_path, capsys):
    status = cli.main(["train", f"model={tiny_model}", "data=demo", f"project={tmp_path / 'runs'}", "mem_limt=1GiB"])
    assert status == 2
    assert "unknown argument 'mem_limt'. Did you mean 'mem_limit'?" in capsys.readouterr().err
    with pytest.raises(SyntaxError, match=r"'mem_limt' is not a valid YOLO argument(.|\n)*mem_limit"):
        YOLO(tiny_model).train(data="demo", project=tmp_path / "runs", device="cpu", mem_limt="1GiB")
    assert not (tmp_path / "runs").exists()


def test_command_line_and_python_agree_and_args_yaml_has_them(trainings, tiny_model, tmp_path):
    """Both also agree with a file that gives the arguments."""
    (tmp_path / "cfg.yaml").write_text("mem_limit: 0.5\nmem_safety_ratio: 0.2\n")
    tiny = {**trainings.TINY, "epochs": 1, "project": tmp_path, "name": "words"}
    words = [f"{key}={value}" for key, value in tiny.items()]
    engine = ["mem_limit=0.5", "mem_safety_ratio=0.2", "bn_group=auto", "micro_batch=2"]
    assert cli.main(["train", f"model={tiny_model}", *words, *engine]) == 0
    python = {"mem_limit": 0.5, "mem_safety_ratio": 0.2, "bn_group": "auto", "micro_batch": 2}
    trainings.train(tmp_path, epochs=1, name="python", **python)
    trainings.train(tmp_path, epochs=1, name="file", cfg=tmp_path / "cfg.yaml", micro_batch=2)
    names = ("mas", "mem_safety_ratio", "mem_limit", "bn_group", "micro_batch")
    for run in ("words", "python", "file"):
        args = yaml.safe_load((tmp_path / run / "args.yaml").read_text())
        assert [args[name] for name in names] == [True, 0.2, 0.5, 2, 2]  # bn_group is the number that auto has chosen


@pytest.mark.parametrize("word", ["mas=False", "mas=false"])
def test_the_engine_is_switched_off_by_a_word(trainings, tiny_model, tmp_path, word):
    words = [f"{key}={value}" for key, value in {**trainings.TINY, "epochs": 1, "project": tmp_path}.items()]
    assert cli.main(["train", f"model={tiny_model}", *words, word]) == 0
    (run,) = tmp_path.iterdir()
    assert yaml.safe_load((run / "args.yaml").read_text())["mas"] is False
    assert not list(run.glob("memory*"))
    assert "memory" not in (run / "results.csv").read_text()


def test_a_limit_is_a_fraction_of_the_memory_or_a_number_of_bytes(trainings, tmp_path):
    half = trainings.train(tmp_path, **trainings.SPLIT, mem_limit=0.5, mem_safety_ratio=0, epochs=1)
    fixed = trainings.train(tmp_path, **trainings.SPLIT, mem_limit="3GiB", mem_safety_ratio=0.5, epochs=1)
    from yolov12.mas.memory.host import HostMemory

    total_mib = HostMemory().room_bytes()[0] / 2**20
    assert max(float(row["budget_mib"]) for row in half.memory) <= total_mib / 2 + 0.1
    assert {float(row["budget_mib"]) for row in fixed.memory} == {1536.0}


def test_arguments_without_effect_are_named(trainings, tmp_path):
    run = trainings.train(tmp_path, mas=False, epochs=1, mem_limit="8GiB", micro_batch=4)
    assert "mas=False, so there is no use for mem_limit=8GiB, micro_batch=4" in run.log


def test_a_layer_that_does_not_exist_is_refused_and_leaves_nothing(trainings, tmp_path, recwarn):
    run = trainings.train(tmp_path, disable_mas_layers=["backbone.44"], raises=ConfigError)
    assert run.trainer is None
    assert not list(tmp_path.rglob("args.yaml"))
    gc.collect()
    assert not [each for each in recwarn if each.category is ResourceWarning]  # no file was left open


def test_names_of_disabled_layers_are_saved_with_the_run(trainings, tmp_path):
    run = trainings.train(tmp_path, epochs=1, disable_mas_layers=["backbone.4", "neck.2"])
    assert run.args["disable_mas_layers"] == ["backbone.4", "neck.2"]
    assert len(run.memory) == trainings.BATCHES
