"""`skerry adapt`: adapters that the device learns, and what they are learned from."""

from __future__ import annotations

import click

from tools.commands.adapt.lessons import add, forget
from tools.commands.adapt.run import run
from tools.commands.adapt.use import list_adapters, rollback, status, use


@click.group(epilog="Example: skerry adapt status")
def adapt() -> None:
    """What the device learns for its own model: look at it, train now, choose, go back."""


for _command in (add, forget, run, status, list_adapters, use, rollback):
    adapt.add_command(_command)
