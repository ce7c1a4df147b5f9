"""The signed envelope of a device update: everything the aggregator may know besides the payload, and no free text.

Strict pydantic (Pydantic 2, `extra="forbid"`), canonical JSON, Ed25519 over the canonical bytes without the signature.
`update_id` is derived from the content, so a re-sent update is recognised whoever sends it. Counts are bucketed to
powers of two before they leave the device. The envelope travels in the record header `fednested-envelope`; a payload of
at most 16 KiB is the record's value, a larger one lies in the blob store under `payload_uri` (claim check).
"""

from __future__ import annotations

import json
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_serializer, model_validator

from fednested_lib.adapter_spec import MAX_RANK, AdapterSpec, Encoding, Mode
from fednested_lib.errors import EnvelopeError
from fednested_lib.signing import HEX64, Signer, canonical_json, sha256_hex, verify

HEADER = "fednested-envelope"
INLINE_LIMIT_BYTES = 16 * 1024
MAX_ENVELOPE_BYTES = 256 * 1024
MAX_PAYLOAD_BYTES = 1 << 30

ClientId = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")]
Digest = Annotated[str, Field(pattern=HEX64)]
Count = Annotated[int, Field(ge=0, le=1 << 40)]
FederationName = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,62}$")]
Layer = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,3})$")]


class AdapterFields(BaseModel):
    """Rank, alpha and mode of the adapter (see `delta.AdapterSpec`)."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    rank: int = Field(ge=1, le=MAX_RANK)
    alpha: float = Field(gt=0, allow_inf_nan=False)
    mode: Mode = "lora"
    seed: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")] | None = None  # of A, in mode fixed_a only

    @model_validator(mode="after")
    def _consistent(self) -> AdapterFields:
        if (self.mode == "fixed_a") != (self.seed is not None):
            raise ValueError("mode fixed_a needs a seed, and no other mode has one")
        return self

    @model_serializer(mode="wrap")
    def _without_absent_seed(self, handler):
        # Written only where it means something: envelopes of mode lora keep the bytes they were signed with.
        return {name: value for name, value in handler(self).items() if name != "seed" or value is not None}

    def spec(self) -> AdapterSpec:
        """Return the plain spec."""
        return AdapterSpec(rank=self.rank, alpha=self.alpha, mode=self.mode, seed=self.seed)


class Envelope(BaseModel):
    """What one device says about one update."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["fednested.update/1"] = "fednested.update/1"
    update_id: Digest
    federation: FederationName
    client_id: ClientId
    key_epoch: int = Field(ge=0, le=1 << 31)
    sequence: int = Field(ge=0, le=1 << 53)
    base_version: int = Field(ge=0, le=1 << 53)
    base_digest: Digest
    adapter: AdapterFields
    expert_ids: dict[Layer, list[Annotated[int, Field(ge=0, le=1 << 16)]]]
    tokens: dict[Layer, list[Count]]
    num_examples: Count
    encoding: Encoding
    payload_sha256: Digest
    payload_bytes: int = Field(ge=1, le=MAX_PAYLOAD_BYTES)
    payload_uri: Annotated[str, Field(pattern=r"^blob:[0-9a-f]{64}$")] | None = None
    signature: Annotated[str, Field(pattern=r"^[0-9a-f]{128}$")]

    @model_validator(mode="after")
    def _consistent(self) -> Envelope:
        if set(self.expert_ids) != set(self.tokens):
            raise ValueError("tokens must name the layers of expert_ids")
        for layer, ids in self.expert_ids.items():
            if len(self.tokens[layer]) != len(ids):
                raise ValueError(f"layer {layer} has {len(ids)} experts but {len(self.tokens[layer])} token counts")
        if self.payload_uri is not None and self.payload_uri != f"blob:{self.payload_sha256}":
            raise ValueError("payload_uri must be blob:<payload_sha256>")
        return self

    def layers(self) -> dict[int, tuple[int, ...]]:
        """Return the adapted experts per layer."""
        return {int(layer): tuple(ids) for layer, ids in self.expert_ids.items()}

    def tokens_of(self, layer: int, expert_id: int) -> int:
        """Return the declared tokens of one expert (0 when it was not adapted)."""
        ids = self.expert_ids.get(str(layer), [])
        return self.tokens[str(layer)][ids.index(expert_id)] if expert_id in ids else 0

    def to_bytes(self) -> bytes:
        """Return the canonical bytes that travel."""
        return canonical_json(self.model_dump(mode="json"))


def bucket(count: int) -> int:
    """Round a count down to a power of two (0 stays 0), so that it says little about the data."""
    return 1 << (count.bit_length() - 1) if count > 0 else 0


def _signed_part(fields: dict) -> bytes:
    return canonical_json({key: value for key, value in fields.items() if key != "signature"})


def _content_id(fields: dict) -> str:
    return sha256_hex(
        canonical_json({key: value for key, value in fields.items() if key not in ("signature", "update_id")})
    )


def make_envelope(signer: Signer, **fields) -> Envelope:
    """Fill in the content-derived id, sign, and validate.

    Args:
        signer: the device's key.
        **fields: every field of `Envelope` but update_id and signature; JSON types.
    """
    fields = {"format": "fednested.update/1", "payload_uri": None, **fields}
    fields["adapter"] = AdapterFields.model_validate(fields["adapter"]).model_dump()
    fields["update_id"] = _content_id(fields)
    return Envelope(**fields, signature=signer.sign(_signed_part(fields)))


def parse_envelope(data: bytes) -> Envelope:
    """Parse untrusted header bytes; does not check the signature (see `verify_envelope`).

    Raises:
        EnvelopeError: reason ``bad_envelope``; the message names the field, never its value.
    """
    if len(data) > MAX_ENVELOPE_BYTES:
        raise EnvelopeError("bad_envelope", f"envelope has {len(data)} bytes, bound {MAX_ENVELOPE_BYTES}")
    try:
        document = json.loads(data)
        envelope = Envelope.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(str(part) for part in first["loc"])[:120] or "envelope"
        raise EnvelopeError("bad_envelope", f"envelope field {place}: {first['msg']}") from None
    except (ValueError, RecursionError) as error:
        raise EnvelopeError("bad_envelope", f"envelope is not JSON ({type(error).__name__})") from None
    if envelope.to_bytes() != data:
        raise EnvelopeError("bad_envelope", "envelope bytes are not canonical JSON")
    return envelope


def verify_update_id(envelope: Envelope) -> None:
    """Check that the update id is derived from the content; whoever sent it.

    Raises:
        EnvelopeError: reason ``bad_update_id``.
    """
    if envelope.update_id != _content_id(envelope.model_dump(mode="json")):
        raise EnvelopeError(
            "bad_update_id", f"update id {envelope.update_id[:12]} does not match the envelope's content"
        )


def verify_envelope(envelope: Envelope, public_key: str) -> None:
    """Check content id and signature.

    Raises:
        EnvelopeError: reason ``bad_update_id`` or ``bad_signature``.
    """
    verify_update_id(envelope)
    fields = envelope.model_dump(mode="json")
    if not verify(public_key, envelope.signature, _signed_part(fields)):
        raise EnvelopeError(
            "bad_signature",
            f"envelope of client {envelope.client_id} is unsigned or altered (key epoch {envelope.key_epoch})",
        )
