"""The thin way out: the one module that builds what leaves the device, under the site's signed policy.

It never passes on what the trainer wrote; it makes it anew, in this order:

    check      base, adapter, seed of A, experts: what the trainer declares was ordered, and is on the policy's lists
    withhold   experts that saw fewer distinct tokens than the floor, 4·r or more, go out as zeros with tokens = 0
               (their rows are recoverable below r distinct tokens; absence itself would tell the routing)
    clip       ΔW ← ΔW · min(1, C/‖ΔW‖_F) over all experts, by the Gram identity, never dense
    truncate   to `outgoing.mean_rank`, if given; what this and rounding take may go into the next update of the base
    round      int8, unbiased, seeded by HMAC(device key, sequence, digest): a restarted device emits the same bytes,
               and the trainer, who has no key, cannot foresee them
    bucket     token and example counts down to powers of two
    sign       Ed25519 over the canonical envelope
    charge     bytes, updates and ε of the policy's budgets, durably and once (`ledger.py`)
    record     the decision, whatever it is, in the audit log (`audit.py`)

and puts the result into the durable outbox. With differential privacy on, withhold, clip and bucket are replaced by
`privacy.py`: clip and noise on every expert that the policy names, and counts that are constants. Which rule refuses
for good, which waits, and what a lying trainer can still do: docs/sidecar.md.
"""

from __future__ import annotations

import hmac
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
import structlog

from fednested_lib.adapter_spec import INT4_LEVELS
from fednested_lib.audit import AuditLog, Decision
from fednested_lib.config import OutgoingConfig, Tier2Config
from fednested_lib.delta import AdapterSpec, Delta, Encoding, ExpertFactors, squared_norm
from fednested_lib.envelope import INLINE_LIMIT_BYTES, Envelope, bucket, make_envelope
from fednested_lib.errors import ConfigError, PayloadError, PolicyRefused, PolicyWait
from fednested_lib.events import TrainingTelemetry
from fednested_lib.failpoints import failpoint
from fednested_lib.feedback import FEEDBACK_MAX_RANK, Residuals, joined, squeeze
from fednested_lib.fixed_a import seed_of
from fednested_lib.ledger import Charge, Ledger
from fednested_lib.log import UPDATES
from fednested_lib.partition import PROJECTIONS, expert_param
from fednested_lib.policy import Policy, load_policy
from fednested_lib.privacy import constant_counts, gaussian, noised_telemetry
from fednested_lib.signing import Signer, canonical_json, sha256_hex
from fednested_lib.snapshot import SnapshotManifest, expert_shapes
from fednested_lib.spool import Declaration, Spool
from fednested_lib.telemetry import training_telemetry

MAX_LOSS = 20.0  # nats per token that telemetry tells at most: e²⁰ is beyond any vocabulary

_log = structlog.get_logger(__name__)


def norm(delta: Delta) -> float:
    """Return ‖ΔW‖_F over all experts.

    Raises:
        PayloadError: reason ``non_finite``.
    """
    with np.errstate(invalid="ignore", over="ignore"):
        squares = {name: squared_norm(each, delta.spec.scale).sum() for name, each in delta.factors.items()}
    for name, square in squares.items():
        if not np.isfinite(square):  # every factor is in it, and finite fp32 numbers do not overflow it
            raise PayloadError(
                "non_finite", f"{name} has NaN or infinite factors: the update stays here; lower training.learning_rate"
            )
    return math.sqrt(sum(map(float, squares.values())))


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


def rounding_seed(secret: bytes, label: bytes) -> int:
    """Return the 128-bit seed of an update's stochastic rounding, which nobody without the secret can foresee.

    Args:
        secret: of this device; the trainer does not have it.
        label: names client, key epoch, number and content: a number that is used twice is not rounded alike.
    """
    return int.from_bytes(hmac.digest(secret, b"fednested.rounding/" + label, "sha256")[:16], "big")


