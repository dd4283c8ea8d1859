"""Both layouts, compared with outputs of the official code in data/official.json (`source` says how they were made)."""

import gzip
import json
import os
import pickletools
import subprocess
import sys
import zipfile
import zlib
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import torch
from ultralytics import YOLO
from ultralytics.nn.modules.block import AAttn
from ultralytics.nn.tasks import DetectionModel

from yolov12.errors import ConfigError
from yolov12.models.layouts import building, layout_of

DATA = Path(__file__).parent / "data"
OFFICIAL = json.loads((DATA / "official.json").read_text())
TURBO_PARAMETERS = {"n": 2_553_904, "s": 9_127_424, "m": 19_670_784, "l": 26_506_496, "x": 59_414_176}
# as stated in Ultralytics' yolo12.yaml
V1_PARAMETERS = {"n": 2_602_288, "s": 9_284_096, "m": 20_199_168, "l": 26_450_784, "x": 59_210_784}


@pytest.fixture
def as_they_come(monkeypatch):
    """Convolutions whose weights are whatever is in memory: those of large models take seconds to draw."""
    monkeypatch.setattr(torch.nn.Conv2d, "reset_parameters", lambda layer: None)


def parameters(name: str) -> int:
    return sum(p.numel() for p in DetectionModel(name, verbose=False).parameters())


def weights_by_name(state_dict):
    """Make weights that depend only on their names, so that both implementations have the same weights."""
    made = {}
    for key, tensor in state_dict.items():
        shape = tuple(tensor.shape)
        rng = np.random.default_rng(zlib.crc32(key.encode()))
        if "dfl" in key:
            made[key] = tensor
            continue
        if key.endswith("num_batches_tracked"):
            value = np.zeros(shape)
        elif key.endswith("running_var"):
            value = rng.uniform(1, 2, shape)
        elif tensor.ndim > 1:
            value = rng.normal(0, 1, shape) * (1.0 / np.prod(shape[1:])) ** 0.5
        elif key.endswith("gamma"):
            value = rng.uniform(0.1, 0.3, shape)
        elif key.endswith("weight"):
            # large queries and keys make attention selective, so that swapped heads or swapped q and k are detected
            value = rng.uniform(0.5, 1, shape) * (6 if ".qk" in key else 2 if ".attn." in key else 1)
        else:
            value = rng.normal(0, 0.1, shape)
        made[key] = torch.from_numpy(np.asarray(value)).to(tensor.dtype)
    return made


@pytest.mark.usefixtures("as_they_come")
@pytest.mark.parametrize("scale", "nsmlx")
def test_parameter_counts(scale):
    assert parameters(f"yolov12{scale}.yaml") == TURBO_PARAMETERS[scale] == OFFICIAL["models"][scale]["parameters"]
    assert parameters(f"yolov12{scale}-v1.yaml") == V1_PARAMETERS[scale]
    assert parameters(f"yolo12{scale}.yaml") == V1_PARAMETERS[scale]


@pytest.mark.usefixtures("as_they_come")
@pytest.mark.parametrize("scale", "nl")  # without and with the residual that brings gamma and the MLP ratio 1.5
def test_turbo_state_dict_has_the_official_names_and_shapes(scale):
    ours = {key: list(value.shape) for key, value in DetectionModel(f"yolov12{scale}.yaml").state_dict().items()}
    assert ours == OFFICIAL[f"state_dict_{scale}"]


