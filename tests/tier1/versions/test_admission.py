from __future__ import annotations

import json
import os
from functools import partial
from pathlib import Path

import numpy as np
import pytest

from fednested_lib.blobs import BlobStore
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, encode
from fednested_lib.envelope import INLINE_LIMIT_BYTES
from fednested_lib.errors import EnvelopeError, StorageError, TransportError
from fednested_lib.signing import Signer, canonical_json, sha256_hex
from tests.tier1.versions.scene import COMMITTER, LOCAL, SHAPES, TIER1, Scene, device_key, random_delta
from tier1.versions import admission as admission_module
from tier1.versions.admission import admit_dense, readmit
from tier1.versions.dense_update import make_dense

STRANGER = Signer.from_seed(b"\x03" * 32)


def reasons(scene: Scene) -> list[str]:
    """Return the reasons of a new cut's refused records in log order; a good update beside them must go through."""
    scene.send("bob", 1000 + scene.chain.state().seq)
    admission = scene.admit(scene.cut())
    assert [update.envelope.client_id for update in admission.updates if update.envelope.sequence >= 1000] == ["bob"]
    return [record.reason for record in admission.refused]


def altered(scene: Scene, field: str, value) -> bytes:
    """Return the envelope of a good update with one field changed after signing."""
    envelope, _ = scene.envelope("ada", 0, random_delta(0))
    return canonical_json(json.loads(envelope.to_bytes()) | {field: value})


def changed_factors(change) -> bytes:
    """Return a payload whose factors `change` maps, keeping names and shapes."""
    delta = random_delta(0)
    factors = {
        name: ExpertFactors(expert_ids=f.expert_ids, lora_a=change(f.lora_a), lora_b=change(f.lora_b))
        for name, f in delta.factors.items()
    }
    return encode_unchecked(Delta(spec=delta.spec, factors=factors))


def encode_unchecked(delta: Delta) -> bytes:
    """Encode as fp32 without the writer's own check for finiteness, as a hostile device would."""
    import cramjam
    from safetensors.numpy import save

    tensors = {f"{name}.{part}": getattr(f, part) for name, f in delta.factors.items() for part in ("lora_a", "lora_b")}
    return bytes(cramjam.zstd.compress(save(tensors), level=3))


def test_good_updates_are_accepted_and_archived(scene):
    """Envelope and payload bytes of accepted updates lie in the archive under their digests, inline or claim check."""
    scene.send("ada", 0)
    scene.send("bob", 0, random_delta(1, rank=16))  # larger than the inline limit
    admission = scene.admit(scene.cut())
    assert not admission.refused
    assert {update.envelope.client_id for update in admission.updates} == {"ada", "bob"}
    assert max(update.envelope.payload_bytes for update in admission.updates) > INLINE_LIMIT_BYTES
    for update in admission.updates:
        assert scene.archive.get(sha256_hex(update.envelope.to_bytes())) == update.envelope.to_bytes()
        assert len(scene.archive.get(update.envelope.payload_sha256)) == update.envelope.payload_bytes


def test_refused_payloads_are_not_archived(scene):
    """What is refused leaves nothing in the archive."""
    scene.send("ada", 0, signer=STRANGER)
    scene.admit(scene.cut())
    assert list(scene.archive.digests()) == []


ENVELOPES = {
    "bad_envelope": [lambda s: b"not json", lambda s: altered(s, "surprise", 1), lambda s: b"", lambda s: b"\xff{}"],
    "bad_update_id": [lambda s: altered(s, "num_examples", 9), lambda s: altered(s, "update_id", "0" * 64)],
    "bad_signature": [
        lambda s: altered(s, "signature", "0" * 128),
        lambda s: s.envelope("ada", 0, random_delta(0), signer=STRANGER)[0].to_bytes(),
    ],
    "unknown_client": [lambda s: s.envelope("eve", 0, random_delta(0))[0].to_bytes()],
    "foreign_federation": [
        lambda s: s.envelope("ada", 0, random_delta(0), federation="other")[0].to_bytes(),
        lambda s: s.envelope("eve", 0, random_delta(0), federation="other")[0].to_bytes(),
    ],
    "wrong_key_epoch": [lambda s: s.envelope("ada", 0, random_delta(0), key_epoch=1)[0].to_bytes()],
    "unknown_base": [lambda s: s.envelope("ada", 0, random_delta(0), base_version=7)[0].to_bytes()],
    "base_digest_mismatch": [lambda s: s.envelope("ada", 0, random_delta(0), base_digest="c" * 64)[0].to_bytes()],
    "bad_expert_ids": [
        lambda s: s.envelope("ada", 0, random_delta(0), expert_ids={"0": [0, 9]}, tokens={"0": [1, 1]})[0].to_bytes()
    ],
    "empty_update": [lambda s: s.envelope("ada", 0, random_delta(0), expert_ids={}, tokens={})[0].to_bytes()],
}


