"""Noise on what leaves: its size, its independence, its place after encoding, and its price in ε."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, decode, encode, fixed_factor
from fednested_lib.errors import PayloadError
from fednested_lib.events import TrainingTelemetry
from fednested_lib.privacy import constant_counts, epsilon, gaussian, noised_telemetry
from fednested_lib.sidecar import norm

SECRET = bytes(range(32))
SPEC = AdapterSpec(rank=8, alpha=16.0, mode="fixed_a", seed="5" * 32)
SHAPES = {
    f"model.layers.0.mlp.experts.{name}": shape
    for name, shape in (("gate_up_proj", (4, 96, 48)), ("down_proj", (4, 48, 64)))
}
IDS = (0, 1, 3)


def _delta(size: float = 1.0, spec: AdapterSpec = SPEC) -> Delta:
    rng = np.random.default_rng(1)
    factors = {}
    for name, (_, d_out, d_in) in SHAPES.items():
        lora_b = (size * rng.standard_normal((len(IDS), d_out, spec.rank))).astype(np.float32)
        lora_b[1] = 0.0  # an expert that saw no token
        lora_a = fixed_factor(SPEC, name, IDS, d_in)
        factors[name] = ExpertFactors(expert_ids=IDS, lora_a=lora_a, lora_b=lora_b)
    return Delta(spec=spec, factors=factors)


def _noised(delta: Delta, **changed) -> Delta:
    how = {"clip_norm": 2.0, "noise_multiplier": 0.5, "secret": SECRET, "label": "romeo/0/7", **changed}
    return gaussian(delta, **how)


def _values(delta: Delta) -> np.ndarray:
    """All of (α/r)·B, one vector."""
    return delta.spec.scale * np.concatenate([delta.factors[name].lora_b.ravel() for name in sorted(delta.factors)])


def test_noise_has_the_deviation_it_was_asked_for():
    """Released minus clipped is normal with deviation z·C in every expert, the one without tokens included."""
    delta = _delta()
    clipped = _values(delta) * 2.0 / norm(delta)
    noise = (_values(_noised(delta)) - clipped) / (0.5 * 2.0)
    n = noise.size
    assert abs(noise.mean()) < 5 / math.sqrt(n)
    assert abs(noise.var() - 1) < 5 * math.sqrt(2 / n)
    ordered = np.sort(noise)
    normal = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in ordered])
    assert np.abs(normal - (np.arange(n) + 0.5) / n).max() < 1.95 / math.sqrt(n)  # Kolmogorov, 1e-3
    empty = np.concatenate([f.lora_b[1].ravel() for f in _noised(delta).factors.values()])
    assert empty.std() == pytest.approx(0.5 * 2.0 / SPEC.scale, rel=0.1)


def test_clip_bounds_what_the_text_can_change():
    """Whatever the size of an update, the part that noise is added to has a norm of at most C; a small one is kept."""
    tiny = 1e-9
    for size, bound in ((1e-3, None), (1.0, 2.0), (1e6, 2.0)):
        delta = _delta(size)
        released = _values(_noised(delta, noise_multiplier=tiny))
        expected = norm(delta) if bound is None else bound
        assert np.linalg.norm(released) == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("encoding", ["int8", "fp16", "fp32"])
def test_encoding_does_not_lose_the_noise(encoding):
    """The decoded payload has the noise's variance in each expert: rounding adds to it and takes nothing off."""
    payload = encode(_noised(_delta(0.0)), encoding=encoding, seed=3)
    sent = decode(payload, encoding=encoding, spec=SPEC, expert_ids={0: IDS}, shapes=SHAPES)
    sigma = 0.5 * 2.0 / SPEC.scale
    for factors in sent.factors.values():
        for lora_b in factors.lora_b:
            assert lora_b.std() == pytest.approx(sigma, rel=0.1)
    assert all(np.array_equal(sent.factors[name].lora_a, _delta().factors[name].lora_a) for name in SHAPES)


def test_same_update_same_bits_and_no_other_shares_its_noise():
    """Made again, an update is the same; another text, label, bound, multiplier or secret brings independent noise.

    Two releases that shared noise would give away their exact difference.
    """
    first = _values(_noised(_delta()))
    assert np.array_equal(first, _values(_noised(_delta())))
    sigma = 0.5 * 2.0
    others = [
        _noised(_delta(1.0000001)),
        _noised(_delta(), label="romeo/0/8"),
        _noised(_delta(), clip_norm=2.0 + 1e-9),
        _noised(_delta(), noise_multiplier=0.5 + 1e-9),
        _noised(_delta(), secret=bytes(32)),
    ]
    for other in others:
        assert (_values(other) - first).std() == pytest.approx(math.sqrt(2) * sigma, rel=0.1)


