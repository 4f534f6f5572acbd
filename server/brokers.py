"""What the services that speak MQTT are configured with alike: certificates, log, and a value for each cluster."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated, Literal

import msgspec
from msgspec import Meta

from protocol.errors import ConfigError
from protocol.topics import Cluster
from protocol.transport.mqtt import MqttOptions


class Tls(msgspec.Struct, frozen=True):
    ca: Annotated[str, Meta(description="File of the authority that signed the brokers' certificates.")] = ""
    certificate: Annotated[str, Meta(description="File of this service's certificate for the brokers.")] = ""
    key: Annotated[str, Meta(description="File of that certificate's private key.")] = ""


class Log(msgspec.Struct, frozen=True):
    level: Annotated[
        Literal["debug", "info", "warning", "error"],
        Meta(description="Least severe messages logged. Keys and tokens never are."),
    ] = "info"


def connection(url: str, client_id: str, user: str, password: str, tls: Tls) -> MqttOptions:
    return MqttOptions(
        url=url,
        client_id=client_id,
        username=user if password else "",
        password=password.strip(),  # a secret file ends with a newline
        ca=tls.ca,
        certificate=tls.certificate,
        key=tls.key,
    )


def by_cluster(pairs: Sequence[str], key: str) -> dict[str, str]:
    """From CLUSTER=VALUE each. `key`: what the configuration calls them. Raises ConfigError."""
    found: dict[str, str] = {}
    for pair in pairs:
        name, equals, value = pair.partition("=")
        if not equals or not value or name in found:
            raise ConfigError(f"{key}: each is CLUSTER=VALUE, and names a cluster of its own; {name!r} does not")
        Cluster("fleet", name)  # raises ConfigError for what can't be part of a topic
        found[name] = value
    return found
