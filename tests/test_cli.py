import errno
import re
import signal
import subprocess
import sys
from importlib import metadata
from types import SimpleNamespace

import pytest

from yolov12 import __version__, cli
from yolov12.errors import ConfigError


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["epochs=3", "imgsz=320"], {"epochs": 3, "imgsz": 320}),
        (["epochs", "=", "3"], {"epochs": 3}),
        (["--lr0=0.1", "cos_lr"], {"lr0": 0.1, "cos_lr": True}),
        (["detect", "name=007"], {"task": "detect", "name": "007"}),
        (["half=True"], {"quantize": 16}),
        (["recipe=False"], {"recipe": False}),
        (["imgsz=[320,640]", "device=0,1"], {"imgsz": [320, 640], "device": (0, 1)}),
    ],
)
def test_grammar_is_that_of_yolo(words, expected):
    assert cli.parse(words) == expected


def test_cfg_file_gives_way_to_words(tmp_path):
    file = tmp_path / "my.yaml"
    file.write_text("model: yolov12s.yaml\nepochs: 7\nlr0: 0.1\n")
    assert cli.parse(["epochs=3", f"cfg={file}"]) == {"model": "yolov12s.yaml", "epochs": 3, "lr0": 0.1}
    file.write_text("epohcs: 7\n")
    with pytest.raises(ConfigError, match=r"'epohcs'\. Did you mean 'epochs'"):
        cli.parse([f"cfg={file}"])


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["bathc=4"], "unknown argument 'bathc'. Did you mean 'batch'?"),
        (["modle=x"], "unknown argument 'modle'. Did you mean 'model'?"),
        (["mod=x"], "unknown argument 'mod'. Did you mean 'model'?"),  # mode= is the command
        (["epochs="], "'epochs=' has no value"),
        (["fast"], "'fast' is not an argument"),
        (["epochs"], "'epochs' is not an argument"),
    ],
)
def test_unusable_words_are_refused(words, message):
    with pytest.raises(ConfigError) as error:
        cli.parse(words)
    assert message in str(error.value)


def test_control_c_ends_a_command_by_its_signal_and_without_a_traceback():
    code = (
        "import signal, sys; from yolov12 import cli; signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "def interrupted(options): signal.raise_signal(signal.SIGINT)\n"
        "cli.VERBS['val'] = interrupted\n"
        "sys.exit(cli.main(['val']))"
    )
    ended = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert (ended.returncode, ended.stderr) == (-signal.SIGINT, "yolov12: interrupted\n")


def test_unknown_command_and_help(capsys):
    assert cli.main(["trian"]) == 2
    assert "unknown command 'trian'. Commands: train, val, predict, export, check" in capsys.readouterr().err
    assert cli.main([]) == 0
    assert "key=value" in capsys.readouterr().out


def test_version():
    """It needs no import of torch, which takes seconds."""
    for word in ("--version", "version", "-V"):
        code = (
            f"import sys\nfrom yolov12 import cli\nassert cli.main([{word!r}]) == 0\n"
            "assert not {'torch', 'ultralytics'} & set(sys.modules)"
        )
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        expected = [f"{name} {metadata.version(name)}" for name in ("ultralytics", "torch")]
        assert done.stdout == ", ".join([f"yolov12 {__version__}", *expected]) + "\n"


def test_errors_are_one_line_and_a_traceback_is_there_for_the_asking(capsys, monkeypatch):
    assert cli.main(["train", "bathc=4"]) == 2
    err = capsys.readouterr().err
    assert err == "yolov12: error: unknown argument 'bathc'. Did you mean 'batch'?\n"
    monkeypatch.setenv("YOLOV12_TRACEBACK", "1")
    with pytest.raises(ConfigError):
        cli.main(["train", "bathc=4"])


def test_errors_of_ultralytics_are_shown_without_colour_codes(capsys, monkeypatch):
    def fail(options):
        raise RuntimeError("\x1b[31m\x1b[1mtrain:\x1b[0m no images\nin folder")

    monkeypatch.setitem(cli.VERBS, "val", fail)
    assert cli.main(["val"]) == 1
    err = capsys.readouterr().err
    assert err == "yolov12: error: train: no images in folder (YOLOV12_TRACEBACK=1 shows where)\n"


