"""A delta: what a device learnt, as low-rank factors, and its bytes on the wire.

    delta = local − snapshot,   W ← W + η · (α/r) · B·A        (added with +η, never subtracted)

LoRA (Hu et al. 2021, arXiv 2106.09685): `lora_a` is A [r, d_in], `lora_b` is B [d_out, r]. For each fused expert
parameter the factors of the experts a device adapted are *stacked*: `lora_a [n, r, d_in]`, `lora_b [n, d_out, r]`; so
an update has a handful of tensors however many experts the model has, and any subset of experts and any rank is valid.

The payload is a zstd frame around a safetensors file with canonical bytes. Encodings: `fp32`, `fp16`, `int8`, the
default: one fp32 scale per rank vector, and `int4`: one per block of 128 (`rounding.py`); both with unbiased stochastic
rounding from a counter generator (Philox), so that the same seed gives the same bytes on every machine.

Two adapter modes: `lora` sends A and B; `fixed_a` sends B alone, and A follows from the spec's seed (`fixed_a.py`).

The parser trusts nothing: sizes are computed from the envelope before a byte is decompressed, the file must be
byte-identical to what our writer makes of its tensors (so there is no room for metadata, padding, duplicate keys or
extra fields), and names, types, shapes and finiteness are checked. Nothing is ever unpickled.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass

import numpy as np

from fednested_lib.adapter_spec import ENCODINGS, INT4_LEVELS, AdapterSpec, Encoding
from fednested_lib.errors import PayloadError
from fednested_lib.fixed_a import fixed_rows
from fednested_lib.rounding import pack_int4, packed_shapes, round_int8, unpack_int4

_HEADER_BYTES_PER_TENSOR = 512  # a generous bound of one safetensors header entry
_SMALL_BYTES = 1 << 16  # a millisecond of zstd's hardest work, which takes 3 % off so small a file


@dataclass(frozen=True, kw_only=True)
class ExpertFactors:
    """Stacked factors of one fused expert parameter.

    Args:
        expert_ids: the n experts, ascending.
        lora_a: float32 [n, r, d_in].
        lora_b: float32 [n, d_out, r].
    """

    expert_ids: tuple[int, ...]
    lora_a: np.ndarray
    lora_b: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Delta:
    """local − snapshot of one device: factors per fused expert parameter name."""

    spec: AdapterSpec
    factors: Mapping[str, ExpertFactors]

    @property
    def size_fp32_bytes(self) -> int:
        """Bytes of the same factors as plain fp32."""
        return sum(f.lora_a.size * 4 + f.lora_b.size * 4 for f in self.factors.values())


def squared_norm(factors: ExpertFactors, scale: float) -> np.ndarray:
    """Return ‖(α/r)·B·A‖²_F per expert, fp64 [n], without forming B·A: Σ (BᵀB) ∘ (A·Aᵀ)."""
    a = factors.lora_a.astype(np.float64)
    b = factors.lora_b.astype(np.float64)
    return scale**2 * np.einsum("npq,npq->n", np.matmul(b.transpose(0, 2, 1), b), np.matmul(a, a.transpose(0, 2, 1)))


def fixed_factor(spec: AdapterSpec, name: str, expert_ids: tuple[int, ...], d_in: int) -> np.ndarray:
    """Return A of a `fixed_a` adapter, float32 [n, r, d_in].

    Raises:
        PayloadError: reason ``bad_rank``, if r > d_in: that many orthonormal rows do not exist.
    """
    assert spec.seed is not None, "mode fixed_a has a seed"
    return fixed_rows(int(spec.seed, 16), name, expert_ids, spec.rank, d_in)


def _sent_factors(spec: AdapterSpec) -> tuple[tuple[str, int], ...]:
    """Return the factors that travel, with the axis of their rank vectors."""
    return (("lora_b", 1),) if spec.mode == "fixed_a" else (("lora_a", 2), ("lora_b", 1))


def _encode_tensors(delta: Delta, encoding: str, seed: int, levels: int) -> dict[str, np.ndarray]:
    rng = np.random.Generator(np.random.Philox(key=seed))
    tensors: dict[str, np.ndarray] = {}
    for name in sorted(delta.factors):
        factors = delta.factors[name]
        _check_fixed(delta.spec, name, factors)
        for factor, axis in _sent_factors(delta.spec):
            values = np.ascontiguousarray(getattr(factors, factor), dtype=np.float32)
            if not np.isfinite(values).all():
                raise PayloadError(
                    "non_finite",
                    f"{name}.{factor} has NaN or infinite values: the update is not sent; lower the learning rate",
                )
            key = f"{name}.{factor}"
            if encoding == "int8":
                tensors[key], tensors[f"{key}.scale"] = round_int8(values, axis, rng)
            elif encoding == "int4":
                tensors[key], tensors[f"{key}.scale"] = pack_int4(values, axis, rng, levels)
            else:
                tensors[key] = values.astype(np.float16) if encoding == "fp16" else values
    return tensors


def _check_fixed(spec: AdapterSpec, name: str, factors: ExpertFactors) -> None:
    if spec.mode != "fixed_a":
        return
    if not np.array_equal(factors.lora_a, fixed_factor(spec, name, factors.expert_ids, factors.lora_a.shape[2])):
        raise PayloadError(
            "bad_adapter", f"{name}.lora_a is not the A of seed {spec.seed}: in mode fixed_a only B may be trained"
        )


def encode(delta: Delta, *, encoding: Encoding = "int8", seed: int, levels: int = INT4_LEVELS) -> bytes:
    """Write a delta as payload bytes; equal arguments give equal bytes.

    Args:
        delta: the factors, all finite.
        encoding: ``int8`` (default), ``int4``, ``fp16`` or ``fp32``.
        seed: 0 ≤ seed < 2**128, of the stochastic rounding; of the device's secret (`sidecar.py`).
        levels: of int4, 2 to 7 on either side of zero: fewer err more and take fewer bytes.

    Raises:
        PayloadError: unknown encoding, non-finite values, or an A that is not the one of the seed.
    """
    import cramjam
    from safetensors.numpy import save

    if encoding not in ENCODINGS:
        raise PayloadError(
            "bad_encoding", f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding}: set outgoing.encoding"
        )
    raw = save(_encode_tensors(delta, encoding, seed, levels))
    return bytes(cramjam.zstd.compress(raw, level=19 if len(raw) <= _SMALL_BYTES else 3))


def _expected(
    encoding: str,
    spec: AdapterSpec,
    expert_ids: Mapping[int, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, int, int]],
) -> dict[str, tuple[np.dtype, tuple[int, ...]]]:
    """Return name → (dtype, shape) of every tensor the payload must hold."""
    from fednested_lib.partition import expert_param

    dtypes = {"fp32": np.float32, "fp16": np.float16, "int8": np.int8, "int4": np.uint8}
    dtype = np.dtype(dtypes[encoding])
    expected: dict[str, tuple[np.dtype, tuple[int, ...]]] = {}
    for name, (n_experts, d_out, d_in) in shapes.items():
        layer, _ = expert_param(name)
        ids = expert_ids.get(layer, ())
        if not ids:
            continue
        if list(ids) != sorted(set(ids)) or ids[0] < 0 or ids[-1] >= n_experts:
            raise PayloadError(
                "bad_expert_ids",
                f"expert ids of layer {layer} must be ascending in 0..{n_experts - 1}, got {list(ids)[:8]}",
            )
        shapes_of = {"lora_a": (len(ids), spec.rank, d_in), "lora_b": (len(ids), d_out, spec.rank)}
        for factor, axis in _sent_factors(spec):
            shape = shapes_of[factor]
            scales = (len(ids), spec.rank)
            if encoding == "int4":
                shape, scales = packed_shapes(len(ids), spec.rank, shape[axis])
            expected[f"{name}.{factor}"] = (dtype, shape)
            if encoding in ("int8", "int4"):
                expected[f"{name}.{factor}.scale"] = (np.dtype(np.float32), scales)
    layers = {expert_param(name)[0] for name in shapes}
    unknown = sorted(set(expert_ids) - layers)
    if unknown:
        raise PayloadError(
            "bad_expert_ids", f"layer {unknown[0]} has no experts in this model (layers {min(layers)}..{max(layers)})"
        )
    if not expected:
        raise PayloadError("empty_update", "the update adapts no expert")
    return expected


def _is_one_frame(payload: bytes) -> bool:
    """Walk the blocks of a zstd frame (RFC 8878, 3.1.1): readers skip other frames, in which anything may hide."""
    if len(payload) < 6 or payload[:4] != b"\x28\xb5\x2f\xfd":
        return False
    descriptor = payload[4]
    single, checksum = descriptor >> 5 & 1, descriptor >> 2 & 1
    at = 6 - single + (0, 1, 2, 4)[descriptor & 3] + (single, 2, 4, 8)[descriptor >> 6]
    while at + 3 <= len(payload):
        block = int.from_bytes(payload[at : at + 3], "little")
        at += 3 + (1 if block >> 1 & 3 == 1 else block >> 3)  # type 1 holds one byte, to be repeated
        if block & 1:
            return at + 4 * checksum == len(payload)
    return False


def _decompress(payload: bytes, expected: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> np.ndarray:
    import cramjam

    if not _is_one_frame(payload):
        raise PayloadError("bad_frame", "payload is not one zstd frame and nothing else: no second or skippable frame")
    bound = 16 + sum(
        _HEADER_BYTES_PER_TENSOR + dtype.itemsize * int(np.prod(shape)) for dtype, shape in expected.values()
    )
    buffer = np.empty(bound, dtype=np.uint8)  # bounded before a byte is decompressed: no zip bomb
    try:
        n = cramjam.zstd.decompress_into(payload, buffer)
    except Exception as error:  # cramjam raises its own DecompressionError or ValueError
        raise PayloadError("bad_frame", f"payload is not a zstd frame of at most {bound} bytes ({error})") from error
    return buffer[:n]


def _canonical_header(expected: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> bytes:
    """Return the header that safetensors writes for such tensors: wide types first, then by name; padded to 8 bytes."""
    words = {"float32": "F32", "float16": "F16", "int8": "I8", "uint8": "U8"}
    header, at = {}, 0
    for name, (dtype, shape) in sorted(expected.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        end = at + dtype.itemsize * math.prod(shape)
        header[name] = {"dtype": words[dtype.name], "shape": list(shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _views(raw: np.ndarray, expected: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, np.ndarray] | None:
    """Return the tensors of a file that is canonical to the byte, without a copy; None for any other."""
    header = _canonical_header(expected)
    size = sum(dtype.itemsize * math.prod(shape) for dtype, shape in expected.values())
    if raw.size != len(header) + size or raw[: len(header)].tobytes() != header:
        return None
    tensors, at = {}, len(header)
    for name, (dtype, shape) in sorted(expected.items(), key=lambda item: (-item[1][0].itemsize, item[0])):
        end = at + dtype.itemsize * math.prod(shape)
        tensors[name] = raw[at:end].view(dtype).reshape(shape)
        at = end
    return tensors


def _parse(raw: np.ndarray, expected: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    tensors = _views(raw, expected)
    return _parse_odd(raw.tobytes(), expected) if tensors is None else tensors


def _parse_odd(raw: bytes, expected: Mapping[str, tuple[np.dtype, tuple[int, ...]]]) -> dict[str, np.ndarray]:
    """Say what is wrong with a file that is not canonical."""
    from safetensors import SafetensorError
    from safetensors.numpy import load, save

    try:
        tensors = load(raw)
    except (SafetensorError, ValueError, KeyError, AttributeError, TypeError) as error:
        raise PayloadError("bad_tensors", f"payload is not a safetensors file ({error})") from error
    if set(tensors) != set(expected):
        odd = sorted(set(tensors) ^ set(expected))[0]
        raise PayloadError("bad_tensors", f"payload tensors differ from the declared adapter at {odd[:120]!r}")
    for name, (dtype, shape) in expected.items():
        found = tensors[name]
        if found.dtype != dtype or found.shape != shape:
            raise PayloadError(
                "bad_shape", f"{name} must be {dtype} {list(shape)}, got {found.dtype} {list(found.shape)}"
            )
    if save(tensors) != raw:
        raise PayloadError(
            "not_canonical", "payload bytes differ from the canonical file of its tensors (hidden bytes or metadata)"
        )
    return tensors


def decode(
    payload: bytes,
    *,
    encoding: str,
    spec: AdapterSpec,
    expert_ids: Mapping[int, tuple[int, ...]],
    shapes: Mapping[str, tuple[int, int, int]],
) -> Delta:
    """Parse untrusted payload bytes strictly.

    Args:
        payload: zstd frame.
        encoding: as the envelope declares.
        spec: rank and alpha of the envelope.
        expert_ids: adapted experts per layer, from the envelope.
        shapes: (experts, d_out, d_in) of every fused expert parameter of the base model.

    Returns:
        The delta with float32 factors.

    Raises:
        PayloadError: with a machine-readable reason.
    """
    if encoding not in ENCODINGS:
        raise PayloadError("bad_encoding", f"encoding must be one of {', '.join(ENCODINGS)}, got {encoding}")
    expected = _expected(encoding, spec, expert_ids, shapes)
    tensors = _parse(_decompress(payload, expected), expected)
    for name, values in tensors.items():
        if values.dtype.kind == "f" and not np.isfinite(values).all():
            raise PayloadError("non_finite", f"{name} has NaN or infinite values")
    from fednested_lib.partition import expert_param

    factors = {}
    for name in sorted(shapes):
        ids = tuple(expert_ids.get(expert_param(name)[0], ()))
        if ids:
            _, d_out, d_in = shapes[name]
            lora_b = _widen(tensors, f"{name}.lora_b", "lora_b", d_out)
            if spec.mode == "fixed_a":
                lora_a = fixed_factor(spec, name, ids, d_in)
            else:
                lora_a = _widen(tensors, f"{name}.lora_a", "lora_a", d_in)
            factors[name] = ExpertFactors(expert_ids=ids, lora_a=lora_a, lora_b=lora_b)
    return Delta(spec=spec, factors=factors)


def _widen(tensors: Mapping[str, np.ndarray], key: str, factor: str, length: int) -> np.ndarray:
    if tensors[key].dtype == np.uint8:
        vectors = unpack_int4(key, tensors[key], tensors[f"{key}.scale"], length)
        return vectors if factor == "lora_a" else np.ascontiguousarray(vectors.transpose(0, 2, 1))
    values = tensors[key].astype(np.float32, copy=False)
    if f"{key}.scale" in tensors:
        scale = tensors[f"{key}.scale"]
        values *= scale[:, :, None] if factor == "lora_a" else scale[:, None, :]
    return values
