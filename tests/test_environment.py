"""The scripts' way to a Python with everything in it, with a stand-in for the five gigabytes; and the locks."""

import inspect
import json
import os
import re
import shutil
import subprocess
import sys
from importlib import metadata
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from ultralytics.models.yolo.detect.val import DetectionValidator
from ultralytics.utils.checks import check_requirements

from yolov12.seams import PINNED

ROOT = Path(__file__).parents[1]

STAND_IN = r"""#!/usr/bin/env bash
# Plays python, python -m venv and python -m pip, and writes down what it was asked.
echo "$(basename "$0") $*" >>"$CALLS"
case "$*" in
  "-m venv "*)
    mkdir -p "$3/bin"
    cp "$0" "$3/bin/python"
    ;;
  "- "*)
    mkdir -p "$YOLO_CONFIG_DIR/Ultralytics"
    echo "\"$2/runs\"" >"$YOLO_CONFIG_DIR/Ultralytics/settings.json"
    ;;
  "-m pip install"*"/lock.txt") [ ! -e "$CALLS.offline" ] ;;
  "-c import cv2") [ ! -e "$CALLS.no-libGL" ] ;;
  "-c import sys"*) basename "$0" | cut -d. -f2 ;;
esac
"""


@pytest.fixture
def clone(tmp_path):
    """A clone in a folder with a space in its name, and a PATH whose only Python is the stand-in for 3.11."""
    root = tmp_path / "a clone"
    for name in ("scripts", "requirements"):
        shutil.copytree(ROOT / name, root / name)
    shutil.copy(ROOT / "pyproject.toml", root)
    (tmp_path / "bin").mkdir()
    offer(root, "3.11")
    return root


def offer(clone, *versions):
    """Let these be the Pythons on PATH. The system's are hidden by ones that fail."""
    for version in ("3.10", "3.11", "3.12", "3.13", "3.14", "3"):
        python = clone.parent / "bin" / f"python{version}"
        python.write_text(STAND_IN if version in versions else "#!/bin/sh\nexit 1\n")
        python.chmod(0o755)


def source_env(clone, cwd="/", before=":", **environment):
    """Run a command and source scripts/env.sh; return the finished process and the calls of the stand-in."""
    calls = clone.parent / "calls"
    calls.write_text("")
    env = {k: v for k, v in os.environ.items() if k not in ("CONDA_DEFAULT_ENV", "VIRTUAL_ENV", "YOLO_CONFIG_DIR")}
    env |= {"PATH": f"{clone.parent / 'bin'}:/usr/bin:/bin", "CALLS": str(calls), **environment}
    script = f'set -euo pipefail; {before}; . "{clone}/scripts/env.sh"; command -v python; echo "$YOLO_CONFIG_DIR"'
    done = subprocess.run(["bash", "-c", script], cwd=cwd, env=env, capture_output=True, text=True, timeout=800)
    return done, calls.read_text().splitlines()


def test_first_use_makes_a_venv_and_the_second_finds_it(clone):
    done, calls = source_env(clone)
    assert done.stdout.splitlines() == [str(clone / ".venv/bin/python"), str(clone / ".ultralytics")], done.stderr
    installs = [call for call in calls if "pip install" in call]
    assert "--require-hashes" in installs[0]
    assert installs[1].endswith(f"--no-deps --no-build-isolation --no-index -e {clone}")
    assert [call for call in calls if call.startswith("python - ")] == [f"python - {clone}"]  # settings, once
    done, calls = source_env(clone)
    assert done.returncode == 0
    assert calls == []


def test_a_clone_that_cannot_be_written_to_is_used_if_its_environment_is_made(clone):
    source_env(clone)
    (clone / ".venv.lock").unlink()
    (clone / ".venv.lock").mkdir()  # root could write to any file
    done, calls = source_env(clone)
    assert (done.returncode, calls) == (0, []), done.stderr


