"""What leaves the device: withheld, clipped, rounded, bucketed and signed; and nothing that is not fit to leave."""

from __future__ import annotations

import json

import numpy as np
import pytest

from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, decode
from fednested_lib.envelope import parse_envelope, verify_envelope
from fednested_lib.errors import PayloadError
from fednested_lib.sidecar import clip, make_update, norm, rounding_seed
from fednested_lib.signing import Signer
from fednested_lib.spool import Spool
from tests.policies import make_policy

SIGNER = Signer.from_seed(b"d" * 32)
SHAPES = {
    f"model.layers.{layer}.mlp.experts.{projection}": shape
    for layer in (0, 2)
    for projection, shape in (("gate_up_proj", (6, 24, 16)), ("down_proj", (6, 16, 12)))
}
IDS = {0: (1, 4, 5), 2: (0,)}
ROUTED, DISTINCT = {0: [100, 40, 0], 2: [1000]}, {0: [50, 15, 0], 2: [16]}
WHO = {"federation": "stage", "client_id": "romeo", "key_epoch": 2, "signer": SIGNER}


def _delta(size: float = 0.05, seed: int = 0) -> Delta:
    rng = np.random.default_rng(seed)
    factors = {}
    for name, (_, d_out, d_in) in SHAPES.items():
        ids = IDS[int(name.split(".")[2])]
        a, b = rng.standard_normal((len(ids), 4, d_in)), rng.standard_normal((len(ids), d_out, 4))
        factors[name] = ExpertFactors(
            expert_ids=ids, lora_a=(a * size).astype(np.float32), lora_b=(b * size).astype(np.float32)
        )
    return Delta(spec=AdapterSpec(rank=4, alpha=8.0), factors=factors)


def _spooled(tmp_path, delta=None, sequence=7):
    spool = Spool(tmp_path / "spool")
    spool.write(
        delta or _delta(),
        sequence=sequence,
        base_version=3,
        base_digest="a" * 64,
        routed_tokens=ROUTED,
        distinct_tokens=DISTINCT,
        num_examples=100,
    )
    return spool.read(sequence, SHAPES)


def _made(tmp_path, delta=None, encoding="int8", **policy):
    declaration, factors = _spooled(tmp_path, delta)
    made = make_update(declaration, factors, policy=make_policy(**policy), encoding=encoding, **WHO)
    parsed = parse_envelope(made.envelope.to_bytes())
    verify_envelope(parsed, SIGNER.public_key)
    sent = decode(
        made.payload, encoding=parsed.encoding, spec=parsed.adapter.spec(), expert_ids=parsed.layers(), shapes=SHAPES
    )
    return parsed, made.payload, sent


def test_envelope_tells_buckets_only(tmp_path):
    """Counts leave as powers of two, and an expert under the floor of 4·r distinct tokens says it saw none."""
    envelope, _, _ = _made(tmp_path)
    assert envelope.tokens == {"0": [64, 0, 0], "2": [512]}
    assert envelope.num_examples == 64
    assert (envelope.sequence, envelope.key_epoch, envelope.base_version) == (7, 2, 3)
    assert envelope.layers() == IDS


def test_experts_under_the_floor_leave_as_zeros(tmp_path):
    """A withheld expert stays in the list of ids with factors of exact zeros; the others are as trained."""
    envelope, _, sent = _made(tmp_path, encoding="fp32")
    for name, factors in sent.factors.items():
        layer = int(name.split(".")[2])
        for j, distinct in enumerate(DISTINCT[layer]):
            same = np.array_equal(factors.lora_b[j], _delta().factors[name].lora_b[j])
            assert same == (distinct >= 16)
            assert factors.lora_a[j].any() == factors.lora_b[j].any() == (distinct >= 16)
    assert _made(tmp_path, min_tokens_per_rank=5)[0].tokens == {"0": [64, 0, 0], "2": [0]}


def test_a_floor_per_width_withholds_by_the_hidden_size(tmp_path):
    """An expert must have seen `min_tokens_per_width` × 16, the hidden size, not the experts' own 12 or 24."""
    for factor, tokens in ((3, [64, 0, 0]), (4, [0, 0, 0])):
        envelope, _, sent = _made(tmp_path, encoding="fp32", min_tokens_per_width=factor)
        assert envelope.tokens == {"0": tokens, "2": [0]}
        kept = [bool(each.any()) for each in sent.factors["model.layers.0.mlp.experts.down_proj"].lora_b]
        assert kept == [n > 0 for n in tokens]


