"""mqtts:// with certificates made on the fly: both sides prove who they are."""

from __future__ import annotations

import datetime
import ipaddress
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives import serialization as s
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from protocol.errors import ConfigError
from protocol.transport.mqtt import MqttOptions, MqttTransport
from tests.brokers import Mosquitto
from tests.protocol.transport.worlds import Inbox, wait_until

Key = ec.EllipticCurvePrivateKey


@dataclass
class Authority:
    """A certificate authority, and the folder that its files are in."""

    folder: Path
    name: str

    def __post_init__(self) -> None:
        self.key = ec.generate_private_key(ec.SECP256R1())
        self.file = self.folder / f"{self.name}.pem"
        self.file.write_bytes(self._sign(self.name, self.key, ca=True))

    def issue(self, name: str) -> tuple[str, str]:
        """Certificate and key for `name` at 127.0.0.1."""
        key = ec.generate_private_key(ec.SECP256R1())
        certificate, private = self.folder / f"{name}.crt", self.folder / f"{name}.key"
        certificate.write_bytes(self._sign(name, key, ca=False))
        private.write_bytes(key.private_bytes(s.Encoding.PEM, s.PrivateFormat.PKCS8, s.NoEncryption()))
        return str(certificate), str(private)

    def _sign(self, name: str, key: Key, *, ca: bool) -> bytes:
        now = datetime.datetime.now(datetime.UTC)
        builder = (
            x509.CertificateBuilder()
            .subject_name(_named(name))
            .issuer_name(_named(self.name))
            .public_key(key.public_key())
            .serial_number(x509.random_serial_number())
            .not_valid_before(now - datetime.timedelta(days=1))
            .not_valid_after(now + datetime.timedelta(days=1))
            .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
            .add_extension(x509.SubjectAlternativeName([x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]), False)
        )
        return builder.sign(self.key, hashes.SHA256()).public_bytes(s.Encoding.PEM)


def _named(name: str) -> x509.Name:
    return x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])


@pytest.fixture
def authority(tmp_path: Path) -> Authority:
    return Authority(tmp_path, "authority")


@pytest.fixture
def broker(authority: Authority, tmp_path: Path) -> Iterator[Mosquitto]:
    certificate, key = authority.issue("broker")
    tls = [f"cafile {authority.file}", f"certfile {certificate}", f"keyfile {key}", "require_certificate true"]
    with Mosquitto(tmp_path / "m", [*tls, "allow_anonymous true"]) as running:
        yield running  # type: ignore[misc]


def transport(broker: Mosquitto, ca: Path, certificate: str = "", key: str = "") -> MqttTransport:
    url = f"mqtts://127.0.0.1:{broker.port}"
    options = MqttOptions(url, "a", ca=str(ca), certificate=certificate, key=key, first_retry=0.02, longest_retry=0.1)
    made = MqttTransport(options)
    made.start()
    return made


def test_both_sides_prove_who_they_are(broker: Mosquitto, authority: Authority) -> None:
    device, inbox = transport(broker, authority.file, *authority.issue("device")), Inbox()
    device.subscribe("t", inbox, qos=1)
    wait_until(lambda: device.connected)
    wait_until(lambda: device.publish("t", b"x" * 100_000, qos=1) and inbox.got)
    assert len(inbox.payloads[0]) == 100_000
    device.close()


def test_a_broker_of_another_authority_is_not_trusted(broker: Mosquitto, authority: Authority, tmp_path: Path) -> None:
    stranger = Authority(tmp_path, "stranger")
    device = transport(broker, stranger.file, *authority.issue("device"))
    wait_until(lambda: device.state.startswith("unreachable: its certificate is not trusted"))
    device.close()


def test_a_certificate_that_is_replaced_takes_effect(broker: Mosquitto, authority: Authority, tmp_path: Path) -> None:
    certificate, key = Authority(tmp_path, "stranger").issue("device")
    device = transport(broker, authority.file, certificate, key)
    wait_until(lambda: device.state != "connecting")
    assert not device.connected
    authority.issue("device")  # into the same files
    wait_until(lambda: device.connected)
    device.close()


def test_files_that_cannot_be_used_are_named(authority: Authority, tmp_path: Path) -> None:
    certificate, key = authority.issue("device")
    for ca, mine in ((tmp_path / "none.pem", certificate), (Path(key), certificate), (authority.file, key)):
        with pytest.raises(ConfigError, match="TLS files"):
            MqttTransport(MqttOptions("mqtts://x", "a", ca=str(ca), certificate=mine, key=key))
