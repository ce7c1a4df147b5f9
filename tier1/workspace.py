"""A federation's directory: configuration, policy and keys, as `fednested init-config tier1` writes them.

    <dir>/tier1.yaml   policy.yaml   keys/{tier1,approver}.key (+ .pub)   home/ (made by the loops)

Nothing is overwritten: keys and policy that exist stay as they are.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from fednested_lib.blobs import create_exclusive
from fednested_lib.errors import ConfigError
from fednested_lib.signing import Signer

TRAINER = "trainer"
APPROVER = "secops"

POLICY = """\
# Default deny: what no rule allows is refused. Deny rules win. A resource is an exact name or a prefix followed by *.
version: 1
groups:
  trainers: [{trainer}]
  secops: [{approver}, console]   # console: a bare answer at the gate; take it out where only signed tokens may decide
allow:
  - {{id: train-core, groups: [trainers], actions: [read, train], resources: ["dataset:*"], purposes: [core-update]}}
  - {{id: fold-updates, groups: [trainers], actions: [read, aggregate],
     resources: ["topic:updates.experts.local", "topic:updates.tier1"], purposes: [fold]}}
  # Who may go on with a log that lost records: narrow it to the people who would notice that it should not have.
  - {{id: accept-log, groups: [trainers], actions: [aggregate], resources: ["topic:updates.experts.local"],
     purposes: [accept-log]}}
  - {{id: publish-model, groups: [trainers, secops], actions: [publish], resources: ["model:*"]}}
  - {{id: promote-model, groups: [secops], actions: [promote], resources: ["model:*"]}}
deny: []
"""

HEADER = """\
# One federation as tier 1 sees it. Relative paths are relative to this file; FEDNESTED_KAFKA_BOOTSTRAP wins over
# log.bootstrap.
"""


# What a new federation begins with, chosen on seeds 0 to 4 of `benchmarks/hostile.py` and judged on five others: three
# hostile devices of ten leave at least 90 % of the gain, and without any the pipeline keeps at least 98 % of what the
# weighted mean gains.
AGGREGATION: dict[str, Any] = {
    "probe": 0.025,
    "norm_ratio": 1.1,
    "expert_norm_ratio": 2.0,
    "token_ratio": 1.0,
    "min_coverage": 2,
    "mass_ratio": 0.2,
}

AGGREGATION_NOTES = """\
# aggregation: admission → clip → prior → rule → mass → fold; every key in docs/configuration.md. What stands above is
# what keeps a fleet learning with 30 % hostile devices. Other choices, for example:
#   rule: geometric_median     # or krum, multi_krum, centred_clipping, fltrust, foolsgold, your own; they tell devices
#                              # apart by distances, which LoRA updates from random A hardly have
#   reputation: {}             # trust from a device's rows in the last versions
#   outer: {kind: nesterov}    # momentum over versions; halve rates.eta_t2 with it
#   orthogonal: {}             # a fold keeps clear of the directions that the last ones moved (docs/forgetting.md)
#   measure: true              # cosine and distance of every update in audit and deck, if nothing else asks for them
"""


def load_or_create_key(path: Path) -> Signer:
    """Return the key at `path`, making it if there is none."""
    if not path.exists():
        Signer.generate().save(path)
    return Signer.load(path)


def create_workspace(
    directory: str | os.PathLike,
    *,
    datasets: Mapping[str, str],
    suites: Mapping[str, str],
    devices: Mapping[str, str] | None = None,
    overrides: Mapping[str, Any] | None = None,
    name: str = "tier1.yaml",
) -> Path:
    """Write a tier-1 workspace.

    Args:
        directory: where; made if missing.
        datasets: governed training sets, name → path relative to `directory`.
        suites: evaluation suites, name → path relative to `directory`.
        devices: client id → public key (64 hex digits).
        overrides: sections or keys that replace the defaults, merged one level deep.
        name: file name; a second configuration of the same federation has another.

    Returns:
        Path of the new file.

    Raises:
        ConfigError: the file exists already.
    """
    import yaml

    directory = Path(directory)
    tier1, approver = (load_or_create_key(directory / "keys" / f"{name}.key") for name in ("tier1", "approver"))
    create_exclusive(directory / "policy.yaml", POLICY.format(trainer=TRAINER, approver=APPROVER).encode())
    document: dict[str, Any] = {
        "federation": "fednested",
        "profile": "local",
        "home": "home",
        "log": {"bootstrap": "127.0.0.1:9092"},
        "identity": {"principal": TRAINER, "key": "keys/tier1.key", "trusted": {tier1.public_key: "tier1"}},
        "devices": {client: {"public_key": key} for client, key in (devices or {}).items()},
        "core": {"datasets": dict(datasets)},
        "aggregation": dict(AGGREGATION),
        "evaluation": {"suites": dict(suites)},
        "registry": {"uri": "file"},
        "governance": {"policy": "policy.yaml", "approvers": {approver.public_key: APPROVER}, "allow_unverified": True},
    }
    for key, value in (overrides or {}).items():
        document[key] = {**document[key], **value} if isinstance(value, Mapping) and key in document else value
    path = directory / name
    if not create_exclusive(path, (HEADER + yaml.safe_dump(document, sort_keys=False) + AGGREGATION_NOTES).encode()):
        raise ConfigError(f"{path} exists already: move it away or choose another directory")
    return path