@pytest.mark.parametrize(
    "files",
    [
        ["weights/best.pt", "results.csv", "results.png", "val_batch0_pred.jpg", "confusion_matrix.png", "labels.jpg"],
        ["weights/best.pt", "results.csv"],
        ["weights/best.pt", "memory.csv", "memory.png", "classes.csv", "classes.png"],
        ["memory.csv", "memory.png", "val_batch0_pred.jpg", "confusion_matrix.png"],
        [],
    ],
)
def test_the_end_of_a_training_names_only_files_that_exist(capsys, monkeypatch, tmp_path, files):
    trainer = SimpleNamespace(
        save_dir=tmp_path, best=tmp_path / "weights" / "best.pt", csv=tmp_path / "results.csv", epochs=1
    )
    for name in files:
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).touch()
    model = SimpleNamespace(trainer=trainer, train=lambda **options: None)
    monkeypatch.setattr(cli, "_model", lambda options, default: model)
    cli._train({"data": "demo"})
    out = capsys.readouterr().out
    named = set(re.findall(r"[\w/.]+\.(?:pt|csv|png|jpg)", out.replace(str(tmp_path) + "/", "")))
    assert named <= set(files)
    assert named >= {"weights/best.pt", "results.csv", "classes.csv", "memory.png"} & set(files)
    assert str(tmp_path) in out
    assert ("and others" in out) is (len(files) > 5)


@pytest.mark.parametrize(
    ("given", "model", "expected"),
    [
        ({"device": "cpu"}, "yolov12n-demo.pt", {"data": "demo", "batch": 64, "mem_limit": "1.9GiB"}),
        ({"batch": 8, "mem_limit": "3GiB", "device": "cpu"}, "yolov12n-demo.pt", {"batch": 8, "mem_limit": "3GiB"}),
        ({"model": "yolov12x.pt", "device": "cpu"}, "yolov12x.pt", {"batch": 64, "mem_limit": None}),
        ({"imgsz": 1280, "device": "cpu"}, "yolov12n-demo.pt", {"imgsz": 1280, "mem_limit": None}),
        ({"device": 0}, "yolov12n-demo.pt", {"mem_limit": None}),  # an integrated GPU: the limit is for the host, too
        ({"data": "mine.yaml"}, "yolov12n.yaml", {"data": "mine.yaml"}),
        ({"resume": "auto"}, "yolov12n-demo.pt", {"resume": "auto"}),
    ],
)
def test_a_training_without_data_is_the_first_run_unless_it_goes_on_with_a_run(
    given, model, expected, monkeypatch, tmp_path
):
    """What the user gives comes first, and a run that is resumed keeps its own batch."""
    seen = {}
    trainer = SimpleNamespace(save_dir=tmp_path, best=tmp_path / "best.pt", csv=tmp_path / "results.csv")

    def make(options, default):
        seen["model"] = default
        return SimpleNamespace(
            trainer=trainer, ckpt={"model": 1}, task="detect", train=lambda **options: seen.update(options)
        )

    monkeypatch.setattr(cli, "_model", make)
    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("yolov12.mas.memory.meter.shares_memory", lambda device: True)
    monkeypatch.setattr("yolov12.training.run.resume.latest_interrupted", lambda *_, **__: tmp_path / "last.pt")
    cli._train(dict(given))
    assert seen["model"] == model
    assert {key: seen.get(key) for key in expected} == expected
    assert ("epochs" in seen) == ("data" not in given and "resume" not in given)


def test_help_for_a_command(capsys):
    assert cli.main(["train", "--help"]) == 0
    out = capsys.readouterr().out
    assert "key=value" in out
    assert "Without data= and model=, teach the weights of this package two classes" in out


@pytest.mark.parametrize("verb", cli.OWN_ARGUMENTS)
def test_help_is_for_users(verb, capsys):
    """It says how the command is used, and nothing about classes and functions."""
    assert cli.main([verb, "--help"]) == 0
    out = capsys.readouterr().out
    assert out.startswith(f"`yolov12 {verb} ")
    assert re.search(r"^[-\w]+(=\S+)? +\S", out, re.MULTILINE)  # a list of arguments
    assert not re.search(r"`[A-Z]\w*[a-z]`|\bfunctions?\b", out)


def test_mode_cannot_contradict_the_command(capsys, tmp_path):
    assert cli.main(["predict", "mode=val"]) == 2
    (tmp_path / "copy.yaml").write_text("mode: train\ndata: null\nepochs: 4\n")  # as `yolo copy-cfg` writes it
    assert cli.parse([f"cfg={tmp_path / 'copy.yaml'}"]) == {"epochs": 4}


def test_val_without_weights_says_what_to_do(capsys, monkeypatch, tmp_path):
    from ultralytics.utils import SETTINGS

    monkeypatch.setitem(SETTINGS, "runs_dir", str(tmp_path))
    assert cli.main(["val"]) == 2
    assert f"nothing trained yet in {tmp_path}" in capsys.readouterr().err


