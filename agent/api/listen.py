"""Which addresses are this machine's own."""

from __future__ import annotations

import ipaddress
import re

from agent.config import Api as ApiConfig
from protocol.errors import ConfigError


def check_listening(config: ApiConfig) -> None:
    """Raises ConfigError if others could reach the API without a key."""
    if not config.key and not is_loopback(config.host):
        raise ConfigError(
            f"api.host = {config.host} can be reached by others: set api.key (SKERRY_API_KEY), or listen on 127.0.0.1"
        )


def host_of(header: str) -> str:
    """The name or address in a `Host` header, without port and brackets; never fails."""
    found = re.fullmatch(r"\[?([^\]]*?)\]?(?::\d*)?", header)
    return found[1].lower() if found else ""


def is_loopback(host: str) -> bool:
    if host == "localhost":
        return True
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False
