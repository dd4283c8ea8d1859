"""The image's scripts without the image: what they say of a container that was started in the wrong way."""

import copy
import os
import re
import subprocess
from pathlib import Path

import pytest
import yaml

from yolov12 import __version__
from yolov12.cli import parse
from yolov12.training.run.process_group import check_batch

ROOT = Path(__file__).parents[2]


def preflight(tmp_path, *words, driver=None, shm=None, environment=None, **kwargs):
    """Run docker/preflight.sh beside a stand-in for nvidia-smi."""
    tools = tmp_path / "tools"
    tools.mkdir(exist_ok=True)
    tool = tools / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho {driver}\n" if driver else "#!/bin/sh\necho 'no devices' >&2; exit 9\n")
    tool.chmod(0o755)
    env = {**os.environ, "PATH": f"{tools}:{os.environ['PATH']}", **({"SHM": shm} if shm else {})}
    env |= {"CONDA_PREFIX": str(tmp_path), "CUDA_HOME": str(tmp_path), **(environment or {})}
    return subprocess.run(
        [ROOT / "docker" / "preflight.sh", f"project={tmp_path}", *words],
        env=env,
        capture_output=True,
        text=True,
        timeout=280,
        **kwargs,
    )


def test_no_gpu_is_a_warning(tmp_path):
    done = preflight(tmp_path)
    assert done.returncode == 0
    assert "yolov12: no GPU was passed to this container: docker run --gpus all" in done.stderr
    assert "GPU" not in preflight(tmp_path, "device=cpu").stderr


@pytest.mark.parametrize(
    ("driver", "status"), [("470.82.01", 1), ("525.60.12", 1), ("525.60.13", 0), ("535.9", 0), ("1000.1", 0)]
)
def test_an_old_driver_is_an_error(tmp_path, driver, status):
    done = preflight(tmp_path, driver=driver)
    assert done.returncode == status
    assert (f"driver {driver} of this machine is older than 525.60.13" in done.stderr) is bool(status)
    assert preflight(tmp_path, "device=cpu", driver=driver).returncode == 0


def bring_driver(folder, version):
    """Make the folder of CUDA's base images that has a user-mode driver."""
    (folder / "compat").mkdir()
    (folder / "compat" / f"libcuda.so.{version}").touch()
    (folder / "compat" / "libcuda.so.1").symlink_to(f"libcuda.so.{version}")


def test_an_old_driver_is_a_warning_where_the_base_image_brings_a_newer_one(tmp_path):
    """NVIDIA's runtime refuses to start the image where this cannot work, so the entrypoint does not."""
    bring_driver(tmp_path, "530.30.02")
    done = preflight(tmp_path, driver="470.82.01")
    assert done.returncode == 0
    assert "driver 470.82.01 of this machine is older than 525.60.13" in done.stderr
    assert "data-center GPUs only" in done.stderr


def test_the_oldest_driver_is_that_of_the_installed_pytorch(tmp_path):
    folder = tmp_path / "lib" / "python3.12" / "site-packages" / "torch"
    folder.mkdir(parents=True)
    for cuda, status in (("12.1", 0), ("13.2", 1)):
        (folder / "version.py").write_text(f"__version__ = '2'\ncuda: Optional[str] = '{cuda}'\nhip = None\n")
        done = preflight(tmp_path, driver="570.1")
        assert done.returncode == status
        assert ("older than 580.65.06, which CUDA 13 needs" in done.stderr) is bool(status)


def test_a_driver_of_the_base_image_that_is_too_old_itself_does_not_help(tmp_path):
    """It is as with LOCK=current on a base of CUDA 12."""
    test_the_oldest_driver_is_that_of_the_installed_pytorch(tmp_path)
    bring_driver(tmp_path, "530.30.02")
    assert preflight(tmp_path, driver="570.1").returncode == 1


def test_help_is_not_held_up_by_a_machine_that_cannot_train(tmp_path):
    done = preflight(tmp_path, "--help", driver="470.82.01")
    assert (done.returncode, done.stderr) == (0, "")


