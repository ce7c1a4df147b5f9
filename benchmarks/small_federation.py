"""A whole federation in one process and one directory: devices with dialects of their own, and every loop of tier 1.

A device is `fednested_lib.client.Client` with its trainer, spool, sidecar and outbox. A version goes through cut,
admission, fold, gate, approval and broadcast, over an `InMemoryLog`. The model is a Mixtral of 50,000 parameters, small
enough that a local update takes a tenth of a second.

Text is symbols from Markov chains: 60 % of what follows a symbol is common to all devices, 25 % is one device's own,
the rest is chance. Tier 1's text follows another chain, so that the core knows the symbols and what devices have in
common is theirs to find. The gate's suite holds rows of every device in equal parts, so a version's loss is theirs all.
"""

from __future__ import annotations

import json
import string
from collections.abc import Mapping
from pathlib import Path

import numpy as np

from fednested_lib.client import Client
from fednested_lib.config import Tier2Config
from fednested_lib.outbox import Outbox
from fednested_lib.signing import Signer, sha256_hex
from tests.policies import pin_policy
from tier1.federation import Federation, open_federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.broadcast import publish_champion
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import decide, settle_candidate
from tier1.loops.gate_candidate import losses_of
from tier1.loops.records import CandidateRef
from tier1.workspace import create_workspace

SYMBOLS = (string.ascii_lowercase + string.digits)[:32]
SUCCESSORS = 3  # likely ones of a symbol, in every chain
SEQ_LEN = 32
MODEL = {
    "hidden_size": 48,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 128,
}
CORE = {"steps": 150, "batch_size": 8, "seq_len": SEQ_LEN, "learning_rate": 3e-3, "threads": 1}


class SmallFederation:
    """Tier 1 with its first champion, a trained core, and devices that have done nothing yet.

    Args:
        directory: empty.
        seed: of text, model and training.
        n_devices: numbered from 0.
        adapters: of every device, as in its configuration.
        training: likewise.
        sections: of tier1.yaml, over the defaults.
    """

    def __init__(
        self, directory: Path, *, seed: int, n_devices: int, adapters: Mapping, training: Mapping, sections: Mapping
    ):
        self.directory = directory
        names = [f"device-{device:02d}" for device in range(n_devices)]
        _write_texts(directory, names, seed)
        self.tier1 = self._open_tier1(names, seed, sections)
        self.devices = [self._open_device(name, adapters, {**training, "seed": seed}) for name in names]

    def start(self, device: int) -> None:
        """Let a device take the newest champion and write down its job."""
        self.devices[device].follow()
        self.devices[device].start_job()

    def finish(self, device: int) -> None:
        """Let it train the job and send the update."""
        self.devices[device].finish_job()
        self.devices[device].send()

    def fold(self) -> None:
        """Cut, fold, gate, approve and publish."""
        self._promote(fold_updates(self.tier1, take_updates(self.tier1)))

    def loss(self) -> float:
        """Return the champion's mean loss on held-out rows of all devices, nats per token."""
        return losses_of(self.tier1, self.tier1.chain.state().champion)["devices"]

    def close(self) -> None:
        """Let go of what is open."""
        for device in self.devices:
            device.outbox.close()
        self.tier1.close()

    def _promote(self, candidate: CandidateRef) -> None:
        decide(self.tier1, settle_candidate(self.tier1, candidate), "approve", "flag")
        publish_champion(self.tier1)

    def _open_tier1(self, names: list[str], seed: int, sections: Mapping) -> Federation:
        keys = {}
        for name in names:
            key = Signer.from_seed(bytes.fromhex(sha256_hex(name.encode())))  # the same run is the same to the bit
            key.save(self.directory / name / "device.key")
            keys[name] = key.public_key
        defaults = {
            "log": {"bootstrap": f"memory:{self.directory}"},
            "model": {"family": "mixtral", "vocab_size": 258, "config": MODEL, "seed": seed},
            "core": {**CORE, "seed": seed},
            "evaluation": {"seq_len": SEQ_LEN},
        }
        path = create_workspace(
            self.directory,
            datasets={"symbols": "core.jsonl"},
            suites={"devices": "heldout.jsonl"},
            devices=keys,
            overrides={**defaults, **sections},
        )
        self.tier1 = open_federation(path)
        packed = pack_datasets(self.tier1, authorise_training(self.tier1, "core"))
        self._promote(fold_dense(self.tier1, train_delta(self.tier1, packed, "core")))
        return self.tier1

    def _open_device(self, name: str, adapters: Mapping, training: Mapping) -> Client:
        home, blobs = self.directory / name / "home", self.tier1.home / "blobs"
        home.mkdir()
        (home / "blobs").symlink_to(blobs)  # read in place, so that fetching a model copies nothing
        config = Tier2Config.model_validate(
            {
                "client_id": name,
                "key": self.directory / name / "device.key",
                "home": home,
                "data": self.directory / name / "text.jsonl",
                "blobs_uri": str(blobs),
                "payloads_uri": str(self.tier1.home / "payloads"),
                "control": {"public_key": self.tier1.signer.public_key},
                "policy": pin_policy(self.directory / name),
                "adapters": dict(adapters),
                "training": dict(training),
            }
        )
        outbox = Outbox(home / "outbox", max_bytes=config.outgoing.outbox_bytes)
        return Client(config, self.tier1.log, outbox, stopped=lambda: False)


def _write_texts(directory: Path, names: list[str], seed: int) -> None:
    rng = np.random.default_rng(seed)
    shared, other = _successors(rng), _successors(rng)
    _write_rows(directory / "core.jsonl", 0.5 * other + 0.5 / len(SYMBOLS), 300, rng)
    for name in names:
        dialect = 0.6 * shared + 0.25 * _successors(rng) + 0.15 / len(SYMBOLS)
        _write_rows(directory / name / "text.jsonl", dialect, 40, rng)
        _write_rows(directory / "heldout.jsonl", dialect, 2, rng)


def _successors(rng: np.random.Generator) -> np.ndarray:
    """Return P(next | symbol) [symbol, next]: a few successors of each, all as likely."""
    n = len(SYMBOLS)
    likely = [rng.choice(n, SUCCESSORS, replace=False) for _ in range(n)]
    return np.stack([np.isin(np.arange(n), each) / SUCCESSORS for each in likely])


def _write_rows(path: Path, chain: np.ndarray, n_rows: int, rng: np.random.Generator) -> None:
    """Append rows of four sequences each, drawn from a chain, to a JSONL file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("a", encoding="utf-8") as file:
        for _ in range(n_rows):
            symbols = [int(rng.integers(len(SYMBOLS)))]
            for _ in range(4 * SEQ_LEN):
                symbols.append(int(rng.choice(len(SYMBOLS), p=chain[symbols[-1]])))
            file.write(json.dumps({"text": "".join(SYMBOLS[symbol] for symbol in symbols)}) + "\n")
