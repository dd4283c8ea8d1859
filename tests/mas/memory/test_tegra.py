"""Sensors of Jetsons, in invented /sys trees with the layouts of JetPack 5 and 6."""

import pytest

from yolov12.mas.memory.reading import Sensors
from yolov12.mas.memory.tegra import TegraSensors


def lay(root, files):
    for name, text in files.items():
        file = root / name
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(f"{text}\n")
    return TegraSensors(root)


def monitor(folder, *rails):
    """Return the files of an INA3221: (label, millivolts, milliamperes) of each channel."""
    files = {f"{folder}/name": "ina3221", f"{folder}/in7_label": "sum of shunt voltages", f"{folder}/in7_input": 99}
    for channel, (label, millivolts, milliamperes) in enumerate(rails, 1):
        files |= {
            f"{folder}/in{channel}_label": label,
            f"{folder}/in{channel}_input": millivolts,
            f"{folder}/curr{channel}_input": milliamperes,
        }
    return files


def zones(*pairs):
    files = {}
    for index, (kind, temp) in enumerate(pairs):
        files |= {f"class/thermal/thermal_zone{index}/type": kind, f"class/thermal/thermal_zone{index}/temp": temp}
    return files


AGX_ORIN_JETPACK_5 = {
    "devices/gpu.0/load": 873,
    "class/hwmon/hwmon0/name": "pwmfan",
    **monitor(
        "class/hwmon/hwmon3", ("VDD_GPU_SOC", 19_000, 500), ("VDD_CPU_CV", 19_000, 100), ("VIN_SYS_5V0", 5_000, 900)
    ),
    **monitor("class/hwmon/hwmon4", ("NC", 0, 0), ("VDDQ_VDD2_1V8AO", 19_000, 100), ("NC", 0, 0)),
    **zones(("CPU-therm", 51_000), ("GPU-therm", 48_500), ("tj-therm", 52_000)),
}
ORIN_NANO_JETPACK_6 = {
    "class/devfreq/15340000.vic/device/load": 5,
    "class/devfreq/17000000.gpu/device/load": 1000,
    **monitor("class/hwmon/hwmon1", ("VDD_IN", 5_000, 2_000), ("VDD_CPU_GPU_CV", 5_000, 900), ("VDD_SOC", 5_000, 400)),
    **zones(("cpu-thermal", 60_000), ("gpu-thermal", 61_250)),
}


@pytest.mark.parametrize(
    ("files", "busy_percent", "power_w", "temperature_c"),
    [(AGX_ORIN_JETPACK_5, 87.3, 9.5 + 1.9 + 4.5, 48.5), (ORIN_NANO_JETPACK_6, 100.0, 10.0, 61.25)],
)
def test_load_power_and_temperature(tmp_path, files, busy_percent, power_w, temperature_c):
    tegra = lay(tmp_path, files)
    assert tegra.busy_percent() == busy_percent
    assert tegra.read() == Sensors(pytest.approx(power_w), temperature_c)


def test_what_cannot_be_read_is_unknown(tmp_path):
    """The zone of a part that is switched off gives an error; a rail less would be a wrong sum."""
    tegra = lay(tmp_path, AGX_ORIN_JETPACK_5)
    (tmp_path / "class/thermal/thermal_zone1/temp").unlink()
    (tmp_path / "class/hwmon/hwmon3/curr2_input").unlink()
    (tmp_path / "devices/gpu.0/load").write_text("")
    assert (tegra.busy_percent(), tegra.read()) == (None, Sensors())


def test_another_machine_has_no_such_sensors(tmp_path):
    tegra = lay(tmp_path, {"class/hwmon/hwmon0/name": "coretemp", **zones(("x86_pkg_temp", 40_000))})
    assert (tegra.busy_percent(), tegra.read()) == (None, Sensors())
    assert TegraSensors(tmp_path / "none").read() == Sensors()