def test_a_small_shm_is_a_warning(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/sh\necho Avail\necho 65536\n")
    (tools / "df").chmod(0o755)
    done = preflight(tmp_path, driver="550.54")
    assert done.returncode == 0
    assert done.stderr == ("yolov12: /dev/shm has 64 MiB, too little for workers: docker run --shm-size=8g ...\n")


def test_a_right_start_is_silent(tmp_path):
    tools = tmp_path / "tools"
    tools.mkdir()
    (tools / "df").write_text("#!/bin/sh\necho Avail\necho 8388608\n")
    (tools / "df").chmod(0o755)
    done = preflight(tmp_path, driver="550.54")
    assert (done.returncode, done.stdout, done.stderr) == (0, "", "")


def test_no_command_without_a_terminal_says_what_there_is(tmp_path):
    """With a stand-in for the scripts, which need the environment."""
    (tmp_path / "docker").mkdir()
    (tmp_path / "scripts").mkdir()
    entrypoint = tmp_path / "docker" / "entrypoint.sh"
    entrypoint.write_text((ROOT / "docker" / "entrypoint.sh").read_text())
    entrypoint.chmod(0o755)
    for name in ("scripts/check", "scripts/val", "scripts/watch", "docker/preflight"):
        script = tmp_path / f"{name}.sh"
        script.write_text('#!/bin/sh\necho "$(basename $0)" "$@"\n')
        script.chmod(0o755)
    (tmp_path / "yolov12").write_text('#!/bin/sh\necho yolov12 "$@"\n')
    (tmp_path / "yolov12").chmod(0o755)
    alike = {"stdin": subprocess.DEVNULL, "text": True, "env": {"PATH": f"{tmp_path}:{os.environ['PATH']}"}}
    run = lambda *words: subprocess.check_output([entrypoint, *words], **alike)  # noqa: E731
    assert run().endswith("This container:\ncheck.sh\n")
    assert run("val", "a b", "c") == "val.sh a b c\n"
    assert run("watch", "inbox=a b") == "preflight.sh inbox=a b\nwatch.sh inbox=a b\n"
    assert run("printf", "%s|", "a b", "c") == "a b|c|"
    for word in ("--help", "-h", "help"):
        assert "docker run --gpus all --shm-size=8g" in run(word)
        assert "check.sh" not in run(word)
    assert run("--version") == "yolov12 --version\n"
    done = subprocess.run([entrypoint, "-m", "yolov12"], stderr=subprocess.PIPE, check=False, **alike)
    assert (done.returncode, done.stderr.count("unknown option '-m' before a command")) == (2, 1)


def test_the_image_agrees_with_the_rest_of_the_project():
    """Names and versions that stand in several places."""
    dockerfile = (ROOT / "Dockerfile").read_text()
    environment = (ROOT / "environment.yml").read_text()
    lock = (ROOT / "requirements" / "lock.txt").read_text()
    gpu = (ROOT / "requirements" / "gpu.txt").read_text()
    name = re.search(r"^name: (.+)$", environment, re.MULTILINE)[1]
    assert f"CONDA_DEFAULT_ENV={name}" in dockerfile
    assert f"/opt/conda/envs/{name}/bin" in dockerfile
    assert "-r requirements/lock.txt" in environment
    assert re.search(r"^torch==2\.3\.", lock, re.MULTILINE)
    assert re.search(r"^nvidia-cuda-runtime-cu12==12\.1\.", lock, re.MULTILINE)
    gpu_packages = {line.split(" ")[0] for line in gpu.splitlines() if "==" in line}
    parts = [f"tensorrt-cu12{part}==10.9.0.34" for part in ("", "-bindings", "-libs")]
    assert gpu_packages == {"flash-attn==2.7.4.post1", *parts}
    assert f"ARG VERSION={__version__}\n" in dockerfile
    assert {"setuptools", "wheel"} <= {line.strip(" -").partition("=")[0] for line in environment.splitlines()}
    for path in re.findall(r"/root/yolov12/(docker/\S+?\.sh)", dockerfile):
        assert (ROOT / path).exists()
    assert "exec" in (ROOT / "docker" / "entrypoint.sh").read_text().split("train)")[1].split(";;")[0]


def test_restarts_resume_by_themselves():
    compose = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["train"]
    job = yaml.safe_load((ROOT / "docker" / "job.yaml").read_text())["spec"]["template"]["spec"]
    container = job["containers"][0]
    assert compose["command"] == container["args"]
    assert {"resume=auto", "name=line", "project=/work/runs"} < set(container["args"])
    assert re.fullmatch(r"on-failure:[1-9]", compose["restart"])  # status 2 would come again and again
    assert compose["shm_size"] == "8gb"
    assert job["volumes"][1]["emptyDir"]["medium"] == "Memory"
    words = parse(container["args"][1:])
    assert words["batch"] == 256
    assert words["resume"] == "auto"


def jobs():
    """Name of each Kubernetes job → its spec, also of the job inside the job set."""
    single = yaml.safe_load((ROOT / "docker" / "job.yaml").read_text())
    _, nodes = yaml.safe_load_all((ROOT / "docker" / "nodes.yaml").read_text())
    job_set = yaml.safe_load((ROOT / "docker" / "jobset.yaml").read_text())
    (replicated,) = job_set["spec"]["replicatedJobs"]
    return {"job": single["spec"], "nodes": nodes["spec"], "jobset": replicated["template"]["spec"]}


def action(spec, status):
    """What Kubernetes does after a container has ended with a status: the first rule that matches decides."""
    for rule in spec["podFailurePolicy"]["rules"]:
        codes = rule.get("onExitCodes", {"operator": "In", "values": []})
        assert codes["operator"] == "In"
        assert codes.get("containerName") in (None, spec["template"]["spec"]["containers"][0]["name"])
        if status in codes["values"]:
            return rule["action"]
    return "Count"


@pytest.mark.parametrize("name", ["job", "nodes", "jobset"])
def test_kubernetes_starts_a_training_again_by_its_exit_status(name):
    spec = jobs()[name]
    assert spec["template"]["spec"]["restartPolicy"] == "Never"  # else Kubernetes refuses a podFailurePolicy
    wanted = {1: "Count", 2: "FailJob", 137: "Count", 143: "Ignore"}
    assert {status: action(spec, status) for status in wanted} == wanted
    disrupted = [{"type": "DisruptionTarget", "status": "True"}]  # JobSet's schema wants the status
    assert {"action": "Ignore", "onPodConditions": disrupted} in spec["podFailurePolicy"]["rules"]
    assert spec["backoffLimit"] <= 10


def test_a_job_set_ends_where_a_job_does():
    spec = yaml.safe_load((ROOT / "docker" / "jobset.yaml").read_text())["spec"]
    (rule,) = spec["failurePolicy"]["rules"]
    assert (rule["action"], rule["onJobFailureReasons"]) == ("FailJobSet", ["PodFailurePolicy"])
    assert spec["network"]["publishNotReadyAddresses"] is True
    nodes, job_set = (copy.deepcopy(jobs()[name]) for name in ("nodes", "jobset"))
    endpoint = "--rdzv-endpoint=yolov12-node-0-0.yolov12:29400"  # SET-JOB-JOB'S INDEX-POD'S INDEX.SUBDOMAIN
    assert job_set["template"]["spec"]["containers"][0]["args"].count(endpoint) == 1
    for each in (nodes, job_set):
        each.pop("backoffLimit")  # 0 for a set, which starts all pods anew
        each["template"]["spec"].pop("subdomain", None)
        args = each["template"]["spec"]["containers"][0]["args"]
        args[:] = [word for word in args if not word.startswith("--rdzv-endpoint=")]
    assert nodes == job_set


def test_a_training_on_several_machines_is_one_that_torchrun_and_we_understand():
    from torch.distributed.run import parse_args

    service, job = yaml.safe_load_all((ROOT / "docker" / "nodes.yaml").read_text())
    pod = job["spec"]["template"]["spec"]
    launcher, words = pod["containers"][0]["args"][:3], pod["containers"][0]["args"][3:]
    assert launcher == ["python", "-m", "yolov12.torchrun"]  # whose exit statuses the podFailurePolicy knows
    asked = parse_args(words)
    gpus = pod["containers"][0]["resources"]["limits"]["nvidia.com/gpu"]
    assert (int(asked.nnodes), int(asked.nproc_per_node)) == (job["spec"]["completions"], gpus)
    host, _, _ = asked.rdzv_endpoint.partition(":")
    assert host == f"{job['metadata']['name']}-0.{service['metadata']['name']}"
    assert pod["subdomain"] == service["metadata"]["name"]
    # PyTorch 2.3 hosts the store only where its own name resolves, which is before the pod is ready.
    assert service["spec"]["publishNotReadyAddresses"] is True
    assert (asked.module, asked.training_script, asked.training_script_args[0]) == (True, "yolov12", "train")
    settings = parse(asked.training_script_args[1:])
    assert settings["resume"] == "auto"
    check_batch(settings, int(asked.nnodes) * gpus)


def test_what_linters_and_tests_write_does_not_go_into_the_image():
    """It is built while they run."""
    ignored = (ROOT / ".dockerignore").read_text().split()
    written = {".hypothesis", ".mypy_cache", ".pytest_cache", ".ruff_cache", ".ultralytics"}
    written |= {".venv", ".venv-current", ".venv.lock"}
    assert written <= set(ignored)
    mounts = yaml.safe_load((ROOT / "compose.yaml").read_text())["services"]["train"]["volumes"]
    assert {mount.partition(":")[0].removeprefix("./") for mount in mounts} <= set(ignored)
    tracked = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    assert not {line.split("/")[0] for line in tracked.stdout.splitlines()} & written