@dataclass(frozen=True, kw_only=True)
class Outgoing:
    """What is to leave, and the numbers that the audit log keeps of it."""

    envelope: Envelope
    payload: bytes
    experts: int
    withheld: int
    floor: int  # distinct tokens that an expert needed
    norm: float
    residual: Delta | None  # what rounding and truncation took, with error feedback


def make_update(
    declaration: Declaration,
    delta: Delta,
    *,
    policy: Policy,
    encoding: Encoding,
    levels: int = INT4_LEVELS,
    mean_rank: float | None = None,
    error_feedback: bool = False,
    carried: Delta | None = None,
    federation: str,
    client_id: str,
    key_epoch: int,
    signer: Signer,
) -> Outgoing:
    """Make the outgoing envelope and payload of a spooled update; equal arguments give equal bytes.

    `mean_rank` bounds the columns of what leaves, `carried` is what earlier updates of the base lost (`feedback.py`).

    Raises:
        PayloadError: a factor is not finite.
    """
    norm(delta)  # before anything is withheld: a broken trainer must not pass because its NaN sits in a zeroed expert
    due = delta if carried is None else joined(delta, carried)
    label = canonical_json([client_id, key_epoch, declaration.sequence, declaration.factors_sha256])
    floor = policy.floor(declaration.adapter.rank, _width(delta))
    if policy.dp == "off":
        outgoing, counts, withheld = _bounded(declaration, due, policy.max_norm, floor)
    else:
        outgoing, counts, withheld = *_noised(declaration, delta, policy, floor, signer.secret("noise"), label), 0
    squeezed = squeeze(
        outgoing,
        max_rank=declaration.adapter.rank,
        mean_rank=mean_rank,
        encoding=encoding,
        levels=levels,
        seed=rounding_seed(signer.secret("rounding"), label),
        feedback=error_feedback,
    )
    payload, spec = squeezed.payload, squeezed.spec
    digest = sha256_hex(payload)
    envelope = make_envelope(
        signer,
        federation=federation,
        client_id=client_id,
        key_epoch=key_epoch,
        sequence=declaration.sequence,
        base_version=declaration.base_version,
        base_digest=declaration.base_digest,
        adapter={"rank": spec.rank, "alpha": spec.alpha, "mode": spec.mode, "seed": spec.seed},
        expert_ids={layer: list(ids) for layer, ids in declaration.expert_ids.items()},
        **counts,
        encoding=encoding,
        payload_sha256=digest,
        payload_bytes=len(payload),
        payload_uri=f"blob:{digest}" if len(payload) > INLINE_LIMIT_BYTES else None,
    )
    return Outgoing(
        envelope=envelope,
        payload=payload,
        experts=sum(map(len, declaration.expert_ids.values())),
        withheld=withheld,
        floor=floor,
        norm=norm(outgoing),
        residual=squeezed.residual,
    )


def _width(delta: Delta) -> int:
    """Return the model's hidden size: what an up-projection reads."""
    return next(each.lora_a.shape[2] for name, each in delta.factors.items() if expert_param(name)[1] == PROJECTIONS[0])


def _bounded(
    declaration: Declaration, delta: Delta, max_norm: float, floor: int
) -> tuple[Delta, dict[str, object], int]:
    """Withhold, clip and bucket; returns the delta, the envelope's counts and how many experts were withheld."""
    kept = {int(layer): tuple(n >= floor for n in counts) for layer, counts in declaration.distinct_tokens.items()}
    tokens = {
        layer: [bucket(n) if keep else 0 for n, keep in zip(counts, kept[int(layer)], strict=True)]
        for layer, counts in declaration.routed_tokens.items()
    }
    counts = {"tokens": tokens, "num_examples": bucket(declaration.num_examples)}
    withheld = sum(not keep for layer in kept.values() for keep in layer)
    return clip(withhold(delta, kept), max_norm), counts, withheld


