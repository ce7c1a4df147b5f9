"""What a core update protects and how: safeguards from the configuration, old rows by grant, Fisher of the base.

The old rows are those of the datasets under `core.safeguards.rehearsal`, an equal share of each; the policy is asked
for every one of them, like for those that are trained on. The Fisher information is the base's: a run with EWC leaves
its own in its update, signed and archived like its delta, and the version that folds it carries the sum
(`tier1/aggregation/fisher.py`).
"""

from __future__ import annotations

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
        SnapshotError: a blob of the base's Fisher information is missing or corrupt.
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
    """Pack each dataset of old domains by itself; bad records are set aside beside its rows."""
    from tier1.training.data import prepare_dataset

    tokenizer, seq_len, paths = fed.blobs.get(base.tokenizer), fed.config.core.seq_len, []
    for name, path in sorted(rehearsed_datasets(fed).items()):
        packed = prepare_dataset({name: path}, tokenizer, seq_len=seq_len, out_dir=fed.home / "rehearsal" / name)
        log.info("core_update.rehearsed", dataset=name, rows=packed.n_rows, set_aside=packed.n_set_aside)
        paths.append(str(packed.path))
    return paths


def _earlier_fisher(fed: Federation, base: VersionView) -> dict[str, Tensor]:
    """Return the Fisher information that the base carries; empty: no core update behind it had EWC."""
    if base.fisher:
        return read_state_dict(replace(base.snapshot, blobs=dict(base.fisher)), fed.blobs)
    log.warning("core_update.no_fisher", base=base.version)
    return {}
