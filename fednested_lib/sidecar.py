"""The thin way out: the one module that builds what leaves the device.

It never passes on what the trainer wrote; it makes it anew, in this order:

    withhold   experts that saw fewer than 4·r distinct tokens go out as zeros with tokens = 0   (their rows are
               recoverable below r distinct tokens; absence itself would tell the routing)
    clip       ΔW ← ΔW · min(1, C/‖ΔW‖_F) over all experts, by the Gram identity, never dense
    round      int8, unbiased, seeded by H(client, sequence): a restarted device emits the same bytes
    bucket     token and example counts down to powers of two
    sign       Ed25519 over the canonical envelope

and puts the result into the durable outbox. Anything that is not finite stops here and nothing leaves.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping

import numpy as np
import structlog

from fednested_lib.config import ExportPolicyConfig
from fednested_lib.delta import Delta, ExpertFactors, encode, squared_norm
from fednested_lib.envelope import INLINE_LIMIT_BYTES, Envelope, bucket, make_envelope
from fednested_lib.errors import PayloadError
from fednested_lib.log import UPDATES
from fednested_lib.outbox import Outbox
from fednested_lib.partition import expert_param
from fednested_lib.signing import Signer, sha256_hex
from fednested_lib.spool import Declaration

_log = structlog.get_logger(__name__)


def norm(delta: Delta) -> float:
    """Return ‖ΔW‖_F over all experts.

    Raises:
        PayloadError: reason ``non_finite``.
    """
    for name, factors in delta.factors.items():
        if not (np.isfinite(factors.lora_a).all() and np.isfinite(factors.lora_b).all()):
            raise PayloadError(
                "non_finite", f"{name} has NaN or infinite factors: the update stays here; lower training.learning_rate"
            )
    return math.sqrt(sum(float(squared_norm(factors, delta.spec.scale).sum()) for factors in delta.factors.values()))


def withhold(delta: Delta, kept: Mapping[int, tuple[bool, ...]]) -> Delta:
    """Set the factors of the experts that are not kept to zero; the expert ids stay as they are.

    An A that follows from a seed says nothing about data and stays.
    """
    fixed, factors = delta.spec.mode == "fixed_a", {}
    for name, each in delta.factors.items():
        keep = np.asarray(kept[expert_param(name)[0]])[:, None, None]
        factors[name] = ExpertFactors(
            expert_ids=each.expert_ids,
            lora_a=each.lora_a if fixed else np.where(keep, each.lora_a, np.float32(0)),
            lora_b=np.where(keep, each.lora_b, np.float32(0)),
        )
    return Delta(spec=delta.spec, factors=factors)


def clip(delta: Delta, max_norm: float) -> Delta:
    """Scale a delta down to ‖ΔW‖_F ≤ max_norm; a smaller one is returned as it is."""
    found = norm(delta)
    if found <= max_norm:
        return delta
    shrink = np.float32(max_norm / found)
    factors = {
        name: ExpertFactors(expert_ids=each.expert_ids, lora_a=each.lora_a, lora_b=each.lora_b * shrink)
        for name, each in delta.factors.items()
    }
    return Delta(spec=delta.spec, factors=factors)


def rounding_seed(client_id: str, key_epoch: int, sequence: int) -> int:
    """Return H(client, key epoch, sequence) as the 128-bit seed of the stochastic rounding."""
    digest = hashlib.sha256(f"fednested.rounding/{client_id}/{key_epoch}/{sequence}".encode()).digest()
    return int.from_bytes(digest[:16], "big")


def make_update(
    declaration: Declaration,
    delta: Delta,
    *,
    policy: ExportPolicyConfig,
    federation: str,
    client_id: str,
    key_epoch: int,
    signer: Signer,
) -> tuple[Envelope, bytes]:
    """Make the outgoing envelope and payload of a spooled update; equal arguments give equal bytes.

    Raises:
        PayloadError: a factor is not finite.
    """
    norm(delta)  # before anything is withheld: a broken trainer must not pass because its NaN sits in a zeroed expert
    floor = policy.min_tokens_per_rank * declaration.adapter.rank
    kept = {int(layer): tuple(n >= floor for n in counts) for layer, counts in declaration.distinct_tokens.items()}
    tokens = {
        layer: [bucket(n) if keep else 0 for n, keep in zip(counts, kept[int(layer)], strict=True)]
        for layer, counts in declaration.routed_tokens.items()
    }
    outgoing = clip(withhold(delta, kept), policy.max_norm)
    seed = rounding_seed(client_id, key_epoch, declaration.sequence)
    payload = encode(outgoing, encoding=policy.encoding, seed=seed)
    digest = sha256_hex(payload)
    envelope = make_envelope(
        signer,
        federation=federation,
        client_id=client_id,
        key_epoch=key_epoch,
        sequence=declaration.sequence,
        base_version=declaration.base_version,
        base_digest=declaration.base_digest,
        adapter=declaration.adapter.model_dump(),
        expert_ids={layer: list(ids) for layer, ids in declaration.expert_ids.items()},
        tokens=tokens,
        num_examples=bucket(declaration.num_examples),
        encoding=policy.encoding,
        payload_sha256=digest,
        payload_bytes=len(payload),
        payload_uri=f"blob:{digest}" if len(payload) > INLINE_LIMIT_BYTES else None,
    )
    withheld = sum(not keep for layer in kept.values() for keep in layer)
    _log.info(
        "sidecar.released",
        sequence=declaration.sequence,
        experts=sum(map(len, kept.values())),
        withheld=withheld,
        floor=floor,
        norm=norm(outgoing),
        payload_bytes=len(payload),
        fp32_bytes=delta.size_fp32_bytes,
    )
    return envelope, payload


def release(
    declaration: Declaration,
    delta: Delta,
    *,
    policy: ExportPolicyConfig,
    federation: str,
    client_id: str,
    key_epoch: int,
    signer: Signer,
    outbox: Outbox,
) -> Envelope:
    """Re-make a spooled update under the policy and put it into the outbox; doing it again changes nothing.

    Args:
        declaration: counts and base, from `Spool.read`.
        delta: exact factors, likewise.
        policy: floor, norm bound and encoding.
        federation: the one that the update is for.
        client_id: this device.
        key_epoch: number of its key.
        signer: its key.
        outbox: durable queue to the log.

    Raises:
        PayloadError: a factor is not finite; nothing leaves.
        StorageError: the outbox or the disk is full.
    """
    identity = {"federation": federation, "client_id": client_id, "key_epoch": key_epoch, "signer": signer}
    envelope, payload = make_update(declaration, delta, policy=policy, **identity)
    outbox.put(
        sequence=envelope.sequence,
        update_id=envelope.update_id,
        topic=UPDATES,
        key=client_id.encode(),
        payload=payload,
        envelope=envelope.to_bytes(),
    )
    return envelope
