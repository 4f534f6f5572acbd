"""`skerry doctor` as a person runs it, against real processes and sockets."""

from __future__ import annotations

import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from models.store import Places
from tools.processes import Child, start_cloud


class Doctor:
    """`skerry doctor` with a configuration folder of its own; `env` is laid over the environment."""

    def __init__(self, home: Path, models: Path) -> None:
        clean = {name: value for name, value in os.environ.items() if not name.startswith("SKERRY_")}
        self._env = clean | {"XDG_CONFIG_HOME": str(home), "SKERRY_MODELS": str(models), "SKERRY_MODEL_THREADS": "1"}

    def run(self, *arguments: str, **env: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-m", "tools.cli", "doctor", *arguments],
            env=self._env | env,
            capture_output=True,
            text=True,
            timeout=120,
            check=False,
        )

    def findings(self, *, code: int, **env: str) -> dict[str, Any]:
        """By subject; the last one of each."""
        result = self.run("--json", **{"SKERRY_API_PORT": "0"} | env)
        assert result.returncode == code, result.stdout + result.stderr
        return {finding["subject"]: finding for finding in json.loads(result.stdout)["findings"]}


@pytest.fixture
def doctor(tmp_path: Path, smollm2: Path) -> Doctor:
    return Doctor(tmp_path, smollm2.parent)


@pytest.fixture
def empty(tmp_path: Path) -> Doctor:
    """Without a model, so that what is examined besides it is there at once."""
    return Doctor(tmp_path, tmp_path / "models")


def test_all_is_well_alone(doctor: Doctor) -> None:
    result = doctor.run("--json", SKERRY_API_PORT="0")
    assert (result.returncode, result.stderr) == (0, "")
    said = json.loads(result.stdout)
    assert said["machine"]["cores"] >= 1
    assert {"ok", "warn"} >= {finding["level"] for finding in said["findings"]}
    by_subject = {finding["subject"]: finding["text"] for finding in said["findings"]}
    assert "SHA-256 as in the catalog" in by_subject["model"]
    assert "tok/s" in by_subject["engine"]
    assert "works alone" in by_subject["cloud"]


def test_a_missing_model_is_an_error_with_its_remedy(empty: Doctor) -> None:
    result = empty.run(SKERRY_API_PORT="0")
    assert result.returncode == 1
    assert "error  model          smollm2-135m is not on this machine" in result.stdout
    assert "→ skerry models pull smollm2-135m" in result.stdout
    assert result.stdout.rstrip().endswith("1 error")


def test_a_wrong_configuration_is_a_finding(empty: Doctor, tmp_path: Path) -> None:
    file = tmp_path / "agent.toml"
    file.write_text("[policy]\nthreshold = 7\n")
    result = empty.run("--config", str(file))
    assert result.returncode == 1
    assert "policy.threshold = 7 is not allowed" in result.stdout
    assert "machine" in result.stdout


def test_wrong_and_misspelt_variables_are_named(empty: Doctor) -> None:
    assert "policy.threshold" in empty.findings(code=1, SKERRY_POLICY_THRESHOLD="9")["configuration"]["text"]
    assert "did you mean SKERRY_CLOUD_URL?" in empty.findings(code=1, SKERRY_CLOUD_ULR="x")["configuration"]["text"]
    assert "did you mean SKERRY_CLOUD_URL?" in empty.run(SKERRY_CLUOD_URL="x").stdout


def test_a_cloud_that_refuses_and_one_that_is_silent(empty: Doctor) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        silent = empty.findings(code=1, SKERRY_CLOUD_URL=url)["cloud"]
    refused = empty.findings(code=1, SKERRY_CLOUD_URL=url)["cloud"]
    assert "says nothing" in silent["text"]
    assert "refuses connections" in refused["text"]


def test_a_real_cloud_with_the_right_and_the_wrong_key(doctor: Doctor, empty: Doctor, tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "SKERRY_LISTEN_KEYS_FILE": str(tmp_path / "keys.json")}
    made = subprocess.run(
        [sys.executable, "-m", "tools.cli", "serve", "keys", "add", "device"],
        env=os.environ | environment,
        capture_output=True,
        text=True,
        check=True,
    )
    key = max(made.stdout.split(), key=len)
    cloud, port = start_cloud("smollm2-135m", 1, env=environment)
    with cloud:
        url = {"SKERRY_CLOUD_URL": f"http://127.0.0.1:{port}"}
        right = doctor.findings(code=0, SKERRY_CLOUD_KEY=key, **url)
        wrong = empty.findings(code=1, SKERRY_CLOUD_KEY="wrong", **url)
        none = empty.findings(code=1, **url)
    assert right["cloud"]["level"] == "ok"
    assert "token ids" in right["tokenizer"]["text"]
    assert "refuses the key" in wrong["cloud"]["text"]
    assert "none is set" in none["cloud"]["text"]


def test_a_port_that_an_agent_holds_already(empty: Doctor, smollm2: Path, tmp_path: Path) -> None:
    environment = {"XDG_CONFIG_HOME": str(tmp_path), "SKERRY_MODELS": str(Places.of(os.environ).models)}
    with Child(["agent", "--port", "0", "--threads", "1"], env=environment) as agent:
        port = agent.wait_for(r"ready on \S*?:(\d+)")[1]
        finding = empty.findings(code=1, SKERRY_API_PORT=port)["api"]
    assert (finding["level"], finding["text"]) == (
        "ok",
        f"an agent already serves smollm2-135m on 127.0.0.1:{port}",
    )
