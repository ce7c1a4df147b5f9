"""Mode fixed_a from a device's configuration to the weights of a version."""

from __future__ import annotations

import numpy as np

from benchmarks.small_federation import SEQ_LEN, SmallFederation
from fednested_lib.delta import AdapterSpec, Delta, encode
from fednested_lib.envelope import parse_envelope
from fednested_lib.fixed_a import fixed_rows, seed_of
from fednested_lib.partition import expert_param
from fednested_lib.snapshot import SLICE_TENSOR, expert_of, expert_shapes, read_slice, slice_key
from tests.federation import PLAIN
from tests.oracle import Pipeline, Sent, step
from tier1.versions.archive import decode_payload

RANK = 4


def _matrices(fed, blobs) -> dict[str, np.ndarray]:
    return {key: read_slice(key, digest, fed.blobs)[SLICE_TENSOR] for key, digest in blobs.items() if expert_of(key)}


def _said(fed, row, shapes) -> tuple[Sent, Delta, int]:
    """Return one folded update as the oracle wants it, with A made here from the seed, its delta and its bytes."""
    envelope = parse_envelope(fed.archive.get(row.envelope_sha256))
    payload = fed.archive.get(envelope.payload_sha256)
    delta = decode_payload(envelope, payload, shapes)
    seed = int(seed_of(envelope.base_digest), 16)
    factors = {}
    for name, each in delta.factors.items():
        made = fixed_rows(seed, name, each.expert_ids, RANK, shapes[name][2])
        for j, expert in enumerate(each.expert_ids):
            factors[slice_key(name, expert)] = (made[j], each.lora_b[j])
    sent = Sent(
        client=envelope.client_id,
        sequence=envelope.sequence,
        base=envelope.base_version,
        order=envelope.update_id,
        scale=envelope.adapter.spec().scale,
        factors=factors,
        tokens={
            (layer, expert): envelope.tokens_of(layer, expert)
            for layer, experts in envelope.layers().items()
            for expert in experts
        },
    )
    return sent, delta, len(payload)


def test_devices_in_mode_fixed_a_are_folded_exactly(tmp_path):
    """Updates of configured devices carry B alone, three fifths of the bytes, and fold as the dense oracle says."""
    federation = SmallFederation(
        tmp_path,
        seed=0,
        n_devices=2,
        adapters={"mode": "fixed_a", "rank": RANK, "alpha": 8.0},
        training={"steps": 3, "batch_size": 4, "seq_len": SEQ_LEN},
        sections={
            "core": {"steps": 2, "batch_size": 2, "seq_len": SEQ_LEN, "threads": 1},
            "window": {"min_updates": 2, "max_wait_s": 0.0},
            "aggregation": PLAIN,
        },
    )
    for device in (0, 1):
        federation.start(device)
        federation.finish(device)
    fed = federation.tier1
    parent = fed.chain.state().head
    federation.fold()
    federation.close()
    head = fed.chain.state().head
    candidate = fed.chain.entries()[head.seq].entry.body.candidate
    assert (len(candidate.accepted), candidate.refused) == (2, [])
    shapes = expert_shapes(parent.snapshot)
    said = [_said(fed, row, shapes) for row in candidate.accepted]
    before, after = _matrices(fed, parent.blobs), _matrices(fed, head.blobs)
    expected = step(before, [sent for sent, _, _ in said], [0, 0], Pipeline())
    moved = max(np.abs(after[key] - before[key]).max() for key in before)
    assert moved > 1e-3
    for key in before:
        np.testing.assert_allclose(after[key], expected[key], rtol=0, atol=1e-6)
    for _, delta, size_bytes in said:
        whole = encode(Delta(spec=AdapterSpec(rank=RANK, alpha=8.0), factors=delta.factors), seed=0)
        assert 0.5 < size_bytes / len(whole) < 0.67
    assert {expert_param(name)[0] for name in said[0][1].factors} == {0, 1}