def _noised(
    declaration: Declaration, delta: Delta, policy: Policy, floor: int, secret: bytes, label: bytes
) -> tuple[Delta, dict[str, object]]:
    """Clip and add noise; returns the delta and counts that are constants."""
    noised = gaussian(
        delta,
        clip_norm=policy.dp.clip_norm,
        noise_multiplier=policy.dp.noise_multiplier,
        secret=secret,
        label=label.decode(),
    )
    return noised, constant_counts(declaration.expert_ids, tokens_per_expert=bucket(floor), num_examples=1)


def check_declaration(
    declaration: Declaration, base: SnapshotManifest | None, policy: Policy
) -> dict[str, tuple[int, int, int]]:
    """Refuse what the trainer was not ordered to do or the policy does not list, before its factors are read.

    Args:
        declaration: what it says.
        base: the snapshot that it names, if the device holds it.
        policy: of the site.

    Returns:
        (experts, d_out, d_in) of the base's fused expert parameters.

    Raises:
        PolicyRefused: reason ``wrong_base``, ``adapter_not_allowed``, ``wrong_seed``, ``expert_not_allowed`` or
            ``experts_incomplete``.
    """
    if base is None:
        raise PolicyRefused(
            "wrong_base",
            f"update {declaration.sequence} starts from version {declaration.base_version}, which is not held, or not "
            "with that digest: train it again",
        )
    spec = declaration.adapter.spec()
    policy.check_adapter(spec)
    if spec.seed is not None and spec.seed != seed_of(base.digest):
        raise PolicyRefused(
            "wrong_seed", f"seed of A of update {declaration.sequence} is not that of its base version: train it again"
        )
    shapes = expert_shapes(base)
    policy.check_experts(declaration.layers(), {expert_param(name)[0]: shape[0] for name, shape in shapes.items()})
    return shapes


class Queue(Protocol):
    """Where finished updates go: the outbox, or what hands them to it."""

    def put(self, *, sequence: int, update_id: str, topic: str, key: bytes, payload: bytes, envelope: bytes) -> None:
        """Keep an update; putting the same one again does nothing."""


