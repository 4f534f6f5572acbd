"""A real `skerry agent` process for tests."""

from __future__ import annotations

import http.client
import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from openai import OpenAI
from prometheus_client.parser import text_string_to_metric_families

ROOT = Path(__file__).parents[2]


@dataclass(frozen=True)
class Reply:
    status: int
    headers: dict[str, str]
    body: bytes

    @property
    def json(self) -> Any:
        return json.loads(self.body)

    @property
    def code(self) -> str | None:
        """Of an error object."""
        code: str | None = self.json["error"]["code"]
        return code


@dataclass(frozen=True)
class RunningAgent:
    """`log`: the file that its standard error goes to."""

    process: subprocess.Popen[str]
    url: str
    log: Path
    key: str

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def client(self) -> OpenAI:
        return OpenAI(base_url=f"{self.url}/v1", api_key=self.key or "none", max_retries=0)

    def call(self, method: str, path: str, body: bytes | None = None, **headers: str) -> Reply:
        """One HTTP request. Header names are given with `_` for `-`."""
        given = {"Authorization": f"Bearer {self.key}"} if self.key else {}
        given |= {name.replace("_", "-"): value for name, value in headers.items()}
        connection = http.client.HTTPConnection("127.0.0.1", self.port, timeout=60)
        try:
            connection.request(method, path, body, given)
            answer = connection.getresponse()
            return Reply(answer.status, dict(answer.getheaders()), answer.read())
        finally:
            connection.close()

    def connect(self) -> socket.socket:
        return socket.create_connection(("127.0.0.1", self.port))

    def metric(self, sample: str, **labels: str) -> float:
        """The present value of one sample, 0 if nothing was counted under these labels."""
        for family in text_string_to_metric_families(self.call("GET", "/metrics").body.decode()):
            for found in family.samples:
                if found.name == sample and labels.items() <= found.labels.items():
                    return found.value
        return 0.0

    def terminate(self) -> None:
        self.process.send_signal(signal.SIGTERM)


@contextmanager
def running(model: Path, folder: Path, settings: Mapping[str, str]) -> Iterator[RunningAgent]:
    """An agent on a free port. `settings`: environment variables on top of the tests' own."""
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SKERRY_")}
    ours = {"SKERRY_API_PORT": "0", "SKERRY_MODEL_NAME": str(model), "XDG_CONFIG_HOME": str(folder)}
    ours |= {"SKERRY_DEVICE_FOLDER": str(folder / "device"), **settings}
    log = folder / "agent.log"
    with log.open("w") as errors:
        process = subprocess.Popen(
            [sys.executable, "-m", "tools.cli", "agent"],
            cwd=ROOT,
            env=clean | ours,
            stdout=subprocess.PIPE,
            stderr=errors,
            text=True,
        )
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line.startswith("skerry agent: ready on http://"), log.read_text()
        yield RunningAgent(process, line.split()[4], log, settings.get("SKERRY_API_KEY", ""))
    finally:
        process.terminate()
        try:
            process.wait(20)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()
        if process.stdout is not None:
            process.stdout.close()
