"""Skerry's own processes as children: started, waited for until they are ready, and always stopped."""

from __future__ import annotations

import os
import queue
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Sequence
from types import TracebackType

from protocol.errors import SkerryError

_READY_SECONDS = 120.0
_STOP_SECONDS = 10.0


class Child:
    """`skerry ARGUMENTS…` (or any Python module). Leaving the context stops it: SIGTERM, then SIGKILL."""

    def __init__(
        self, arguments: Sequence[str], *, module: str = "tools.cli", env: dict[str, str] | None = None
    ) -> None:
        self._lines: queue.Queue[str | None] = queue.Queue()
        self._seen: list[str] = []
        self.process = subprocess.Popen(
            [sys.executable, "-m", module, *arguments],
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            text=True,
            env={**os.environ, **(env or {})},
            start_new_session=True,  # Ctrl-C is for the parent, which stops its children in order
        )
        threading.Thread(target=self._drain, daemon=True).start()

    def _drain(self) -> None:
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self._lines.put(line.rstrip())
        self._lines.put(None)

    def wait_for(self, pattern: str) -> re.Match[str]:
        """The first line of output that matches. Raises SkerryError with the output if the child ends first."""
        while True:
            try:
                line = self._lines.get(timeout=_READY_SECONDS)
            except queue.Empty:
                raise SkerryError(f"no sign of life from a child process: {self._tail()}") from None
            if line is None:
                raise SkerryError(f"a child process ended: {self._tail()}")
            self._seen.append(line)
            if match := re.search(pattern, line):
                return match

    def _tail(self) -> str:
        return " / ".join(self._seen[-5:]) or "it printed nothing"

    def stop(self) -> int:
        """Ends it, gently first; its exit status."""
        if self.process.poll() is None:
            self.process.terminate()
            try:
                self.process.wait(_STOP_SECONDS)
            except subprocess.TimeoutExpired:
                self.kill()
        return self.process.wait()

    def kill(self) -> None:
        """SIGKILL to it and its children, as when the power goes."""
        if self.process.poll() is None:
            os.killpg(self.process.pid, signal.SIGKILL)
            self.process.wait()

    def __enter__(self) -> Child:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.stop()


def start_cloud(model: str, threads: int, *arguments: str, env: dict[str, str] | None = None) -> tuple[Child, int]:
    """`skerry serve` on a free loopback port, ready, and that port."""
    child = Child(["serve", "--model", model, "--port", "0", "--threads", str(threads), *arguments], env=env)
    try:
        return child, int(child.wait_for(r"ready on \S*?:(\d+)")[1])
    except BaseException:
        child.stop()
        raise


def start_broker(*arguments: str) -> tuple[Child, int]:
    """`skerry broker` on a free loopback port, ready, and that port."""
    child = Child(["broker", "--port", "0", *arguments])
    try:
        return child, int(child.wait_for(r"ready on \S*?:(\d+)$")[1])
    except BaseException:
        child.stop()
        raise
