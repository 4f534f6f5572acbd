"""Whether the agent can listen where it is told to, or does so already."""

from __future__ import annotations

import errno
import socket
from typing import Any

import aiohttp

from agent.api.listen import check_listening
from agent.config import Api
from agent.doctor.finding import Finding
from protocol.errors import ConfigError

_TIMEOUT = 2.0
_EVERYWHERE = {"0.0.0.0": "127.0.0.1", "::": "::1"}  # an address to call for one to listen on


async def check_api(api: Api) -> Finding:
    where = f"{api.host}:{api.port}"
    try:
        check_listening(api)
        family = socket.AF_INET6 if ":" in api.host else socket.AF_INET
        socket.create_server((api.host, api.port), family=family).close()
    except ConfigError as error:
        return Finding("error", "api", str(error), "set api.key, or api.host to 127.0.0.1")
    except OSError as error:
        if error.errno == errno.EADDRINUSE:
            return await _check_taken(api)
        remedy = "choose an api.port from 1024" if error.errno == errno.EACCES else "correct api.host"
        return Finding("error", "api", f"cannot listen on {where}: {error.strerror or error}", remedy)
    return Finding("ok", "api", f"{where} is free")


async def _check_taken(api: Api) -> Finding:
    host = _EVERYWHERE.get(api.host, api.host)
    said = await _ready(f"http://{f'[{host}]' if ':' in host else host}:{api.port}/ready")
    if isinstance(said, dict) and {"model", "active", "queued"} <= said.keys():
        return Finding("ok", "api", f"an agent already serves {said['model']} on {api.host}:{api.port}")
    text = f"another program listens on {api.host}:{api.port}"
    return Finding("error", "api", text, "stop it, or choose another api.port")


async def _ready(url: str) -> Any:
    """What it says there as JSON, None if it is something else."""
    try:
        async with aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=_TIMEOUT)) as http:
            async with http.get(url) as response:
                return await response.json(content_type=None)
    except (aiohttp.ClientError, OSError, ValueError, TimeoutError):
        return None
