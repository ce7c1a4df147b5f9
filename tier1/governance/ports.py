"""The four governance ports; every server of governance is reached through one of them.

    Authorizer    may this principal do this to that?      policy file (`policy_file.py`); Ranger in a later issue
    Lineage       what was made from what, by which run?   outbox of DataHub MCPs (`lineage_outbox.py`)
    Registry      which version is candidate, champion?    a real MLflow server or a file (`registry.py`)
    PiiScanner    does this text hold personal data?       no adapter yet

Two rules hold for every adapter. Anything undecidable is a deny: an adapter that cannot answer raises or denies, it
never allows. A view is never the truth: what the registry says is repaired from the manifest chain.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Protocol, get_args

from fednested_lib.signing import canonical_json, sha256_hex

Action = Literal["read", "train", "aggregate", "publish", "promote"]
ACTIONS: frozenset[str] = frozenset(get_args(Action))
RESOURCE_KINDS = ("dataset", "model", "topic")
ALIASES = ("candidate", "champion")


@dataclass(frozen=True, kw_only=True)
class AccessRequest:
    """One question to the policy.

    Args:
        principal: name of the person or service that acts.
        action: what it wants to do.
        resource: ``dataset:<path>``, ``model:<name>`` or ``topic:<name>``; never a pattern.
        context: attributes a policy may ask for, e.g. ``purpose``.
    """

    principal: str
    action: Action
    resource: str
    context: Mapping[str, str] = field(default_factory=dict)

    def to_document(self) -> dict[str, Any]:
        """Return the request as a JSON document."""
        return {
            "principal": self.principal,
            "action": self.action,
            "resource": self.resource,
            "context": dict(self.context),
        }


@dataclass(frozen=True, kw_only=True)
class AccessDecision:
    """The policy's answer, in a form that can be cited.

    Args:
        request: the question.
        allowed: the answer.
        reason: one line for a person.
        rule: id of the rule that decided; None when no rule matched.
        policy: identity of the policy that was asked, e.g. ``file:<digest>``.
    """

    request: AccessRequest
    allowed: bool
    reason: str
    rule: str | None
    policy: str

    @property
    def id(self) -> str:
        """The decision's name, derived from its content: the same question to the same policy has one id."""
        return sha256_hex(canonical_json(self._content()))

    def to_document(self) -> dict[str, Any]:
        """Return the decision as a JSON document with its id."""
        return {"id": self.id, **self._content()}

    def _content(self) -> dict[str, Any]:
        return {
            "request": self.request.to_document(),
            "allowed": self.allowed,
            "reason": self.reason,
            "rule": self.rule,
            "policy": self.policy,
        }


class Authorizer(Protocol):
    """Decides who may do what."""

    def decide(self, request: AccessRequest) -> AccessDecision:
        """Answer one question; an exception counts as a deny."""
        ...


@dataclass(frozen=True, kw_only=True)
class LineageEvent:
    """The metadata proposals of one run or one decision.

    Args:
        kind: ``core_update``, ``fold_core``, ``aggregate_experts``, ``version`` or ``promotion``.
        run_id: id of the run, derived from its inputs, so that a repetition is the same event; for a promotion, the
            id of the access decision.
        manifest_digest: manifest of the version concerned; None for a run, which comes before its manifest.
        proposals: DataHub MCPs as JSON documents, in the order in which they are to be shipped.
    """

    kind: str
    run_id: str
    manifest_digest: str | None
    proposals: tuple[Mapping[str, Any], ...]


class Lineage(Protocol):
    """Records what was made from what."""

    def record(self, event: LineageEvent) -> tuple[str, ...]:
        """Store the event durably and once; return the ids of its proposals, the same on every repetition."""
        ...

    def has(self, *, run_id: str | None = None, manifest_digest: str | None = None) -> bool:
        """Tell whether the run, or the version with this manifest, is recorded completely."""
        ...

    def missing(self, ids: Iterable[str]) -> tuple[str, ...]:
        """Return those of `ids` that are not recorded, in the order given."""
        ...


