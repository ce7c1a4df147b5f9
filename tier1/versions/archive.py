"""Accepted updates, kept by digest: what a version can be rebuilt from when the log has forgotten.

Envelope and payload bytes of every accepted update lie in `archive/` under their SHA-256, which the manifest names. So
replay, a halved-η try and a fold on another head read the same bytes as the first fold, from the same place. The drop
box where devices put payloads is another store: no device can take back or replace what was accepted.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from fednested_lib.blobs import BlobStore
from fednested_lib.delta import Delta, decode
from fednested_lib.envelope import Envelope, parse_envelope, verify_envelope
from fednested_lib.errors import ChainCorrupt, ContractError
from fednested_lib.signing import sha256_hex
from tier1.versions.manifest import Accepted

Shapes = Mapping[str, tuple[int, int, int]]


@dataclass(frozen=True, kw_only=True)
class Update:
    """A verified device update and where in the log it lies; its payload is in the archive.

    Args:
        envelope: signed by `public_key`, the registered key of its client.
        partition: of the record.
        offset: of the record.
        record_sha256: digest of the record.
    """

    envelope: Envelope
    public_key: str
    partition: int
    offset: int
    record_sha256: str

    @property
    def claim(self) -> tuple[str, int, int]:
        """What an update is unique in: (client, key epoch, sequence)."""
        return self.envelope.client_id, self.envelope.key_epoch, self.envelope.sequence

    def tokens(self) -> dict[tuple[int, int], int]:
        """Return declared tokens per (layer, expert)."""
        envelope = self.envelope
        return {
            (int(layer), expert): count
            for layer, experts in envelope.expert_ids.items()
            for expert, count in zip(experts, envelope.tokens[layer], strict=True)
        }


def decode_payload(envelope: Envelope, payload: bytes, shapes: Shapes) -> Delta:
    """Parse the payload as its envelope declares it.

    Raises:
        PayloadError: with a machine-readable reason.
    """
    spec = envelope.adapter.spec()
    return decode(payload, encoding=envelope.encoding, spec=spec, expert_ids=envelope.layers(), shapes=shapes)


def read_delta(update: Update, archive: BlobStore, shapes: Shapes) -> Delta:
    """Read the delta of an archived update.

    Raises:
        SnapshotError: the payload is missing or corrupt.
        PayloadError: it is not what the envelope declares.
    """
    return decode_payload(update.envelope, archive.get(update.envelope.payload_sha256), shapes)


def restore(accepted: Accepted, archive: BlobStore) -> Update:
    """Read an accepted update back and check it against its manifest row.

    Raises:
        ChainCorrupt: envelope or payload is missing, altered, not signed by the recorded device key, or another one
            than the manifest names.
    """
    name = f"update {accepted.update_id[:12]} of {accepted.client_id} (sequence {accepted.sequence})"
    envelope = _checked("envelope", name, lambda: parse_envelope(archive.get(accepted.envelope_sha256)))
    _checked("envelope", name, lambda: verify_envelope(envelope, accepted.public_key))
    for field in ("update_id", "client_id", "key_epoch", "sequence", "base_version", "payload_sha256", "payload_bytes"):
        said, recorded = getattr(envelope, field), getattr(accepted, field)
        if said != recorded:
            raise ChainCorrupt(
                f"envelope of {name} has {field} {said}, its manifest says {recorded}: one of them was replaced"
            )
    _checked("payload", name, lambda: archive.get(accepted.payload_sha256))
    return Update(
        envelope=envelope,
        public_key=accepted.public_key,
        partition=accepted.partition,
        offset=accepted.offset,
        record_sha256=accepted.record_sha256,
    )


def envelope_digest(update: Update) -> str:
    """Return the digest under which the envelope is archived."""
    return sha256_hex(update.envelope.to_bytes())


def _checked(part: str, name: str, read):
    try:
        return read()
    except ContractError as error:
        raise ChainCorrupt(f"{part} of {name}: {error}") from error
