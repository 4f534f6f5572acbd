"""`skerry serve` as a user runs it: a process of its own."""

from __future__ import annotations

import asyncio
import json
import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import aiohttp
import pytest
from click.testing import CliRunner

from protocol.errors import AuthError
from protocol.resolve import Answer, Ask, Close, Hello
from tests.server.helpers import Device, opening
from tools.commands.serve import serve


@contextmanager
def served(*options: str, home: Path) -> Iterator[tuple[subprocess.Popen[str], str]]:
    """The process, once it is ready, and its address."""
    command = [sys.executable, "-m", "tools.cli", "serve", "--port", "0", "--threads", "1", *options]
    env = {**os.environ, "XDG_CONFIG_HOME": str(home), "PYTHONUNBUFFERED": "1"}
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, env=env) as process:
        try:
            assert process.stdout is not None
            line = process.stdout.readline()
            found = re.fullmatch(r"skerry serve: ready on (127\.0\.0\.1:\d+) \(.+\)\n", line)
            assert found, line or process.communicate()[1]
            yield process, f"http://{found[1]}"
        finally:
            process.kill()


def test_sigterm_lets_a_running_session_finish(smollm2: Path, tmp_path: Path) -> None:
    async def run(process: subprocess.Popen[str], url: str) -> None:
        async with aiohttp.ClientSession() as http, http.ws_connect(f"{url}/v1/resolve") as socket:
            device = Device(socket)
            hello = await device.next(Hello)
            await device.send(opening(hello.tokenizer), Ask(1, 1, 0))
            await device.next(Answer)
            process.send_signal(signal.SIGTERM)
            while True:  # a signal arrives when it arrives; from then on nothing new is taken
                async with http.get(f"{url}/ready") as response:
                    if response.status == 503:
                        break
            await device.send(opening(hello.tokenizer, session=2))
            await device.refused("draining")
            await device.send(Ask(1, 2, 0))
            assert (await device.next(Answer)).step == 2
            await device.send(Close(1))
            assert await device.closed() == 1001

    with served("--model", str(smollm2), home=tmp_path) as (process, url):
        asyncio.run(run(process, url))
        assert process.wait(timeout=30) == 0


def test_keys_are_added_listed_and_revoked(tmp_path: Path) -> None:
    env = {"SKERRY_LISTEN_KEYS_FILE": str(tmp_path / "keys.json")}
    runner = CliRunner(env=env)
    added = runner.invoke(serve, ["keys", "add", "phone"])
    assert added.exit_code == 0
    assert added.stdout.startswith("sk-skerry-")
    assert len(added.stdout.splitlines()) == 1
    (listed,) = json.loads(runner.invoke(serve, ["keys", "list", "--json"]).stdout)
    assert listed["name"] == "phone"
    assert "phone" in runner.invoke(serve, ["keys", "list"]).stdout
    assert runner.invoke(serve, ["keys", "revoke", "phone"]).exit_code == 0
    assert json.loads(runner.invoke(serve, ["keys", "list", "--json"]).stdout) == []
    assert isinstance(runner.invoke(serve, ["keys", "revoke", "phone"]).exception, AuthError)


@pytest.mark.parametrize("arguments", [[], ["keys"], ["keys", "add"], ["keys", "list"], ["keys", "revoke"]])
def test_every_command_explains_itself_with_an_example(arguments: list[str]) -> None:
    result = CliRunner().invoke(serve, [*arguments, "--help"])
    assert result.exit_code == 0
    assert "skerry serve" in result.stdout
    assert "Example" in result.stdout
