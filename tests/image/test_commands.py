"""Every way to use the image finds `yolov12` and `python`, and none writes where it may not."""

import signal
import subprocess
import time

import pytest

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]

FIND = 'command -v yolov12 && command -v python && python -c "import yolov12, torch; print(torch.version.cuda)"'
FOUND = ["/opt/conda/envs/yolov12/bin/yolov12", "/opt/conda/envs/yolov12/bin/python", "12.1"]
TINY = ("data=demo:images=40", "model=yolov12n.yaml", "imgsz=64", "batch=8", "epochs=1", "device=cpu", "plots=False")


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


def test_another_user_trains_in_a_mounted_folder(image, tmp_path):
    tmp_path.chmod(0o777)
    done = image.run("train", *TINY, user="1000:1000", mounts=[f"{tmp_path}:/work"], folder="/work", check=0)
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
    done = image.run("train", *TINY, user="1000:1000", check=1)
    assert "cannot be written to by user 1000" in done.stderr
    assert 'docker run -v "$PWD:/work" -w /work' in done.stderr


def test_a_stopped_training_goes_on(image, tmp_path):
    """SIGTERM reaches the trainer through tini and the scripts."""
    tmp_path.chmod(0o777)
    where = {"mounts": [f"{tmp_path}:/work"], "folder": "/work"}
    words = ("train", *TINY[:4], "epochs=4", "device=cpu", "plots=False", "project=/work", "name=line", "resume=auto")
    run = image.start(*words, "save_every=1", **where)
    state = tmp_path / "line" / "weights" / "state.pt"
    deadline = time.monotonic() + 120
    while not state.exists() and run.poll() is None and time.monotonic() < deadline:
        time.sleep(0.1)
    assert state.exists(), run.communicate()[0][-2000:]
    trainer = trainer_of(tmp_path)
    subprocess.run(["kill", f"-{signal.SIGTERM.value}", trainer], check=True)
    run.communicate(timeout=60)
    assert run.returncode == 143
    done = image.run(*words, **where, check=0)
    assert "resume=auto: going on with /work/line/weights/last.pt" in done.stdout
    assert not state.exists()


def trainer_of(folder):
    """The process that tini started: docker's PID 1 hands it every signal."""
    found = subprocess.check_output(["pgrep", "-f", "tini -- /root/yolov12/docker/entrypoint.sh train"], text=True)
    return found.split()[-1]
