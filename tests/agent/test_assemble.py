"""What a configuration says about peers."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from agent.assemble import assemble, spaces_named, usable
from agent.config import AgentConfig, Device, Memory, Model, Policy
from agent.memory.key import KEY_BYTES
from protocol.errors import ConfigError
from protocol.memory import Entry
from tests.brokers import ROOT


def entry(width: int, token: int) -> Entry:
    return Entry(b"s" * 16, b"k" * width, b"t" * 8, token, 0.5, 1, 0, b"o" * 32)


def test_spaces_are_named_by_their_hex_digits() -> None:
    assert spaces_named(["0123456789abcdef" * 2, "AB" * 16]) == {bytes.fromhex("0123456789abcdef" * 2), b"\xab" * 16}


@pytest.mark.parametrize("wrong", ["abcd", " AB ", "", "g" * 32, "ab" * 17, "ab" * 16 + "\n", "ab " * 16])
def test_what_is_no_space_is_named_in_the_error(wrong: str) -> None:
    with pytest.raises(ConfigError, match="write the 32 hex digits that `skerry memory stats` shows") as caught:
        spaces_named(["ab" * 16, wrong])
    assert repr(wrong) in str(caught.value)


@pytest.mark.parametrize(
    ("width", "token", "wanted"),
    [
        (KEY_BYTES, 0, True),
        (KEY_BYTES, 99, True),
        (KEY_BYTES, 100, False),
        (KEY_BYTES, -1, False),
        (KEY_BYTES + 1, 0, False),
        (8192, 0, False),
    ],
)
def test_only_what_the_model_can_make_and_read_is_usable(width: int, token: int, wanted: bool) -> None:
    assert usable(vocab=100)(entry(width, token)) is wanted


def test_what_only_rounds_need_is_not_loaded_without_a_broker() -> None:
    """Their messages and cryptography take some tens of milliseconds of each `skerry ask`."""
    code = (
        "import sys, tools.commands.ask; print([name for name in sys.modules if 'secure' in name or 'federat' in name])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize("learn", [True, False])
def test_who_does_not_learn_audits_nothing(smollm2: Path, tmp_path: Path, learn: bool) -> None:
    config = AgentConfig(
        model=Model(context=256, sequences=1, threads=1),
        policy=Policy(learn=learn, audit=0.1),
        device=Device(folder=str(tmp_path)),
        memory=Memory(enabled=False),
    )
    device = assemble(config, smollm2)
    assert device.agent.options.policy.decide(0.0, 0, 0).propensity == (0.1 if learn else 0.0)
    assert (device.learner is not None) is learn
    device.close()
