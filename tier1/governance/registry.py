"""The registry as a view of the manifest chain, and how it is repaired.

    repair: for every version of the chain    an entry with its manifest digest exists
            for candidate and champion        the alias points at an entry whose artifacts are that version's
            for the head                      the anchor names it

A registry lets whoever may edit it move aliases, so nothing is ever read from it to decide what is served; it is
written from the chain, again and again, and says what it had to change. The one thing that it gives back is the anchor:
a head digest kept outside the chain. If the chain does not hold the anchored head, its end was cut off or rewritten.
"""

from __future__ import annotations

import abc
import contextlib
from collections.abc import Callable, Mapping, Sequence

import structlog

from fednested_lib.errors import ChainConflict, ChainCorrupt, GovernanceError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import sha256_hex
from tier1.governance.ports import ALIASES, ModelVersion, Registered, Registry, RegistryState, TrainingRun

log = structlog.get_logger(__name__)


def check_anchor(anchor: str | None, entries: Sequence[str]) -> None:
    """Compare the registry's anchor, read before the chain, with the chain.

    Args:
        anchor: what `Registry.anchor()` returned.
        entries: digests of all chain entries, read afterwards.

    Raises:
        ChainCorrupt: the chain does not hold the anchored head.
    """
    if anchor is not None and anchor not in entries:
        raise ChainCorrupt(
            f"the registry remembers chain head {anchor[:12]}, which is not among the {len(entries)} entries of the "
            "chain: its end was cut off or rewritten, restore chain/ from a backup"
        )


def repair_from_chain(
    registry: Registry, read_state: Callable[[], RegistryState], *, attempts: int = 5
) -> tuple[str, ...]:
    """Repair a registry while other processes commit to the chain and repair it too.

    Args:
        registry: what to repair.
        read_state: reads the chain anew on every call.
        attempts: readings before a head that the chain lacks counts as lost, not as new.

    Returns:
        One line per change.

    Raises:
        ChainCorrupt: the chain does not hold the anchored head, however often it is read.
        TransportError: the registry cannot be reached.
    """
    for _ in range(attempts):
        with contextlib.suppress(ChainConflict):  # another committer was between our reading and our repair
            return registry.repair(read_state())
    check_anchor(registry.anchor(), read_state().entries)
    return registry.repair(read_state())


class RepairableRegistry(abc.ABC):
    """Base of both registries: the repair, over a handful of primitives."""

    @abc.abstractmethod
    def register(self, version: ModelVersion) -> Registered:
        """Store a version unless an entry with its manifest is there."""

    @abc.abstractmethod
    def versions(self) -> tuple[Registered, ...]:
        """Return all registered versions, oldest first."""

    @abc.abstractmethod
    def aliases(self) -> Mapping[str, str]:
        """Return alias → registry number."""

    @abc.abstractmethod
    def anchor(self) -> str | None:
        """Return the remembered chain head."""

    @abc.abstractmethod
    def artifacts(self, registered: Registered) -> Mapping[str, bytes]:
        """Return the stored files of an entry that are there: ``manifest.json`` and ``snapshot.json``."""

    @abc.abstractmethod
    def add(self, version: ModelVersion) -> Registered:
        """Store a version in a new entry, whatever is there already."""

    @abc.abstractmethod
    def point(self, alias: str, number: str | None) -> None:
        """Let an alias point at an entry; None removes it."""

    @abc.abstractmethod
    def set_tags(self, number: str, tags: Mapping[str, str]) -> None:
        """Set tags of an entry, leaving its other tags alone."""

    @abc.abstractmethod
    def set_anchor(self, digest: str) -> None:
        """Remember a chain head."""

    @abc.abstractmethod
    def record_run(self, run: TrainingRun) -> None:
        """Show the metrics of a training run's steps, once."""

    def get(self, alias: str) -> Registered | None:
        """Return the version behind an alias, or None."""
        number = self.aliases().get(alias)
        return next((entry for entry in self.versions() if entry.number == number), None)

    def manifest(self, registered: Registered) -> bytes:
        """Return the stored manifest of an entry.

        Raises:
            GovernanceError: it is missing, or is not the one that the entry's tag names.
        """
        data = self.artifacts(registered).get("manifest.json")
        if data is None or sha256_hex(data) != registered.manifest_digest:
            found = "is missing" if data is None else f"has digest {sha256_hex(data)[:12]}"
            raise GovernanceError(
                f"manifest.json of registry entry {registered.number} {found}, its tag names "
                f"{(registered.manifest_digest or 'none')[:12]}: repair the registry from the chain"
            )
        return data

    def repair(self, state: RegistryState) -> tuple[str, ...]:
        """Make the registry show the chain.

        Args:
            state: what the chain says.

        Returns:
            One line per change; empty if nothing had to be done.

        Raises:
            ChainConflict: the anchored head is not in `state`, which was read before another committer's entry: see
                `repair_from_chain`.
            TransportError: the registry cannot be reached; the next repair does what this one left.
        """
        anchor = self.anchor()
        if anchor is not None and anchor not in state.entries:
            raise ChainConflict(
                f"the registry shows chain head {anchor[:12]}, which the chain lacked when it was read: read it again"
            )
        changes = self._repair_versions(state) + self._repair_aliases(state)
        head = state.entries[-1]
        if anchor != head:
            self.set_anchor(head)
            changes.append(f"anchor: {(anchor or 'none')[:12]} → {head[:12]}")
        if changes:
            log.info("registry.repaired", changes=len(changes))
        return tuple(changes)

    def _repair_versions(self, state: RegistryState) -> list[str]:
        known = {entry.manifest_digest for entry in self.versions()}
        changes = []
        for number, digest in sorted(state.manifests.items()):
            if digest not in known:
                version = state.load(number)
                assert version.manifest_digest == digest, "the state's digests are those of the manifest bytes"
                entry = self.register(version)
                failpoint("registry.after_register")
                changes.append(f"version {number}: registered as {entry.number}")
        return changes

    def _repair_aliases(self, state: RegistryState) -> list[str]:
        wanted = dict(zip(ALIASES, (state.candidate, state.champion), strict=True))
        changes: list[str] = []
        targets: dict[str, str | None] = {}
        for version in {number for number in wanted.values() if number is not None}:
            entry = self._whole(state.load(version), changes)
            targets.update({alias: entry for alias in ALIASES if wanted[alias] == version})
        shown = self.aliases()
        for alias in ALIASES:
            current, target = shown.get(alias), targets.get(alias)
            if current != target:
                self.point(alias, target)
                changes.append(f"alias {alias}: {current or 'none'} → {target or 'none'}")
        return changes

    def _whole(self, version: ModelVersion, changes: list[str]) -> str:
        """Return the number of an entry whose artifacts and tags are this version's, making or mending one."""
        expected = {"manifest.json": version.manifest, "snapshot.json": version.snapshot}
        for entry in self.versions():
            if entry.manifest_digest != version.manifest_digest:
                continue
            if self.artifacts(entry) != expected:
                changes.append(f"version {version.version}: entry {entry.number} has other artifacts, passed over")
                continue
            wrong = {name: value for name, value in version.tags().items() if entry.tags.get(name) != value}
            if wrong:
                self.set_tags(entry.number, wrong)
                changes.append(
                    f"version {version.version}: {', '.join(sorted(wrong))} of entry {entry.number} set back"
                )
            return entry.number
        entry = self.add(version)
        changes.append(f"version {version.version}: registered as {entry.number}")
        return entry.number