def check_against_official(name, dtype, tolerance, model=None):
    model = (model or DetectionModel(f"yolov12{name}.yaml", verbose=False)).eval()
    model.load_state_dict(weights_by_name(model.state_dict()))
    images = np.random.default_rng(12).uniform(0, 1, (1, 3, 96, 160)).astype("float32")
    with torch.no_grad():
        out = model.to(dtype)(torch.from_numpy(images).to(dtype))[0]
    expected = OFFICIAL["models"][name]
    assert list(out.shape) == expected["output_shape"]
    samples = out.double().flatten()[:: out.numel() // 64][:64]
    assert torch.allclose(samples, torch.tensor(expected["output_samples"]).double(), rtol=tolerance, atol=tolerance)
    assert out.double().std().item() == pytest.approx(expected["output_std"], rel=tolerance)


@pytest.mark.usefixtures("as_they_come")
@pytest.mark.parametrize("scale", "nsmlx")
def test_turbo_computes_what_the_official_code_computes(scale):
    check_against_official(scale, torch.float64, 1e-6)


@pytest.mark.parametrize(("name", "layout"), [("n", "turbo"), ("n-v1", "v1")])
def test_files_the_official_code_wrote_are_told_apart_and_compute_what_they_did(name, layout, tmp_path):
    """The official code (Ultralytics 8.3.63) wrote these files, with zero weights so that they compress well."""
    file = tmp_path / "yolov12n.pt"  # both releases use this name
    file.write_bytes(gzip.decompress((DATA / f"official-{layout}-n.pt.gz").read_bytes()))
    model = YOLO(file).model
    assert model.yaml["layout"] == layout
    check_against_official(name, torch.float64, 1e-6, model)
    rebuilt = DetectionModel(model.yaml, verbose=False)  # as a training from this checkpoint does
    check_against_official(name, torch.float64, 1e-6, rebuilt)


@pytest.mark.parametrize("scale", "nsm")  # l and x amplify rounding errors with these weights, in both implementations
def test_turbo_computes_what_the_official_code_computes_in_fp32(scale):
    check_against_official(scale, torch.float32, 1e-4)


STOCK = """
import sys, torch
from ultralytics import YOLO
from ultralytics.nn.modules.block import AAttn
folder = sys.argv[1]
for area in (1, 4):
    torch.manual_seed(0)
    m = AAttn(64, 2, area).train()
    x = torch.randn(3, 64, 8, 12, requires_grad=True)
    y = m(x)
    y.square().sum().backward()
    found = [m.state_dict(), x.detach(), y.detach(), x.grad, m.qkv.conv.weight.grad]
    torch.save(found, f"{folder}/attention-{area}.pt")
torch.manual_seed(0)
m = YOLO(f"{folder}/v1.pt").model.eval()
with torch.no_grad():
    torch.save(m(torch.rand(1, 3, 64, 64))[0], f"{folder}/v1-out.pt")
assert not any(n.startswith("yolov12.models") for n in sys.modules)
"""


@pytest.fixture(scope="module")
def stock(made_once):
    """The folder of what a process computes that has nothing of ours."""

    def compute(folder):
        YOLO("yolov12n-v1.yaml").save(folder / "v1.pt")
        subprocess.run([sys.executable, "-c", STOCK, folder], env={**os.environ, "YOLOV12_AUTOPATCH": "0"}, check=True)

    return made_once("stock", compute)


@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize("area", [1, 4])
def test_v1_attention_equals_stock(stock, memory_format, area):
    weights, x, y, x_grad, w_grad = torch.load(stock / f"attention-{area}.pt")
    ours = AAttn(64, 2, area).train()
    # The stock pass has already updated the running statistics, but training mode does not read them.
    ours.load_state_dict(weights)
    x = x.contiguous(memory_format=memory_format).requires_grad_()
    out = ours(x)
    out.square().sum().backward()
    torch.testing.assert_close(out, y, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(x.grad, x_grad, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(ours.qkv.conv.weight.grad, w_grad, rtol=1e-3, atol=1e-3)
    assert out.is_contiguous(memory_format=memory_format)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("memory_format", [torch.contiguous_format, torch.channels_last])
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float16, 1e-2), (torch.bfloat16, 4e-2), (torch.float32, 1e-3)])
@pytest.mark.parametrize("layout", ["v1", "turbo"])
def test_attention_block_on_a_gpu_agrees_with_float64(layout, dtype, tolerance, memory_format, deterministic):
    """Tests the module, not the function, because the layout determines the strides of gradients at the kernels."""
    torch.manual_seed(0)
    with building(layout):
        block = AAttn(64, 2, 4).eval()
    x = torch.randn(2, 64, 20, 20).contiguous(memory_format=memory_format)
    results = []
    for device, kind in (("cpu", torch.float64), ("cuda", dtype)):
        torch.use_deterministic_algorithms(deterministic, warn_only=True)
        try:
            copy = deepcopy(block).to(device, kind)
            leaf = x.to(device, kind).requires_grad_()
            out = copy(leaf)
            out.backward(torch.linspace(-1, 1, out.numel(), dtype=torch.float64).view(out.shape).to(device, kind))
        finally:
            torch.use_deterministic_algorithms(False)
        results.append([t.double().cpu() for t in (out.detach(), leaf.grad, copy.proj.conv.weight.grad)])
    for reference, measured in zip(*results, strict=True):
        assert (measured - reference).norm() / reference.norm() < tolerance


