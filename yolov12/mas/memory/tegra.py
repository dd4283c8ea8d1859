"""Reads the sensors of NVIDIA's Tegra modules (Jetson), which Linux shows in /sys: GPU load, power, temperature.

The layout is that of JetPack 5 and 6 (Xavier, Orin). NVML tells none of these values there.
"""

from __future__ import annotations

from pathlib import Path

from yolov12.mas.memory.cgroups import read_text
from yolov12.mas.memory.reading import Sensors

__all__ = ["TegraSensors"]

# Load of the GPU in per mille. The device is called 17000000.gpu in JetPack 6, and after the chip in JetPack 5
# (17000000.ga10b, 17000000.gv11b).
_LOADS = ("devices/gpu.0/load", "devices/platform/gpu.0/load", "class/devfreq/*.g*/device/load")
_WHOLE = "VDD_IN"  # rail that feeds all others: Orin NX, Orin Nano and Xavier NX have it
# Rails that are not there, and one that VIN_SYS_5V0 feeds (AGX Orin).
_NOT_ADDED = {"", "NC", "VDDQ_VDD2_1V8AO"}


class TegraSensors:
    """Sensors of the module that this process runs on. Where there are none, every value is None.

    Args:
        sys: Folder where `/sys` is mounted.
    """

    def __init__(self, sys: Path = Path("/sys")) -> None:
        self._load = next((file for pattern in _LOADS for file in sorted(sys.glob(pattern))), None)
        self._rails = _rails(sys)
        self._zone = _gpu_zone(sys)

    def busy_percent(self) -> float | None:
        """Read the load of the GPU, as a percentage of the last sample period."""
        load = None if self._load is None else _number(self._load)
        return None if load is None else load / 10

    def read(self) -> Sensors:
        """Read the power of the module and the temperature of the GPU."""
        watts = [
            millivolts * milliamperes / 1e6
            for voltage, current in self._rails
            if (millivolts := _number(voltage)) is not None and (milliamperes := _number(current)) is not None
        ]
        millidegrees = None if self._zone is None else _number(self._zone)
        return Sensors(
            power_w=sum(watts) if watts and len(watts) == len(self._rails) else None,
            temperature_c=None if millidegrees is None else millidegrees / 1000,
        )


def _rails(sys: Path) -> list[tuple[Path, Path]]:
    """Return the files with voltage and current of the rails whose power adds up to that of the module."""
    found: dict[str, tuple[Path, Path]] = {}
    for folder in sorted(sys.glob("class/hwmon/hwmon*")):
        if read_text(folder / "name").strip() == "ina3221":
            # Channels 4 to 7 are the voltages at the shunts.
            for channel in "123":
                rail = read_text(folder / f"in{channel}_label").strip()
                if rail not in _NOT_ADDED:
                    found[rail] = folder / f"in{channel}_input", folder / f"curr{channel}_input"
    return [found[_WHOLE]] if _WHOLE in found else list(found.values())


def _gpu_zone(sys: Path) -> Path | None:
    """Return the file with the temperature of the GPU: `gpu-thermal` in JetPack 6, `GPU-therm` in JetPack 5."""
    zones = sorted(sys.glob("class/thermal/thermal_zone*"))
    return next((zone / "temp" for zone in zones if read_text(zone / "type").lower().startswith("gpu")), None)


def _number(file: Path) -> int | None:
    text = read_text(file).strip()  # a zone whose part is switched off cannot be read
    return int(text) if text.lstrip("-").isdigit() else None
