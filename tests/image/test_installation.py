"""What the image says of itself."""

import json

import pytest

pytestmark = [pytest.mark.image, pytest.mark.timeout(300)]


def test_check_says_what_the_image_is(image):
    done = image.run("check", "--json", "device=cpu", check=0)
    told = json.loads(done.stdout)
    assert told["lock"]["name"] in ("lock", "current")
    assert told["lock"]["differing"] == {}
    assert told["image"]["bases"].keys() == {"CUDA_DEVEL", "CUDA_RUNTIME", "CONDA"}
    assert told["image"]["digest"] is None  # nobody told it
    assert told["cuda"]["torch_cuda"]
    packages = {package["name"]: package for package in told["gpu_packages"]}
    assert packages.keys() == {"flash-attn", "tensorrt"}
    for package in packages.values():
        assert (package["version"] is None) == (told["image"]["flash_attn"] == "none")
        assert package["failure"] is None
    labels = image.config()["Labels"]
    assert labels["org.opencontainers.image.version"] == told["image"]["version"] == told["versions"]["yolov12"]
    assert labels["org.opencontainers.image.revision"] == told["image"]["revision"]
    assert labels["org.opencontainers.image.source"] == told["image"]["source"]


def test_caches_of_conda_and_pip_are_not_in_layers(fresh_image):
    find = "find /root/.cache /root/.conda /opt/conda/pkgs -type f 2>/dev/null | head"
    assert fresh_image.run("bash", "-c", find, check=0).stdout == ""


def test_a_smoke_run_without_the_gpu_that_it_requires_fails(image):
    script = "YOLOV12_REQUIRE=gpu,flash-attn,tensorrt /root/yolov12/scripts/smoke.sh"
    done = image.run("bash", "-c", script)
    assert done.returncode != 0
    assert "YOLOV12_REQUIRE asks for what this machine does not have: gpu (" in done.stdout + done.stderr