@pytest.mark.parametrize("reason", ENVELOPES)
def test_bad_envelopes_are_refused_with_their_reason(scene, reason):
    """Each kind of bad envelope gets its machine-readable reason, and the good update beside it goes through."""
    _, payload = scene.envelope("ada", 0, random_delta(0))
    for make in ENVELOPES[reason]:
        scene.send_bytes("ada", make(scene), payload)
    assert reasons(scene) == [reason] * len(ENVELOPES[reason])


def test_record_without_an_envelope_is_refused(scene):
    """A record with no envelope header is not an update."""
    scene.log.append(LOCAL, key=b"ada", value=b"x", headers={})
    assert reasons(scene) == ["bad_envelope"]


def test_bad_payloads_are_refused_with_their_reason(scene):
    """Size, digest, claim check, framing, shape, NaN, overflow and cancelling factors have a reason each."""
    good = encode(random_delta(0), encoding="fp32", seed=0)
    send = partial(scene.send, "ada", delta=random_delta(0))
    envelope, payload = scene.envelope("ada", 0, random_delta(0))
    scene.send_bytes("ada", envelope.to_bytes(), payload + b"!")
    scene.send_bytes("ada", envelope.to_bytes(), payload[:-1] + bytes([payload[-1] ^ 1]))
    scene.send_bytes("ada", scene.envelope("ada", 2, random_delta(2, rank=16))[0].to_bytes(), b"")
    scene.send_bytes(
        "ada", scene.envelope("ada", 3, random_delta(0), payload_uri=f"blob:{sha256_hex(good)}")[0].to_bytes(), b"x"
    )
    send(4, payload=b"no zstd frame")
    send(5, payload=encode(random_delta(0, rank=3), encoding="fp32", seed=0))
    send(6, payload=changed_factors(lambda array: np.where(array > 0.1, np.nan, array).astype(np.float32)))
    send(
        7,
        payload=changed_factors(lambda array: array * np.float32(1e37)),
        adapter={"rank": 2, "alpha": 1e300, "mode": "lora"},
    )
    assert reasons(scene) == [
        "payload_size",
        "payload_digest",
        "payload_missing",
        "payload_size",
        "bad_frame",
        "bad_shape",
        "non_finite",
        "non_finite",
    ]


def test_factors_that_cancel_are_refused(scene):
    """B = [b, −b], A = [a; a] has no product but any reach: its norm is rounding, so the clip would bound nothing."""
    factors = {}
    for name, (_, d_out, d_in) in SHAPES.items():
        a = np.full((1, 2, d_in), 1e6, np.float32)
        b = np.repeat(np.array([[[1e6, -1e6]]], np.float32), d_out, axis=1)
        factors[name] = ExpertFactors(expert_ids=(0,), lora_a=a, lora_b=b)
    scene.send("ada", 0, Delta(spec=AdapterSpec(rank=2, alpha=2.0), factors=factors))
    assert reasons(scene) == ["ill_conditioned"]


def test_corrupt_claim_check_is_refused_without_stopping_the_cut(scene):
    """A payload that was altered in the blob store is that update's fault alone."""
    delta = random_delta(1, rank=16)
    scene.send("ada", 0, delta)
    envelope, _ = scene.envelope("ada", 0, delta)
    with open(scene.payloads.location(envelope.payload_sha256), "r+b") as file:
        file.write(b"?")
    assert reasons(scene) == ["payload_digest"]


PLANTED = {
    "payload_unreadable": [lambda place: place.mkdir(), os.mkfifo, lambda place: place.symlink_to(place)],
    "payload_size": [lambda place: place.touch() or os.truncate(place, 1 << 40)],
    "payload_digest": [lambda place: place.touch()],
}


@pytest.mark.parametrize("reason", PLANTED)
def test_what_lies_at_a_claim_check_cannot_stop_the_cut(scene, reason):
    """A directory, pipe, link loop, huge or empty file at the claimed digest refuses that record alone."""
    for sequence, plant in enumerate(PLANTED[reason]):
        delta = random_delta(sequence, rank=16)
        scene.send("ada", sequence, delta)
        place = Path(scene.payloads.location(scene.envelope("ada", sequence, delta)[0].payload_sha256))
        place.unlink()
        plant(place)
    assert reasons(scene) == [reason] * len(PLANTED[reason])


def test_duplicates_and_equivocation_within_a_cut(scene):
    """The lowest offset wins: the same bytes again are a duplicate, other bytes under the same number equivocation."""
    first, second = random_delta(1), random_delta(2)
    scene.send("ada", 0, first)
    scene.send("ada", 0, first)
    scene.send("ada", 0, second)
    scene.send("ada", 1, second)
    assert reasons(scene) == ["duplicate", "equivocation"]
    accepted = [update for update in scene.admit(scene.cut()).updates if update.envelope.client_id == "ada"]
    assert [update.envelope.sequence for update in accepted] == [0, 1]
    assert accepted[0].envelope.update_id == scene.envelope("ada", 0, first)[0].update_id