def test_no_folder_that_can_be_written_to_has_the_status_of_a_wrong_argument(clone):
    """The arguments of `docker run` have to change."""
    no_folder = 'function [ { case "$1 $2" in -w*) return 1 ;; "! -w") return 0 ;; *) builtin [ "$@" ;; esac; }'
    done, _ = source_env(clone, before=no_folder)
    assert (done.returncode, done.stderr.splitlines()[-1]) == (
        2,
        f'yolov12: neither {clone} nor / can be written to: docker run -v "$PWD:/work" -w /work ...',
    )


def test_an_interrupted_install_is_done_again(clone):
    offline = clone.parent / "calls.offline"
    offline.touch()
    assert source_env(clone)[0].returncode != 0
    offline.unlink()
    done, calls = source_env(clone)
    assert done.returncode == 0
    assert any("lock.txt" in call for call in calls)


@pytest.mark.parametrize("kind", ["the user's", "a link to another clone's"])
def test_an_environment_that_no_script_made_is_kept(clone, kind):
    theirs = clone / ".venv"
    if kind == "the user's":
        (theirs / "bin").mkdir(parents=True)
        (theirs / "pyvenv.cfg").touch()
    else:
        other = clone.with_name("other")
        shutil.copytree(clone, other)
        source_env(other)
        theirs.symlink_to(other / ".venv")
    files = sorted(theirs.rglob("*"))
    done, calls = source_env(clone)
    assert (done.returncode, sorted(theirs.rglob("*"))) == (2, files)
    assert done.stderr.startswith(f"yolov12: {theirs} was not made by the scripts for this clone. Move it away, or")
    assert not any("-m" in call for call in calls)


def test_an_environment_whose_making_was_interrupted_is_made_from_nothing(clone):
    source_env(clone)
    for stamp in clone.glob(".venv/installed-*"):
        stamp.unlink()
    (clone / ".venv/half").touch()
    done, _ = source_env(clone)
    assert (done.returncode, (clone / ".venv/half").exists()) == (0, False), done.stderr


def test_a_copy_of_a_clone_makes_its_own(clone):
    """A virtual environment holds absolute paths: the copy would run the original's code."""
    source_env(clone)
    copy = clone.with_name("copy")
    shutil.copytree(clone, copy)
    _, calls = source_env(copy)
    assert any(call.endswith(f"-e {copy}") for call in calls)
    assert f"python - {copy}" in calls


def test_a_changed_lock_is_installed(clone):
    source_env(clone)
    with (clone / "requirements" / "lock.txt").open("a") as lock:
        lock.write("# changed\n")
    assert any("lock.txt" in call for call in source_env(clone)[1])


def test_an_active_environment_is_used_as_it_is(clone):
    """With the real Python: Ultralytics' settings are made for the clone, once."""
    python = Path(sys.executable)
    for first in (True, False):
        done, _ = source_env(clone, CONDA_DEFAULT_ENV="yolov12", PATH=f"{python.parent}:/usr/bin:/bin")
        assert done.stdout.splitlines()[0] == str(python), done.stderr
        settings = clone / ".ultralytics" / "Ultralytics" / "settings.json"
        assert json.loads(settings.read_text())["datasets_dir"] == str(clone / "datasets")
        if first:
            made_ns = settings.stat().st_mtime_ns
    assert settings.stat().st_mtime_ns == made_ns
    assert not (clone / ".venv").exists()


def test_an_active_environment_without_the_package_gets_it(clone):
    """From the clone's own folder, where `import yolov12` would find the source."""
    (clone / "yolov12").mkdir()
    shutil.copy(ROOT / "yolov12" / "autopatch.py", clone / "yolov12")
    python = clone.parent / "bin" / "python"
    python.write_text(STAND_IN.replace("case", 'case "$*" in *"-I -c"*) exit 1 ;; "-c "*) exit 0 ;; esac\ncase', 1))
    python.chmod(0o755)
    done, calls = source_env(clone, cwd=clone, CONDA_DEFAULT_ENV="yolov12")
    assert done.returncode == 0, done.stderr
    assert any(call.endswith(f"-e {clone}") for call in calls)


