"""Builds engines of TensorRT or TensorRT-RTX within a memory limit. Both libraries have the same small interface here.

Ultralytics' own `onnx2engine` calls the library (precision, INT8 calibration, DLA, dynamic shapes, metadata) and passes
the memory limit to it. While `onnx2engine` runs, `import tensorrt` returns a module with a builder of ours. This
builder also sets how hard the library looks for fast kernels, and reuses the kernel times of earlier builds.

TensorRT-RTX is another product, for GeForce and RTX cards. It has the interface of TensorRT 11 and builds without a
GPU. TensorRT cannot load its engines.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
import re
import sys
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from ultralytics.utils import LOGGER, USER_CONFIG_DIR

from yolov12 import files
from yolov12.errors import ConfigError, ExportError

__all__ = ["BUILDERS", "Attempt", "Effort", "Job", "Library", "build", "find", "load", "logger"]

BUILDERS = {"tensorrt": "TensorRT", "tensorrt_rtx": "TensorRT-RTX"}
"""Value of `engine_builder=` → name of the product."""

_RTX_CARDS = ("SM86", "SM89", "SM120")  # Ampere, Ada, Blackwell: targets if this machine has no GPU
_NO_ROOM = re.compile(
    r"out ?of ?memory|insuff?icient (workspace|memory)|memory is insufficient|bad_alloc|Requested size was",
    re.IGNORECASE,
)
# With a limit, this message means that every kernel needs more memory than the limit.
_NO_KERNEL = re.compile("could not find any implementation", re.IGNORECASE)


@dataclass(frozen=True)
class Effort:
    """How hard a builder looks for fast kernels. Less effort needs less memory during the build."""

    level: int | None = None
    """`builder_optimization_level`, 0 to 5; None: the library's default, 3."""
    all_tactics: bool = True
    """True if the builder also tries tactics of other libraries (cuDNN, cuBLAS, …)."""


EFFORTS: Sequence[Effort] = (
    Effort(),
    Effort(level=2),
    Effort(level=1, all_tactics=False),
    Effort(level=0, all_tactics=False),
)
"""Efforts in the order in which they are tried. The first one for which the memory suffices is used."""


@dataclass(frozen=True)
class Job:
    """An engine to build. The fields are arguments of Ultralytics' `onnx2engine`, which documents them."""

    onnx: Path
    engine: Path
    shape: tuple[int, ...]
    """(images, channels, height, width)."""
    dynamic: bool = False
    quantize: int | str | None = None
    dla: int | None = None
    dataset: Any = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    verbose: bool = False
    prefix: str = ""


@dataclass(frozen=True)
class Attempt:
    """One attempt to build an engine. The journal contains its fields."""

    builder: str
    workspace_bytes: int | None
    """Bytes that the builder was allowed to use; None: no limit."""
    level: int | None
    all_tactics: bool
    seconds: float
    outcome: str
    """`built`, `out of memory` or `failed`."""
    message: str = ""

    def as_dict(self) -> dict[str, Any]:
        """Return the attempt as a JSON object."""
        return asdict(self)


@dataclass(frozen=True)
class Library:
    """TensorRT or TensorRT-RTX, with its Python module."""

    key: str
    """Value of `engine_builder=`."""
    module: ModuleType

    @property
    def name(self) -> str:
        """Name and version of the product."""
        return f"{BUILDERS[self.key]} {self.module.__version__}"

    @property
    def is_rtx(self) -> bool:
        """True for TensorRT-RTX."""
        return self.key == "tensorrt_rtx"

    @contextmanager
    def installed(self, effort: Effort = Effort()) -> Iterator[None]:
        """Let `import tensorrt` return this library inside the block. Its builders look for kernels with one effort.

        Args:
            effort: How hard the builders look for fast kernels.
        """
        before = sys.modules.get("tensorrt")
        stand_in = sys.modules["tensorrt"] = _stand_in(self)
        stand_in.effort = effort  # type: ignore[attr-defined]
        try:
            yield
        finally:
            del sys.modules["tensorrt"]
            if before is not None:
                sys.modules["tensorrt"] = before

    def _configure(self, config: Any, effort: Effort) -> None:
        if effort.level is not None and hasattr(config, "builder_optimization_level"):  # since TensorRT 8.6
            config.builder_optimization_level = effort.level
        if not effort.all_tactics:
            config.set_tactic_sources(0)
        if self.is_rtx:
            if not torch.cuda.is_available():
                config.num_compute_capabilities = len(_RTX_CARDS)
                for index, name in enumerate(_RTX_CARDS):
                    config.set_compute_capability(getattr(self.module.ComputeCapability, name), index)
        else:
            file = self._timings
            config.set_timing_cache(config.create_timing_cache(file.read_bytes() if file.exists() else b""), False)

    def _keep_timings(self, config: Any) -> None:
        """Write the measured times of kernels to a file, so that later builds of similar networks can reuse them."""
        cache = None if self.is_rtx else config.get_timing_cache()
        if cache is not None:
            with contextlib.suppress(OSError):  # without a cache, the engine that was built is still good
                self._timings.parent.mkdir(parents=True, exist_ok=True)
                files.write(self._timings, lambda file: file.write(bytes(cache.serialize())))

    @property
    def _timings(self) -> Path:
        card = torch.cuda.get_device_name() if torch.cuda.is_available() else "none"
        name = re.sub(r"[^\w.]+", "-", f"{self.name} {card}")
        return Path(USER_CONFIG_DIR) / "yolov12-timings" / f"{name}.bin"


