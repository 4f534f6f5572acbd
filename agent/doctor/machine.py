"""What this machine is: board, memory, accelerator, disk, clock. `root` is `/`, or a tree that looks like it."""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from agent.doctor.finding import Finding, size
from models.engine.open import Kind

_EARLIEST = datetime(2026, 1, 1, tzinfo=UTC)  # Skerry is younger than this, so a clock before it is wrong
_ACCELERATED: dict[Kind, tuple[str, str]] = {
    "gguf": (
        "llama.cpp",
        "CMAKE_ARGS=-DGGML_CUDA=ON pip install --force-reinstall --no-cache-dir llama-cpp-python==0.3.36",
    ),
    "onnx": ("onnxruntime", "install the build of it that is for this accelerator (docs/install.md)"),
}
"""The library that runs such models, and how to get the one that uses an accelerator."""

_LITTLE_DISK = 500_000_000  # bytes


@dataclass(frozen=True, slots=True)
class Machine:
    """`memory` and `available` in bytes, as far as this process may use them; None: the system does not say.
    `accelerator` "" if there is none."""

    board: str
    architecture: str
    cores: int
    memory: int | None
    available: int | None
    accelerator: str


def read_machine(root: Path, architecture: str, cores: int) -> Machine:
    memory, available = _memory(root)
    return Machine(_board(root), architecture, cores, memory, available, _accelerator(root))


def check_machine(machine: Machine) -> Finding:
    what = f"{machine.board}, {machine.architecture}, {machine.cores} core{'s' if machine.cores > 1 else ''}"
    if machine.memory is None or machine.available is None:
        return Finding("warn", "machine", f"{what}; /proc/meminfo does not tell the memory", "mount /proc")
    return Finding("ok", "machine", f"{what}, {size(machine.memory)} of memory, {size(machine.available)} available")


def offloads(kind: Kind) -> bool:
    """Whether the library that runs such models was built so that it can use an accelerator."""
    try:
        if kind == "gguf":
            import llama_cpp

            return bool(llama_cpp.llama_supports_gpu_offload())
        import onnxruntime

        return "CUDAExecutionProvider" in onnxruntime.get_available_providers()
    except ModuleNotFoundError:
        return False


def check_accelerator(machine: Machine, kind: Kind, offload: bool) -> Finding:
    """`kind`: of the model; `offload`: what runs it can use an accelerator."""
    if not machine.accelerator:
        return Finding("ok", "accelerator", "none: the model runs on the CPU")
    if offload:
        return Finding("ok", "accelerator", machine.accelerator)
    library, remedy = _ACCELERATED[kind]
    text = f"{machine.accelerator}, which this build of {library} does not use"
    return Finding("warn", "accelerator", text, remedy)


def check_disk(folder: Path, missing: int) -> Finding:
    """`missing`: bytes that still have to be pulled into the models' folder, which need not exist yet."""
    there = next(place for place in (folder, *folder.absolute().parents) if place.exists())
    free = shutil.disk_usage(there).free
    text = f"{size(free)} free in {folder}"
    if free < missing:
        return Finding(
            "error",
            "disk",
            f"{text}, but the model takes {size(missing)}",
            "free some space, or name another folder in SKERRY_MODELS",
        )
    if free - missing < _LITTLE_DISK:
        return Finding("warn", "disk", text, "free some space: a full disk stops pulls and logs")
    return Finding("ok", "disk", text)


def check_clock(now: float) -> Finding:
    """`now`: seconds since 1970."""
    time = datetime.fromtimestamp(now, UTC)
    text = f"{time:%Y-%m-%d %H:%M} UTC"
    if time < _EARLIEST:
        return Finding("warn", "clock", f"{text} cannot be right: TLS will fail", "sudo timedatectl set-ntp true")
    return Finding("ok", "clock", text)


def _board(root: Path) -> str:
    """The device tree's model on Arm boards, the DMI product on PCs."""
    if model := _text(root / "proc/device-tree/model").rstrip("\0").strip():
        return model
    dmi = root / "sys/class/dmi/id"
    words = (_text(dmi / "sys_vendor").strip(), _text(dmi / "product_name").strip())
    return " ".join(word for word in words if word) or "unknown board"


def _accelerator(root: Path) -> str:
    if tegra := _text(root / "etc/nv_tegra_release"):
        release = re.search(r"R(\d+) \(release\), REVISION: ([\d.]+)", tegra)
        return f"NVIDIA Jetson GPU (L4T {release[1]}.{release[2]})" if release else "NVIDIA Jetson GPU"
    information = sorted((root / "proc/driver/nvidia/gpus").glob("*/information"))
    names = [found[1] for path in information if (found := re.search(r"^Model:\s*(.+?)\s*$", _text(path), re.M))]
    if not names:
        names = [f"NVIDIA GPU {path.name[6:]}" for path in sorted((root / "dev").glob("nvidia[0-9]*"))]
    return ", ".join(names)


def _memory(root: Path) -> tuple[int | None, int | None]:
    """Bytes in total and available; the limits of the control groups around this process count."""
    lines = re.findall(r"^(MemTotal|MemAvailable):\s+(\d+) kB", _text(root / "proc/meminfo"), re.M)
    kilobytes = {name: int(value) for name, value in lines}
    if len(kilobytes) < 2:
        return None, None
    limits = list(_limits(root))
    total = min([kilobytes["MemTotal"] * 1024, *(limit for limit, _ in limits)])
    available = min([kilobytes["MemAvailable"] * 1024, *(room for _, room in limits)])
    return total, max(0, available)


def _limits(root: Path) -> Iterator[tuple[int, int]]:
    """Limit and what is left of it, in bytes, of every control group (v2) around this process that has one."""
    mount = root / "sys/fs/cgroup"
    own = re.search(r"^0::/(.*)$", _text(root / "proc/self/cgroup"), re.M)
    group = mount / own[1] if own and ".." not in own[1] else mount
    for folder in (group, *group.parents):
        limit = _text(folder / "memory.max").strip()
        if limit.isdigit():
            used = int(_text(folder / "memory.current") or 0)
            # What files occupy in the page cache is given back on demand, so it is not used up.
            cached = re.findall(r"^(?:in)?active_file (\d+)$", _text(folder / "memory.stat"), re.M)
            yield int(limit), int(limit) - used + sum(map(int, cached))
        if folder == mount:
            return


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