def test_values_lie_on_a_grid_coarser_than_doubles():
    """Every released value is a multiple of σ·2⁻¹⁶ (rounded down to a power of two): no low bits of the exact one."""
    lora_b = np.concatenate([f.lora_b.ravel() for f in _noised(_delta()).factors.values()]).astype(np.float64)
    grid = 2.0 ** (math.floor(math.log2(0.5 * 2.0 / SPEC.scale)) - 16)
    assert np.array_equal(np.rint(lora_b / grid) * grid, lora_b)


def test_refuses_what_it_cannot_protect():
    """Mode lora and NaN are named stops: the first has no exact sensitivity here, the second no norm."""
    with pytest.raises(PayloadError, match="adapters.mode fixed_a") as caught:
        _noised(_delta(spec=AdapterSpec(rank=8, alpha=16.0)))
    assert caught.value.reason == "dp_needs_fixed_a"
    broken = _delta()
    broken.factors[next(iter(SHAPES))].lora_b[0, 0, 0] = np.nan
    with pytest.raises(PayloadError) as caught:
        _noised(broken)
    assert caught.value.reason == "non_finite"


@pytest.mark.parametrize("noise_multiplier", [0.05, 0.3, 1.0, 4.0, 50.0])
@pytest.mark.parametrize("releases", [1, 10, 1000])
@pytest.mark.parametrize("delta", [1e-3, 1e-5, 1e-9])
def test_epsilon_equals_the_oracle(noise_multiplier, releases, delta):
    """ε is that of Google's dp-accounting (analytic Gaussian) to 1e-9, in both adjacencies, and 0 where it says 0."""
    oracle = pytest.importorskip("dp_accounting").get_epsilon_gaussian
    for adjacency, factor in (("zero_out", 1), ("replace", 2)):
        expected = oracle(noise_multiplier / factor / math.sqrt(releases), delta)
        found = epsilon(noise_multiplier, releases, delta, adjacency=adjacency)
        assert found == pytest.approx(expected, rel=1e-9, abs=1e-11)


def test_epsilon_keeps_its_promise_by_quadrature():
    """δ(ε) of the returned ε, integrated numerically over two shifted normals, is the δ asked for."""
    mu, delta = math.sqrt(3) / 2.0, 1e-4
    found = epsilon(2.0, 3, delta, adjacency="zero_out")
    x = np.linspace(-40, 40, 2_000_001)
    density = np.exp(-((x - mu) ** 2) / 2), np.exp(-(x**2) / 2)
    excess = np.maximum(density[0] - math.exp(found) * density[1], 0).sum() * (x[1] - x[0]) / math.sqrt(2 * math.pi)
    assert excess == pytest.approx(delta, rel=1e-4)


def test_epsilon_of_nothing_and_of_more():
    """No release costs nothing, and ε grows with releases, falls with noise, and `replace` costs more."""
    assert epsilon(1.0, 0, 1e-5) == 0.0
    assert epsilon(1.0, 2, 1e-5) > epsilon(1.0, 1, 1e-5) > epsilon(1.1, 1, 1e-5)
    assert epsilon(1.0, 1, 1e-5) > epsilon(1.0, 1, 1e-5, adjacency="zero_out")
    assert epsilon(1.0, 1, 1e-5) == epsilon(0.5, 1, 1e-5, adjacency="zero_out")


def _event(**changed) -> TrainingTelemetry:
    fields = {"loss_first": 5.0, "loss_last": 4.0, "tokens": 1234, "seconds": 3.5, "payload_bytes": 99}
    return TrainingTelemetry(
        federation="stage", client_id="romeo", sequence=7, base_version=3, **{**fields, **changed},
        expert_tokens={"0": {"1": 64}},
    )  # fmt: skip


def test_telemetry_tells_constants_and_noised_losses():
    """Seconds, tokens and experts say nothing about the text; losses have noise of z·max_loss/√2 round the clipped."""
    how = {"tokens": 1024, "max_loss": 8.0, "noise_multiplier": 0.5, "secret": SECRET}
    told = noised_telemetry(_event(), **how)
    assert (told.tokens, told.seconds, told.expert_tokens) == (1024, 0.0, None)
    assert (told.sequence, told.payload_bytes) == (7, 99)
    assert told == noised_telemetry(_event(), **how)
    many = [noised_telemetry(_event(loss_first=50.0, loss_last=4.0 + i * 1e-9), **how) for i in range(400)]
    first, last = (np.array([getattr(each, name) for each in many]) for name in ("loss_first", "loss_last"))
    sigma = 0.5 * 8.0 / math.sqrt(2)
    assert abs(first.mean() - 8.0) < 5 * sigma / 20
    assert abs(last.mean() - 4.0) < 5 * sigma / 20
    assert first.std() == pytest.approx(sigma, rel=0.2)
    assert abs(np.corrcoef(first, last)[0, 1]) < 0.25


def test_envelope_counts_do_not_depend_on_the_text():
    """Every named expert is declared alike."""
    counts = constant_counts({"0": [1, 4, 5], "2": [0]}, tokens_per_expert=256, num_examples=64)
    assert counts == {"tokens": {"0": [256, 256, 256], "2": [256]}, "num_examples": 64}
