"""Who may connect to the embedded broker, and what they may publish and hear."""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from protocol.errors import ConfigError
from protocol.topics import COORDINATOR, EDGE, ROOT, is_level

_HEARD = {  # below fleet and cluster
    "{user}/#",
    "+/status",
    "+/directory",
    "+/memory/new",
    "+/memory/ask/{user}",
    "+/memory/answer/{user}",
    "+/round",
    "+/round/secure/{user}",
    "+/policy",
    "+/adapters/round",
    "+/adapters/agreed",
}
_HEARD_BY = {EDGE: {"#"}, COORDINATOR: {"edge/report"}}
_ITERATIONS = 10_000  # 10 ms: a broker checks the passwords of a whole cluster when it comes back


@dataclass(frozen=True, slots=True)
class _Hash:
    salt: bytes
    digest: bytes
    iterations: int


class Access:
    """Without a password file everybody on this machine may do everything. With one it is as in deploy/mosquitto/acl:
    a user publishes below its own name, `skerry/1/+/+/<user>/#`, and hears what is for all, or for itself."""

    def __init__(self, hashes: Mapping[str, _Hash] | None = None) -> None:
        self._hashes = hashes

    @classmethod
    def of(cls, path: Path | None) -> Access:
        """Raises ConfigError if the file can't be read or is no password file."""
        return cls() if path is None else cls({name: _parse(path, line) for name, line in _lines(path)})

    def admits(self, user: str | None, password: str | None) -> bool:
        if self._hashes is None:
            return True
        known = self._hashes.get(user or "")
        given = known or _Hash(b"", b"", _ITERATIONS)  # an unknown name takes as long as a wrong password
        digest = hashlib.pbkdf2_hmac("sha512", (password or "").encode(), given.salt, given.iterations)
        return hmac.compare_digest(digest, given.digest) and known is not None

    def may_publish(self, user: str | None, topic: str) -> bool:
        if self._hashes is None:
            return True
        levels = topic.split("/")
        return topic.startswith(ROOT + "/") and len(levels) > 5 and levels[4] == user

    def may_hear(self, user: str | None, filter: str) -> bool:
        if self._hashes is None:
            return True
        patterns = _HEARD | _HEARD_BY.get(user or "", set())
        return any(_covers(f"{ROOT}/+/+/{pattern.format(user=user)}", filter) for pattern in patterns)


def _covers(pattern: str, filter: str) -> bool:
    """Does the pattern match whatever the filter matches?"""
    levels, wanted = pattern.split("/"), filter.split("/")
    if levels[-1] == "#":
        levels, wanted = levels[:-1], wanted[: len(levels) - 1]
    return len(levels) == len(wanted) and all(
        allowed == level or (allowed == "+" and level != "#") for allowed, level in zip(levels, wanted, strict=True)
    )


def set_password(path: Path, user: str, password: str) -> None:
    """Adds the user or changes its password. The file is Mosquitto's (`mosquitto_passwd`). Raises ConfigError."""
    if not is_level(user):
        raise ConfigError(f"{user!r} cannot be a user: 1 to 64 of the characters A-Z a-z 0-9 _ . -")
    salt = os.urandom(12)
    digest = hashlib.pbkdf2_hmac("sha512", password.encode(), salt, _ITERATIONS)
    line = "$".join(["", "7", str(_ITERATIONS), *(base64.b64encode(part).decode() for part in (salt, digest))])
    lines = dict(_lines(path)) if path.exists() else {}
    lines[user] = line
    written = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with os.fdopen(os.open(written, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o600), "w") as file:
            file.write("".join(f"{name}:{rest}\n" for name, rest in lines.items()))
            file.flush()
            os.fsync(file.fileno())
        written.replace(path)
    except OSError as error:
        raise ConfigError(f"{path}: cannot be written: {error.strerror}") from None
    finally:
        written.unlink(missing_ok=True)


def _lines(path: Path) -> list[tuple[str, str]]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except UnicodeDecodeError:
        raise ConfigError(f"{path}: not a password file") from None
    except OSError as error:
        raise ConfigError(f"{path}: the password file cannot be read: {error.strerror}") from None
    return [(name, rest) for name, _, rest in (line.partition(":") for line in lines if line.strip())]


def _parse(path: Path, line: str) -> _Hash:
    try:
        empty, kind, iterations, salt, digest = line.split("$")
        if empty or kind != "7" or not 1 <= int(iterations) <= 10_000_000:
            raise ValueError
        return _Hash(base64.b64decode(salt, validate=True), base64.b64decode(digest, validate=True), int(iterations))
    except (ValueError, binascii.Error):
        raise ConfigError(
            f"{path}: not a password file as `skerry broker password` or Mosquitto 2's mosquitto_passwd write it"
        ) from None
