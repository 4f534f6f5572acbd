"""`skerry feedback`: tells the running agent what an answer was worth."""

from __future__ import annotations

import json
import os
import urllib.error
import urllib.request
from http.client import HTTPException
from pathlib import Path
from typing import Any

import click

from agent.config import AgentConfig, Api
from protocol.errors import AuthError, LinkError, RequestError, SkerryError
from tools.settings import configuration

_TIMEOUT = 60.0  # seconds
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # an address to call for one to listen on


@click.command(epilog='Example: skerry feedback chatcmpl-3f2a "The capital of Australia is Canberra."')
@click.argument("words", nargs=-1, metavar="[ID] [CORRECTION]")
@click.option("--good", "rating", flag_value="good", help="The answer was right.")
@click.option("--bad", "rating", flag_value="bad", help="It was wrong: nothing is to be learned from it.")
@click.option(
    "--messages", type=click.Path(path_type=Path, dir_okay=False), help="JSON file: the chat that it answers."
)
@click.option("--prompt", help="The text that it continues.")
@click.option("--private", is_flag=True, help="For this device's own adapter only.")
@click.option("--url", help="The agent's address. [default: as configured]")
@click.option("--config", type=click.Path(path_type=Path), help="The agent's configuration file.")
@click.option("--json", "as_json", is_flag=True, help="Print JSON instead of text.")
def feedback(
    words: tuple[str, ...],
    rating: str | None,
    messages: Path | None,
    prompt: str | None,
    private: bool,
    url: str | None,
    config: Path | None,
    as_json: bool,
) -> None:
    """Correct an answer, or rate it. ID is the `id` of the response, which the agent remembers for an hour; without
    it, say with --messages or --prompt what the right answer is to.

    \b
    Examples:
      skerry feedback chatcmpl-3f2a --bad
      skerry feedback --messages chat.json "Canberra."
      skerry feedback --prompt "The capital of Australia is" " Canberra."
    """
    body: dict[str, Any] = {"private": True} if private else {}
    if messages is not None:
        body["messages"] = _read(messages)
    if prompt is not None:
        body["prompt"] = prompt
    named = () if messages is not None or prompt is not None else ("id",)
    said = () if rating else ("correction",)
    if len(words) != len((*named, *said)):
        raise click.UsageError("give ID or --messages or --prompt, and a correction or --good or --bad")
    body |= dict(zip((*named, *said), words, strict=True)) | ({"rating": rating} if rating else {})
    api = configuration(AgentConfig, "agent", config, os.environ).api
    taken = _send(url or _url(api), api.key, body)
    told = f"{taken['lessons']} lessons learned, {taken['dropped']} dropped"
    click.echo(json.dumps(taken) if as_json else told)


def _read(path: Path) -> Any:
    """A list of messages, or an object that has one. Raises RequestError."""
    try:
        given = json.loads(path.read_bytes())
    except (OSError, ValueError, RecursionError) as error:
        raise RequestError(f"{path}: no JSON can be read there: {error}") from None
    return given.get("messages") if isinstance(given, dict) else given


def _url(api: Api) -> str:
    host = _EVERYWHERE.get(api.host, api.host)
    return f"http://{f'[{host}]' if ':' in host else host}:{api.port}"


def _send(url: str, key: str, body: dict[str, Any]) -> dict[str, Any]:
    """Raises RequestError, AuthError, LinkError."""
    headers = {"Content-Type": "application/json"} | ({"Authorization": f"Bearer {key}"} if key else {})
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # an agent is near: no proxy in between
    try:
        request = urllib.request.Request(f"{url.rstrip('/')}/v1/feedback", json.dumps(body).encode(), headers)
        with opener.open(request, timeout=_TIMEOUT) as answer:
            taken: dict[str, Any] = json.load(answer)
            return taken
    except urllib.error.HTTPError as error:
        raise _refused(error) from None
    except (OSError, HTTPException, ValueError) as error:
        why = getattr(error, "reason", error)
        raise LinkError(f"no agent answers at {url} ({why}): start `skerry agent`, or give its --url") from None


def _refused(error: urllib.error.HTTPError) -> SkerryError:
    try:
        message = str(json.load(error)["error"]["message"])
    except (ValueError, LookupError, TypeError, OSError):
        message = f"the agent answered with status {error.code}"
    kind = AuthError if error.code == 401 else RequestError if error.code < 500 else LinkError
    return kind(message)
