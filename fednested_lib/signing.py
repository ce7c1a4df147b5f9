"""Canonical JSON, SHA-256 and Ed25519: the three primitives every record of the system rests on.

Canonical JSON is UTF-8 with sorted keys, no blanks and no NaN, so equal documents are equal bytes. Signatures are
Ed25519 (RFC 8032) over such bytes.
"""

from __future__ import annotations

import hashlib
import hmac
import json
import os
import re
from pathlib import Path
from typing import Any

from cryptography.exceptions import InvalidSignature
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

from fednested_lib.errors import ConfigError

HEX64 = r"^[0-9a-f]{64}$"


def canonical_json(document: Any) -> bytes:
    """Serialise to the one byte string that stands for this document."""
    return json.dumps(document, sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False).encode()


def sha256_hex(data: bytes) -> str:
    """Return the SHA-256 of `data` as 64 lower-case hex digits."""
    return hashlib.sha256(data).hexdigest()


class Signer:
    """An Ed25519 private key that signs bytes.

    Key files hold the 32-byte seed as 64 hex digits, mode 0600; beside it lies `<name>.pub` with the public key.
    """

    def __init__(self, private_key: Ed25519PrivateKey):
        self._private_key = private_key
        self.public_key: str = private_key.public_key().public_bytes_raw().hex()

    @classmethod
    def generate(cls) -> Signer:
        """Make a new random key."""
        return cls(Ed25519PrivateKey.generate())

    @classmethod
    def from_seed(cls, seed: bytes) -> Signer:
        """Make the key of a 32-byte seed (for tests and fixtures)."""
        return cls(Ed25519PrivateKey.from_private_bytes(seed))

    @classmethod
    def load(cls, path: str | os.PathLike) -> Signer:
        """Read a key file.

        Raises:
            ConfigError: the file is missing or is not 64 hex digits.
        """
        try:
            text = Path(path).read_text(encoding="ascii").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise ConfigError(
                f"key file {path} cannot be read ({error}): run `fednested init-config` or fix the path"
            ) from error
        if not re.fullmatch(HEX64, text):
            raise ConfigError(f"key file {path} must hold 64 hex digits, got {len(text)} characters: make a new key")
        return cls.from_seed(bytes.fromhex(text))

    def save(self, path: str | os.PathLike) -> None:
        """Write the seed to `path` (mode 0600) and the public key to `path` with suffix .pub; never overwrites."""
        path = Path(path)
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with os.fdopen(descriptor, "w", encoding="ascii") as file:
            file.write(self._private_key.private_bytes_raw().hex() + "\n")
        path.with_suffix(".pub").write_text(self.public_key + "\n", encoding="ascii")

    def secret(self, label: str) -> bytes:
        """Return 32 bytes that nobody without this key can compute, always the same ones for one label."""
        return hmac.digest(self._private_key.private_bytes_raw(), f"fednested.secret/{label}".encode(), "sha256")

    def sign(self, message: bytes) -> str:
        """Return the signature as 128 hex digits."""
        return self._private_key.sign(message).hex()


def verify(public_key: str, signature: str, message: bytes) -> bool:
    """Tell whether `signature` is the signature of `message` by `public_key` (both hex)."""
    try:
        Ed25519PublicKey.from_public_bytes(bytes.fromhex(public_key)).verify(bytes.fromhex(signature), message)
    except (InvalidSignature, ValueError):
        return False
    return True
