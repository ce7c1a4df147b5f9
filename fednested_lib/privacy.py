"""Differential privacy of what a device sends: the Gaussian mechanism on one delta, and what it has cost so far.

    u = (α/r)·B of all adapted experts,    ũ = u·min(1, C/‖u‖) + N(0, (z·C)²·I),    B̃ = ũ·(r/α)

Mode `fixed_a` only. Its A is public (it follows from the digest of the base version) and has orthonormal rows, so
‖u‖ = ‖ΔW‖_F and noise on B is the Gaussian mechanism on ΔW itself. Mode `lora` releases a product: with noise on both
factors, (B + N_B)·(A + N_A) carries N_B·N_A besides the two terms of first order, and the sidecar could not know the
start from which A's change is to be clipped (FFA-LoRA, Sun et al. 2024, arXiv 2403.12313, section 3). It is refused.

**Unit.** One update: all of the device's text that it was trained on, whatever the trainer did with it. T updates that
may hold the same text compose to T releases. **Sensitivity** in ‖u‖: C against the update of a device without text
(adjacency `zero_out`, B = 0), 2·C against the same device with any other text (`replace`, the local model's promise and
the default). **Accountant.** A Gaussian release of sensitivity Δ and deviation σ is Δ/σ-Gaussian-DP, and T of them,
each free to depend on what was released before, are √T·Δ/σ-Gaussian-DP (Dong, Roth & Su 2022, corollary 2). With
μ = √T·Δ/σ:

    δ(ε) = Φ(μ/2 − ε/μ) − e^ε·Φ(−μ/2 − ε/μ)                             (Balle & Wang 2018, arXiv 1805.06530, eq. 6)

Nothing is subsampled in secret, so nothing is amplified. Google's `dp-accounting` gives the same numbers and is the
oracle of the tests; it would cost the sidecar 70 MB of memory.

Whatever else leaves must not depend on the text either: no expert is withheld, counts are constants
(`constant_counts`), the experts come from the policy, error feedback is off. The promise does not cover *whether* and
*when* a device sends, nor an update that stays at home because it is not finite.

Noise comes from ChaCha20 under a secret of the device, not from a statistical generator whose state could be solved for
where B is known to be zero. Its key depends on the update and on C and z, so that no two releases share noise, and one
update made again has the same bytes. Sums of doubles have gaps that can betray the term without noise (Mironov 2012,
"On significance of the least significant bits"): the result is rounded to multiples of about σ·2⁻¹⁶, far coarser than
those gaps. That closes the known attack and is not a proof. What follows, the rounding to int8, is post-processing.
"""

from __future__ import annotations

import hashlib
import hmac
import math
from collections.abc import Mapping
from typing import Literal

import numpy as np
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms

from fednested_lib.delta import Delta, ExpertFactors
from fednested_lib.errors import PayloadError
from fednested_lib.events import TrainingTelemetry

Adjacency = Literal["replace", "zero_out"]
SECRET_BYTES = 32
_GRID_BITS = 16  # a released number is a multiple of 2⁻¹⁶ of the noise's deviation, rounded down to a power of two


def gaussian(delta: Delta, *, clip_norm: float, noise_multiplier: float, secret: bytes, label: str) -> Delta:
    """Clip a delta to ‖ΔW‖_F ≤ C and add noise to every value of B; equal arguments give equal bits.

    Args:
        delta: of mode `fixed_a`, with exactly the experts that the policy names; experts without tokens are noised too.
        clip_norm: C > 0.
        noise_multiplier: z > 0; the noise on ΔW within the span of A has deviation z·C.
        secret: 32 random bytes of this device, which never leave it.
        label: names the update, another one for each (client id, key epoch, sequence).

    Raises:
        PayloadError: reason ``dp_needs_fixed_a`` or ``non_finite``.
    """
    if delta.spec.mode != "fixed_a":
        raise PayloadError(
            "dp_needs_fixed_a",
            f"differential privacy needs adapters.mode fixed_a, got {delta.spec.mode}: set it, or switch policy.dp off",
        )
    assert clip_norm > 0
    names = sorted(delta.factors)
    squares = [np.square(delta.factors[name].lora_b, dtype=np.float64).sum() for name in names]
    norm = delta.spec.scale * math.sqrt(sum(squares))
    if not math.isfinite(norm):
        raise PayloadError(
            "non_finite", "the update has NaN or infinite factors and stays here: lower training.learning_rate"
        )
    content = hashlib.sha256()
    for name in names:
        content.update(name.encode() + np.ascontiguousarray(delta.factors[name].lora_b).tobytes())
    parameters = f"delta/{label}/{clip_norm!r}/{noise_multiplier!r}/{delta.spec!r}"
    stream = _stream(secret, parameters.encode(), content.digest())
    shrink, sigma = min(1.0, clip_norm / norm) if norm else 1.0, noise_multiplier * clip_norm / delta.spec.scale
    factors = {
        name: ExpertFactors(
            expert_ids=delta.factors[name].expert_ids,
            lora_a=delta.factors[name].lora_a,
            lora_b=_noised(delta.factors[name].lora_b * np.float64(shrink), sigma, stream).astype(np.float32),
        )
        for name in names
    }
    return Delta(spec=delta.spec, factors=factors)


