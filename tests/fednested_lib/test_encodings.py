from __future__ import annotations

import numpy as np
import pytest
from pydantic import ValidationError
from safetensors.numpy import load, save

from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, decode, encode, fixed_factor
from fednested_lib.envelope import AdapterFields, make_envelope, parse_envelope, verify_envelope
from fednested_lib.errors import PayloadError
from fednested_lib.fixed_a import fixed_rows
from fednested_lib.partition import expert_name
from fednested_lib.rounding import BLOCK, pack_int4, unpack_int4
from fednested_lib.sidecar import withhold
from fednested_lib.signing import Signer

SHAPES = {expert_name(0, "gate_up_proj"): (4, 301, 40), expert_name(0, "down_proj"): (4, 40, 151)}
IDS = {0: (1, 3)}
SEED = "0123456789abcdef" * 2
LORA = AdapterSpec(rank=5, alpha=10.0)
FIXED = AdapterSpec(rank=5, alpha=10.0, mode="fixed_a", seed=SEED)


def random_delta(seed: int = 0, spec: AdapterSpec = LORA) -> Delta:
    rng, n = np.random.default_rng(seed), len(IDS[0])
    factors = {}
    for name, (_, d_out, d_in) in SHAPES.items():
        lora_a = rng.normal(size=(n, spec.rank, d_in)).astype(np.float32)
        factors[name] = ExpertFactors(
            expert_ids=IDS[0],
            lora_a=fixed_factor(spec, name, IDS[0], d_in) if spec.mode == "fixed_a" else lora_a,
            lora_b=rng.normal(0, 0.1, size=(n, d_out, spec.rank)).astype(np.float32),
        )
    return Delta(spec=spec, factors=factors)


def parse(payload: bytes, encoding: str, spec: AdapterSpec = LORA) -> Delta:
    return decode(payload, encoding=encoding, spec=spec, expert_ids=IDS, shapes=SHAPES)


def tampered(payload: bytes, change) -> bytes:
    import cramjam

    tensors = {name: array.copy() for name, array in load(bytes(cramjam.zstd.decompress(payload))).items()}
    change(tensors)
    return bytes(cramjam.zstd.compress(save(tensors)))


@pytest.mark.parametrize("spec", [LORA, FIXED], ids=["lora", "fixed_a"])
@pytest.mark.parametrize(("encoding", "steps"), [("fp32", 0.0), ("fp16", 1e-3), ("int8", 1 / 127), ("int4", 1 / 7)])
def test_what_is_encoded_comes_back(encoding, steps, spec):
    """Every encoding in both modes comes back to within one step of its grid; the same seed gives the same bytes."""
    delta = random_delta(spec=spec)
    payload = encode(delta, encoding=encoding, seed=7)
    assert payload == encode(delta, encoding=encoding, seed=7)
    found = parse(payload, encoding, spec)
    for name, factors in delta.factors.items():
        assert found.factors[name].expert_ids == factors.expert_ids
        for factor in ("lora_a", "lora_b"):
            sent, got = getattr(factors, factor), getattr(found.factors[name], factor)
            assert (got.shape, got.dtype) == (sent.shape, np.float32)
            assert np.abs(sent - got).max() <= steps * np.abs(sent).max() * (1 + 2**-7)  # of the scale


@pytest.mark.parametrize("levels", [7, 3, 2])
def test_int4_is_unbiased(levels):
    """The mean over seeds is the value, at any number of levels: rounding makes noise, not drift."""
    values = np.random.default_rng(0).normal(size=(1, 2, 200)).astype(np.float32)
    decoded = []
    for seed in range(400):
        codes, scales = pack_int4(values, 2, np.random.Generator(np.random.Philox(key=seed)), levels)
        decoded.append(unpack_int4("x", codes, scales, 200))
    step = np.repeat(np.abs(values[..., :BLOCK]).max(axis=2, keepdims=True), 200, axis=2) / levels
    assert np.abs(np.mean(decoded, axis=0) - values).max() < 5 * step.max() / 2 / np.sqrt(400)


