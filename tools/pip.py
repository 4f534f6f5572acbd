"""The user's own pip, asked what it would install on another machine."""

from __future__ import annotations

import json
import re
import subprocess
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from packaging.markers import default_environment
from packaging.requirements import Requirement
from packaging.version import Version

from protocol.errors import SkerryError

_GLIBC = 35  # 2.35 of Ubuntu 22.04, which JetPack 6 is; the other systems of docs/install.md have a newer one
_NOTHING = re.compile(r"No matching distribution found for (.+?)(?: \(from (.+)\))?$", re.MULTILINE)


class NoWheel(Exception):
    """A requirement that no wheel for the target meets; `parent` is what has it, if it is not one's own."""

    def __init__(self, requirement: Requirement, parent: str | None) -> None:
        super().__init__(str(requirement))
        self.requirement = requirement
        self.parent = parent


@dataclass(frozen=True)
class Target:
    """CPython `python` on a 64-bit Arm board."""

    python: str

    @property
    def options(self) -> list[str]:
        platforms = ["linux_aarch64", "manylinux2014_aarch64"]
        platforms += [f"manylinux_2_{minor}_aarch64" for minor in range(17, _GLIBC + 1)]
        return [f"--python-version={self.python}", "--implementation=cp", *(f"--platform={name}" for name in platforms)]

    def applying(self, requirements: Iterable[Requirement], extras: Sequence[str] = ()) -> list[Requirement]:
        """Those whose markers hold there, without the markers: pip would read them for the machine that it runs on."""
        there = {str(key): str(value) for key, value in default_environment().items()} | {
            "python_version": self.python,
            "python_full_version": f"{self.python}.0",
            "implementation_name": "cpython",
            "platform_python_implementation": "CPython",
            "platform_machine": "aarch64",
            "platform_system": "Linux",
            "sys_platform": "linux",
            "os_name": "posix",
        }
        return [
            Requirement(str(line).partition(";")[0])
            for line in requirements
            if line.marker is None or any(line.marker.evaluate(there | {"extra": extra}) for extra in ("", *extras))
        ]


class Pip:
    """`env` is pip's environment: its settings there and in its configuration files hold."""

    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = dict(env)

    def resolve(self, requirements: Iterable[Requirement], target: Target) -> list[dict[str, Any]]:
        """The items of pip's installation report, wheels all of them. Raises NoWheel, SkerryError."""
        options = ["--dry-run", "--quiet", "--ignore-installed", "--only-binary=:all:", *target.options]
        lines = [str(requirement) for requirement in requirements]
        if not lines:
            return []
        with tempfile.TemporaryDirectory() as folder:
            places = ["--target", f"{folder}/none", "--report", f"{folder}/report"]
            done = self._run("install", *options, *places, *lines)
            if done.returncode == 0:
                items: list[dict[str, Any]] = json.loads(Path(folder, "report").read_text(encoding="utf-8"))["install"]
                return items
        if found := _NOTHING.search(done.stderr):
            raise NoWheel(Requirement(found.group(1)), found.group(2))
        raise SkerryError(f"pip finds no solution for Python {target.python}: {_complaints(done.stderr)}")

    def versions(self, package: str, *options: str) -> list[Version]:
        """All that the index has of it, within these options of pip; none, too, if it does not answer."""
        done = self._run("index", "versions", *options, package)
        if found := re.search(r"^Available versions: (.+)$", done.stdout, re.MULTILINE):
            return [Version(version) for version in found.group(1).split(", ")]
        if _NOTHING.search(done.stderr):
            return []
        raise SkerryError(f"pip could not list the versions of {package}: {_complaints(done.stderr)}")

    def _run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        # -P keeps modules of the current folder out.
        command = [sys.executable, "-P", "-m", "pip", "--disable-pip-version-check", "--no-input", *arguments]
        return subprocess.run(command, env=self._env, stdin=subprocess.DEVNULL, capture_output=True, text=True)


def _complaints(stderr: str) -> str:
    return "\n".join(line for line in stderr.splitlines() if not line.startswith("WARNING:"))
