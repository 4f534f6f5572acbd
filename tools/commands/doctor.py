"""`skerry doctor`: what this machine is, and whether model, cloud and configuration are all right."""

from __future__ import annotations

import json
import os
import platform
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict
from pathlib import Path

import click

from agent.config import AgentConfig
from agent.doctor.examine import examine_agent, examine_machine, examine_variables
from agent.doctor.finding import Finding
from agent.doctor.machine import Machine, read_machine
from models.engine.threads import physical_cores
from models.store import Places
from protocol.config import keys
from protocol.errors import ConfigError
from server.cloud.config import ServeConfig
from tools.settings import configuration

_STYLES = {"ok": "green", "warn": "yellow", "error": "red"}


@click.command(epilog="Example: skerry doctor --config agent.toml")
@click.option("--config", type=click.Path(path_type=Path), help="the agent's TOML file")
@click.option("--json", "as_json", is_flag=True, help="one JSON object instead of the list")
def doctor(config: Path | None, as_json: bool) -> None:
    """Check this machine, the model, the cloud and the configuration; each finding comes with its remedy.

    The exit code is 1 if any finding is an error, else 0.
    """
    machine = read_machine(Path("/"), platform.machine(), physical_cores())
    findings: list[Finding] = []
    for finding in _examine(machine, config):
        findings.append(finding)
        if not as_json:
            _show(finding)
    if as_json:
        click.echo(json.dumps({"machine": asdict(machine), "findings": [asdict(finding) for finding in findings]}))
    else:
        click.echo(_summary(findings))
    if any(finding.level == "error" for finding in findings):
        sys.exit(1)


def _examine(machine: Machine, config: Path | None) -> Iterator[Finding]:
    now = time.time()
    yield from examine_machine(machine, now)
    known = {key.env for schema in (AgentConfig, ServeConfig) for key in keys(schema)} | {"SKERRY_MODELS"}
    yield from examine_variables(os.environ, known)
    try:
        settings = configuration(AgentConfig, "agent", config, os.environ)
    except ConfigError as error:
        yield Finding("error", "configuration", str(error), "correct it; what depends on it was not checked")
        return
    yield Finding("ok", "configuration", f"{config} is valid" if config else "valid")
    yield from examine_agent(settings, Places.of(os.environ), machine, now)


def _show(finding: Finding) -> None:
    level = click.style(f"{finding.level:<5}", fg=_STYLES[finding.level], bold=finding.level != "ok")
    click.echo(f"{level}  {finding.subject:<13}  {finding.text}")
    if finding.remedy:
        click.echo(f"{'':<22}→ {finding.remedy}")


def _summary(findings: list[Finding]) -> str:
    counts = {level: sum(finding.level == level for finding in findings) for level in ("error", "warn")}
    if not any(counts.values()):
        return "All is well."
    words = {"error": "error", "warn": "warning"}
    return ", ".join(f"{count} {words[level]}{'s' if count > 1 else ''}" for level, count in counts.items() if count)
