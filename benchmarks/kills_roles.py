"""One piece of work of one role, in a process that may be killed: `python -m benchmarks.kills_roles ROLE CONFIG …`.

    device      CONFIG BOOTSTRAP CLIENT TARGET    the device loop until it has made TARGET updates and sent them
    aggregator  CONFIG                            cut, admit, archive, fold, store the candidate
    committer   CONFIG                            settle, quarantine, receipts, write an approval, broadcast

Everything is the product's but three stand-ins: a random delta, spooled like a trained one, for the device's training;
a gate that passes, for the evaluation; and a decision written straight to the chain, for the approval. The last goes
past `decide`: no policy, no promotion checklist, no lineage and no registry is asked or kept. Running a piece again
finishes what a kill left, or finds it done. Prints `done` at the end; modules are imported before the work begins.
"""

from __future__ import annotations

import logging
import sys
from contextlib import ExitStack
from pathlib import Path

import structlog

CLIENTS = ("ada", "bob", "cat", "dan", "eve", "fay")
RANKS = (2, 16)  # payloads in the record, and above 16 KiB by claim check


def device_config(config: Path, client: str, target: int):
    """Describe one device beside the federation of `config`."""
    from fednested_lib.config import Tier2Config
    from fednested_lib.signing import Signer
    from tests.policies import SITE

    root = config.parent
    return Tier2Config.model_validate(
        {
            "client_id": client,
            "key": root / "devices" / f"{client}.key",
            "home": root / "devices" / client,
            "data": root / "devices" / "text.jsonl",
            "blobs_uri": str(root / "home/blobs"),
            "payloads_uri": str(root / "home/payloads"),
            "control": {"public_key": Signer.load(root / "keys/tier1.key").public_key, "poll_s": 0.05},
            "training": {"max_updates": target, "updates_per_base": 1000},
            "policy": {"file": root / "devices" / "policy.yaml", "public_key": SITE.public_key},
        }
    )


def device(config: Path, bootstrap: str, client: str, target: int) -> None:
    """Run one device until it has made and sent `target` updates since it was born."""
    from fednested_lib.client import Client
    from fednested_lib.kafka_log import KafkaLog
    from fednested_lib.outbox import Outbox

    options = device_config(config, client, target)
    with ExitStack() as stack:
        outbox = stack.enter_context(Outbox(options.home / "outbox", max_bytes=options.outgoing.outbox_bytes))
        one = Client(options, KafkaLog(bootstrap), outbox, lambda: False)
        one.trainer.local = RandomTrainer(options, one.trainer.spool)
        report = one.run()
    assert report.waiting == 0, report


class RandomTrainer:
    """Spools a random delta where a device would train one; equal jobs give equal deltas."""

    def __init__(self, config, spool):
        self.config, self.spool, self.loaded = config, spool, None

    def train(self, job, _stopped) -> None:
        """Spool the update of a job."""
        from fednested_lib.blobs import BlobStore
        from fednested_lib.failpoints import failpoint
        from fednested_lib.snapshot import SnapshotManifest, expert_shapes

        name, model = self.config.client_id, job.model
        blobs = BlobStore(self.config.home / "blobs")
        shapes = expert_shapes(SnapshotManifest.from_json(blobs.get(model.snapshot)))
        self.loaded = model.snapshot
        counts = {int(param.split(".")[2]): [256] * n for param, (n, _, _) in shapes.items()}
        delta = random_delta(shapes, f"{name}/{job.sequence}", RANKS[CLIENTS.index(name) % len(RANKS)])
        failpoint("trainer.after_training")
        self.spool.write(
            delta,
            sequence=job.sequence,
            base_version=model.version,
            base_digest=model.base_digest,
            routed_tokens=counts,
            distinct_tokens=counts,
            num_examples=8,
        )
        failpoint("trainer.after_spool")


def random_delta(shapes, name: str, rank: int):
    """Make a small delta over all experts from its name."""
    import numpy as np

    from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors

    rng = np.random.default_rng(list(name.encode()))

    def draw(*shape: int) -> np.ndarray:
        return (0.01 * rng.standard_normal(shape)).astype(np.float32)

    factors = {
        param: ExpertFactors(expert_ids=tuple(range(n)), lora_a=draw(n, rank, d_in), lora_b=draw(n, d_out, rank))
        for param, (n, d_out, d_in) in shapes.items()
    }
    return Delta(spec=AdapterSpec(rank=rank, alpha=2.0 * rank), factors=factors)


def aggregator(config: Path) -> None:
    """Cut what has arrived and fold it into a candidate; one that waits already is left to the committer."""
    import tier1.versions.admission
    import tier1.versions.build
    import tier1.versions.cut  # noqa: F401 (imported before the work begins)
    from tier1.federation import open_federation
    from tier1.loops.aggregate_experts import fold_updates, take_updates

    fed = open_federation(config)
    fold_updates(fed, take_updates(fed))


def committer(config: Path) -> None:
    """Settle the newest candidate, repair the views on the log, write an approval of head and announce it."""
    from functools import partial

    from tier1.federation import open_federation
    from tier1.loops.broadcast import publish_champion
    from tier1.loops.evaluate_and_promote import newest_candidate
    from tier1.loops.views import publish_outcomes
    from tier1.versions.candidates import load_candidate, save_candidate
    from tier1.versions.commit import settle

    fed = open_federation(config)
    publish_outcomes(fed)
    ref = newest_candidate(fed)
    if ref.digest:
        save = partial(save_candidate, fed.home)
        settle(load_candidate(fed.home, ref.digest), chain=fed.chain, gate=_pass, fold=_refold, save=save, max_tries=1)
    _approve_head(fed)
    publish_outcomes(fed)
    publish_champion(fed)


def _pass(candidate):
    from tier1.versions.manifest import GateRecord, SuiteChange

    rows = [SuiteChange(suite="none", before=0.0, after=0.0, bound=0.0, passed=True)]
    return GateRecord(candidate=candidate.digest(), passed=True, reason="not evaluated", rows=rows)


def _refold(*_):
    raise AssertionError("one committer loses no race, and its gate passes")


def _approve_head(fed) -> None:
    """Write an approval of head straight to the chain, which neither a policy nor the promotion checklist has seen."""
    from tier1.versions.commit import utc_now
    from tier1.versions.manifest import Decision

    state = fed.chain.state()
    if state.head.version in state.approved:
        return
    body = Decision(
        verdict="approve",
        version=state.head.version,
        manifest=state.head.digest,
        approver="campaign",
        verified=False,
        channel="flag",
        reason="a campaign of kills",
        authorisation="none",
        lineage=[],
        created_at=utc_now(),
    )
    fed.chain.append(body, state.next_seq)


def main(role: str, config: str, *arguments: str) -> None:
    """Do one piece of work and say so."""
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    if role == "device":
        bootstrap, client, target = arguments
        device(Path(config), bootstrap, client, int(target))
    else:
        {"aggregator": aggregator, "committer": committer}[role](Path(config))
    print("done", flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])