def test_int4_takes_an_eighth_of_fp32():
    """4.25 bits per value: 13.3 % of fp32 for long vectors, header aside."""
    values = np.random.default_rng(0).normal(size=(1, 4, 4096)).astype(np.float32)
    codes, scales = pack_int4(values, 2, np.random.default_rng(0))
    assert (codes.nbytes + scales.nbytes) / values.nbytes == pytest.approx(4.25 / 32)


def test_blocks_have_their_own_scale():
    """One huge value costs its block its digits and no other."""
    values = np.full((1, 1, 2 * BLOCK), 0.01, np.float32)
    values[0, 0, 0] = 1e6
    codes, scales = pack_int4(values, 2, np.random.default_rng(0))
    found = unpack_int4("x", codes, scales, 2 * BLOCK)
    np.testing.assert_allclose(found[..., BLOCK:], 0.01, rtol=1 / 6)


def test_fewer_levels_take_fewer_bytes():
    """Codes stay within the levels, scales have no low bits, and 3 levels take three quarters of what 7 take."""
    values = np.random.default_rng(0).normal(size=(4, 4, 4096)).astype(np.float32)
    sizes = {}
    for levels in (7, 3):
        codes, scales = pack_int4(values, 2, np.random.default_rng(0), levels)
        assert {int(code) for code in np.unique(codes & 15)} == set(range(8 - levels, 9 + levels))
        assert not (scales.view(np.uint32) & 0xFFFF).any()
        factors = {"w": ExpertFactors(expert_ids=(0, 1, 2, 3), lora_a=values, lora_b=values.transpose(0, 2, 1))}
        delta = Delta(spec=AdapterSpec(rank=4, alpha=8.0), factors=factors)
        sizes[levels] = len(encode(delta, encoding="int4", seed=0, levels=levels))
    assert sizes[3] < 0.75 * sizes[7]


def test_zero_and_odd_lengths():
    """Zeros stay zeros, a vector of odd length ends with the code of zero."""
    codes, scales = pack_int4(np.zeros((1, 1, 3), np.float32), 2, np.random.default_rng(0))
    assert codes.tolist() == [[[0x88, 0x88]]]
    assert scales.tolist() == [[[0.0]]]
    assert not unpack_int4("x", codes, scales, 3).any()


def hide_a_code(tensors) -> None:
    next(array for name, array in tensors.items() if name.endswith("lora_a"))[0, 0, 0] = 0x80


def hide_in_padding(tensors) -> None:
    tensors[f"{expert_name(0, 'gate_up_proj')}.lora_b"][0, 0, -1] |= 0xF0  # d_out = 301 is odd


def no_scale(tensors) -> None:
    tensors[f"{expert_name(0, 'down_proj')}.lora_b.scale"][:] = np.nan


def other_shape(tensors) -> None:
    name = f"{expert_name(0, 'down_proj')}.lora_b"
    tensors[name] = tensors[name][..., :-1].copy()


@pytest.mark.parametrize(
    ("change", "reason"),
    [(hide_a_code, "not_canonical"), (hide_in_padding, "not_canonical"),
     (no_scale, "non_finite"), (other_shape, "bad_shape")],
)  # fmt: skip
def test_int4_is_parsed_strictly(change, reason):
    """Codes that rounding never writes, data in padding, scales that are not finite and other shapes are refused."""
    payload = encode(random_delta(), encoding="int4", seed=1)
    with pytest.raises(PayloadError) as caught:
        parse(tampered(payload, change), "int4")
    assert caught.value.reason == reason


def test_fixed_rows_are_orthonormal_and_nested():
    """A·Aᵀ = I, and the A of a smaller rank is the first rows of a larger one, bit by bit."""
    large = fixed_rows(int(SEED, 16), "p", (0, 5), 16, 40)
    for rows in large.astype(np.float64):
        np.testing.assert_allclose(rows @ rows.T, np.eye(16), atol=1e-6)
    for rank in (1, 7):
        assert np.array_equal(fixed_rows(int(SEED, 16), "p", (0, 5), rank, 40), large[:, :rank])
    assert np.array_equal(fixed_rows(int(SEED, 16), "p", (5,), 16, 40)[0], large[1])