@pytest.mark.parametrize("threads", ["", "1"])
def test_the_suite_runs_in_three_processes_for_two_cores(clone, threads):
    """`nproc` prints OMP_NUM_THREADS where it is set, which says nothing about processes."""
    (clone.parent / "bin" / "nproc").write_text('#!/bin/sh\necho "${OMP_NUM_THREADS:-4}"\n')
    (clone.parent / "bin" / "nproc").chmod(0o755)
    _, calls = source_env(clone, before=f'bash "{clone}/scripts/test.sh" --deep', OMP_NUM_THREADS=threads)
    assert "python -m pytest -n 6 --dist worksteal --deep" in calls


def test_the_regression_guard_writes_outside_of_what_git_tracks(clone):
    done, calls = source_env(clone, before=f'bash "{clone}/scripts/bench.sh" --device cpu')
    assert f"python -m benchmarks guard --out {clone}/runs/guard.json --device cpu" in calls, done.stderr
    assert (clone / "runs").is_dir()
    assert "/runs/" in (ROOT / ".gitignore").read_text().splitlines()


def test_no_suitable_python_is_said(clone):
    needed = (
        "yolov12: Python 3.10 to 3.12 is needed for requirements/lock.txt, 3.11 to 3.14 for current.txt, "
        "and none is on PATH"
    )
    offer(clone)
    done, _ = source_env(clone)
    assert (done.returncode != 0, done.stderr.strip()) == (True, needed)
    offer(clone, "3.13")
    done, _ = source_env(clone, YOLOV12_LOCK="lock")
    assert (done.returncode != 0, done.stderr.strip()) == (True, needed)
    done, _ = source_env(clone, YOLOV12_LOCK="newest")
    assert (done.returncode, done.stderr.strip()) == (2, "yolov12: YOLOV12_LOCK=newest: give lock or current")


@pytest.mark.parametrize("version", ["3.13", "3.14"])
def test_a_machine_with_only_newer_pythons_gets_the_current_lock(clone, version):
    offer(clone, version)
    done, calls = source_env(clone)
    assert done.stdout.splitlines()[0] == str(clone / ".venv-current/bin/python"), done.stderr
    assert [call.split("/")[-1] for call in calls if "--require-hashes" in call] == ["current.txt"]
    done, calls = source_env(clone)
    assert done.stdout.splitlines()[0] == str(clone / ".venv-current/bin/python"), done.stderr
    assert not any("pip" in call for call in calls)


def test_each_lock_keeps_its_environment(clone):
    """Changing from one to the other and back installs nothing again."""
    for lock, folder in (("", ".venv"), ("current", ".venv-current")):
        assert f"/{lock or 'lock'}.txt" in "".join(source_env(clone, YOLOV12_LOCK=lock)[1])
        assert (clone / folder).is_dir()
    for lock, folder in (("", ".venv"), ("current", ".venv-current"), ("lock", ".venv")):
        done, calls = source_env(clone, YOLOV12_LOCK=lock)
        assert done.stdout.splitlines()[0] == str(clone / folder / "bin/python"), done.stderr
        assert calls == []


def test_an_environment_that_was_made_is_used_although_its_python_is_off_the_path(clone):
    source_env(clone)
    offer(clone, "3.13")
    done, calls = source_env(clone)
    assert (done.stdout.splitlines()[0], calls) == (str(clone / ".venv/bin/python"), []), done.stderr


@pytest.mark.parametrize("lock", ["lock", "current"])
def test_a_machine_without_the_libraries_of_a_desktop_gets_opencv_without_windows(clone, lock):
    (clone.parent / "calls.no-libGL").touch()
    done, calls = source_env(clone, YOLOV12_LOCK=lock)
    assert "opencv-python-headless" in done.stderr
    assert done.returncode == 0
    installs = [call.split("requirements/")[-1] for call in calls if "--require-hashes" in call]
    assert installs == [f"{lock}.txt", f"{lock}-headless.txt"]
    assert any(call.endswith("uninstall --quiet --yes opencv-python") for call in calls)