@dataclass(frozen=True, kw_only=True)
class ModelVersion:
    """What the registry is told about one version of the chain.

    Args:
        version: number in the manifest chain, from 0.
        manifest: bytes of the signed chain entry; their SHA-256 is the version's name.
        snapshot: bytes of the snapshot manifest.
        weights_digest: digest of the weights, equal for equal weights.
        chain_head: digest of the newest chain entry at the time of registration.
        policy_decision: id of the access decision under which the version was made; None for genesis.
        losses: mean loss per evaluation suite, nats per token.
        metrics: what else was measured, by the name that the registry shows.
    """

    version: int
    manifest: bytes
    snapshot: bytes
    weights_digest: str
    chain_head: str
    policy_decision: str | None = None
    losses: Mapping[str, float] = field(default_factory=dict)
    metrics: Mapping[str, float] = field(default_factory=dict)

    @property
    def manifest_digest(self) -> str:
        """SHA-256 of the manifest bytes."""
        return sha256_hex(self.manifest)

    def tags(self) -> dict[str, str]:
        """Return the tags that describe this version for good (the chain head moves on and is not among them)."""
        return {
            "version": str(self.version),
            "manifest_digest": self.manifest_digest,
            "weights_digest": self.weights_digest,
            "policy_decision": self.policy_decision or "none",
        }


@dataclass(frozen=True, kw_only=True)
class Registered:
    """A version as the registry knows it.

    Args:
        number: the registry's own number, which need not equal the version number of the chain.
        run_id: the registry's run that carries the losses.
        source: where its artifacts lie, e.g. ``models:/m-…``.
        tags: tags of the registry entry.
        platform: the registry's kind, ``mlflow`` or ``file``; part of the model's name in lineage.
    """

    platform: str
    number: str
    run_id: str
    source: str
    tags: Mapping[str, str]

    @property
    def manifest_digest(self) -> str | None:
        """Manifest that this entry claims to be."""
        return self.tags.get("manifest_digest")


@dataclass(frozen=True, kw_only=True)
class RegistryState:
    """What the manifest chain says the registry should show.

    Args:
        candidate: version number behind the alias ``candidate``; None removes the alias.
        champion: version number behind the alias ``champion``; None removes the alias.
        manifests: manifest digest of every version of the chain, voided ones too.
        entries: digests of all chain entries in order; the last one is anchored in the registry.
        load: reads one version; called only for versions that are missing or aliased.
    """

    candidate: int | None
    champion: int | None
    manifests: Mapping[int, str]
    entries: Sequence[str]
    load: Callable[[int], ModelVersion]


@dataclass(frozen=True, kw_only=True)
class TrainingRun:
    """What the registry is told about the steps of one core update.

    Args:
        update_id: id of the dense update that it published.
        name: name of the run.
        base_version: version it trained from.
        dataset_digest: content hash of what it was trained on.
        trainer: who trained.
        steps: per measured step a number for each metric, among them ``step`` and ``at_ms`` (Unix time).
    """

    update_id: str
    name: str
    base_version: int
    dataset_digest: str
    trainer: str
    steps: Sequence[Mapping[str, float]]

    def tags(self) -> dict[str, str]:
        """Return the tags of the entry."""
        return {
            "update_id": self.update_id,
            "base_version": str(self.base_version),
            "dataset_digest": self.dataset_digest,
            "trainer": self.trainer,
        }


class Registry(Protocol):
    """Shows versions to people and serving systems; a view of the chain, never its source."""

    def register(self, version: ModelVersion) -> Registered:
        """Store a version with its artifacts, tags and losses; a second call with the same manifest changes nothing."""
        ...

    def get(self, alias: str) -> Registered | None:
        """Return the version behind an alias, or None."""
        ...

    def versions(self) -> tuple[Registered, ...]:
        """Return all registered versions, oldest first."""
        ...

    def manifest(self, registered: Registered) -> bytes:
        """Return the stored manifest, verified against the digest that its tag names."""
        ...

    def anchor(self) -> str | None:
        """Return the chain head that the registry remembers; read it before the chain, then compare."""
        ...

    def repair(self, state: RegistryState) -> tuple[str, ...]:
        """Make the registry show `state` and return one line per change."""
        ...

    def record_run(self, run: TrainingRun) -> None:
        """Show the metrics of a training run's steps; a second call with the same update changes nothing."""
        ...


class PiiScanner(Protocol):
    """Finds personal data in text; returns counts only, never the text."""

    def scan(self, texts: Iterable[str]) -> Mapping[str, int]:
        """Return the number of findings per entity type."""
        ...