def constant_counts(
    expert_ids: Mapping[str, list[int]], *, tokens_per_expert: int, num_examples: int
) -> dict[str, dict[str, list[int]] | int]:
    """Return the counts that an envelope under differential privacy declares: constants of the policy.

    The true counts tell the routing, and whether an expert is withheld tells it too. So every expert that the policy
    names is declared alike, and aggregation gives a device that saw nothing the same weight as one that saw much.

    Args:
        expert_ids: layer → the experts that the policy names, never those that the text chose.
        tokens_per_expert: declared for each.
        num_examples: declared for the update.

    Returns:
        The fields `tokens` and `num_examples` of `envelope.make_envelope`.
    """
    return {
        "tokens": {layer: [tokens_per_expert] * len(ids) for layer, ids in expert_ids.items()},
        "num_examples": num_examples,
    }


def noised_telemetry(
    event: TrainingTelemetry, *, tokens: int, max_loss: float, noise_multiplier: float, secret: bytes
) -> TrainingTelemetry:
    """Put noise on what a device tells about one training; it counts as one release more of this noise multiplier.

    Both losses are clipped to 0..max_loss and taken from the middle of it, which is what a device without text would
    say: C = max_loss/√2. Tokens become a constant, the seconds and the tokens per expert are not told, and the size of
    the payload is that of a noised one already.

    Args:
        event: the exact one; equal events get equal noise.
        tokens: declared instead of the true number.
        max_loss: nats per token, > 0.
        noise_multiplier: z > 0; the noise on each loss has deviation z·max_loss/√2.
        secret: as in `gaussian`.
    """
    assert max_loss > 0
    losses = np.array([event.loss_first, event.loss_last])
    parameters = f"telemetry/{max_loss!r}/{noise_multiplier!r}"
    stream = _stream(secret, parameters.encode(), event.to_bytes())
    told = _noised(np.clip(losses, 0.0, max_loss), noise_multiplier * max_loss / math.sqrt(2), stream)
    return event.model_copy(
        update={
            "loss_first": float(told[0]),
            "loss_last": float(told[1]),
            "tokens": tokens,
            "seconds": 0.0,
            "expert_tokens": None,
        }
    )


def epsilon(noise_multiplier: float, releases: int, delta: float, *, adjacency: Adjacency = "replace") -> float:
    """Return the smallest ε such that all releases together are (ε, δ)-differentially private, rounded up at 1e-12.

    Releases of several noise multipliers: one release of (Σ 1/z²)^−½ costs the same.

    Args:
        noise_multiplier: z > 0 of each release.
        releases: T ≥ 0.
        delta: 0 < δ < 1; far below one over the number of devices.
        adjacency: `replace` (sensitivity 2·C) or `zero_out` (C).
    """
    assert noise_multiplier > 0
    assert 0 < delta < 1
    mu = math.sqrt(releases) / noise_multiplier * (2 if adjacency == "replace" else 1)
    target = math.log(delta)
    if releases == 0 or _log_delta(mu, 0.0) <= target:
        return 0.0
    low, high = 0.0, 1.0
    while _log_delta(mu, high) > target:
        low, high = high, 2 * high
    while high - low > 1e-12 * high:
        middle = (low + high) / 2
        low, high = (middle, high) if _log_delta(mu, middle) > target else (low, middle)
    return high


def _log_delta(mu: float, eps: float) -> float:
    left, right = _log_normal_cdf(mu / 2 - eps / mu), eps + _log_normal_cdf(-mu / 2 - eps / mu)
    return left + math.log1p(-math.exp(right - left)) if right < left else -math.inf


def _log_normal_cdf(x: float) -> float:
    if x > -35:  # below, erfc leaves the range of doubles
        return math.log(math.erfc(-x / math.sqrt(2)) / 2)
    tail = -1 / x**2 + 3 / x**4 - 15 / x**6 + 105 / x**8  # Mills' ratio, relative error below 1e-12 here
    return -(x**2) / 2 - math.log(-x * math.sqrt(2 * math.pi)) + math.log1p(tail)


def _stream(secret: bytes, *parts: bytes) -> CipherContext:
    """Return a keystream that no other (secret, parts) shares."""
    assert len(secret) == SECRET_BYTES
    digest = hashlib.sha256()
    for part in parts:
        digest.update(len(part).to_bytes(8, "big") + part)
    key = hmac.digest(secret, b"fednested.privacy/" + digest.digest(), "sha256")
    return Cipher(algorithms.ChaCha20(key, bytes(16)), mode=None).encryptor()


def _noised(values: np.ndarray, sigma: float, stream: CipherContext) -> np.ndarray:
    assert sigma > 0
    grid = 2.0 ** (math.floor(math.log2(sigma)) - _GRID_BITS)
    noise = sigma * _standard_normal(stream, values.size).reshape(values.shape)
    return np.rint((values + noise) / grid) * grid


def _standard_normal(stream: CipherContext, n: int) -> np.ndarray:
    """Return n fp64 normal numbers (Box & Muller 1958); 53 bits each, so none is beyond 8.6 deviations."""
    pairs = -(-n // 2)
    words = np.frombuffer(stream.update(bytes(16 * pairs)), dtype="<u8") >> np.uint64(11)
    uniform = (words + 0.5) * 2.0**-53  # in (0, 1]
    radius, angle = np.sqrt(-2 * np.log(uniform[:pairs])), 2 * np.pi * uniform[pairs:]
    return np.concatenate([radius * np.cos(angle), radius * np.sin(angle)])[:n]