class Sidecar:
    """The way out of one device: its policy, its budgets, its audit log and its outbox.

    Args:
        policy: verified.
        outgoing: how it leaves; of an encoding that the policy lists.
        federation: that updates are for.
        client_id: this device.
        key_epoch: number of its key.
        signer: its key.
        ledger: of what left before.
        audit: log of decisions.
        outbox: durable queue to the log.
        residuals: what earlier updates lost.
    """

    def __init__(
        self,
        *,
        policy: Policy,
        outgoing: OutgoingConfig,
        federation: str,
        client_id: str,
        key_epoch: int,
        signer: Signer,
        ledger: Ledger,
        audit: AuditLog,
        outbox: Queue,
        residuals: Residuals,
    ):
        self.policy, self.ledger, self.audit, self.outbox = policy, ledger, audit, outbox
        self.identity = {"federation": federation, "client_id": client_id, "key_epoch": key_epoch, "signer": signer}
        self._outgoing, self.residuals = outgoing, residuals

    def release(
        self, spool: Spool, sequence: int, *, held: Callable[[int, str], SnapshotManifest | None], now: float
    ) -> tuple[Envelope, TrainingTelemetry | None]:
        """Re-make a spooled update under the policy and put it into the outbox; doing it again changes nothing.

        Args:
            spool: what the trainer wrote.
            sequence: number of the update that was ordered.
            held: finds the snapshot of a version and digest among those that the trainer was given.
            now: seconds since the epoch.

        Returns:
            The envelope, and what the policy lets be told about the training.

        Raises:
            PayloadError: it will never leave, with the rule; the file may be removed.
            PolicyWait: it may leave later; the file must stay.
            StorageError: the outbox, the ledger, the audit log or the disk refuses; the file must stay.
        """
        with self._recorded(sequence, now):
            declaration = spool.declaration(sequence)
            base = held(declaration.base_version, declaration.base_digest)
            shapes = check_declaration(declaration, base, self.policy)
            delta = spool.delta(declaration, shapes)
            made = self._make(declaration, delta)
            self._check_made(made)
            self.ledger.fix_experts(self.policy, sha256_hex(canonical_json(made.envelope.expert_ids)), now=now)
            spent = self._charge(made.envelope, now)
        failpoint("sidecar.after_charge")
        envelope = made.envelope
        self.audit.append(
            Decision(
                decision="released",
                time_s=now,
                policy_version=self.policy.version,
                sequence=sequence,
                payload_sha256=envelope.payload_sha256,
                payload_bytes=envelope.payload_bytes,
                experts=made.experts,
                withheld=made.withheld,
                norm=made.norm,
                epsilon=spent,
            )
        )
        failpoint("sidecar.after_audit")
        if made.residual is not None:  # before the update is queued: it is never made again once it is
            self.residuals.keep(sequence, envelope.base_digest, made.residual)
        self.outbox.put(
            sequence=sequence,
            update_id=envelope.update_id,
            topic=UPDATES,
            key=envelope.client_id.encode(),
            payload=made.payload,
            envelope=envelope.to_bytes(),
        )
        _log.info(
            "sidecar.released",
            sequence=sequence,
            experts=made.experts,
            withheld=made.withheld,
            norm=made.norm,
            payload_bytes=envelope.payload_bytes,
            fp32_bytes=delta.size_fp32_bytes,
        )
        told = training_telemetry(declaration, envelope)
        return envelope, None if told is None else self.telemetry(told)

    def telemetry(self, event: TrainingTelemetry) -> TrainingTelemetry | None:
        """Return what of an event may be told: nothing, few digits, or noise whose ε the update has paid for."""
        if self.policy.telemetry == "off":
            return None
        if self.policy.telemetry == "noised":
            return noised_telemetry(
                event,
                tokens=1,
                max_loss=MAX_LOSS,
                noise_multiplier=self.policy.dp.noise_multiplier,
                secret=self.identity["signer"].secret("telemetry"),
            )
        told = {name: round(min(max(getattr(event, name), 0.0), MAX_LOSS), 3) for name in ("loss_first", "loss_last")}
        told |= {"tokens": bucket(event.tokens), "seconds": float(f"{event.seconds:.2g}")}
        return event.model_copy(update=told)

    def close(self) -> None:
        """Let go of the ledger."""
        self.ledger.close()

    def _make(self, declaration: Declaration, delta: Delta) -> Outgoing:
        how, carried = self._outgoing, None
        if how.error_feedback:
            carried = self.residuals.carried(declaration.sequence, declaration.base_digest, delta)
        return make_update(
            declaration,
            delta,
            policy=self.policy,
            encoding=how.encoding,
            levels=how.levels,
            mean_rank=how.mean_rank,
            error_feedback=how.error_feedback,
            carried=carried,
            **self.identity,
        )

    def _check_made(self, made: Outgoing) -> None:
        sequence = made.envelope.sequence
        if made.withheld == made.experts:
            raise PolicyRefused(
                "too_few_tokens",
                f"no expert of update {sequence} saw {made.floor} distinct tokens (min_tokens_per_rank and "
                f"min_tokens_per_width of policy {self.policy.version}): train on more text",
            )
        if len(made.payload) > self.policy.bytes_per_update:
            raise PolicyRefused(
                "bytes_per_update",
                f"update {sequence} has {len(made.payload)} bytes, bound {self.policy.bytes_per_update} of policy "
                f"{self.policy.version}: lower the rank or the experts, or choose outgoing.encoding int4",
            )

    def _charge(self, envelope: Envelope, now: float) -> float:
        dp, telemetry = self.policy.dp, self.policy.telemetry
        releases = 1 + (telemetry == "noised")
        charge = Charge(
            sequence=envelope.sequence,
            payload_sha256=envelope.payload_sha256,
            payload_bytes=envelope.payload_bytes,
            inverse_z2=0.0 if dp == "off" else releases / dp.noise_multiplier**2,
        )
        return self.ledger.charge(charge, self.policy, now=now)

    @contextmanager
    def _recorded(self, sequence: int, now: float) -> Iterator[None]:
        """Write a decision against an update into the audit log before anybody acts on it."""
        try:
            yield
        except (PayloadError, PolicyWait) as error:
            waits = isinstance(error, PolicyWait)
            decision = Decision(
                decision="waiting" if waits else "refused",
                rule=error.reason,
                time_s=now,
                policy_version=self.policy.version,
                sequence=sequence,
            )
            self.audit.append(decision)
            if waits:  # of a refusal the loop speaks, which gives it its name
                _log.warning("sidecar.waits", sequence=sequence, rule=error.reason)
            raise


