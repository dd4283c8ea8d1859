"""Every way to use the image finds `yolov12` and `python`, and none writes where it may not."""

import signal
import time

import pytest

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]

FIND = 'command -v yolov12 && command -v python && python -c "import yolov12, torch; print(torch.version.cuda)"'
FOUND = ["/opt/conda/envs/yolov12/bin/yolov12", "/opt/conda/envs/yolov12/bin/python", "12.1"]
TINY = ("data=demo:images=40", "model=yolov12n.yaml", "imgsz=64", "batch=8", "epochs=1", "device=cpu", "plots=False")


# The three commands, their caches, and a package in the user's own site-packages that must not be found.
EACH = """
for name in python yolo yolov12 torchrun; do command -v "$name"; done
python -c "import matplotlib.pyplot, torch; print('python runs', torch.version.cuda)"
python -c "from triton.runtime.cache import get_cache_manager as at; at('0' * 64).put(b'', 'x')"
echo "triton can write: $?"
python -c "import of_the_user" 2>/dev/null || echo "packages of the user are not found"
python -c "import os; print('auto-install is', os.environ['YOLO_AUTOINSTALL'])"
yolo version
yolov12 --help
"""
EACH_SAYS = [
    *(f"/opt/conda/envs/yolov12/bin/{name}" for name in ("python", "yolo", "yolov12", "torchrun")),
    "python runs 12.1",
    "triton can write: 0",
    "packages of the user are not found",
    "auto-install is false",
    "8.4.190",
    "`yolov12 COMMAND --help`",
]
ANYBODY = {"user": "1000:1000"}


@pytest.mark.parametrize(
    ("shell", "options"),
    [
        pytest.param(["sh", "-c"], {}, id="docker exec sh -c"),
        pytest.param(["bash", "-c"], ANYBODY, id="docker exec -u 1000"),
        pytest.param(["bash", "-lc"], ANYBODY, id="docker exec -u 1000 bash -lc"),
        pytest.param(["sh", "-lc"], {**ANYBODY, "env": ["HOME=/"]}, id="a home at the root"),
        pytest.param(
            ["bash", "--noprofile", "--norc", "-ec"], {"env": ["HOME=/github/home"]}, id="container: of a CI job"
        ),
        pytest.param(["sh", "-ec"], {**ANYBODY, "env": ["HOME=/missing"]}, id="a CI job of another user"),
    ],
)
def test_python_yolo_and_yolov12_run_without_the_entrypoint(image, shell, options):
    assert_each_runs(image.run(*shell, EACH, entrypoint=[], **options))


@pytest.mark.parametrize("home", ["/work/home", "/"])
def test_python_yolo_and_yolov12_run_in_apptainer(fresh_image, tmp_path, home):
    """It has a read-only root, no entrypoint for `exec`, and the user's home with what is installed there."""
    packages = tmp_path / "home" / ".local" / "lib" / "python3.11" / "site-packages"
    packages.mkdir(parents=True)
    (packages / "of_the_user.py").touch()
    for folder in (tmp_path, *tmp_path.rglob("*")):
        folder.chmod(0o777)
    script = f"cd /work\n{EACH}"
    options = {"work": tmp_path, "user": "1000:1000", "home": home, "entrypoint": []}
    assert_each_runs(fresh_image.run_read_only("bash", "-c", script, **options))


def assert_each_runs(done):
    said = done.stdout + done.stderr
    assert done.returncode == 0, said
    assert [words for words in EACH_SAYS if words not in done.stdout] == [], said
    for complaint in ("Traceback", "writable", "denied", "Read-only", "WARNING"):
        assert complaint not in said


def test_help_is_that_of_the_image(image):
    for word in ("--help", "-h", "help"):
        assert "docker run --gpus all --shm-size=8g" in image.run(word, check=0).stdout
    assert "usage: yolov12 train key=value" in image.run("train", "--help", check=0).stdout
    assert image.run("--version", check=0).stdout.startswith("yolov12 ")


def test_exit_statuses_reach_the_outside(image):
    """Through tini, the entrypoint and the scripts."""
    assert image.run("train", "bathc=4", "device=cpu").returncode == 2
    assert image.run("val", "model=/missing.pt").returncode == 2
    assert image.run("python", "-m", "yolov12", "trian").returncode == 2
    launch = ("python", "-m", "yolov12.torchrun", "--standalone", "--local-addr=127.0.0.1", "--max-restarts=9")
    done = image.run(*launch, "-m", "yolov12", "trian")
    assert (done.returncode, done.stderr.count("unknown command 'trian'")) == (2, 1)


def test_nothing_is_installed_at_run_time(image):
    done = image.run("export", "model=yolov12n.yaml", "format=openvino", "imgsz=64", "device=cpu", check=2)
    assert "AutoUpdate disabled by YOLO_AUTOINSTALL=False" in done.stdout + done.stderr
    assert "this needs the package 'openvino', which is not installed" in done.stderr


@pytest.mark.parametrize(
    "shell",
    [["bash", "-c"], ["bash", "-lc"], ["bash", "-ic"], ["bash", "-lic"], ["sh", "-c"], ["sh", "-lc"]],
    ids=" ".join,
)
def test_shells_find_everything(image, shell):
    """The second and the fourth way also is `docker exec`."""
    for entrypoint in (None, []):
        assert image.run(*shell, FIND, entrypoint=entrypoint, check=0).stdout.split() == FOUND


