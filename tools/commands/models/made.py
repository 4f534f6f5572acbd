"""What `skerry models export` and `quantize` share: progress while they work, and what they say of the result."""

from __future__ import annotations

import json
import os
import re
import shlex
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import click
import msgspec

from models.fingerprint import size_of
from models.workshop.job import Job
from models.workshop.manifest import Manifest
from protocol.errors import WorkshopError


@contextmanager
def working() -> Iterator[Job]:
    """A job whose lines go to stderr with the time that has passed. Raises WorkshopError if a library is missing."""
    began = time.monotonic()

    def say(line: str) -> None:
        passed = int(time.monotonic() - began)
        click.echo(f"{passed // 60:>3}:{passed % 60:02}  {line}", err=True)

    try:
        yield Job(os.environ, say)
    except ModuleNotFoundError as error:
        raise WorkshopError(f"{error.name} is not installed: pip install 'skerry[export]'") from None


def show(target: Path, made: Manifest, as_json: bool) -> None:
    size = size_of(target)
    if as_json:
        click.echo(json.dumps({"path": str(target), "bytes": size} | msgspec.to_builtins(made), indent=2))
        return
    click.echo(f"{target}: {made.architecture}, {made.quantisation}, {size / 1e6:,.1f} MB")
    for name, value in made.checks.items():
        click.echo(f"  {name.replace('_', ' ')}: {value:.3g}")
    place = shlex.quote(str(target))
    click.echo(f"Look into it:           skerry models inspect {place}")
    click.echo(f"Take it to the catalog: skerry models add {_id(target)} --file {place}")


def _id(target: Path) -> str:
    """A catalog id after the file's name."""
    name = re.sub(r"[^a-z0-9._-]+", "-", target.name.lower().removesuffix(".gguf"))
    return name.strip("._-") or "my-model"
