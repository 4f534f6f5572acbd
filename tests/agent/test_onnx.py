"""A device whose model is in ONNX: all of the agent works, but for adapters, and llama.cpp is not needed."""

from __future__ import annotations

import asyncio
import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import openai
import pytest
from msgspec.structs import replace

from agent.agent import Account, Request
from agent.assemble import assemble
from agent.config import AgentConfig, Device, Memory, Model
from agent.engine import check_kind
from agent.memory.key import space_of
from models.engine.onnx import OnnxEngine
from models.engine.open import open_tokenizer
from models.fingerprint import fingerprint
from protocol.errors import ConfigError
from protocol.resolve import Message
from tests.agent.running import ROOT, RunningAgent, running

QUESTION = [Message("user", "Name three colours of the rainbow.")]


def config_of(model: Path, folder: Path) -> AgentConfig:
    return AgentConfig(
        model=Model(name=str(model), context=320, sequences=1, threads=1, engine="onnx", providers=["cpu"]),
        device=Device(folder=str(folder)),
    )


def test_a_device_answers_remembers_and_learns_when_to_ask_but_no_adapters(smollm2_int4: Path, tmp_path: Path) -> None:
    async def run() -> Account:
        async with device.linked():
            *_, account = [event async for event in device.agent.stream(Request(QUESTION, max_tokens=8))]
            assert isinstance(account, Account)
            return account

    device = assemble(config_of(smollm2_int4, tmp_path), smollm2_int4)
    try:
        assert isinstance(device.agent.engine, OnnxEngine)
        assert asyncio.run(run()).counts["local"] == 8
        assert device.keeper is not None
        assert device.keeper.keys.space == space_of(fingerprint(smollm2_int4))
        assert device.learner is not None
        assert device.adaptation is None
    finally:
        device.close()
    assert not list(tmp_path.glob("lessons*")), "what nothing can be learned from is not kept"


def test_an_engine_that_does_not_fit_the_model_is_said_to_be_wrong(smollm2: Path, smollm2_int4: Path) -> None:
    with pytest.raises(ConfigError, match="a GGUF file: `skerry models export` makes an ONNX model of it"):
        check_kind(Model(engine="onnx"), smollm2)
    with pytest.raises(ConfigError, match="name the GGUF file"):
        check_kind(Model(engine="gguf"), smollm2_int4)
    assert [check_kind(Model(), path) for path in (smollm2, smollm2_int4)] == ["gguf", "onnx"]
    assert check_kind(Model(engine="onnx"), smollm2_int4) == "onnx"


def test_only_an_export_with_hidden_states_serves_the_memory(smollm2_int4: Path, tmp_path: Path) -> None:
    """Without memory no state is asked for."""
    config = replace(config_of(smollm2_int4, tmp_path), memory=Memory(enabled=False))
    device = assemble(config, smollm2_int4)
    place = device.agent.engine.open([1, 2], 0)
    (step,) = device.agent.engine.forward([(place, [1, 2])])
    assert step.hidden is None
    place.close()
    device.close()


def skerry_without(package: str, folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    """A device on which the package is not installed."""
    code = f"import sys; sys.modules[{package!r}] = None; from tools.cli import main; main()"
    clean = {name: value for name, value in os.environ.items() if not name.startswith("SKERRY_")}
    ours = {"XDG_CONFIG_HOME": str(folder), "SKERRY_DEVICE_FOLDER": str(folder / "device")}
    ours |= {"SKERRY_MODEL_THREADS": "1", "SKERRY_MODEL_CONTEXT": "512", "SKERRY_API_PORT": "0"}
    ours |= {"SKERRY_MEMORY_ENABLED": "false"}  # preparing it takes some seconds
    return subprocess.run(
        [sys.executable, "-c", code, *arguments],
        cwd=ROOT,
        env=clean | ours,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_without_llama_cpp_a_model_in_onnx_is_served(smollm2_int4: Path, tmp_path: Path) -> None:
    asked = ("ask", "Name a colour.", "--model", str(smollm2_int4), "--max-tokens", "4", "--json")
    done = skerry_without("llama_cpp", tmp_path, *asked)
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["tokens"]


def test_without_llama_cpp_doctor_says_what_a_gguf_file_needs(smollm2: Path, tmp_path: Path) -> None:
    (tmp_path / "agent.toml").write_text(f'[model]\nname = "{smollm2}"\n')
    done = skerry_without("llama_cpp", tmp_path, "doctor", "--config", str(tmp_path / "agent.toml"), "--json")
    findings = {finding["subject"]: finding for finding in json.loads(done.stdout)["findings"]}
    assert findings["engine"]["level"] == "error"
    assert "needs llama_cpp, which is not installed" in findings["engine"]["text"]
    assert findings["engine"]["remedy"].startswith("pip install 'skerry'")


@pytest.mark.parametrize("package", ["onnxruntime", "tokenizers"])
def test_without_onnxruntime_the_remedy_is_named(package: str, smollm2_int4: Path, tmp_path: Path) -> None:
    done = skerry_without(package, tmp_path, "ask", "Name a colour.", "--model", str(smollm2_int4))
    assert done.returncode == 9
    assert done.stderr.startswith(f"skerry: a model in ONNX needs {package}, which is not installed")
    assert "pip install 'skerry[onnx]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.fixture(scope="module")
def agent(smollm2_int4: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningAgent]:
    """Configured by its file."""
    folder = tmp_path_factory.mktemp("agent")
    (folder / "skerry").mkdir()
    (folder / "skerry" / "agent.toml").write_text(
        f'[model]\nname = "{smollm2_int4}"\nengine = "onnx"\nproviders = ["cpu"]\nthreads = 1\n'
    )
    with running(smollm2_int4, folder, {"SKERRY_MEMORY_ENABLED": "false"}) as started:
        yield started


def test_a_running_agent_answers_chats_and_completions(agent: RunningAgent, smollm2_int4: Path) -> None:
    with agent.client() as client:
        model = client.models.list().data[0].id
        assert model == smollm2_int4.name
        chat = client.chat.completions.create(
            model=model,
            messages=[{"role": "user", "content": "What is the capital of France? One word."}],
            max_tokens=12,
            temperature=0,
        )
        assert "Paris" in (chat.choices[0].message.content or "")
        assert chat.choices[0].skerry["fingerprint"] == fingerprint(smollm2_int4)  # type: ignore[attr-defined]
        text = client.completions.create(model=model, prompt="one, two, three, four,", max_tokens=6, temperature=0)
        assert text.choices[0].text
        tokens = len(open_tokenizer(smollm2_int4).encode("one, two, three, four,", start=True))
        assert text.usage is not None
        assert text.usage.prompt_tokens == tokens


def test_feedback_is_refused_where_nothing_learns_from_it(agent: RunningAgent) -> None:
    answer = agent.call("POST", "/v1/feedback", b'{"id": "x", "rating": "good"}', Content_Type="application/json")
    assert answer.status == 400
    assert "a model in GGUF" in answer.json["error"]["message"]


def test_adapters_cannot_be_asked_for(agent: RunningAgent) -> None:
    with agent.client() as client, pytest.raises(openai.BadRequestError, match="no adapter in use"):
        client.completions.create(
            model=client.models.list().data[0].id, prompt="one", extra_body={"skerry": {"adapter": "own"}}
        )
