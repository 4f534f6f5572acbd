"""Checking of Ed25519 signatures (RFC 8032)."""

from __future__ import annotations

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey


def verify(public: bytes, signature: bytes, data: bytes) -> bool:
    """Whether the owner of `public` (32 bytes) made `signature` (64 bytes) for `data`. Malformed ones are not."""
    try:
        Ed25519PublicKey.from_public_bytes(public).verify(signature, data)
    except (InvalidSignature, ValueError):
        return False
    return True