def test_duplicates_and_equivocation_against_history(scene):
    """What the chain has accepted is recognised cuts later, also when its payload is gone."""
    base, delta = scene.chain.state().head, random_delta(1, rank=16)
    scene.send("ada", 0, delta, base=base)
    scene.advance()
    envelope, payload = scene.envelope("ada", 0, delta, base=base)
    scene.send_bytes("ada", envelope.to_bytes(), b"")
    scene.send("ada", 0, random_delta(2), base=base)
    scene.payloads = BlobStore(scene.home / "emptied")
    assert reasons(scene) == ["duplicate", "equivocation"]


def test_resent_update_is_accepted_when_its_first_record_was_unusable(scene):
    """A device sends unnamed updates again: if the payload was missing the first time, the second record counts."""
    delta = random_delta(1, rank=16)
    envelope, payload = scene.envelope("ada", 0, delta)
    scene.send_bytes("ada", envelope.to_bytes(), b"")
    cut = scene.cut()
    assert [record.reason for record in scene.admit(cut).refused] == ["payload_missing"]
    scene.settle(scene.fold(cut))
    scene.send("ada", 0, delta)
    assert scene.advance().outcome == "advanced"


def test_too_stale_is_judged_against_the_head(scene):
    """An update is accepted up to the bound and refused one version later; `readmit` judges again for another head."""
    base = scene.chain.state().head
    for sequence in range(3):
        scene.send("bob", sequence)
        scene.advance()
    scene.send("ada", 0, base=base)
    early = scene.admit(scene.cut())
    assert [update.envelope.client_id for update in early.updates] == ["ada"]
    scene.settle(scene.fold(scene.dense("run-1")))
    assert [record.reason for record in scene.admit(scene.cut()).refused] == ["too_stale"]
    late = readmit(early.updates, scene.chain.state(), scene.settings)
    assert (late.updates, [record.reason for record in late.refused]) == ((), ["too_stale"])


def test_unreachable_store_refuses_nobody(scene, monkeypatch):
    """A store that does not answer, or a full archive, is an error to try again, not the device's fault."""
    scene.send("ada", 0, random_delta(1, rank=16))
    for error in (TransportError("down"), StorageError("full")):

        def fail(*_, error=error, **__):
            raise error

        monkeypatch.setattr(scene.payloads, "get", fail)
        with pytest.raises(type(error)):
            scene.admit(scene.cut())


def test_parser_bug_quarantines_one_record(scene, monkeypatch):
    """Should a record ever make the parser raise something unforeseen, that record is refused and named, no more."""
    parse = admission_module.decode_payload

    def buggy(envelope, payload, shapes):
        if envelope.client_id == "ada":
            raise ZeroDivisionError
        return parse(envelope, payload, shapes)

    monkeypatch.setattr(admission_module, "decode_payload", buggy)
    scene.send("ada", 0)
    assert reasons(scene) == ["parser_error"]


def test_random_bytes_never_stop_a_cut(scene):
    """Flipped bits anywhere in envelope or payload refuse the record, or change nothing; seeds 0..79."""
    envelope, payload = scene.envelope("ada", 0, random_delta(0))
    for seed in range(80):
        rng = np.random.default_rng(seed)
        parts = [bytearray(envelope.to_bytes()), bytearray(payload)]
        part = parts[seed % 2]
        for position in rng.integers(0, len(part), rng.integers(1, 4)):
            part[position] ^= 1 << int(rng.integers(8))
        scene.send_bytes("ada", bytes(parts[0]), bytes(parts[1]))
    assert len(reasons(scene)) == 80


def test_dense_update_is_checked(scene):
    """A dense update must be canonical, signed by a trusted key, and trained on a version of this chain."""
    state = scene.chain.state()
    fields = {
        "run_id": "run-1",
        "base_version": 0,
        "base_digest": state.head.base_digest,
        "blobs": {},
        "steps": 1,
        "tokens": 1,
        "dataset_digest": "d" * 64,
        "trainer": "trainer",
    }

    def reason(data: bytes) -> str:
        partition, offset = scene.log.append(TIER1, key=b"run-1", value=data, headers={})
        record = next(scene.log.read(TIER1, {partition: (offset, offset + 1)}))
        with pytest.raises(EnvelopeError) as caught:
            admit_dense(record, state, scene.chain.trusted)
        return caught.value.reason

    good = make_dense(COMMITTER, **fields)
    altered_steps = good.model_copy(update={"steps": 2})
    assert reason(b"{}") == "bad_envelope"
    assert reason(good.to_bytes() + b" ") == "bad_envelope"
    assert reason(altered_steps.to_bytes()) == "bad_update_id"
    assert (
        reason(altered_steps.model_copy(update={"update_id": altered_steps.content_id()}).to_bytes()) == "bad_signature"
    )
    assert reason(make_dense(device_key("ada"), **fields).to_bytes()) == "unknown_signer"
    assert reason(make_dense(COMMITTER, **fields | {"base_version": 4}).to_bytes()) == "unknown_base"
    assert reason(make_dense(COMMITTER, **fields | {"base_digest": "c" * 64}).to_bytes()) == "base_digest_mismatch"