def test_fixed_rows_depend_on_seed_parameter_and_expert():
    """Another seed, parameter or expert is another A; a golden value pins the generator (Philox words of this key)."""
    first = fixed_rows(1, "p", (0,), 2, 8)
    for other in (fixed_rows(2, "p", (0,), 2, 8), fixed_rows(1, "q", (0,), 2, 8), fixed_rows(1, "p", (1,), 2, 8)):
        assert not np.allclose(first, other)
    # Word 0 of Philox4x64-10 under SHA-256("fednested.fixed_a/0…01/p/0")[:16]: sign and share of the first row's norm.
    np.testing.assert_allclose(first[0, 0, :3], GOLDEN, rtol=1e-6)


GOLDEN = [0.321496338, -0.081362918, 0.139472067]


def test_rank_above_the_width_is_refused():
    """There are no 9 orthonormal rows of length 8."""
    with pytest.raises(PayloadError, match=r"must be 1\.\.8, got 9: set adapters.rank"):
        fixed_rows(0, "p", (0,), 9, 8)


def test_fixed_a_sends_b_alone():
    """The payload has no A, and a delta whose A is another one is not encoded."""
    import cramjam

    payload = encode(random_delta(spec=FIXED), encoding="int8", seed=0)
    assert all(".lora_b" in name for name in load(bytes(cramjam.zstd.decompress(payload))))
    other = Delta(spec=FIXED, factors=random_delta(spec=LORA).factors)
    with pytest.raises(PayloadError, match="only B may be trained"):
        encode(other, seed=0)


def test_withheld_experts_of_fixed_a_are_still_sent():
    """Withholding an expert zeroes its B and leaves the public A, so that the update still encodes."""
    delta = withhold(random_delta(spec=FIXED), {0: (True, False)})
    found = parse(encode(delta, seed=0), "int8", FIXED)
    for factors in found.factors.values():
        assert not factors.lora_b[1].any()
        assert factors.lora_b[0].any()


@pytest.mark.parametrize(("mode", "seed"), [("lora", SEED), ("fixed_a", None), ("fixed_a", "xyz")])
def test_mode_and_seed_belong_together(mode, seed):
    """A seed without fixed_a, fixed_a without a seed, and a seed that is none are refused, inside and at the border."""
    with pytest.raises(PayloadError):
        AdapterSpec(rank=2, alpha=1.0, mode=mode, seed=seed)
    with pytest.raises(ValidationError):
        AdapterFields(rank=2, alpha=1.0, mode=mode, seed=seed)


def envelope(adapter: dict):
    fields = {
        "federation": "stage",
        "client_id": "ada", "key_epoch": 0, "sequence": 0, "base_version": 0, "base_digest": "0" * 64,
        "expert_ids": {"0": [1, 3]}, "tokens": {"0": [8, 8]}, "num_examples": 8, "encoding": "int4",
        "payload_sha256": "0" * 64, "payload_bytes": 1,
    }  # fmt: skip
    return make_envelope(Signer.from_seed(b"\x01" * 32), adapter=adapter, **fields)


def test_envelope_carries_mode_and_seed():
    """The spec of fixed_a travels in the signed envelope; an envelope of lora has the bytes it always had."""
    key = Signer.from_seed(b"\x01" * 32).public_key
    fixed = envelope({"rank": 5, "alpha": 10.0, "mode": "fixed_a", "seed": SEED})
    parsed = parse_envelope(fixed.to_bytes())
    verify_envelope(parsed, key)
    assert parsed.adapter.spec() == FIXED
    lora = envelope({"rank": 5, "alpha": 10.0, "mode": "lora"})
    assert b'"adapter":{"alpha":10.0,"mode":"lora","rank":5}' in lora.to_bytes()
    assert envelope({"rank": 5, "alpha": 10.0, "mode": "lora", "seed": None}) == lora
