"""When it is a moment to train, from trees that look like a machine's."""

from __future__ import annotations

from pathlib import Path

import pytest

from agent.adapt.idle import Machine


@pytest.fixture
def root(tmp_path: Path) -> Path:
    stat(tmp_path, 0, 0, 0)
    return tmp_path


def put(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text + "\n")


def stat(root: Path, user: int, nice: int, idle: int) -> None:
    put(root / "proc/stat", f"cpu  {user} {nice} 0 {idle} 0 0 0 0 0 0\ncpu0 1 2 3 4 5 6 7 0 0 0")


def heat(root: Path, millidegrees: int | str) -> None:
    put(root / "sys/class/thermal/thermal_zone1/temp", str(millidegrees))


def supply(root: Path, name: str, **files: str) -> None:
    for file, text in files.items():
        put(root / "sys/class/power_supply" / name / file, text)


def test_a_machine_that_tells_nothing_may_train(tmp_path: Path) -> None:
    assert Machine(tmp_path, 75.0).why_not() is None


def test_no_training_when_hot_and_not_before_it_has_cooled_down(root: Path) -> None:
    machine = Machine(root, 75.0)
    for millidegrees, expected in ((74_900, None), (75_000, "hot"), (72_000, "hot"), (69_900, None), (74_000, None)):
        heat(root, millidegrees)
        assert machine.why_not() == expected


@pytest.mark.parametrize("nonsense", [-273_000, 0, 4_000_000, "", "n/a"])
def test_sensors_that_are_not_there_mean_nothing(nonsense: int | str, root: Path) -> None:
    heat(root, nonsense)
    put(root / "sys/class/thermal/thermal_zone0/temp", "40000")
    assert Machine(root, 75.0).why_not() is None


def test_no_training_while_the_processor_is_throttled(root: Path) -> None:
    device = root / "sys/class/thermal/cooling_device0"
    put(device / "type", "thermal-cpufreq-0")
    put(device / "cur_state", "3")
    machine = Machine(root, 75.0)
    assert machine.why_not() == "hot"
    put(device / "cur_state", "0")
    assert machine.why_not() is None
    put(device / "type", "fan")
    put(device / "cur_state", "3")
    assert machine.why_not() is None, "a fan that turns slows nothing down"


@pytest.mark.parametrize(("flags", "expected"), [("0x50005", "hot"), ("50000", None), ("0", None)])
def test_the_firmware_of_a_raspberry_pi_says_whether_it_is_throttled_now(
    flags: str, expected: str | None, root: Path
) -> None:
    put(root / "sys/devices/platform/soc/soc:firmware/get_throttled", flags)
    assert Machine(root, 75.0).why_not() == expected


def test_no_training_on_battery(root: Path) -> None:
    machine = Machine(root, 75.0)
    supply(root, "BAT0", type="Battery", status="Discharging")
    assert machine.why_not() == "on battery"
    supply(root, "BAT0", status="Charging")
    assert machine.why_not() is None
    supply(root, "AC", type="Mains", online="0")
    assert machine.why_not() == "on battery"
    supply(root, "AC", online="1")
    assert machine.why_not() is None
    supply(root, "mouse", type="Battery", scope="Device", status="Discharging")
    assert machine.why_not() is None, "a mouse's battery is not ours"


def test_others_work_counts_and_training_itself_does_not(root: Path) -> None:
    machine = Machine(root, 75.0)
    stat(root, 60, 0, 40)
    assert machine.why_not() == "busy"
    stat(root, 60, 100, 40)
    assert machine.why_not() is None, "work of low priority, as training is"
    stat(root, 100, 100, 100)
    assert machine.why_not() is None


def test_how_much_others_may_do_is_chosen(root: Path) -> None:
    machine = Machine(root, 75.0, busy=0.7)
    stat(root, 60, 0, 40)
    assert machine.why_not() is None
    stat(root, 140, 0, 60)
    assert machine.why_not() == "busy"
