"""scripts/image.sh with a stand-in for docker: the arguments of a build, its size, and new digests."""

import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
DOCKER = """#!/usr/bin/env bash
echo "$*" >>"$CALLS"
case "$*" in
  "inspect "*) exit 1 ;; # no base is there yet
  "pull "*) [[ "${UNREACHABLE:-none}" != "${@: -1}" ]] ;;
  *"{{.Size}}"*) echo 7209000000 ;;
  *RepoDigests*) echo "${@: -1}" | sed "s|:.*|@sha256:$(printf 'e%.0s' {1..64})|" ;;
esac
"""


@pytest.fixture
def image_script(tmp_path):
    """Run scripts/image.sh of a copy of the clone; return the finished process and the calls of docker."""
    clone = tmp_path / "clone"
    (clone / "scripts").mkdir(parents=True)
    shutil.copy(ROOT / "scripts" / "image.sh", clone / "scripts")
    shutil.copy(ROOT / "Dockerfile", clone)
    docker = tmp_path / "bin" / "docker"
    docker.parent.mkdir()
    docker.write_text(DOCKER)
    docker.chmod(0o755)
    calls = tmp_path / "calls"
    git = ["git", "-C", clone, "-c", "user.name=a", "-c", "user.email=a@b", "-c", "commit.gpgsign=false"]
    for words in (["init", "-q"], ["add", "."], ["commit", "-qm", "all"]):
        subprocess.run([*git, *words], check=True)
    subprocess.run([*git, "remote", "add", "origin", "https://user:secret@host.example/a/b"], check=True)

    def run(*words, **environment):
        calls.write_text("")
        env = {**os.environ, "PATH": f"{docker.parent}:{os.environ['PATH']}", "CALLS": str(calls), **environment}
        done = subprocess.run([clone / "scripts" / "image.sh", *words], env=env, capture_output=True, text=True)
        return done, calls.read_text().splitlines()

    run.clone = clone
    return run


def test_a_build_says_its_commit_its_source_and_its_size(image_script):
    done, calls = image_script("build", "--quiet")
    assert done.returncode == 0, done.stderr
    (build,) = [call for call in calls if call.startswith("build ")]
    head = subprocess.check_output(["git", "-C", image_script.clone, "rev-parse", "HEAD"], text=True).strip()
    assert f"--build-arg REVISION={head} " in build
    assert "--build-arg SOURCE=https://host.example/a/b " in build
    assert "secret" not in build
    assert build.endswith(f"--quiet {image_script.clone}")
    assert done.stdout.splitlines()[-1] == "scripts/image.sh: yolov12 has 7209 MB"


def test_the_newest_versions_are_built_without_what_is_pinned_for_the_others(image_script):
    _, calls = image_script("build", YOLOV12_LOCK="current")
    (build,) = [call for call in calls if call.startswith("build ")]
    assert "--build-arg LOCK=current --build-arg GPU_REQUIREMENTS= " in build
    done, calls = image_script("build", YOLOV12_LOCK="newest")
    assert done.returncode == 2
    assert "YOLOV12_LOCK=newest is not known: lock or current" in done.stderr
    assert not any(call.startswith("build ") for call in calls)


@pytest.mark.parametrize("option", ["--build-arg=", "--build-arg "])
def test_a_mirror_is_enough_when_the_registry_has_deleted_the_base(image_script, option):
    gone = re.search("^ARG CUDA_RUNTIME=(.+)$", (ROOT / "Dockerfile").read_text(), re.MULTILINE)[1]
    done, _ = image_script("build", UNREACHABLE=gone)
    assert done.returncode == 75
    words = f"{option}CUDA_RUNTIME=mirror.example/cuda@sha256:{'a' * 64}".split()
    done, calls = image_script("build", *words, UNREACHABLE=gone)
    assert done.returncode == 0, done.stderr
    assert [call for call in calls if call.startswith("build ")]


def test_pin_writes_what_the_registry_says(image_script):
    done, _ = image_script("pin")
    assert done.returncode == 0, done.stderr
    before, after = ((folder / "Dockerfile").read_text() for folder in (ROOT, image_script.clone))
    assert len(re.findall(r"^ARG (?:CUDA_DEVEL|CUDA_RUNTIME|CONDA)=\S+:\S+@sha256:e{64}$", after, re.MULTILINE)) == 3
    assert re.sub(r"@sha256:\w+", "", after) == re.sub(r"@sha256:\w+", "", before)