def open_sidecar(config: Tier2Config, outbox: Queue, *, now: float) -> Sidecar:
    """Open the way out of a device, or refuse to.

    Args:
        config: of the device.
        outbox: its own.
        now: seconds since the epoch.

    Raises:
        ConfigError: the policy is missing, unsigned, altered, older than one obeyed before, for another federation, or
            does not list what the configuration wants to send.
        AuditError: the audit log was altered.
        StorageError: the file system refuses.
    """
    policy = load_policy(config.policy.file, config.policy.public_key)
    check_config(policy, config)
    log, anchor = audit_places(config)
    audit = AuditLog(log, anchor=anchor)
    ledger = Ledger(config.home / "sidecar" / "ledger.db")
    if ledger.obey(policy):
        audit.append(Decision(decision="policy", time_s=now, policy_version=policy.version))
    return Sidecar(
        policy=policy,
        outgoing=config.outgoing,
        federation=config.federation,
        client_id=config.client_id,
        key_epoch=config.key_epoch,
        signer=Signer.load(config.key),
        ledger=ledger,
        audit=audit,
        outbox=outbox,
        residuals=Residuals(config.home / "sidecar" / "residuals"),
    )


def audit_places(config: Tier2Config) -> tuple[Path, Path]:
    """Return the directories of a device's audit log and of its anchor."""
    own = config.home / "sidecar"
    return own / "audit", config.audit.anchor or own / "anchor"


def check_config(policy: Policy, config: Tier2Config) -> None:
    """Refuse a configuration whose every update the policy would refuse.

    Raises:
        ConfigError: another federation, an encoding or an adapter that the policy does not list; experts would change
            more often than it lets them.
    """
    if policy.federation != config.federation:
        raise ConfigError(
            f"policy {config.policy.file} is for federation {policy.federation}, this device is in "
            f"{config.federation}: sign a policy for it"
        )
    if config.outgoing.encoding not in policy.encodings:
        raise ConfigError(
            f"outgoing.encoding = {config.outgoing.encoding} is not among encodings {', '.join(policy.encodings)} of "
            f"policy {policy.version}: choose one of them, or sign a policy that lists it"
        )
    if config.outgoing.error_feedback and policy.dp != "off":
        raise ConfigError(
            f"outgoing.error_feedback = true under policy {policy.version} with differential privacy, whose noise the "
            "next update would take back: set it to false"
        )
    if config.outgoing.error_feedback and config.adapters.rank > FEEDBACK_MAX_RANK:
        raise ConfigError(
            f"adapters.rank with outgoing.error_feedback must be 1..{FEEDBACK_MAX_RANK}, got {config.adapters.rank}: "
            "lower it, or set error_feedback to false"
        )
    how, days = config.adapters, policy.experts_period_days
    if how.period_days is not None and (days is None or how.period_days < days):
        raise ConfigError(
            f"adapters.period_days = {how.period_days}, but policy {policy.version} lets the adapted experts change "
            f"{'only with its version' if days is None else f'once in {days} days'} (experts_period_days): "
            f"{'leave it out' if days is None else f'set it to {days} or more'}, or sign a policy that allows it"
        )
    try:
        seed = "0" * 32 if how.mode == "fixed_a" else None
        policy.check_adapter(AdapterSpec(rank=how.rank, alpha=how.alpha, mode=how.mode, seed=seed))
    except PolicyRefused as error:
        raise ConfigError(str(error)) from None
