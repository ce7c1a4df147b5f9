"""A fixed story of one federation, told again from the start by every process that is asked: `python -m … HOME`.

Eleven records in two cuts, a gate that fails once, and a core update that loses its race. The log is made anew with the
same records each time, as a broker would still hold them, so a process that died is followed by one that goes on where
the chain ends. Prints a line when it is ready to work, so that a test can time a kill from there.
"""

from __future__ import annotations

import sys
from pathlib import Path

from fednested_lib.blobs import write_durable
from tests.tier1.versions.scene import Scene, gate_record, random_delta
from tier1.versions.candidates import load_candidate, save_candidate
from tier1.versions.manifest import Candidate, GateRecord
from tier1.versions.quarantine import publish_refused
from tier1.versions.state import Sealed


def strict_gate(candidate: Candidate) -> GateRecord:
    """Fail the second cut at full step, pass everything else: the same answer to the same candidate."""
    first_try_of_second_cut = candidate.inputs.cut is not None and candidate.parent_version == 1
    return gate_record(candidate, not (first_try_of_second_cut and candidate.rates.eta_t2 == 1.0))


def send_everything(scene: Scene) -> None:
    """Eight good updates, one sent twice, one sequence number with other bytes, and an unregistered client's."""
    base = scene.chain.state().versions[0]
    for sequence in range(2):
        for client in scene.clients:
            scene.send(client, sequence, base=base)
    scene.send("eve", 0, base=base)
    scene.send("ada", 0, random_delta(99), base=base)
    scene.send("bob", 0, base=base)


def aggregate(scene: Scene) -> bool:
    """Turn the fast loop once: quarantine what a crash left over, cut, admit, fold, settle, quarantine."""
    for sealed in scene.chain.entries():
        quarantine(scene, sealed)
    settlement = scene.settle(scene.fold(scene.cut(max_updates=6)), gate=strict_gate)
    if settlement.sealed is not None:
        quarantine(scene, settlement.sealed)
    return settlement.sealed is not None


def quarantine(scene: Scene, sealed: Sealed) -> None:
    """Publish what a version refused."""
    body = sealed.entry.body
    if body.kind == "version" and body.candidate.inputs.cut is not None:
        publish_refused(body.candidate.refused, body.candidate.inputs.cut, scene.log)


def early_core_update(scene: Scene) -> Candidate:
    """Fold the core update on version 0 and keep the reference, as a task hands it on."""
    reference = scene.home / "core-update"
    if not reference.exists():
        candidate = scene.fold(scene.dense("run-1", base=scene.chain.state().versions[0]))
        write_durable(reference, save_candidate(scene.home, candidate).encode())
    return load_candidate(scene.home, reference.read_text())


def tell(home: Path) -> Scene:
    """Tell the story; what the chain holds already is not done again."""
    scene = Scene(home)
    scene.genesis()
    early = early_core_update(scene)
    send_everything(scene)
    print("ready", flush=True)
    while aggregate(scene):
        pass
    scene.settle(early, gate=strict_gate)
    return scene


if __name__ == "__main__":
    tell(Path(sys.argv[1]))
