"""The `skerry` command. Subcommands are imported when they are called, so that each starts fast."""

from __future__ import annotations

import importlib
import logging
import sys

import click

from protocol.errors import SkerryError

_COMMANDS = {
    "adapt": "what the device learns for its own model: look at it, train now, choose, go back",
    "agent": "run the agent: an OpenAI-compatible API on this device",
    "ask": "ask one question and watch who writes which token",
    "bench": "measure speed, side by side",
    "broker": "run an MQTT broker, for demos and single sites",
    "coordinator": "bring together what the clusters of a fleet learned about when to ask",
    "demo": "two devices that share what they learn, a cloud, and an outage, in three minutes",
    "doctor": "check this machine, the model, the cloud and the configuration",
    "edge": "run the edge service of a cluster: its directory, and the bridge to its neighbours",
    "eval": "measure on real text what pays",
    "feedback": "tell the running agent what an answer was worth",
    "memory": "look at what the device has learned; export, import, clear",
    "models": "get and check model files",
    "policy": "when the device asks for help: look at it, explain it, set what it aims for",
    "serve": "run the cloud resolver: a large model that helps with single tokens",
    "simulate": "a fleet of simulated devices at a real broker and a real edge service",
}


class _Lazy(click.Group):
    def list_commands(self, ctx: click.Context) -> list[str]:
        return sorted(_COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in _COMMANDS:
            return None
        command: click.Command = getattr(importlib.import_module(f"tools.commands.{cmd_name}"), cmd_name)
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(sorted(_COMMANDS.items()))


@click.group(cls=_Lazy, context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100})
@click.version_option(package_name="skerry")
def skerry() -> None:
    """Edge runtime for hybrid language models: offline first, then peers, then cloud.

    Example: skerry ask "Why is the sky blue?"
    """


def main() -> None:
    """Entry point: a user's error is one line and an exit code, never a traceback."""
    logging.lastResort = logging.NullHandler()  # a command that wants a log sets one up
    try:
        skerry(standalone_mode=False)
    except SkerryError as error:
        click.echo(f"skerry: {error}", err=True)
        sys.exit(error.exit_code)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        sys.exit(130)
    except BrokenPipeError:
        sys.stderr.close()
        sys.exit(141)
    except OSError as error:  # such as a full disk behind a redirected output
        click.echo(f"skerry: {error.strerror or error}", err=True)
        sys.exit(1)


if __name__ == "__main__":
    main()
