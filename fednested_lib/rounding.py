"""Unbiased stochastic rounding of rank vectors to 8 and to 4 bits.

    int8    v ≈ scale · q,  q in −127..127,  one fp32 scale per vector: max |v| / 127
    int4    v ≈ scale · q,  q in −s..s,      one fp32 scale per block of 128 values: max |v| / s,  s = 7 or less

q = ⌊v/scale + u⌋ with u uniform in [0, 1) from a counter generator (Philox) that the caller seeds, so E[scale·q] = v
and the same seed gives the same bytes everywhere. Four-bit codes are stored as q + 8, two to a byte, the earlier value
in the low half; a vector of odd length ends with the code of zero. Code 0 does not exist: a parser refuses it, so that
equal factors have one packing only. 4.25 bits per value before compression, 13.3 % of fp32. Fewer levels s (QSGD,
Alistarh et al. 2017, arXiv 1610.02132) err more and compress better, to 2.6 bits per value at s = 3; readers need not
know s. A scale has the eight leading bits of its fp32 mantissa, rounded up: the others say nothing and do not compress.
"""

from __future__ import annotations

import numpy as np

from fednested_lib.adapter_spec import INT4_LEVELS
from fednested_lib.errors import PayloadError

BLOCK = 128
_ZERO = 8  # the code of q = 0
_TINY = np.finfo(np.float32).tiny


def round_int8(vectors: np.ndarray, axis: int, rng: np.random.Generator) -> tuple[np.ndarray, np.ndarray]:
    """Round to int8 with one scale per vector along `axis`; returns (codes, scales)."""
    peak = np.abs(vectors).max(axis=axis, keepdims=True)
    codes, scale = _round(vectors, peak, 127, rng)
    return codes, scale.squeeze(axis)


def packed_shapes(n: int, rank: int, length: int) -> tuple[tuple[int, int, int], tuple[int, int, int]]:
    """Return the shapes of codes and scales of n·rank vectors of this length."""
    return (n, rank, -(-length // 2)), (n, rank, -(-length // BLOCK))


def pack_int4(
    factor: np.ndarray, axis: int, rng: np.random.Generator, levels: int = INT4_LEVELS
) -> tuple[np.ndarray, np.ndarray]:
    """Round a factor to int4.

    Args:
        factor: float32, lora_a [n, r, d] or lora_b [n, d, r].
        axis: of the rank vectors, 2 or 1.
        rng: draws one number per value.
        levels: s, 2 to 7.

    Returns:
        uint8 codes [n, r, ⌈d/2⌉] and fp32 scales [n, r, ⌈d/128⌉].
    """
    vectors = factor if axis == 2 else factor.transpose(0, 2, 1)
    n, rank, length = vectors.shape
    (_, _, n_bytes), (_, _, n_blocks) = packed_shapes(n, rank, length)
    padded = np.zeros((n, rank, n_blocks * BLOCK), np.float32)
    padded[..., :length] = vectors
    blocks = padded.reshape(n, rank, n_blocks, BLOCK)
    codes, scale = _round(blocks, np.abs(blocks).max(axis=3, keepdims=True), levels, rng)
    nibbles = (codes.reshape(n, rank, -1)[..., : 2 * n_bytes] + _ZERO).astype(np.uint8)
    return nibbles[..., 0::2] | (nibbles[..., 1::2] << 4), scale.squeeze(3)


def unpack_int4(name: str, codes: np.ndarray, scales: np.ndarray, length: int) -> np.ndarray:
    """Return float32 vectors [n, r, length].

    Raises:
        PayloadError: reason ``not_canonical``: a code that rounding never writes, or padding that is not zero.
    """
    n, rank, n_bytes = codes.shape
    nibbles = np.empty((n, rank, 2 * n_bytes), np.uint8)
    nibbles[..., 0::2], nibbles[..., 1::2] = codes & 15, codes >> 4
    if not nibbles.all() or (nibbles[..., length:] != _ZERO).any():
        raise PayloadError("not_canonical", f"{name} has a 4-bit code 0 or padding that is not zero")
    values = nibbles[..., :length].astype(np.float32) - np.float32(_ZERO)
    values *= np.repeat(scales, BLOCK, axis=2)[..., :length]
    return values


def _round(
    values: np.ndarray, peak: np.ndarray, largest: int, rng: np.random.Generator
) -> tuple[np.ndarray, np.ndarray]:
    # The smallest normal float keeps the quotient finite for subnormal vectors, which round to zero.
    scale = np.maximum(peak / np.float32(largest), _TINY).astype(np.float32)
    scale = ((scale.view(np.uint32) + np.uint32(0xFFFF)) & np.uint32(0xFFFF0000)).view(np.float32)
    codes = values / scale
    codes += rng.random(values.shape, dtype=np.float32)
    np.floor(codes, out=codes)
    np.clip(codes, -largest, largest, out=codes)
    return codes.astype(np.int8), np.where(peak > 0, scale, np.float32(0)).astype(np.float32)
