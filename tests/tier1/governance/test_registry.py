"""Both registries show the chain and nothing else: one contract, against a file and against a real MLflow server."""

from __future__ import annotations

import dataclasses
import uuid
from collections.abc import Callable
from pathlib import Path

import pytest

from fednested_lib.errors import ChainConflict, ChainCorrupt, GovernanceError
from tier1.governance.ports import ModelVersion, RegistryState
from tier1.governance.registry import RepairableRegistry, check_anchor, repair_from_chain
from tier1.governance.registry_file import FileRegistry
from tier1.governance.registry_mlflow import MlflowRegistry


@pytest.fixture(params=["file", "mlflow"])
def registry(request: pytest.FixtureRequest, tmp_path: Path) -> RepairableRegistry:
    """An empty registry of either kind."""
    if request.param == "file":
        return FileRegistry(tmp_path / "registry.json")
    return MlflowRegistry(request.getfixturevalue("mlflow_server"), f"moe-{uuid.uuid4().hex[:8]}")


@pytest.fixture
def chain(made: Callable[..., ModelVersion]) -> Callable[..., RegistryState]:
    """The state of a chain of `length` versions whose last is candidate."""

    def state(length: int, champion: int | None = None) -> RegistryState:
        versions = {number: made(number) for number in range(length)}
        return RegistryState(
            candidate=length - 1,
            champion=champion,
            manifests={number: version.manifest_digest for number, version in versions.items()},
            entries=[f"{number:064d}" for number in range(length)],
            load=versions.__getitem__,
        )

    return state


def _shown(registry: RepairableRegistry) -> dict[str, str | None]:
    found = {alias: registry.get(alias) for alias in ("candidate", "champion")}
    return {alias: entry and entry.tags["version"] for alias, entry in found.items()}


def test_an_empty_registry_has_nothing_to_say(registry):
    """Looking before anything is registered is not an error."""
    assert (registry.versions(), registry.anchor(), registry.get("champion")) == ((), None, None)


def test_a_version_is_registered_once_with_its_tags_and_artifacts(registry, made):
    """Registering again after a crash changes nothing; the stored manifest is the chain's, to the byte."""
    entry = registry.register(made(4))
    assert registry.register(made(4)) == entry
    assert [found.number for found in registry.versions()] == [entry.number]
    assert dict(entry.tags) == {**made(4).tags(), "chain_head": made(4).chain_head}
    assert registry.manifest(entry) == made(4).manifest
    assert registry.artifacts(entry) == {"manifest.json": made(4).manifest, "snapshot.json": made(4).snapshot}


def test_repair_makes_the_registry_show_the_chain(registry, chain):
    """An empty registry gets every version, both aliases and the anchor, and says so; a second repair finds nothing."""
    changes = registry.repair(chain(3, champion=1))
    assert [change.partition(":")[0] for change in changes] == [
        "version 0", "version 1", "version 2", "alias candidate", "alias champion", "anchor"
    ]  # fmt: skip
    assert _shown(registry) == {"candidate": "2", "champion": "1"}
    assert registry.anchor() == chain(3).entries[-1]
    assert registry.repair(chain(3, champion=1)) == ()


def test_repair_follows_a_longer_chain(registry, chain):
    """A new version and a new champion change what they must, and only that."""
    registry.repair(chain(2, champion=0))
    changes = registry.repair(chain(3, champion=1))
    assert [change.partition(":")[0] for change in changes] == [
        "version 2",
        "alias candidate",
        "alias champion",
        "anchor",
    ]
    assert _shown(registry) == {"candidate": "2", "champion": "1"}


@pytest.mark.parametrize("by_hand", ["moved", "deleted"])
def test_an_alias_changed_by_hand_is_set_back(registry, chain, by_hand: str):
    """Whoever may edit the registry cannot promote: the alias returns to what the chain says."""
    registry.repair(chain(3, champion=1))
    newest = registry.get("candidate").number
    registry.point("champion", newest if by_hand == "moved" else None)
    assert _shown(registry)["champion"] != "1"
    assert [change.partition(":")[0] for change in registry.repair(chain(3, champion=1))] == ["alias champion"]
    assert _shown(registry) == {"candidate": "2", "champion": "1"}


