"""Real brokers for tests, on free loopback ports: Mosquitto and `skerry broker`; and a network that fails."""

from __future__ import annotations

import getpass
import os
import select
import shutil
import signal
import socket
import subprocess
import sys
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from queue import Empty, Queue

ROOT = Path(__file__).parents[1]
_UNPACKED = ROOT / ".venv" / "mosquitto"
_READY_SECONDS = 60.0
_PASS_SECONDS = 2.0


def mosquitto() -> tuple[str, dict[str, str]]:
    """The program and the environment that it runs in: installed on the system, or unpacked by the test set-up."""
    found = shutil.which("mosquitto", path=f"{os.environ.get('PATH', '')}:/usr/sbin:/usr/local/sbin")
    if found:
        return found, dict(os.environ)
    unpacked = _UNPACKED / "usr/sbin/mosquitto"
    assert unpacked.exists(), "Mosquitto is missing: run tests/install_mosquitto, or apt-get install mosquitto"
    folders = {str(library.parent) for library in _UNPACKED.rglob("*.so*")}
    return str(unpacked), {**os.environ, "LD_LIBRARY_PATH": ":".join(sorted(folders))}


def free_port() -> int:
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        port: int = taken.getsockname()[1]
        return port


class Broker(ABC):
    """A broker process on `port`, which stays the same over restarts."""

    keeps = False  # whether a restart may bring sessions and retained messages back

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.port = free_port()
        self.process: subprocess.Popen[str] | None = None

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    @abstractmethod
    def command(self) -> tuple[Sequence[str], dict[str, str], str]:
        """What to run, its environment, and what it prints when it is ready."""

    def start(self) -> None:
        command, env, ready = self.command()
        self.process = subprocess.Popen(
            command, cwd=ROOT, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        lines: Queue[str | None] = Queue()
        threading.Thread(target=_read, args=(self.process, lines), daemon=True).start()
        seen: list[str] = []
        while True:
            try:
                line = lines.get(timeout=_READY_SECONDS)
            except Empty:
                line = None
            assert line is not None, f"the broker did not start: {seen}"
            seen.append(line)
            if ready in line:
                return

    def stop(self) -> int:
        """As an administrator does it. The exit status."""
        assert self.process is not None
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(30)

    def kill(self) -> None:
        """As a power cut does it."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()

    @abstractmethod
    def forget(self) -> None:
        """While stopped: removes what it would remember."""

    def restart(self, *, persistence: bool) -> None:
        """After `stop` or `kill`."""
        assert not persistence or self.keeps
        if not persistence:
            self.forget()
        self.start()

    def __enter__(self) -> Broker:
        self.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self.process is not None and self.process.poll() is None:
            self.kill()


def _read(process: subprocess.Popen[str], lines: Queue[str | None]) -> None:
    assert process.stdout is not None
    with process.stdout:
        for line in process.stdout:
            lines.put(line)
    lines.put(None)


class Mosquitto(Broker):
    """With `lines` as its configuration beside listener, persistence and log; by default anybody may connect."""

    keeps = True

    def __init__(self, folder: Path, lines: Iterable[str] = ("allow_anonymous true",)) -> None:
        super().__init__(folder)
        self.config = folder / "mosquitto.conf"
        folder.mkdir(parents=True, exist_ok=True)
        ours = (
            f"listener {self.port} 127.0.0.1",
            f"user {getpass.getuser()}",
            "set_tcp_nodelay true",
            "max_inflight_messages 1000",
            "max_queued_messages 100000",
            "allow_duplicate_messages false",
            "persistence true",
            f"persistence_location {folder}/",
            "autosave_interval 1",
            "log_dest stderr",
        )
        self.config.write_text("\n".join([*ours, *lines]) + "\n")

    def command(self) -> tuple[Sequence[str], dict[str, str], str]:
        program, env = mosquitto()
        return [program, "-c", str(self.config)], env, " running"

    def forget(self) -> None:
        (self.folder / "mosquitto.db").unlink(missing_ok=True)


class Embedded(Broker):
    """`skerry broker`."""

    def __init__(self, folder: Path, arguments: Sequence[str] = ()) -> None:
        super().__init__(folder)
        self.arguments = list(arguments)

    def command(self) -> tuple[Sequence[str], dict[str, str], str]:
        env = {**os.environ, "PYTHONUNBUFFERED": "1"}
        skerry = [sys.executable, "-m", "tools.cli"]
        return [*skerry, "broker", "--port", str(self.port), *self.arguments], env, "ready on"

    def forget(self) -> None:
        """It remembers nothing."""


class Network:
    """A TCP proxy in front of `target`, on `port`. It can freeze (connections stay, nothing passes), drop (every
    connection is reset, new ones too) and be `well` again."""

    def __init__(self, target: int) -> None:
        self.target = target
        self.listener = socket.create_server(("127.0.0.1", 0))
        self.port: int = self.listener.getsockname()[1]
        self.passed = bytearray()  # what clients have sent
        self._mode = "well"
        self._pairs: dict[socket.socket, socket.socket] = {}
        self._wake, self._woken = socket.socketpair()
        self._orders: Queue[Callable[[], None]] = Queue()
        self._closed = False
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    @property
    def url(self) -> str:
        return f"mqtt://127.0.0.1:{self.port}"

    def freeze(self) -> None:
        self._order("frozen")

    def drop(self) -> None:
        self._order("dropping")

    def well(self) -> None:
        """Frozen connections go on where they stood."""
        self._order("well")

    def close(self) -> None:
        self._order("dropping", last=True)
        self._thread.join()
        for each in (self.listener, self._wake, self._woken):
            each.close()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _order(self, mode: str, *, last: bool = False) -> None:
        """Holds once this returns."""
        obeyed = threading.Event()

        def obey() -> None:
            self._mode = mode
            self._closed = last
            if mode == "dropping":
                for each in list(self._pairs):
                    self._end(each)
            obeyed.set()

        self._orders.put(obey)
        self._wake.send(b"x")
        assert obeyed.wait(30)

    def _run(self) -> None:
        while not self._closed:
            pairs = list(self._pairs) if self._mode == "well" else []
            for ready in select.select([self.listener, self._woken, *pairs], [], [])[0]:
                if ready is self._woken:
                    self._woken.recv(1)
                    self._orders.get()()
                elif ready is self.listener:
                    self._accept()
                elif ready in self._pairs:
                    self._pass(ready)

    def _accept(self) -> None:
        near, _ = self.listener.accept()
        try:
            if self._mode == "dropping":
                raise ConnectionError
            far = socket.create_connection(("127.0.0.1", self.target), _PASS_SECONDS)
        except OSError:
            near.close()
            return
        for each in (near, far):
            each.settimeout(_PASS_SECONDS)  # whoever reads no more loses its connection
            each.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        self._pairs[near], self._pairs[far] = far, near

    def _pass(self, ready: socket.socket) -> None:
        try:
            data = ready.recv(1 << 16)
            if not data:
                raise ConnectionError
            if ready.getsockname()[1] == self.port:
                self.passed += data
            self._pairs[ready].sendall(data)
        except OSError:
            self._end(ready)

    def _end(self, one: socket.socket) -> None:
        other = self._pairs.pop(one, None)
        if other is not None:
            self._pairs.pop(other, None)
            one.close()
            other.close()
