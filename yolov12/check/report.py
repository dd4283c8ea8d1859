"""What `yolov12 check` knows about a machine: plain data, filled by the readers beside this file."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = ["Attention", "Cuda", "Gpu", "Host", "Process", "Report", "TrainingStep"]


@dataclass(frozen=True)
class Process:
    """Another process that holds memory of a GPU."""

    pid: int
    name: str | None
    """None if it may not be read, as for a process outside this container."""
    used_bytes: int | None


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int | None
    """As in `device=0`; None if PyTorch does not see this GPU."""
    name: str
    capability: tuple[int, int] | None
    total_bytes: int | None
    free_bytes: int | None
    memory_source: str
    """Who said so: `NVML`, `torch.cuda.mem_get_info` or `MemAvailable`."""
    integrated: bool = False
    """The GPU shares the host's memory, as on a Jetson."""
    nvml_index: int | None = None
    """As in nvidia-smi; None if NVML does not know this GPU."""
    matched_by: str | None = None
    """How the two indices were found to be one GPU: `UUID` or `PCI bus id`."""
    processes: tuple[Process, ...] | None = None
    """Other processes on this GPU; None if NVML does not tell."""
    own_bytes: int = 0
    """What this process holds; 0 from the command line, where nothing has run yet."""


@dataclass(frozen=True)
class Cuda:
    """The NVIDIA driver and PyTorch's CUDA."""

    driver: str | None
    """Driver version; None if there is no driver, or NVML does not tell."""
    driver_cuda: tuple[int, int] | None
    """The newest CUDA version the driver supports; None if there is no driver."""
    torch_cuda: str | None
    """The CUDA version PyTorch was built for; None for a build without CUDA."""
    arch_list: tuple[str, ...]
    """What PyTorch's kernels are built for, such as `sm_90`."""
    error: str | None
    """Why PyTorch cannot use CUDA, in its own words; None if it can."""
    visible_devices: str | None
    """`CUDA_VISIBLE_DEVICES`."""


@dataclass(frozen=True)
class Attention:
    """What area attention really runs on, and whether it computes what it should."""

    device: str
    dtype: str
    use: str
    """Where Ultralytics comes by here."""
    needed: bool
    """Training with default arguments needs it."""
    backend: str
    reason: str
    kernel: str | None
    """PyTorch's kernel, if the back end is `sdpa`."""
    relative_error: float | None
    """Largest error of the output and the gradients against a float32 reference, relative to the largest value."""
    failure: str | None
    """Why it cannot be used; None if it can."""


@dataclass(frozen=True)
class TrainingStep:
    """A convolution, BatchNorm, SiLU and their gradients on a small tensor."""

    device: str
    dtype: str
    step_ms: float | None
    """Including the start of CUDA and cuDNN; None if it failed."""
    failure: str | None


@dataclass(frozen=True)
class Host:
    """The machine, or what this container may have of it."""

    cpu_count: int
    ram_total_bytes: int
    ram_available_bytes: int
    ram_limited_by_cgroup: bool
    shm_total_bytes: int | None
    """Size of /dev/shm; None if there is none."""
    shm_free_bytes: int | None
    in_container: bool
    has_gpu_device_files: bool
    """/dev has nodes of an NVIDIA GPU."""
    has_mps: bool = False
    """PyTorch can use Apple's GPU."""


@dataclass(frozen=True)
class Report:
    """Everything `yolov12 check` reads."""

    device: str
    """As asked for; empty for the default."""
    devices: tuple[str, ...]
    """What that means here, such as `cuda:0`."""
    cuda: Cuda
    gpus: tuple[Gpu, ...]
    attention: tuple[Attention, ...]
    training: tuple[TrainingStep, ...]
    host: Host
    versions: dict[str, str | None]
    """None for what is not installed."""
    pinned_ultralytics: str