def test_a_users_own_yaml_goes_before_ours(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    ours = YOLO("yolov12n.yaml").model.yaml
    (tmp_path / "yolov12.yaml").write_text(
        json.dumps({**{k: ours[k] for k in ("scales", "backbone", "head")}, "nc": 3})
    )
    assert YOLO("yolov12n.yaml").model.yaml["nc"] == 3


def test_layout_is_told_by_content():
    official = {"backbone": [[-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [128, 3, 2, 1, 2]]]}
    paper = {"backbone": [[-1, 1, "Conv", [64, 3, 2]], [-1, 1, "Conv", [128, 3, 2]]]}
    assert layout_of(official) == "turbo"
    assert layout_of(paper) == "v1"
    assert layout_of({**official, "layout": "v1"}) == "v1"


def test_a_misspelt_layout_is_refused():
    with pytest.raises(ConfigError, match="layout: trubo"):
        layout_of({"layout": "trubo"})


def test_an_image_that_no_area_divides_is_refused_with_its_shape():
    with pytest.raises(RuntimeError, match="shape"):
        AAttn(64, 2, 4)(torch.rand(1, 64, 5, 5))


def globals_in(file: Path) -> set[str]:
    with zipfile.ZipFile(file) as archive:
        (name,) = (n for n in archive.namelist() if n.endswith("/data.pkl"))
        data = archive.read(name)
    return {arg.split()[0] for opcode, arg, _ in pickletools.genops(data) if opcode.name == "GLOBAL"}


@pytest.mark.parametrize("name", ["yolov12n.yaml", "yolov12n-v1.yaml"])
def test_saved_checkpoint_holds_no_class_of_ours_and_keeps_its_layout(name, tmp_path):
    model = YOLO(name)
    file = tmp_path / "saved.pt"
    model.save(file)
    assert not {g for g in globals_in(file) if g.startswith("yolov12")}
    again = YOLO(file)
    x = torch.rand(1, 3, 64, 64)
    with torch.no_grad():
        torch.testing.assert_close(again.model.eval()(x)[0], model.model.half().float().eval()(x)[0])
    assert again.model.yaml["layout"] == model.model.yaml["layout"]
    rebuilt = DetectionModel(again.model.yaml, verbose=False)  # as a training from this checkpoint does
    rebuilt.load_state_dict(again.model.state_dict())


def test_official_turbo_checkpoint_is_recognised_by_its_modules(tmp_path):
    """Official files have no `layout` key, and v1.0 files have the same names as turbo files."""
    model = YOLO("yolov12n.yaml")
    del model.model.yaml["layout"]
    model.model.yaml["backbone"][1][3] = [128, 3, 2]  # the layout is found without the grouped convolutions
    model.save(tmp_path / "yolov12n.pt")
    assert YOLO(tmp_path / "yolov12n.pt").model.yaml["layout"] == "turbo"


def test_v1_checkpoint_loads_in_stock_ultralytics(stock):
    torch.manual_seed(0)
    with torch.no_grad():
        ours = YOLO(stock / "v1.pt").model.eval()(torch.rand(1, 3, 64, 64))[0]
    torch.testing.assert_close(ours, torch.load(stock / "v1-out.pt"), rtol=1e-4, atol=1e-4)
