"""The data that `yolov12 check` reads from a machine."""

from __future__ import annotations

from dataclasses import dataclass

__all__ = [
    "AttentionProbe",
    "Cuda",
    "Gpu",
    "GpuPackage",
    "Host",
    "Image",
    "Lock",
    "OtherProcess",
    "Report",
    "TrainingProbe",
]


@dataclass(frozen=True)
class OtherProcess:
    """Another process that uses memory of a GPU."""

    pid: int
    name: str | None
    """Name of the program. None if it cannot be read, as for a process outside this container."""
    used_bytes: int | None
    """GPU memory of the process. None if NVML does not report it."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int | None
    """PyTorch's number of this GPU, as in `device=0`. None if PyTorch does not see it."""
    name: str
    capability: tuple[int, int] | None
    """Compute capability, such as (9, 0). None if unknown."""
    total_bytes: int | None
    free_bytes: int | None
    memory_source: str
    """Source of the memory readings: `NVML`, `torch.cuda.mem_get_info` or `MemAvailable`."""
    integrated: bool = False
    """True if the GPU shares the host's memory, as on a Jetson."""
    nvml_index: int | None = None
    """Number of this GPU in nvidia-smi. None if NVML does not know the GPU."""
    matched_by: str | None = None
    """Property that matches `index` to `nvml_index`: `UUID` or `PCI bus id`. None if they were not matched."""
    processes: tuple[OtherProcess, ...] | None = None
    """Other processes on this GPU. None if NVML does not report them."""
    own_bytes: int = 0
    """GPU memory of this process. 0 on the command line, because nothing has run yet."""


@dataclass(frozen=True)
class Cuda:
    """The NVIDIA driver and PyTorch's CUDA."""

    driver: str | None
    """Driver version. None if there is no driver, or NVML does not report it."""
    driver_cuda: tuple[int, int] | None
    """Newest CUDA version that the driver supports. None if there is no driver."""
    torch_cuda: str | None
    """CUDA version that PyTorch was built for. None if it was built without CUDA."""
    arch_list: tuple[str, ...]
    """Architectures that PyTorch has kernels for, such as `sm_90`."""
    error: str | None
    """PyTorch's message if it cannot use CUDA, else None."""
    visible_devices: str | None
    """Value of `CUDA_VISIBLE_DEVICES`. None if it is not set."""


@dataclass(frozen=True)
class AttentionProbe:
    """Result of running area attention in one dtype on one device."""

    device: str
    dtype: str
    use: str
    """Ultralytics call that runs attention in this way, such as `training`."""
    needed: bool
    """True if training with default arguments runs attention in this way."""
    backend: str
    """`flash`, `sdpa` or `math`."""
    reason: str
    """Why this back end was chosen."""
    kernel: str | None
    """PyTorch's kernel if the back end is `sdpa`, else None."""
    relative_error: float | None
    """Largest error of output and gradients against a float32 reference, relative to the largest value."""
    failure: str | None
    """Reason if attention fails or is inaccurate, else None."""


@dataclass(frozen=True)
class TrainingProbe:
    """Result of one small training step on one device."""

    device: str
    dtype: str
    step_ms: float | None
    """Milliseconds, including the start of CUDA and cuDNN. None if the step failed."""
    failure: str | None
    """Reason if the step failed, else None."""


@dataclass(frozen=True)
class Host:
    """The host, or the part of it that this container may use."""

    cpu_count: int
    ram_total_bytes: int
    ram_available_bytes: int
    ram_limited_by_cgroup: bool
    """True if a limit of this container is lower than the RAM of the host."""
    shm_total_bytes: int | None
    """Size of /dev/shm. None if it does not exist."""
    shm_free_bytes: int | None
    in_container: bool
    has_gpu_device_files: bool
    """True if /dev has device files of an NVIDIA GPU."""
    has_mps: bool = False
    """True if PyTorch can use an Apple GPU."""


@dataclass(frozen=True)
class Image:
    """The container image that this process runs in, as its build described it."""

    digest: str | None
    """Value of `YOLOV12_IMAGE_DIGEST`. None if it is not set: an image cannot contain its own digest."""
    version: str
    revision: str
    """Commit that the image was built from. Empty if the build did not say it."""
    source: str
    """Address of the repository. Empty if the build did not say it."""
    bases: dict[str, str]
    """Dockerfile argument → base image."""
    flash_attn: str
    """How the build got flash-attn: `source`, `wheel` or `none`."""


@dataclass(frozen=True)
class Lock:
    """The requirements file with exact versions that the installed distributions match best."""

    name: str
    sha256: str
    """Digest of the file."""
    locked: int
    """Number of distributions that the file names for this Python and platform."""
    differing: dict[str, str | None]
    """Distribution → installed version, for those that differ from the file. None means: not installed."""


@dataclass(frozen=True)
class GpuPackage:
    """A package that only the image can install, and whether it can be imported."""

    name: str
    version: str | None
    """Installed version. None means: not installed."""
    failure: str | None
    """Reason if the import of an installed package fails, else None."""

    @property
    def works(self) -> bool:
        """True if the package is installed and can be imported."""
        return self.version is not None and self.failure is None


@dataclass(frozen=True)
class Report:
    """All readings of `yolov12 check`."""

    device: str
    """Value of `device=`. Empty for the default."""
    devices: tuple[str, ...]
    """PyTorch devices that `device` stands for on this machine, such as `cuda:0`."""
    cuda: Cuda
    gpus: tuple[Gpu, ...]
    attention: tuple[AttentionProbe, ...]
    training: tuple[TrainingProbe, ...]
    host: Host
    versions: dict[str, str | None]
    """Name → installed version. None means: not installed."""
    pinned_ultralytics: str
    """Ultralytics version that this package is made for."""
    image: Image | None = None
    """The image of this container. None outside of an image of this project."""
    lock: Lock | None = None
    """None if the requirements files are not there, as without a clone."""
    gpu_packages: tuple[GpuPackage, ...] = ()
