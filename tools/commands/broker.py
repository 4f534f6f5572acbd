"""`skerry broker`: an MQTT broker for demos and single sites."""

from __future__ import annotations

import asyncio
import signal
from pathlib import Path

import click

from server.broker.access import set_password
from server.broker.broker import serve


@click.group(name="broker", invoke_without_command=True)
@click.option("--host", default="127.0.0.1", show_default=True, help="Address to listen on.")
@click.option(
    "--port", type=click.IntRange(0, 65_535), default=1883, show_default=True, help="0 takes a free one and prints it."
)
@click.option("--passwords", type=click.Path(path_type=Path), help="Password file; needed beyond this machine.")
@click.pass_context
def broker(context: click.Context, host: str, port: int, passwords: Path | None) -> None:
    """Run an MQTT 3.1.1 broker, which devices of one site find each other through.

    It keeps its state in memory. For production use Mosquitto with the files in deploy/mosquitto/.

    \b
    Examples:
      skerry broker --port 1883
      skerry broker password passwords device-1
      skerry broker --host 0.0.0.0 --passwords passwords
    """
    if context.invoked_subcommand is None:
        asyncio.run(_serve(host, port, passwords))


@broker.command(name="password")
@click.argument("file", type=click.Path(path_type=Path))
@click.argument("user")
@click.password_option(help="Asked for if not given.")
def password(file: Path, user: str, password: str) -> None:
    """Set USER's password in FILE. A device's user is its name, which it may publish under; the edge's is `edge`.

    \b
    Example:
      skerry broker password passwords device-1
    """
    set_password(file, user, password)
    click.echo(f"{file}: {user} may connect")


async def _serve(host: str, port: int, passwords: Path | None) -> None:
    stop = asyncio.Event()
    for number in (signal.SIGTERM, signal.SIGINT):
        asyncio.get_running_loop().add_signal_handler(number, stop.set)
    running = await serve(host, port, passwords)
    shown = f"[{host}]" if ":" in host else host
    click.echo(f"skerry broker: ready on mqtt://{shown}:{running.port}")
    await stop.wait()
    await running.shutdown()