def test_an_alias_that_the_chain_does_not_know_is_removed(registry, chain):
    """No champion in the chain means no champion in the registry."""
    registry.repair(chain(2, champion=None))
    registry.point("champion", registry.get("candidate").number)
    registry.repair(chain(2, champion=None))
    assert _shown(registry) == {"candidate": "1", "champion": None}


def test_tags_changed_by_hand_are_set_back(registry, chain, made):
    """A served version's tags are the chain's; the change is reported with the tag's name."""
    registry.repair(chain(2, champion=1))
    registry.set_tags(registry.get("champion").number, {"weights_digest": "f" * 64, "note": "kept"})
    (change,) = registry.repair(chain(2, champion=1))
    assert "weights_digest" in change
    assert registry.get("champion").tags["weights_digest"] == made(1).weights_digest
    assert registry.get("champion").tags["note"] == "kept"


def test_an_entry_that_claims_a_foreign_manifest_is_passed_over(registry, chain, made):
    """An entry with our manifest digest as its tag but other artifacts is not believed; the version comes anew."""
    registry.repair(chain(2, champion=0))
    genuine = registry.get("champion").number
    forged = registry.add(made(0, snapshot=b'{"blobs":"evil"}')).number
    registry.set_tags(genuine, {"manifest_digest": "0" * 64})
    registry.point("champion", forged)
    changes = registry.repair(chain(2, champion=0))
    assert any(f"entry {forged} has other artifacts" in change for change in changes)
    champion = registry.get("champion")
    assert champion.number not in (forged, genuine)
    assert registry.artifacts(champion)["snapshot.json"] == made(0).snapshot


def test_a_manifest_that_is_not_its_tags_is_refused(registry, made):
    """Reading a manifest whose entry names another one is an error that names both."""
    entry = registry.register(made(1))
    claim = dataclasses.replace(entry, tags={**entry.tags, "manifest_digest": "e" * 64})
    with pytest.raises(GovernanceError, match=f"has digest {made(1).manifest_digest[:12]}, its tag names eeeeeeeeeeee"):
        registry.manifest(claim)


def test_a_chain_read_too_early_does_not_turn_the_registry_back(registry, chain):
    """Two committers repair at once: the one with the older reading is told to read again and changes nothing."""
    registry.repair(chain(3, champion=2))
    with pytest.raises(ChainConflict, match="read it again"):
        registry.repair(chain(2, champion=0))
    assert _shown(registry) == {"candidate": "2", "champion": "2"}


def test_repair_reads_the_chain_again_when_another_committer_was_faster(registry, chain):
    """An out-of-date reading of the chain is read again and the repair done; a cut-off chain is found all the same."""
    registry.repair(chain(3, champion=2))
    readings = iter([chain(2), chain(2), chain(4, champion=3)])
    changes = repair_from_chain(registry, lambda: next(readings))
    assert changes[0].startswith("version 3: registered")
    assert _shown(registry) == {"candidate": "3", "champion": "3"}
    with pytest.raises(ChainCorrupt, match="its end was cut off"):
        repair_from_chain(registry, lambda: chain(2))


def test_the_anchor_shows_that_the_end_of_the_chain_was_cut_off(registry, chain):
    """A head that the registry remembers and the chain lacks is a corrupt chain, named with the head."""
    registry.repair(chain(3))
    check_anchor(registry.anchor(), chain(4).entries)
    check_anchor(None, chain(1).entries)
    with pytest.raises(ChainCorrupt, match="remembers chain head 000000000000, which is not among the 2 entries"):
        check_anchor(registry.anchor(), chain(2).entries)
