"""`skerry models`: model files, from a hub or a build machine onto this device."""

from __future__ import annotations

import click

from tools.commands.models.compare import compare_models
from tools.commands.models.export import export_model
from tools.commands.models.fit import fit_models
from tools.commands.models.inspect import inspect_model
from tools.commands.models.quantize import quantize_model
from tools.commands.models.stored import add, list_models, path, pull_models, rm, verify


@click.group(epilog="Example: skerry models pull smollm2-135m")
def models() -> None:
    """Model files: list, pull, verify, add and remove them; make them, compare them, choose one for a board.

    Files lie in the folder that SKERRY_MODELS names, else in your data folder.
    """


_STORED = (list_models, pull_models, verify, path, add, rm)
_WORKSHOP = (inspect_model, export_model, quantize_model, compare_models, fit_models)

for _command in (*_STORED, *_WORKSHOP):
    models.add_command(_command)
