"""A small federation on a real broker whose devices are real processes, each with a configuration file of its own."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import yaml

from benchmarks.small_federation import SEQ_LEN, SmallFederation
from tests.policies import pin_policy
from tier1.federation import open_federation
from tier1.loops.broadcast import publish_champion

ADAPTERS = {"rank": 4, "alpha": 8.0}
TRAINING = {"steps": 4, "batch_size": 4, "seq_len": SEQ_LEN, "learning_rate": 8e-3}


class ProcessFederation(SmallFederation):
    """Tier 1 with its first champion, and a tier2.yaml per device in `devices`.

    Args:
        directory: empty.
        bootstrap: of a broker.
        n_devices: numbered from 0.
        training: over `TRAINING`.
        ranks: device → rank of its adapters, where it is another than that of `ADAPTERS`.
    """

    def __init__(
        self,
        directory: Path,
        bootstrap: str,
        *,
        n_devices: int,
        training: Mapping,
        ranks: Mapping[str, int] | None = None,
    ):
        self._bootstrap, self._ranks = bootstrap, ranks or {}
        super().__init__(
            directory,
            seed=1,
            n_devices=n_devices,
            adapters=ADAPTERS,
            training={**TRAINING, **training},
            sections={
                "log": {"bootstrap": bootstrap},
                "window": {"min_updates": 1, "max_wait_s": 0.0},
                "aggregation": {"probe": None},  # what is folded is not judged here, only that it is
                "evaluation": {"seq_len": SEQ_LEN, "max_regression": 100.0},
            },
        )

    def reopen(self) -> None:
        """Connect to the log again, after its broker was away."""
        path = self.directory / "tier1.yaml"
        self.tier1.close()
        self.tier1 = open_federation(path)

    def announce(self) -> None:
        """Publish the champion again."""
        publish_champion(self.tier1)

    def close(self) -> None:
        """Let go of what is open."""
        self.tier1.close()

    def _open_device(self, name: str, adapters: Mapping, training: Mapping) -> Path:
        rank = self._ranks.get(name, adapters["rank"])
        document = {
            "client_id": name,
            "key": "device.key",
            "home": "home",
            "data": "text.jsonl",
            "blobs_uri": str(self.tier1.home / "blobs"),
            "payloads_uri": str(self.tier1.home / "payloads"),
            "control": {"public_key": self.tier1.signer.public_key, "poll_s": 0.05},
            "log": {"bootstrap": self._bootstrap},
            "adapters": {"rank": rank, "alpha": 2.0 * rank},
            "policy": pin_policy(self.directory / name, min_tokens_per_rank=1),  # the text has 32 symbols
            "training": dict(training),
        }
        path = self.directory / name / "tier2.yaml"
        path.write_text(yaml.safe_dump(document, sort_keys=False), encoding="utf-8")
        return path
