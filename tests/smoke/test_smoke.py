"""One training from end to end, as a user has it: scripts/smoke.sh runs these, on a GPU or without."""

import json
import random
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from ultralytics import YOLO
from ultralytics.data.utils import check_det_dataset
from ultralytics.utils import SETTINGS
from ultralytics.utils.metrics import box_iou

from yolov12 import demo
from yolov12.models.attention import attention, select_backend

pytestmark = [pytest.mark.smoke, pytest.mark.timeout(900)]
GPU = torch.cuda.is_available()
# On a CPU the same, in small.
SIZE, BATCH, SECONDS = (640, 64, 120) if GPU else (96, 8, 20)


@pytest.mark.needs("gpu", "flash-attn")
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_the_flash_kernel_computes_attention(dtype):
    assert select_backend(torch.device("cuda"), dtype).name == "flash"
    torch.manual_seed(0)
    q, k, v = torch.randn(3, 4, 400, 8, 32, device="cuda", dtype=dtype).unbind()
    wide = [x.double().transpose(1, 2) for x in (q, k, v)]
    expected = torch.nn.functional.scaled_dot_product_attention(*wide).transpose(1, 2)
    torch.testing.assert_close(attention(q, k, v).double(), expected, rtol=2e-2, atol=5e-3)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder of a training for two minutes, under a limit and beside a process that takes and frees memory."""
    project = tmp_path_factory.mktemp("smoke")
    words = [
        *("model=yolov12n.yaml", "data=demo:images=400", f"imgsz={SIZE}", f"batch={BATCH}", "epochs=1000"),
        *(f"time={SECONDS / 3600}", f"project={project}", "name=run", f"device={0 if GPU else 'cpu'}", "nbs=8"),
        *(["mem_limit=0.5"] if GPU else []),
    ]
    with (project / "log").open("w+") as log:
        run = subprocess.Popen(
            [sys.executable, "-m", "yolov12.cli", "train", *words], stdout=log, stderr=subprocess.STDOUT
        )
        held, chance = [], random.Random(0)
        while run.poll() is None:
            held = []
            if GPU:
                torch.cuda.empty_cache()
                some = int(chance.random() * 0.4 * torch.cuda.mem_get_info()[0])
                held = [torch.empty(some, dtype=torch.uint8, device=0)]
            time.sleep(chance.uniform(1, 5))
        del held
        log.seek(0)
        assert run.returncode == 0, log.read()[-3000:]
    return project / "run"


def test_trains_under_pressure(trained):
    summary = json.loads((trained / "memory.json").read_text())
    assert summary["updates"] == summary["updates_expected"] > 0
    assert summary["images_lost"] == 0
    assert (trained / "memory.png").stat().st_size


def test_validates(trained):
    metrics = YOLO(trained / "weights" / "best.pt").val(
        data="demo:images=400", imgsz=SIZE, batch=2 * BATCH, save_json=True, project=trained, name="val", plots=False
    )
    assert 0 <= metrics.box.map <= 1
    assert list((trained / "val").glob("predictions.json"))


def boxes(weights):
    """Boxes in the first picture of the validation set, by falling confidence."""
    (result,) = YOLO(weights, task="detect").predict(picture(), imgsz=SIZE, conf=0.001, verbose=False, max_det=100)
    return result.boxes.data.cpu()


def assert_alike(found, expected, pixels, confidence):
    """The first ten boxes of each are among the other's; by rank they are not, as confidences that are close swap.

    For a tenth or two, the one of two boxes over each other that is dropped may be the other one.
    """
    for some, all_others in ((found, expected), (expected, found)):
        alike = box_iou(some[:10, :4], all_others[:, :4]) > 0.7  # closer than two boxes of one result may be
        alike &= some[:10, None, 5] == all_others[None, :, 5]
        alike &= (some[:10, None, 4] - all_others[None, :, 4]).abs() < confidence
        assert alike.any(1).all(), f"{some[:10]}\n{all_others}"
        near = alike & ((some[:10, None, :4] - all_others[None, :, :4]).abs().amax(2) < pixels)
        assert near.any(1).double().mean() >= 0.8, f"{some[:10]}\n{all_others}"


def picture():
    data = demo.ensure("demo:images=400", Path(SETTINGS["datasets_dir"]))
    return str(min(Path(check_det_dataset(str(data))["val"]).iterdir()))


def test_onnx_finds_the_same(trained):
    best = trained / "weights" / "best.pt"
    exported = YOLO(best).export(format="onnx", imgsz=SIZE)
    assert_alike(boxes(exported), boxes(best), pixels=1.0 if GPU else 0.1, confidence=0.01)


@pytest.mark.needs("gpu", "tensorrt")
def test_tensorrt_finds_the_same(trained):
    best = trained / "weights" / "best.pt"
    exported = YOLO(best).export(format="engine", half=True, dynamic=True, imgsz=SIZE)
    assert_alike(boxes(exported), boxes(best), pixels=4.0, confidence=0.05)
