"""What the trainings of this folder share: a model that is small, and how two trainings are compared."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

_MODEL = """
nc: {nc}
kpt_shape: [2, 3]
backbone:
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, Conv, [8, 3, 2]]
  - [-1, 1, C2f, [16]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
  - [-1, 1, Conv, [16, 3, 2]]
head:
  - [{head}]
"""
_HEADS = {
    "detect": "[3, 4, 5], 1, Detect, [nc]",
    "segment": "[3, 4, 5], 1, Segment, [nc, 8, 16]",
    "semantic": "[3, 4], 1, SemanticSegment, [nc]",
    "depth": "[3, 4, 5], 1, Depth, [16]",
    "classify": "-1, 1, Classify, [nc]",
    "pose": "[3, 4, 5], 1, Pose, [nc, [2, 3]]",
    "obb": "[3, 4, 5], 1, OBB, [nc, 1]",
}


@pytest.fixture(scope="session")
def small_model(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A detector of 176,000 parameters; its yaml."""
    file: Path = tmp_path_factory.mktemp("model") / "small.yaml"
    file.write_text(_MODEL.format(nc=10, head=_HEADS["detect"]))
    return str(file)


@pytest.fixture(scope="session")
def task_models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A small model of each task, for two classes; their yamls."""
    files: dict[str, Path] = {}
    for task, head in _HEADS.items():
        files[task] = tmp_path_factory.mktemp("model") / f"{task}.yaml"
        files[task].write_text(_MODEL.format(nc=2, head=head))
    return {task: str(file) for task, file in files.items()}


@pytest.fixture(scope="session")
def stock_run(trainings: Any, small_model: str, tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One epoch of it without the engine, and without any code of a user's own."""
    return trainings.train(tmp_path_factory.mktemp("stock"), small_model, mas=False, epochs=1)


@pytest.fixture(scope="session")
def assert_same_weights() -> Callable[[Any, Any], None]:
    """Check two runs for equal parameters, and for statistics that are an ulp a batch apart at most.

    The loss of this package adds up in another order than Ultralytics'. With `rounded`, parameters may show that, as
    they do for crowded images on some processors.
    """

    def check(ours: Any, stock: Any, *, rounded: bool = False) -> None:
        after, before = ours.after, stock.after
        assert list(after) == list(before)
        for name, _ in stock.trainer.model.named_parameters():
            if rounded:
                torch.testing.assert_close(after[name], before[name], rtol=1e-5, atol=1e-12)
            else:
                assert torch.equal(after[name], before[name]), name
        ulps = 2**-23 * len(ours.draws)  # PyTorch's kernel rounds the moving average of BatchNorm elsewhere
        torch.testing.assert_close(after, before, rtol=ulps, atol=ulps)

    return check
