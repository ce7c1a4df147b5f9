"""What a core update protects and how: safeguards from the configuration, old rows by grant, Fisher of earlier runs.

The old rows are those of the datasets under `core.safeguards.rehearsal`, an equal share of each; the policy is asked
for every one of them, like for those that are trained on. The Fisher information of a run is archived slice by slice;
its digests stand in the record of the run beside the chain, under the id of the dense update that a version folded, so
that the next run finds the sum of all before it by walking from its base towards genesis.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import structlog

from fednested_lib.snapshot import read_state_dict
from tier1.federation import Federation
from tier1.training.ranks import Ranks

if TYPE_CHECKING:
    from torch import Tensor

    from tier1.training.safeguards import Memory, Safeguards
    from tier1.versions.state import VersionView

log = structlog.get_logger()


def authorise_datasets(fed: Federation, names: list[str]) -> list[str]:
    """Ask the policy whether the trainer may train on each dataset; return the ids of its decisions.

    Raises:
        PolicyDenied: it may not, or the policy cannot decide.
    """
    return [fed.authorise("train", f"dataset:{name}", purpose="core-update").id for name in names]


def rehearsed_datasets(fed: Federation) -> dict[str, Path]:
    """Return the datasets of old domains: name → JSONL."""
    rehearsal = fed.config.core.safeguards.rehearsal
    return dict(rehearsal.datasets) if rehearsal else {}


def chosen_safeguards(fed: Federation) -> Safeguards | None:
    """Return the safeguards that the configuration turns on; None: it turns on none."""
    from tier1.training.pace import Frequencies
    from tier1.training.safeguards import Ewc, Freeze, Rehearsed, Safeguards

    kinds = {
        "replay": Rehearsed,
        "distillation": Rehearsed,
        "ewc": Ewc,
        "freeze": Freeze,
        "frequencies": Frequencies,
    }
    given = {name: getattr(fed.config.core.safeguards, name) for name in kinds}
    on = {name: kinds[name](**section.model_dump()) for name, section in given.items() if section}
    return Safeguards(**on) if on else None


def memory_of(fed: Federation, base: VersionView, ranks: Ranks) -> Memory:
    """Return what a run from `base` protects; every rank calls.

    Raises:
        PolicyDenied: the trainer may not train on a dataset of old domains.
        DataError: such a dataset is unusable.
        SnapshotError: a blob of an earlier run's Fisher information is missing or corrupt.
    """
    import numpy as np

    from tier1.evaluation.suites import evenly_spaced
    from tier1.training.safeguards import Memory

    rehearsal, memory = fed.config.core.safeguards.rehearsal, {}
    if rehearsal:
        names = sorted(rehearsal.datasets)
        ranks.first(lambda: authorise_datasets(fed, names))
        packed = [np.load(path, mmap_mode="r", allow_pickle=False) for path in ranks.first(lambda: _pack(fed, base))]
        share = max(1, rehearsal.rows // len(names))
        memory["rows"] = np.concatenate([rows[evenly_spaced(len(rows), share)] for rows in packed])
    if fed.config.core.safeguards.ewc:
        memory["fisher"] = _earlier_fisher(fed, base)
    return Memory(**memory)


def _pack(fed: Federation, base: VersionView) -> list[str]:
    from tier1.training.data import prepare_dataset

    tokenizer, seq_len = fed.blobs.get(base.tokenizer), fed.config.core.seq_len
    return [
        str(prepare_dataset({name: path}, tokenizer, seq_len=seq_len, out_dir=fed.home / "rehearsal" / name).path)
        for name, path in sorted(rehearsed_datasets(fed).items())
    ]


def _earlier_fisher(fed: Federation, base: VersionView) -> dict[str, Tensor]:
    """Return the sum of Fisher information that the newest run behind `base` has left; empty: there is none."""
    for view in base.lineage():
        blobs = fisher_of(fed.home, view.dense.update_id) if view.dense else {}
        if blobs:
            return read_state_dict(replace(base.snapshot, blobs=blobs), fed.archive)
    log.warning("core_update.no_fisher", base=base.version)
    return {}


def fisher_of(home: Path, update_id: str) -> dict[str, str]:
    """Return slice key → digest of the Fisher information after a run; empty: trained without EWC, or elsewhere."""
    record = home / "dense" / f"{update_id}.json"
    return json.loads(record.read_bytes()).get("fisher", {}) if record.is_file() else {}
