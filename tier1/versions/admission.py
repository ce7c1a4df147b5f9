"""Admission: which records of a cut are updates, and why the others are not.

A record passes if its envelope is canonical, meant for this federation, from a registered client in its current key
epoch, and signed; if it was trained on a version of this chain; if its payload is what the envelope declares; and if
the chain has not seen it. Each refusal has a machine-readable reason, and no record can stop the others:

    bad_envelope  bad_update_id  foreign_federation                                 to whom
    unknown_client  wrong_key_epoch  bad_signature                                  who says it
    duplicate  equivocation                                                         said before
    unknown_base  base_digest_mismatch                                              trained on what
    payload_missing  payload_unreadable  payload_size  payload_digest               where its bytes lie
    non_finite  ill_conditioned  …                                                  what it says (and delta's reasons)
    too_stale                                                                       when
    harmful                                                                         to what end (`evaluation.probe`)

Within a cut the lowest offset wins: the same update again is a duplicate, the same sequence number with other bytes is
equivocation. What depends on the head (seen before, too stale) is judged again by `readmit` for a fold on another
head.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Protocol

import structlog

from fednested_lib.blobs import BlobStore
from fednested_lib.envelope import (
    HEADER,
    INLINE_LIMIT_BYTES,
    Envelope,
    parse_envelope,
    verify_envelope,
    verify_update_id,
)
from fednested_lib.errors import ContractError, EnvelopeError, FednestedError, PayloadError, SnapshotError
from fednested_lib.failpoints import failpoint
from fednested_lib.log import Record
from fednested_lib.signing import sha256_hex
from fednested_lib.snapshot import expert_shapes
from tier1.aggregation.fold import magnitude
from tier1.versions.archive import Shapes, Update, decode_payload
from tier1.versions.dense_update import parse_dense, verify_dense
from tier1.versions.manifest import DenseInput, Refused
from tier1.versions.settings import AggregationSettings
from tier1.versions.state import ChainState

log = structlog.get_logger()

# Where factors cancel to a product this much smaller, rounding decides about its norm and the clip is void. Factors of
# rank r without structure reach about √r times the norm of their product.
MAX_CANCELLATION = 1e6
PAYLOAD_REASONS = {
    "missing_blob": "payload_missing",
    "corrupt_blob": "payload_digest",
    "oversize_blob": "payload_size",
    "unreadable_blob": "payload_unreadable",
}


class Device(Protocol):
    """A registered device (`tier1.config.DeviceRecord`)."""

    public_key: str
    key_epoch: int


@dataclass(frozen=True, kw_only=True)
class Admission:
    """What a cut is made of: updates to fold and refused records, both in log order."""

    updates: tuple[Update, ...]
    refused: tuple[Refused, ...]


NOTHING_ADMITTED = Admission(updates=(), refused=())


def admit(
    records: Iterable[Record],
    state: ChainState,
    *,
    devices: Mapping[str, Device],
    settings: AggregationSettings,
    payloads: BlobStore,
    archive: BlobStore,
) -> Admission:
    """Admit or refuse every record of a cut; archive what is admitted.

    Args:
        records: of one cut, any order.
        state: the chain; its head is the parent of the fold.
        devices: client id → registered device.
        settings: bound of staleness.
        payloads: where devices put large payloads (claim check); whatever lies there is their word, no more.
        archive: where accepted envelopes and payloads are kept; only tier 1 writes it.

    Raises:
        TransportError: a store does not answer; nothing is refused for that.
        StorageError: the archive is full.
    """
    shapes = expert_shapes(state.head.snapshot)
    updates: list[Update] = []
    refused: list[Refused] = []
    claims: dict[tuple[str, int, int], str] = {}
    for record in sorted(records, key=lambda record: (record.partition, record.offset)):
        envelope: Envelope | None = None
        try:
            envelope = _envelope_of(record)
            _check_addressee(envelope, state)
            update = _check_origin(record, envelope, devices)
            _check_unseen(update, state.claims)
            payload = _check_content(record, envelope, state, shapes, payloads)
            _check_unseen(update, claims)
            claims[update.claim] = envelope.update_id
            _check_fresh(update, state, settings)
            archive.put(envelope.to_bytes())
            archive.put(payload)
            updates.append(update)
        except ContractError as error:
            refused.append(refusal(record, envelope, error))
    failpoint("fold.after_archive")
    return Admission(updates=tuple(updates), refused=tuple(refused))


def readmit(updates: Sequence[Update], state: ChainState, settings: AggregationSettings) -> Admission:
    """Judge archived updates again for another head: seen meanwhile, or too stale now."""
    kept: list[Update] = []
    refused: list[Refused] = []
    for update in sorted(updates, key=lambda update: (update.partition, update.offset)):
        try:
            _check_unseen(update, state.claims)
            _check_fresh(update, state, settings)
            kept.append(update)
        except EnvelopeError as error:
            refused.append(refusal(update, update.envelope, error))
    return Admission(updates=tuple(kept), refused=tuple(refused))


def admit_dense(record: Record, state: ChainState, trusted: Mapping[str, str]) -> DenseInput:
    """Check the dense update of a tier-1 training run, as its record on `updates.tier1` says it.

    Raises:
        EnvelopeError: malformed, unsigned, or trained on a version that this chain does not have.
    """
    dense = parse_dense(record.value)
    verify_dense(dense, trusted)
    _check_base(dense.base_version, dense.base_digest, state)
    return DenseInput(**dense.model_dump(), topic=record.topic, partition=record.partition, offset=record.offset)


def _envelope_of(record: Record) -> Envelope:
    found = [value for name, value in record.headers if name == HEADER]
    if len(found) != 1:
        raise EnvelopeError("bad_envelope", f"record must have one header {HEADER}, has {len(found)}")
    return parse_envelope(found[0])


def _check_addressee(envelope: Envelope, state: ChainState) -> None:
    verify_update_id(envelope)  # before any other reason, so that no refusal names an id that is somebody else's
    if envelope.federation != state.federation:
        raise EnvelopeError(
            "foreign_federation", f"federation must be {state.federation}, got {envelope.federation}: fix tier2.yaml"
        )


def _check_origin(record: Record, envelope: Envelope, devices: Mapping[str, Device]) -> Update:
    device = devices.get(envelope.client_id)
    if device is None:
        raise EnvelopeError("unknown_client", f"client {envelope.client_id} is not registered: add it to devices")
    if envelope.key_epoch != device.key_epoch:
        raise EnvelopeError("wrong_key_epoch", f"key epoch must be {device.key_epoch}, got {envelope.key_epoch}")
    verify_envelope(envelope, device.public_key)
    return Update(
        envelope=envelope,
        public_key=device.public_key,
        partition=record.partition,
        offset=record.offset,
        record_sha256=record.digest,
    )


def _check_unseen(update: Update, claims: Mapping[tuple[str, int, int], str]) -> None:
    envelope = update.envelope
    other = claims.get(update.claim)  # the id is derived from content that includes the claim
    if other == envelope.update_id:
        raise EnvelopeError("duplicate", f"update {other[:12]} was accepted before")
    if other is not None:
        raise EnvelopeError("equivocation", f"sequence {envelope.sequence} was accepted before as update {other[:12]}")


def _check_fresh(update: Update, state: ChainState, settings: AggregationSettings) -> None:
    staleness = state.head.staleness(update.envelope.base_version)
    if staleness > settings.max_staleness:
        raise EnvelopeError(
            "too_stale", f"staleness must be at most {settings.max_staleness} versions, got {staleness}"
        )


def _check_base(version: int, digest: str, state: ChainState) -> None:
    base = state.versions.get(version)
    if base is None:
        raise EnvelopeError("unknown_base", f"base version must be one of 0..{max(state.versions)}, got {version}")
    if digest != base.base_digest:
        raise EnvelopeError(
            "base_digest_mismatch", f"base version {version} has digest {base.base_digest}, not {digest}"
        )


def _check_content(record: Record, envelope: Envelope, state: ChainState, shapes: Shapes, payloads: BlobStore) -> bytes:
    _check_base(envelope.base_version, envelope.base_digest, state)
    payload = _payload_of(record, envelope, payloads)
    if len(payload) != envelope.payload_bytes:
        raise PayloadError("payload_size", f"payload must have {envelope.payload_bytes} bytes, has {len(payload)}")
    if sha256_hex(payload) != envelope.payload_sha256:
        raise PayloadError(
            "payload_digest", f"payload does not have the declared digest {envelope.payload_sha256[:12]}"
        )
    _check_numbers(envelope, payload, shapes)
    return payload


def _payload_of(record: Record, envelope: Envelope, payloads: BlobStore) -> bytes:
    if envelope.payload_uri is None:
        if len(record.value) > INLINE_LIMIT_BYTES:
            raise PayloadError(
                "payload_size", f"inline payload must have at most {INLINE_LIMIT_BYTES} bytes, has {len(record.value)}"
            )
        return record.value
    if record.value:
        raise PayloadError("payload_size", f"a record with a claim check must be empty, has {len(record.value)} bytes")
    try:
        return payloads.get(envelope.payload_sha256, max_bytes=envelope.payload_bytes)
    except SnapshotError as error:
        reason = PAYLOAD_REASONS.get(error.reason, error.reason)
        raise PayloadError(reason, f"payload {envelope.payload_sha256[:12]} cannot be used: {error.reason}") from error


def _check_numbers(envelope: Envelope, payload: bytes, shapes: Shapes) -> None:
    try:
        delta = decode_payload(envelope, payload, shapes)
        tokens = {
            (layer, expert): envelope.tokens_of(layer, expert)
            for layer, experts in envelope.layers().items()
            for expert in experts
        }
        norm, reach = magnitude(delta, tokens)
    except (FednestedError, MemoryError):
        raise
    except Exception as error:  # a parser bug that one record triggers must not halt the federation at that record
        raise PayloadError(
            "parser_error", f"payload made the parser raise {type(error).__name__}: report it"
        ) from error
    if not math.isfinite(reach):
        raise PayloadError("non_finite", "the factors' product is NaN or infinite")
    if reach > MAX_CANCELLATION * max(norm, 1.0):
        raise PayloadError(
            "ill_conditioned", f"factors reach {reach:.3g}, their product only {norm:.3g}: the norm cannot be bounded"
        )


def refusal(place: Record | Update, envelope: Envelope | None, error: ContractError) -> Refused:
    """Return the manifest row of a record that is not folded, and say so in the events."""
    known = {} if envelope is None else envelope.model_dump(include={"client_id", "sequence", "update_id"})
    log.info("update.refused", partition=place.partition, offset=place.offset, reason=error.reason, **known)
    return Refused(
        partition=place.partition,
        offset=place.offset,
        record_sha256=place.digest if isinstance(place, Record) else place.record_sha256,
        reason=error.reason,
        detail=str(error)[:400],
        **known,
    )
