"""What the API refuses, and how the daemon starts and ends."""

from __future__ import annotations

import socket
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import openai
import pytest
from click.testing import CliRunner

from protocol.errors import ConfigError, SkerryError, UnknownModel
from tests.agent.running import RunningAgent, running
from tools.commands.agent import agent as command

COUNTING = "one, two, three, four, five, six, seven,"


@pytest.fixture(scope="module")
def small(smollm2: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """Room for one answer, one more in the queue, a key, and a cloud that is not there and asked at every token."""
    settings = {
        "SKERRY_CLOUD_URL": "http://127.0.0.1:1",
        "SKERRY_POLICY_THRESHOLD": "0",
        "SKERRY_MODEL_SEQUENCES": "1",
        "SKERRY_MODEL_CONTEXT": "2048",
        "SKERRY_MODEL_THREADS": "1",
        "SKERRY_API_QUEUE": "1",
        "SKERRY_API_KEY": "sesame-open",
    }
    with running(smollm2, tmp_path_factory.mktemp("small"), settings) as started:
        yield started


def stream(client: openai.OpenAI, max_tokens: int) -> Any:
    model = client.models.list().data[0].id
    parameters: dict[str, Any] = {"prompt": COUNTING, "max_tokens": max_tokens, "temperature": 0}
    return client.completions.create(model=model, stream=True, **parameters)


def test_a_wrong_key(small: RunningAgent) -> None:
    with openai.OpenAI(base_url=f"{small.url}/v1", api_key="wrong", max_retries=0) as client:
        with pytest.raises(openai.AuthenticationError) as caught:
            client.models.list()
    assert caught.value.code == "invalid_api_key"


@pytest.mark.parametrize("header", ["", "Bearer", "Bearer \xff\xfe", "Basic sesame-open", "Bearer sesame-ope"])
def test_headers_that_carry_no_right_key(small: RunningAgent, header: str) -> None:
    assert small.call("GET", "/v1/models", Authorization=header).code == "invalid_api_key"


def test_only_probes_need_no_key(small: RunningAgent) -> None:
    def status(path: str) -> int:
        return small.call("GET", path, Authorization="none").status

    assert [status(path) for path in ("/health", "/ready")] == [200, 200]
    assert [status(path) for path in ("/metrics", "/v1/models", "/nowhere")] == [401, 401, 401]


def test_too_many_at_once_are_told_when_to_come_again(small: RunningAgent) -> None:
    with small.client() as client, stream(client, 1500) as first:
        next(iter(first))
        with send_and_leave_waiting(small):
            while not small.metric("skerry_queued_requests"):
                pass
            with pytest.raises(openai.RateLimitError) as caught:
                stream(client, 5)
    assert caught.value.code == "overloaded"
    assert int(caught.value.response.headers["Retry-After"]) >= 1
    assert small.metric("skerry_requests_total", outcome="overloaded") == 1


def test_a_cloud_that_is_not_there(small: RunningAgent) -> None:
    cloud = small.call("GET", "/ready").json["cloud"]
    assert cloud["state"] in ("connecting", "unreachable")
    assert cloud["breaker"] == "closed"
    with small.client() as client:
        model = client.models.list().data[0].id
        answers = [
            client.completions.create(
                model=model, prompt=COUNTING, max_tokens=3, extra_body={"skerry": {"private": private}}
            )
            for private in (False, True)
        ]
    counts = [answer.choices[0].skerry["counts"] for answer in answers]
    assert [(count["fallback"], count["local"]) for count in counts] == [(3, 0), (0, 3)]
    assert small.metric("skerry_cloud_connected") == 0
    assert small.metric("skerry_tokens_total", provenance="fallback") >= 3


def send_and_leave_waiting(agent: RunningAgent) -> socket.socket:
    body = b'{"prompt": "Hi", "max_tokens": 1500}'
    key = f"Authorization: Bearer {agent.key}\r\n".encode()
    connection = agent.connect()
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    connection.sendall(head + key + b"Content-Length: %d\r\n\r\n" % len(body) + body)
    return connection


def test_a_place_that_was_left_is_given_to_the_next(small: RunningAgent) -> None:
    with small.client() as client:
        with stream(client, 1500) as first:
            next(iter(first))
        assert len(list(stream(client, 3))) == 4


def test_an_answer_is_finished_before_the_daemon_ends(smollm2: Path, tmp_path: Path) -> None:
    with running(smollm2, tmp_path, {"SKERRY_MODEL_THREADS": "1"}) as agent, agent.client() as client:
        answer = iter(stream(client, 12))
        next(answer)
        agent.terminate()
        rest = list(answer)
        assert rest[-1].choices[0].finish_reason == "length"
        assert agent.process.wait(30) == 0
        with pytest.raises(ConnectionRefusedError):
            agent.connect()
        assert [line for line in agent.log.read_text().splitlines() if "preparing the memory" not in line] == []


def test_an_answer_without_end_does_not_hold_up_the_daemons(smollm2: Path, tmp_path: Path) -> None:
    with running(smollm2, tmp_path, {"SKERRY_MODEL_THREADS": "1"}) as agent, agent.client() as client:
        answer = iter(stream(client, 4000))
        next(answer)
        agent.terminate()
        with pytest.raises(openai.APIError, match="shutting down"):
            list(answer)
        assert agent.process.wait(30) == 0


def refused(*arguments: str, **env: str) -> SkerryError:
    result = CliRunner(env=env).invoke(command, arguments)
    assert isinstance(result.exception, SkerryError), result.output
    return result.exception


@pytest.mark.parametrize("host", ["0.0.0.0", "192.0.2.1", "::", "device.example"])
def test_listening_to_others_needs_a_key(host: str) -> None:
    error = refused(SKERRY_API_HOST=host)
    assert isinstance(error, ConfigError)
    assert "api.key" in str(error)


def test_a_port_that_is_taken(smollm2: Path, small: RunningAgent) -> None:
    error = refused("--model", str(smollm2), "--port", str(small.port), "--threads", "1")
    assert isinstance(error, ConfigError)
    assert f"127.0.0.1:{small.port}" in str(error)


def test_a_model_that_is_not_there() -> None:
    assert isinstance(refused("--model", "no-such-model"), UnknownModel)


def test_a_wrong_configuration_file(tmp_path: Path) -> None:
    path = tmp_path / "agent.toml"
    path.write_text("[api]\nport = 70000\n")
    error = refused("--config", str(path))
    assert isinstance(error, ConfigError)
    assert "api.port" in str(error)


def test_help_has_an_example() -> None:
    assert "Example: skerry agent" in CliRunner().invoke(command, ["--help"]).output