def find(key: str) -> Library:
    """Import the library that `engine_builder=` names.

    Args:
        key: `tensorrt`, `tensorrt_rtx` or `auto`. `auto` is TensorRT if it is installed, otherwise TensorRT-RTX.

    Raises:
        ConfigError: The library is not installed, or no builder has that name.
    """
    if key not in ("auto", *BUILDERS):
        raise ConfigError(f"engine_builder={key}: give one of auto, {', '.join(BUILDERS)}")
    for each in BUILDERS if key == "auto" else (key,):
        module = _import(each)
        if module is not None:
            return Library(each, module)
    raise ConfigError(
        "format=engine needs TensorRT, which is in the Docker image (elsewhere: pip install tensorrt-cu12). GeForce "
        "and RTX cards can use TensorRT-RTX instead, with engine_builder=tensorrt_rtx (pip install tensorrt-rtx-cu12)"
    )


def build(
    library: Library, job: Job, workspace_bytes: int | None, efforts: Sequence[Effort] = EFFORTS
) -> Iterator[Attempt]:
    """Build an engine with less and less effort, until the memory suffices. Only a complete engine gets into a file.

    Args:
        library: The builder.
        job: The engine to build.
        workspace_bytes: Bytes that the builder and the engine may use; None: no limit.
        efforts: Efforts, in the order in which to try them.

    Yields:
        Each attempt. The outcome of the last is `built` or `out of memory`.

    Raises:
        ExportError: The library refuses the graph for another reason than memory.
    """
    for effort in efforts:
        start = time.monotonic()
        outcome, message = _attempt(library, job, workspace_bytes, effort)
        seconds = round(time.monotonic() - start, 1)
        yield Attempt(library.name, workspace_bytes, effort.level, effort.all_tactics, seconds, outcome, message)
        if outcome == "built":
            return
        if outcome == "failed":
            raise ExportError(f"{library.name} cannot build {job.engine}: {message}")


def load(stock: Callable[..., Any], backend: Any, file: Any) -> Any:
    """Load an engine with the library that built it.

    Args:
        stock: Ultralytics' own method.
        backend: Ultralytics' backend for engines.
        file: The engine's file.

    Raises:
        ConfigError: The engine was built by TensorRT-RTX, which is not installed.
    """
    _, metadata = backend.engine_header(file)
    if not str(metadata.get("engine_builder", "")).startswith(BUILDERS["tensorrt_rtx"]):
        return stock(backend, file)
    with find("tensorrt_rtx").installed():
        return stock(backend, file)


@functools.cache
def logger(module: ModuleType) -> Any:
    """Return the logger of a library, one per process. It stores errors and warnings for the messages of `build`."""

    class Log(module.ILogger):  # type: ignore[misc, name-defined]
        def __init__(self) -> None:
            super().__init__()
            self.errors: deque[str] = deque(maxlen=100)
            self.min_severity = module.ILogger.WARNING  # Ultralytics sets this to VERBOSE if verbose=True

        def log(self, severity: Any, message: str) -> None:
            if severity in (module.ILogger.INTERNAL_ERROR, module.ILogger.ERROR, module.ILogger.WARNING):
                self.errors.append(message)
                LOGGER.warning(f"{module.__name__}: {message}")
            elif self.min_severity == module.ILogger.VERBOSE:
                LOGGER.info(f"{module.__name__}: {message}")

    return Log()


@functools.cache
def _stand_in(library: Library) -> ModuleType:
    """Return the module for `import tensorrt`: the library with our builder and a version that Ultralytics accepts."""
    module = ModuleType("tensorrt")

    class Builder(library.module.Builder):  # type: ignore[misc, name-defined]  # the library has no types
        def create_builder_config(self) -> Any:
            config = super().create_builder_config()
            library._configure(config, module.effort)
            return config

        def build_serialized_network(self, network: Any, config: Any) -> Any:
            built = super().build_serialized_network(network, config)
            library._keep_timings(config)
            return built

        def __del__(self) -> None:
            pass  # the library's own method only logs a warning

    vars(module).update(vars(library.module))
    vars(module).update(Builder=Builder, __name__="tensorrt", yolov12_logger=logger(library.module))
    if library.is_rtx:
        vars(module)["__version__"] = f"11.0+rtx{library.module.__version__}"  # it has the interface of TensorRT 11
    return module


def _attempt(library: Library, job: Job, workspace_bytes: int | None, effort: Effort) -> tuple[str, str]:
    """Build once. Return the outcome, as in `Attempt`, and the library's message if the build failed."""
    from ultralytics.utils.export.engine import onnx2engine

    log = logger(library.module)
    log.errors.clear()
    try:
        with files.replacing(job.engine) as unfinished, library.installed(effort):
            onnx2engine(
                str(job.onnx),
                unfinished,
                None if workspace_bytes is None else workspace_bytes / 2**30,
                job.quantize,
                job.dynamic,
                job.shape,
                dla=job.dla,
                dataset=job.dataset,
                metadata=dict(job.metadata),
                verbose=job.verbose,
                prefix=job.prefix,
            )
    except (RuntimeError, MemoryError) as error:
        said = [*log.errors, str(error)]
        no_room = isinstance(error, (MemoryError, torch.cuda.OutOfMemoryError)) or any(map(_NO_ROOM.search, said))
        no_room = no_room or (workspace_bytes is not None and any(map(_NO_KERNEL.search, said)))
        return "out of memory" if no_room else "failed", said[0]
    return "built", ""


def _import(key: str) -> ModuleType | None:
    if key == "tensorrt":
        return importlib.import_module(key) if importlib.util.find_spec(key) else None
    for name in ("tensorrt_rtx", "tensorrt_rtx_bindings"):
        if importlib.util.find_spec(name):
            if importlib.util.find_spec("tensorrt_rtx_libs"):
                importlib.import_module("tensorrt_rtx_libs")
            return importlib.import_module(name)
    return None