def requirements(name: str) -> dict[str, tuple[str, int]]:
    """Package → (version, number of hashes) of a lock."""
    text = (ROOT / "requirements" / name).read_text().replace("\\\n", " ")
    found = {}
    for line in text.splitlines():
        if line and not line.startswith("#"):
            match = re.match(r"([\w.-]+)==(\S+)", line)
            assert match, line
            found[match[1]] = (match[2], line.count("--hash=sha256:"))
    return found


LOCKS = {"lock": ("3.10", "3.11", "3.12"), "current": ("3.11", "3.12", "3.13", "3.14")}  # and their Pythons


@pytest.mark.parametrize("name", [*LOCKS, "lock-headless", "current-headless", "lint", "docs", "gpu", "gpu_build"])
def test_locks_have_hashes_and_no_addresses(name):
    assert "://" not in (ROOT / "requirements" / f"{name}.txt").read_text()
    locked = requirements(f"{name}.txt")
    assert locked
    assert all(hashes for _, hashes in locked.values())


def pins(name: str, **environment: str) -> dict[str, str]:
    """Package → version that a lock installs in an environment, given as values of markers."""
    text = (ROOT / "requirements" / name).read_text()
    lines = map(Requirement, re.findall(r"^[\w.-]+==[^\\\n]+", text, re.MULTILINE))
    found = [(line.name, str(line.specifier)[2:]) for line in lines if applies(line, **environment)]
    assert len(dict(found)) == len(found)
    return dict(found)


def applies(requirement: Requirement, **environment: str) -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": "", **environment})


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
@pytest.mark.parametrize(("name", "python"), [(name, python) for name, pythons in LOCKS.items() for python in pythons])
def test_a_lock_is_that_of_its_requirements(name, python, machine):
    """One of the files may have been changed by hand, or without the other."""
    environment = {"python_version": python, "python_full_version": f"{python}.0", "platform_machine": machine}
    lines = (line.partition("#")[0].strip() for line in (ROOT / "requirements" / f"{name}.in").read_text().splitlines())
    wanted = [*filter(None, lines), *metadata.requires("yolov12")]
    locked = pins(f"{name}.txt", **environment)
    for each in filter(lambda each: applies(each, **environment), map(Requirement, wanted)):
        assert locked[each.name] in each.specifier
    assert pins(f"{name}-headless.txt", **environment) == {"opencv-python-headless": locked["opencv-python"]}


def test_versions_agree_wherever_they_are_written():
    lock = requirements("lock.txt")
    assert lock["ultralytics"][0] == PINNED
    assert (lock["torch"][0], lock["torchvision"][0]) == ("2.3.1", "0.18.1")
    assert f'"ultralytics=={PINNED}"' in (ROOT / "pyproject.toml").read_text()
    tensorrt = {f"tensorrt-cu12{part}" for part in ("", "-bindings", "-libs")}
    assert requirements("gpu.txt").keys() == {"flash-attn", *tensorrt}
    assert len({requirements("gpu.txt")[name][0] for name in tensorrt}) == 1
    assert requirements("gpu_build.txt").keys() == {"ninja", "wheel-stub"}
    environment = yaml.safe_load((ROOT / "environment.yml").read_text())
    assert environment["name"] == "yolov12"
    assert "python=3.11" in environment["dependencies"]
    (pip,) = (d["pip"] for d in environment["dependencies"] if isinstance(d, dict))
    assert pip == ["-r requirements/lock.txt"]


@pytest.mark.parametrize("command", ["train", "val", "predict", "export", "check"])
def test_every_command_has_its_script(command):
    script = ROOT / "scripts" / f"{command}.sh"
    assert os.access(script, os.X_OK)
    assert f'exec yolov12 {command} "$@"' in script.read_text()


def test_what_ultralytics_needs_for_coco_metrics_is_installed():
    """It would be downloaded by `val(save_json=True)` otherwise, and without a network the metrics would be missing."""
    source = inspect.getsource(DetectionValidator.coco_evaluate)
    (needed,) = re.findall(r'check_requirements\("(faster-coco-eval\S*)"\)', source)
    assert check_requirements(needed, install=False)
    assert "faster-coco-eval" in requirements("lock.txt")
