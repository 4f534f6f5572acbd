"""`skerry eval`: what pays, measured on real text."""

from __future__ import annotations

import click

from tools.commands.eval.flywheel import flywheel
from tools.commands.eval.fusion import fusion
from tools.commands.eval.learning import news, text
from tools.commands.eval.memory import memory
from tools.commands.eval.privacy import privacy


@click.group("eval", epilog="Example: skerry eval news --json")
def eval() -> None:
    """Measure on real text what pays. Models and articles are fetched when they are missing."""


for _command in (flywheel, fusion, memory, news, privacy, text):
    eval.add_command(_command)