@pytest.mark.parametrize(
    "words",
    [
        "train model=yolov12n.yaml epochs=abc",  # of another type, as Ultralytics finds
        "train model=yolov12n.yaml lr0=5",
        "train model=yolov12n.yaml data=missing.yaml",
        "train model=missing.yaml",
        "train model=missing.pt",
        "train resume=/missing/last.pt",
        "train cfg=missing.yaml",
        "train task=wrong",
        "train model=yolov8n-pose.yaml data=demo",  # which has no keypoints
        "val model=yolov12n.yaml data=missing.yaml device=cpu",
        "predict model=yolov12n.yaml source=/missing device=cpu",
        "export model=yolov12n.yaml format=wrong device=cpu",
        "plan model=missing.yaml mem=8GiB",
    ],
)
def test_what_the_user_has_to_change_has_status_2(words, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    assert cli.main(words.split()) == 2
    assert capsys.readouterr().err.startswith("yolov12: error: ")


@pytest.mark.parametrize("verb", ["val", "predict", "export"])
def test_a_batch_without_images_is_refused(verb, capsys):
    assert cli.main([verb, "model=yolov12n.yaml", "batch=0", "device=cpu"]) == 2
    assert "batch=0: give a number of images" in capsys.readouterr().err


@pytest.mark.parametrize("verb", ["train", "val", "predict", "export"])
def test_a_yaml_that_describes_no_model_is_refused(verb, capsys, tmp_path):
    data = tmp_path / "data.yaml"
    data.write_text("train: images\nval: images\nnames: [scratch]\n")
    assert cli.main([verb, f"model={data}"]) == 2
    assert f"model={data}: this yaml has no 'backbone'" in capsys.readouterr().err


def test_a_format_whose_package_is_missing_is_refused_in_one_line(capsys, caplog):
    """Nothing is installed at run time: Ultralytics names the requirement, and we say what to do."""
    assert cli.main(["export", "model=yolov12n.yaml", "format=openvino", "imgsz=32", "device=cpu"]) == 2
    assert capsys.readouterr().err == (
        "yolov12: error: this needs the package 'openvino', which is not installed. Install what the warning above "
        "names, or set YOLO_AUTOINSTALL=true to let Ultralytics install it\n"
    )
    assert "not found, AutoUpdate disabled by YOLO_AUTOINSTALL=False" in caplog.text


@pytest.mark.parametrize("content", [b"", b"no weights"])
def test_weights_that_cannot_be_read_have_status_2(content, capsys, tmp_path):
    (tmp_path / "broken.pt").write_bytes(content)
    assert cli.main(["val", f"model={tmp_path / 'broken.pt'}"]) == 2
    assert "cannot be read as a checkpoint" in capsys.readouterr().err


def test_a_download_that_failed_may_succeed_later(capsys, monkeypatch, tmp_path):
    from ultralytics.utils import SETTINGS, downloads

    def fail(*args, **kwargs):
        raise ConnectionError("Environment may be offline")

    monkeypatch.setitem(SETTINGS, "weights_dir", str(tmp_path))
    monkeypatch.setattr(downloads, "safe_download", fail)
    monkeypatch.setattr("ultralytics.data.utils.check_file", fail)
    assert cli.main(["val", "model=yolov12n.pt"]) == 1
    assert cli.main(["train", "model=yolov12n.yaml", "data=missing.yaml"]) == 1
    assert capsys.readouterr().err.count("offline") == 2


@pytest.mark.parametrize(("begun", "status"), [(False, 2), (True, 1)])
def test_what_fails_while_it_trains_has_status_1(begun, status, monkeypatch):
    trainer = SimpleNamespace(**({"train_time_start": 0.0} if begun else {}))

    def train(**options):
        raise ValueError("it was stopped")

    monkeypatch.setattr(cli, "_model", lambda options, default: SimpleNamespace(trainer=trainer, train=train))
    assert cli.main(["train", "data=demo"]) == status


@pytest.mark.parametrize(
    ("has_checkpoint", "then"), [(True, "continue with model={} resume=True"), (False, "start it again")]
)
def test_a_full_disk_is_named_with_what_to_do(capsys, monkeypatch, tmp_path, has_checkpoint, then):
    trainer = SimpleNamespace(train_time_start=0.0, save_dir=tmp_path)
    last = tmp_path / "weights" / "last.pt"
    last.parent.mkdir()
    if has_checkpoint:
        last.touch()

    def train(**options):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(cli, "_model", lambda options, default: SimpleNamespace(trainer=trainer, train=train))
    assert cli.main(["train", "data=demo"]) == 1
    error = capsys.readouterr().err
    assert f"No space left on device, in the training in {tmp_path}. Make room on its disk, or in /dev/shm" in error
    assert f"then {then.format(last)}\n" in error


def test_a_folder_in_use_may_be_free_later(monkeypatch, tmp_path):
    from yolov12 import files

    (tmp_path / "run" / "weights").mkdir(parents=True)
    lock = files.lock(tmp_path / "run" / "weights")
    words = ["data=demo:images=40", "model=yolov12n.yaml", "imgsz=64", "device=cpu", f"project={tmp_path}", "name=run"]
    try:
        assert cli.main(["train", *words, "exist_ok=True", "epochs=1"]) == 1
    finally:
        lock.release()
