"""A Mosquitto of one's own, for benches and simulations."""

from __future__ import annotations

import os
import shutil
import socket
import subprocess
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

from protocol.errors import LinkError

_READY_SECONDS = 30.0
_PATHS = ":/usr/sbin:/usr/local/sbin:/opt/homebrew/sbin"

# The defaults (20 under way, 1000 waiting) are too few for an edge that hears from all devices at once.
_CONFIG = """\
listener {port} 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
max_inflight_messages 1000
max_queued_messages 100000
max_queued_bytes 67108864
log_type error
"""


@contextmanager
def mosquitto(folder: Path) -> Iterator[tuple[str, int]]:
    """A broker of its own on a free loopback port: its URL and its process. Raises LinkError."""
    program = shutil.which("mosquitto", path=os.environ.get("PATH", "") + _PATHS)
    if program is None:
        raise LinkError("Mosquitto is not installed: `apt-get install mosquitto` (or `brew install mosquitto`)")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port: int = taken.getsockname()[1]
    config = folder / "mosquitto.conf"
    config.write_text(_CONFIG.format(port=port))
    process = subprocess.Popen([program, "-c", str(config)], stderr=subprocess.DEVNULL, start_new_session=True)
    try:
        _await(lambda: process.poll() is None, port)
        yield f"mqtt://127.0.0.1:{port}", process.pid
    finally:
        process.terminate()
        process.wait()


def _await(lives: Callable[[], bool], port: int) -> None:
    deadline = time.monotonic() + _READY_SECONDS
    while True:
        try:
            return socket.create_connection(("127.0.0.1", port), 1.0).close()
        except OSError:
            if not lives() or time.monotonic() > deadline:
                raise LinkError("Mosquitto does not start: try `mosquitto -v`") from None
            time.sleep(0.02)
