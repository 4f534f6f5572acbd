"""Steps that need large libraries run as processes of their own: what they took goes back to the system, what they
print stays out of the way, and one that is killed for its memory does not take the command with it."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from protocol.errors import WorkshopError

Say = Callable[[str], None]
"""Hears what is going on, a line at a time."""

_POLL_S = 0.5
_TELL_S = 10.0  # seconds between two signs of life
_LINES = 6  # of what a failed step printed, in the error
# The models are on this machine; a library that asks a hub for more would do so without being told.
_OFFLINE = {"HF_HUB_OFFLINE": "1", "TRANSFORMERS_OFFLINE": "1", "TQDM_DISABLE": "1", "TOKENIZERS_PARALLELISM": "false"}


def run(title: str, module: str, arguments: Sequence[str], *, env: Mapping[str, str], say: Say) -> None:
    """`python -m module arguments…`, to its end. Raises WorkshopError with the last lines that it printed."""
    command = [sys.executable, "-P", "-m", module, *arguments]
    began = time.monotonic()
    say(f"{title} …")
    with tempfile.TemporaryFile() as printed:
        process = subprocess.Popen(
            command, env={**env, **_OFFLINE}, stdin=subprocess.DEVNULL, stdout=printed, stderr=subprocess.STDOUT
        )
        try:
            told = began
            while process.poll() is None:
                try:
                    process.wait(_POLL_S)
                except subprocess.TimeoutExpired:
                    if time.monotonic() - told >= _TELL_S:
                        told = time.monotonic()
                        say(f"{title}: {told - began:.0f} s")
        finally:
            process.kill()
            process.wait()
        if process.returncode != 0:
            raise WorkshopError(f"{title}: {_reason(process.returncode, module, _tail(printed.fileno()))}")
    say(f"{title}: done in {time.monotonic() - began:.0f} s")


def _tail(descriptor: int) -> str:
    size = os.fstat(descriptor).st_size
    return os.pread(descriptor, 4096, max(0, size - 4096)).decode("utf-8", "replace")


def _reason(code: int, module: str, printed: str) -> str:
    if code == -9:
        return "the system ended it, most likely for its memory: close other programs, or use a larger machine"
    if "No module named" in printed:
        return "what it needs is not installed: pip install 'skerry[export]'"
    lines = [line.strip() for line in printed.splitlines() if line.strip()][-_LINES:]
    return f"{module} failed (exit code {code}): " + " | ".join(lines)


def here(path: Path) -> str:
    """As an argument of a child, which may run in another folder."""
    return str(path.absolute())
