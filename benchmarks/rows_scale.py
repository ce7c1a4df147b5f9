"""What grows with the fleet and with nothing else: the two slopes that docs/scale.md multiplies by a million."""

from __future__ import annotations

import tempfile
import time
from pathlib import Path

import yaml

from benchmarks.registry import Reading, figure

REPEATS = 5
DEVICES = 2000
FEW, MANY = 4, 40


@figure("scale.registered_device", unit="ms", cls="full")
def registered_device() -> Reading:
    """CPU time that every task pays for each device registered in tier1.yaml, mean over 2,000 of them."""
    from tests.federation import make_workspace
    from tier1.config import load_tier1

    with tempfile.TemporaryDirectory() as scratch:
        path = make_workspace(Path(scratch))
        document = yaml.safe_load(path.read_text())
        document["devices"] = {f"device-{number:07d}": {"public_key": f"{number:064x}"} for number in range(DEVICES)}
        path.write_text(yaml.safe_dump(document))
        seconds = []
        for _ in range(REPEATS):
            began = time.process_time()
            config = load_tier1(path)
            seconds.append(time.process_time() - began)
        if len(config.devices) != DEVICES:
            raise RuntimeError(f"{len(config.devices)} of {DEVICES} devices were read")
    return Reading.of([1000 * each / DEVICES for each in seconds])


@figure("scale.manifest_row", unit="B", cls="full")
def manifest_row() -> float:
    """Bytes of the chain for each accepted update, two layers of four experts; every task reads it again."""
    with tempfile.TemporaryDirectory() as scratch:
        few, many = (_entry_bytes(Path(scratch) / str(count), count) for count in (FEW, MANY))
    return (many - few) / (MANY - FEW)


def _entry_bytes(directory: Path, count: int) -> int:
    from tests.federation import Device, make_federation
    from tier1.loops.aggregate_experts import fold_updates, take_updates
    from tier1.loops.evaluate_and_promote import settle_candidate
    from tier1.loops.genesis import ensure_genesis

    clients, window = [f"c{number}" for number in range(count)], {"min_updates": count, "max_updates": count}
    fed = make_federation(directory, clients=clients, window=window)
    ensure_genesis(fed)
    for client in clients:
        Device(fed, client).send(base=0)
    settled = settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    if settled.status != "head":
        raise RuntimeError(f"{count} updates ended as {settled.status}: {settled.reason}")
    return max((fed.home / "chain").glob("*.json")).stat().st_size