def test_clip_bounds_the_norm(tmp_path):
    """A large update is scaled down to the bound as a whole, a small one is not touched, and int8 keeps the bound."""
    large = _delta(size=2.0)
    assert norm(large) > 10
    assert norm(clip(large, 1.5)) == pytest.approx(1.5, rel=1e-5)
    name = next(iter(SHAPES))
    ratio = clip(large, 1.5).factors[name].lora_b / large.factors[name].lora_b
    assert ratio.max() == pytest.approx(ratio.min(), rel=1e-5)
    small = _delta(size=0.01)
    assert clip(small, 1.5) is small
    assert norm(_made(tmp_path, large, max_norm=1.5)[2]) == pytest.approx(1.5, rel=0.02)


def test_norm_is_the_dense_norm():
    """The Gram identity equals the norm of the dense matrices."""
    delta = _delta()
    dense = [delta.spec.scale * b @ a for f in delta.factors.values() for a, b in zip(f.lora_a, f.lora_b, strict=True)]
    assert norm(delta) == pytest.approx(
        np.sqrt(sum((matrix.astype(np.float64) ** 2).sum() for matrix in dense)), rel=1e-6
    )


def test_same_update_same_bytes(tmp_path):
    """Making an update again gives the same envelope and payload; another sequence is rounded otherwise."""
    first, again = _made(tmp_path), _made(tmp_path)
    assert first[0] == again[0]
    assert first[1] == again[1]
    declaration, factors = _spooled(tmp_path, sequence=8)
    assert make_update(declaration, factors, policy=make_policy(), encoding="int8", **WHO).payload != first[1]


def test_rounding_cannot_be_foreseen():
    """The seed of the rounding differs with key and label; the trainer lacks the first, every update has another."""
    secrets = [SIGNER.secret("rounding"), SIGNER.secret("noise"), Signer.from_seed(b"e" * 32).secret("rounding")]
    assert len({rounding_seed(secret, label) for secret in secrets for label in (b"a", b"b")}) == 6


@pytest.mark.parametrize("value", [np.nan, np.inf])
@pytest.mark.parametrize("expert", [0, 2])
def test_nothing_leaves_when_a_factor_is_not_finite(tmp_path, value, expert):
    """NaN or infinity in any expert, withheld ones included, stops the update before it is made."""
    declaration, factors = _spooled(tmp_path)
    factors.factors["model.layers.0.mlp.experts.down_proj"].lora_a[expert, 0, 0] = value
    with pytest.raises(PayloadError, match=r"down_proj has NaN or infinite.*learning_rate") as caught:
        make_update(declaration, factors, policy=make_policy(), encoding="int8", **WHO)
    assert caught.value.reason == "non_finite"
    with pytest.raises(PayloadError):
        _spooled(tmp_path, factors)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"sequence": 8},
        {"distinct_tokens": {"0": [101, 15, 0], "2": [16]}},
        {"distinct_tokens": {"0": [50, 15], "2": [16]}},
        {"expert_ids": {"0": [1, 4, 4], "2": [0]}},
        {"expert_ids": {"0": [1, 4, 6], "2": [0]}},
        {"adapter": {"rank": 5, "alpha": 8.0, "mode": "lora"}},
        {"factors_sha256": "0" * 64},
    ],
)
def test_spool_is_parsed_strictly(tmp_path, change):
    """A declaration that was altered, contradicts itself or does not fit its factors is refused."""
    _spooled(tmp_path)
    path = tmp_path / "spool/000000000007.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(PayloadError):
        Spool(tmp_path / "spool").read(7, SHAPES)


def test_incomplete_spool_does_not_count(tmp_path):
    """Factors without a declaration are no update; removing one leaves nothing."""
    spool = Spool(tmp_path / "spool")
    _spooled(tmp_path)
    assert spool.has(7)
    (tmp_path / "spool/000000000007.json").unlink()
    assert not spool.has(7)
    spool.remove(7)
    assert list((tmp_path / "spool").iterdir()) == []
