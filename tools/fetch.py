"""A model's file or folder, fetched first if it is a catalog id that is not there yet."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import click

from models.catalog import Catalog, Entry
from models.pull import Pulled, pull
from models.store import Places, resolve_model, state
from tools.progress import ProgressBar


def model_file(name_or_path: str, places: Places) -> Path:
    """Raises UnknownModel, BadModelFile, PullError."""
    catalog = Catalog(places.entries)
    if name_or_path in catalog:
        entry = catalog.find(name_or_path).entry
        if state(entry, places.models) in ("absent", "partial"):
            pull_entry(entry, places)
    return resolve_model(name_or_path, places)


def pull_entry(entry: Entry, places: Places) -> Pulled:
    """Pulls with a progress bar on stderr, and says there which sources failed."""
    bar = ProgressBar(entry.id, sys.stderr, time.monotonic)
    try:
        result = pull(entry, places.models, env=os.environ, progress=bar)
    finally:
        bar.close()
    for failure in result.failed:
        click.echo(f"{entry.id}: passed over {failure}", err=True)
    how = f"from {result.source}" if result.source else "already there, nothing to do"
    click.echo(f"{entry.id}: {how}: {result.path}", err=True)
    return result