def test_another_user_finds_everything(image):
    assert image.run("bash", "-c", FIND, user="1000:1000", check=0).stdout.split() == FOUND


def test_the_environment_can_be_activated(image):
    script = 'conda activate yolov12 && echo "$CONDA_DEFAULT_ENV" && pwd && command -v python'
    for shell in ("-ic", "-lc"):
        done = image.run("bash", shell, script, check=0)
        assert done.stdout.split() == ["yolov12", "/root/yolov12", FOUND[1]]


def test_no_command_gives_a_usable_answer(image):
    done = image.run(check=None)
    assert "docker run --gpus all --shm-size=8g" in done.stdout
    assert "ultralytics" in done.stdout  # `check` says what there is
    assert "Traceback" not in done.stdout + done.stderr


def test_any_other_command_is_run_as_it_is(image):
    assert image.run("echo", "a  b", check=0).stdout == "a  b\n"
    assert image.run("false").returncode == 1
    assert image.run("no-such-command").returncode == 127


def test_plan_needs_no_gpu(image):
    done = image.run("plan", "model=yolov12n.yaml", "mem=8GiB", "batch=16", check=0)
    assert "predicted peak" in done.stdout


def test_there_are_no_caches_and_no_repository(fresh_image):
    find = "find /root/.cache /var/lib/apt/lists /root/yolov12/.git -type f 2>/dev/null | wc -l"
    done = fresh_image.run("bash", "-c", find, check=0)
    assert done.stdout.strip() == "0"


def test_trains_validates_and_predicts(image, tmp_path):
    tmp_path.chmod(0o777)
    where = {"mounts": [f"{tmp_path}:/work"], "folder": "/work"}
    done = image.run("train", *TINY, "project=/work/runs", "name=line", **where, check=0)
    assert "no GPU was passed" not in done.stderr  # device=cpu
    assert (tmp_path / "runs" / "line" / "weights" / "best.pt").exists()
    done = image.run(
        "val", "model=/work/runs/line/weights/best.pt", "data=demo:images=40", "imgsz=64", **where, check=0
    )
    assert "mAP50" in done.stdout


def test_trains_in_several_processes(image, tmp_path):
    """A container without a network has a name that cannot be resolved, on which torchrun would wait."""
    tmp_path.chmod(0o777)
    launch = ("torchrun", "--standalone", "--local-addr=127.0.0.1", "--nproc-per-node=2", "-m", "yolov12", "train")
    words = (*TINY, "project=/work/runs", "name=line", "bn_group=2")
    image.run(*launch, *words, mounts=[f"{tmp_path}:/work"], folder="/work", check=0)
    assert (tmp_path / "runs" / "line" / "memory.rank1.csv").exists()


@pytest.mark.parametrize("command", [None, "yolo"])
def test_another_user_trains_in_a_mounted_folder(image, tmp_path, command):
    """By the entrypoint, and by a plain command that nothing prepares."""
    tmp_path.chmod(0o777)
    where = {"user": "1000:1000", "mounts": [f"{tmp_path}:/work"], "folder": "/work"}
    words, entrypoint = (["train"], None) if command is None else ([command, "train"], [])
    done = image.run(*words, *TINY, "project=/work/runs", entrypoint=entrypoint, **where, check=0)
    assert list(tmp_path.glob("runs/**/best.pt")), done.stdout[-500:]


def test_a_read_only_image_trains_in_a_mounted_folder(fresh_image, tmp_path):
    done = fresh_image.run_read_only("bash", "-c", f"touch /x; cd /work && {FIND}", work=tmp_path)
    assert done.stdout.split() == FOUND, done.stderr
    assert "Read-only file system" in done.stderr
    script = "cd /work && exec /root/yolov12/docker/entrypoint.sh train " + " ".join(TINY)
    done = fresh_image.run_read_only("bash", "-c", script, work=tmp_path)
    assert done.returncode == 0, done.stderr[-2000:]
    assert list(tmp_path.glob("runs/**/best.pt"))


def test_a_folder_that_cannot_be_written_to_is_told_before_anything_is_done(image):
    done = image.run("train", *TINY, user="1000:1000", check=2)
    assert "cannot be written to by user 1000" in done.stderr
    assert 'docker run -v "$PWD:/work" -w /work' in done.stderr


def test_a_stopped_training_goes_on(image, tmp_path):
    """SIGTERM reaches the trainer through tini and the scripts."""
    tmp_path.chmod(0o777)
    where = {"mounts": [f"{tmp_path}:/work"], "folder": "/work"}
    words = ("train", *TINY[:4], "epochs=4", "device=cpu", "plots=False", "project=/work", "name=line", "resume=auto")
    run = image.start(*words, "save_every=1", **where)
    state = tmp_path / "line" / "weights" / "state.pt"
    deadline = time.monotonic() + 200
    while not state.exists() and run.process.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert state.exists(), run.process.communicate()[0][-2000:]
    run.kill(signal.SIGTERM)
    run.process.communicate(timeout=200)
    assert run.process.returncode == 143
    done = image.run(*words, **where, check=0)
    assert "resume=auto: going on with /work/line/weights/last.pt" in done.stdout
    assert not state.exists()
