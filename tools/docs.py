"""The parts of the documentation that are made from code: `python -m tools.docs --write`, or `--check`."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from pathlib import Path
from typing import Any

import click
import msgspec

from agent.config import AgentConfig
from protocol import errors
from protocol.config import keys
from server.cloud.config import ServeConfig
from server.coordinator.config import CoordinatorConfig
from server.edge.config import EdgeConfig
from tools.cli import skerry

FOLDER = Path(__file__).parent.parent / "docs"
_NOTE = "<!-- Made from the code by `python -m tools.docs --write`; a test compares them. -->"
_WIDTH = 100  # of a command's help

EXAMPLES = {
    "agent": """\
[model]
name = "smollm2-135m"
context = 4096

[policy]
measure = "entropy"
goal = "price"
price = 0.3
audit = 0.01

[cloud]
url = "http://cloud.example:8431"
key = "the key that `skerry serve keys add` printed"
mode = "take"
deadline_ms = 500
burst = 4

[device]
fleet = "farm"
cluster = "north-barn"
name = "barn-3"

[memory]
megabytes = 128
wrong_bound = 0.1

[peers]
broker = "mqtts://broker.example:8883"
password = "the password that the broker knows for barn-3"

[api]
port = 8430
""",
    "serve": """\
[listen]
host = "0.0.0.0"
port = 8431

[upstream]
kind = "embedded"
model = "qwen2.5-coder-0.5b"
context = 16384

[limits]
sessions = 16
sessions_per_key = 4
asks_per_second = 50
""",
    "edge": """\
[edge]
fleet = "farm"
cluster = "north-barn"

[broker]
url = "mqtt://127.0.0.1:1883"

[neighbours]
brokers = ["south-barn=mqtt://10.0.0.2:1883"]
""",
    "coordinator": """\
[coordinator]
fleet = "farm"

[clusters]
brokers = ["north-barn=mqtt://10.0.0.1:1883", "south-barn=mqtt://10.0.0.2:1883"]
passwords = ["north-barn=the password of the user coordinator there"]

[groups]
by = "similarity"
""",
}


def configuration() -> str:
    return f"""\
# Configuration
{_NOTE}

Each process reads one TOML file. Every key is also an environment variable, which wins over the file, and what the
command line gives wins over both. A wrong section, key or value ends the process with exit code
[{errors.ConfigError.exit_code}](exit-codes.md) and a message that names the file or variable, the key and what is
allowed. `skerry doctor` checks the agent's configuration and finds misspelt variables.

All keys have defaults. Without `--config` the file is the one in your configuration folder, if it exists:
`~/.config/skerry/agent.toml` for `skerry agent`, `skerry ask` and `skerry doctor`, `~/.config/skerry/serve.toml` for
`skerry serve`, `~/.config/skerry/edge.toml` for `skerry edge`, `~/.config/skerry/coordinator.toml` for
`skerry coordinator` (`XDG_CONFIG_HOME` names another place than `~/.config`).

## agent.toml

{_keys(AgentConfig)}

Example:

```toml
{EXAMPLES["agent"]}```

## serve.toml

{_keys(ServeConfig)}

Example:

```toml
{EXAMPLES["serve"]}```

## edge.toml

{_keys(EdgeConfig)}

Example:

```toml
{EXAMPLES["edge"]}```

## coordinator.toml

{_keys(CoordinatorConfig)}

Example:

```toml
{EXAMPLES["coordinator"]}```

## Other variables and files

| Variable | Default | Meaning |
|---|---|---|
| `SKERRY_MODELS` | `~/.local/share/skerry/models` | folder of the model files |
| `HF_ENDPOINT` | `https://huggingface.co` | the hub that `skerry models pull` asks |

Your own catalog entries lie in `~/.config/skerry/models.d/*.toml`; `skerry models add` writes them.
"""


def cli() -> str:
    helps = [f"{'#' * (1 + len(path))} {' '.join(path)}\n\n```text\n{text}\n```" for path, text in command_helps()]
    return "\n\n".join([f"# Command line\n{_NOTE}", *helps]) + "\n"


def exit_codes() -> str:
    rows = [
        ("0", "", "success"),
        ("1", "`SkerryError`", "any other error; also: `skerry doctor` found an error"),
        ("2", "", "wrong arguments on the command line"),
        *((str(error.exit_code), f"`{error.__name__}`", meaning) for error, meaning in error_meanings()),
        ("130", "", "interrupted with Ctrl-C"),
        ("141", "", "the reader of the output went away"),
    ]
    return f"""\
# Exit codes
{_NOTE}

An error that you can do something about is one line on stderr: what is wrong, and what to do.

{_table(("Code", "Error", "Meaning"), sorted(rows, key=lambda row: int(row[0])))}
"""


DOCUMENTS: dict[str, Callable[[], str]] = {
    "configuration.md": configuration,
    "cli.md": cli,
    "exit-codes.md": exit_codes,
}


def command_helps() -> Iterator[tuple[tuple[str, ...], str]]:
    """Every command and subcommand: its words and its help, as a terminal of 100 columns shows it."""
    yield from _helps(skerry, ("skerry",), None)


def _helps(
    command: click.Command, path: tuple[str, ...], parent: click.Context | None
) -> Iterator[tuple[tuple[str, ...], str]]:
    settings: dict[str, Any] = {**command.context_settings, "terminal_width": _WIDTH, "max_content_width": _WIDTH}
    context = click.Context(command, parent=parent, info_name=path[-1], **settings)
    yield path, command.get_help(context)
    if isinstance(command, click.Group):
        for name in command.list_commands(context):
            child = command.get_command(context, name)
            assert child is not None
            yield from _helps(child, (*path, name), context)


def error_meanings() -> Iterator[tuple[type[errors.SkerryError], str]]:
    """Every error below the base, with what the tree in protocol/errors.py says of it; else its name in words."""
    told = dict(re.findall(r"[├└]── (\w+) *(.*)", errors.__doc__ or ""))
    for error in _below(errors.SkerryError):
        yield error, told.get(error.__name__) or re.sub("(?<=[a-z])(?=[A-Z])", " ", error.__name__).lower()


def _below(error: type[errors.SkerryError]) -> Iterator[type[errors.SkerryError]]:
    for child in error.__subclasses__():
        if child.__module__ == errors.__name__:  # others refine one of these and have its exit code
            yield child
            yield from _below(child)


def _keys(schema: type[msgspec.Struct]) -> str:
    rows = [
        (f"`{key.section}.{key.name}`", f"`{key.env}`", f"`{json.dumps(key.default)}`", key.allowed, key.description)
        for key in keys(schema)
    ]
    return _table(("Key", "Variable", "Default", "Allowed", "Meaning"), rows)


def _table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(cell.replace("|", "\\|") for cell in line) + " |" for line in lines)


@click.command(epilog="Example: python -m tools.docs --check")
@click.option("--write/--check", default=False, help="write the files, or fail if they are stale (the default)")
def main(write: bool) -> None:
    """Make docs/configuration.md, docs/cli.md and docs/exit-codes.md from the code."""
    stale = []
    for name, make in DOCUMENTS.items():
        path, text = FOLDER / name, make()
        if not path.exists() or path.read_text(encoding="utf-8") != text:
            stale.append(name)
            if write:
                path.write_text(text, encoding="utf-8")
    if stale and not write:
        click.echo(f"stale: {', '.join(stale)}; run `python -m tools.docs --write`", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
