"""What an update loses on its way out, by truncation of its rank and by rounding, goes into the next one.

    v = ΔW + e        what should leave: what was learnt, and what earlier updates of the same base lost
    sent = Q(T_q(v))  the nearest delta of q columns per expert on average (Eckart and Young 1936), as long as v,
                      rounded
    e ← v − sent      error feedback (Karimireddy et al. 2019, arXiv 1901.09847)

Everything stays in factors: a sum of deltas is their columns side by side, s·[B₁ | B₂]·[A₁; A₂], and T_q is two thin QR
decompositions and one SVD of a small core, never dense. The alternative, sending the lost part as extra columns of the
next update, is exact but takes up to 2·r columns more for every update, which costs what truncation and rounding saved;
so what leaves always has q, and what T_q takes is lost part again. That is kept to `KEPT_RANKS`·r columns.

In mode `fixed_a` A is no part of what is learnt: v is a sum of B alone, and there is nothing to truncate.

The residual belongs to one base and scale: it is dropped when they change, and none is carried with differential
privacy, whose noise would be taken back by the next update. It is data of this device; it never leaves but within an
update, after withholding, clipping and rounding like everything else.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.adapter_spec import INT4_LEVELS, MAX_RANK, AdapterSpec, Encoding
from fednested_lib.blobs import write_durable
from fednested_lib.delta import Delta, ExpertFactors, decode, encode, squared_norm
from fednested_lib.envelope import AdapterFields, Digest, Layer
from fednested_lib.errors import ContractError, StorageError
from fednested_lib.partition import expert_param
from fednested_lib.signing import canonical_json

KEPT_RANKS = 2  # ranks of a residual, in those of the adapter: rounding two factors of rank r errs by rank 2·r
FEEDBACK_MAX_RANK = MAX_RANK // 4  # of adapters: learnt, carried and arrived columns side by side are still an adapter


@dataclass(frozen=True, kw_only=True)
class Squeezed:
    """A payload, the adapter that it holds, and what it lost (None without feedback)."""

    payload: bytes
    spec: AdapterSpec
    residual: Delta | None


def joined(first: Delta, second: Delta) -> Delta:
    """Return the sum of two deltas of equal scale, mode and parameters: their columns side by side, or the sum of B."""
    factors = {}
    for name, one in first.factors.items():
        two = second.factors[name]
        assert one.expert_ids == two.expert_ids
        if first.spec.mode == "fixed_a":
            factors[name] = ExpertFactors(expert_ids=one.expert_ids, lora_a=one.lora_a, lora_b=one.lora_b + two.lora_b)
            continue
        factors[name] = ExpertFactors(
            expert_ids=one.expert_ids,
            lora_a=np.concatenate([one.lora_a, two.lora_a], axis=1),
            lora_b=np.concatenate([one.lora_b, two.lora_b], axis=2),
        )
    if first.spec.mode == "fixed_a":
        return Delta(spec=first.spec, factors=factors)
    return Delta(spec=_of_rank(first.spec, first.spec.rank + second.spec.rank), factors=factors)


def truncated(delta: Delta, rank: int) -> Delta:
    """Return the nearest delta of a rank, in the Frobenius norm, per expert; one of no higher rank as it is.

    Args:
        delta: of mode `lora`.
        rank: 1 or more.
    """
    if delta.spec.rank <= rank:
        return delta
    parts = {name: _singular(each) for name, each in delta.factors.items()}
    kept = {name: np.broadcast_to(np.arange(each[1].shape[1]) < rank, each[1].shape) for name, each in parts.items()}
    return _of_parts(delta, parts, kept, rank)


def shared_out(delta: Delta, mean_rank: float, max_rank: int) -> Delta:
    """Return a delta with as many columns as `mean_rank` per expert makes, given to the experts that need them most.

    The columns kept are those of most σ² per value, whatever expert they are of; the others are zeros, which cost next
    to nothing after compression. An expert with few tokens so keeps few columns, or none.

    Args:
        delta: of mode `lora`.
        mean_rank: columns per expert and projection, on average.
        max_rank: most columns of one expert.
    """
    parts = {name: _singular(each) for name, each in delta.factors.items()}
    kept = {name: np.zeros(singular.shape, bool) for name, (_, singular, _) in parts.items()}
    sizes = {name: each.lora_a.shape[2] + each.lora_b.shape[1] for name, each in delta.factors.items()}
    left = mean_rank * sum(sizes[name] * len(each.expert_ids) for name, each in delta.factors.items())
    ranked = sorted(
        (-float(singular[expert, column] ** 2) / sizes[name], name, expert, column)
        for name, (_, singular, _) in parts.items()
        for expert, column in np.ndindex(len(singular), min(max_rank, singular.shape[1]))
        if singular[expert, column] > 0
    )
    for _, name, expert, column in ranked:
        if sizes[name] <= left:
            kept[name][expert, column] = True
            left -= sizes[name]
    return _of_parts(delta, parts, kept, max(1, *(int(each.sum(1).max()) for each in kept.values())))


def _singular(each: ExpertFactors) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the thin SVD of every B·A: left [n, d_out, k], σ [n, k] falling, right [n, k, d_in]."""
    q_b, r_b = np.linalg.qr(each.lora_b.astype(np.float64))
    q_a, r_a = np.linalg.qr(each.lora_a.astype(np.float64).transpose(0, 2, 1))
    u, singular, v = np.linalg.svd(r_b @ r_a.transpose(0, 2, 1), full_matrices=False)
    return q_b @ u, singular, v @ q_a.transpose(0, 2, 1)


def _of_parts(delta: Delta, parts: dict, kept: dict[str, np.ndarray], rank: int) -> Delta:
    factors = {}
    for name, each in delta.factors.items():
        left, singular, right = parts[name]
        width = min(rank, singular.shape[1])
        # Half of σ to each factor, so that both round equally well.
        root = np.sqrt(np.where(kept[name], singular, 0))[:, :width]
        lora_a = np.zeros((len(root), rank, right.shape[2]), np.float32)
        lora_b = np.zeros((len(root), left.shape[1], rank), np.float32)
        lora_a[:, :width] = root[:, :, None] * right[:, :width]
        lora_b[:, :, :width] = left[:, :, :width] * root[:, None, :]
        factors[name] = ExpertFactors(expert_ids=each.expert_ids, lora_a=lora_a, lora_b=lora_b)
    return Delta(spec=_of_rank(delta.spec, rank), factors=factors)


def _of_rank(spec: AdapterSpec, rank: int) -> AdapterSpec:
    """Return the spec of another rank and equal scale α/r."""
    return AdapterSpec(rank=rank, alpha=spec.scale * rank, mode=spec.mode, seed=spec.seed)


def _length(delta: Delta) -> float:
    """Return ‖ΔW‖_F."""
    return float(np.sqrt(sum(squared_norm(each, delta.spec.scale).sum() for each in delta.factors.values())))


def _lengthened(delta: Delta, length: float) -> Delta:
    """Return a delta in the same direction, ‖ΔW‖_F as given: a step that lost columns is not to be a shorter step."""
    found = _length(delta)
    if not found:
        return delta
    factors = {
        name: ExpertFactors(
            expert_ids=each.expert_ids, lora_a=each.lora_a, lora_b=each.lora_b * np.float32(length / found)
        )
        for name, each in delta.factors.items()
    }
    return Delta(spec=delta.spec, factors=factors)


def _negative(delta: Delta) -> Delta:
    factors = {
        name: ExpertFactors(expert_ids=each.expert_ids, lora_a=each.lora_a, lora_b=-each.lora_b)
        for name, each in delta.factors.items()
    }
    return Delta(spec=delta.spec, factors=factors)


def _with_even_peaks(delta: Delta) -> Delta:
    """Return the same delta with max |a| = 1 in every row of A: scales that are all alike compress to nothing."""
    factors = {}
    for name, each in delta.factors.items():
        peak = np.abs(each.lora_a).max(axis=2)
        peak[peak == 0] = 1
        factors[name] = ExpertFactors(
            expert_ids=each.expert_ids, lora_a=each.lora_a / peak[:, :, None], lora_b=each.lora_b * peak[:, None, :]
        )
    return Delta(spec=delta.spec, factors=factors)


def squeeze(
    target: Delta,
    *,
    max_rank: int,
    mean_rank: float | None,
    encoding: Encoding,
    levels: int = INT4_LEVELS,
    seed: int,
    feedback: bool,
) -> Squeezed:
    """Truncate, round and write what should leave; equal arguments give equal bytes.

    Args:
        target: withheld and clipped, what is carried included.
        max_rank: most columns of one expert, that of the adapter which was trained.
        mean_rank: columns per expert on average; None sends `max_rank`.
        encoding: of the payload.
        levels: of int4.
        seed: of the stochastic rounding.
        feedback: whether to return what is lost.
    """
    fixed = target.spec.mode == "fixed_a"
    if fixed:
        sent = target
    elif mean_rank is None:
        sent = truncated(target, max_rank)
    else:
        sent = _lengthened(shared_out(target, mean_rank, max_rank), _length(target))
    if sent is not target and encoding in ("int8", "int4"):  # factors that are not the trained ones any more
        sent = _with_even_peaks(sent)
    payload = encode(sent, encoding=encoding, seed=seed, levels=levels)
    residual = None
    if feedback:
        arrived = decode(payload, encoding=encoding, spec=sent.spec, expert_ids=_ids(sent), shapes=_shapes(sent))
        residual = joined(target, _negative(arrived))
        if not fixed:
            residual = truncated(residual, KEPT_RANKS * max_rank)
    return Squeezed(payload=payload, spec=sent.spec, residual=residual)


def _ids(delta: Delta) -> dict[int, tuple[int, ...]]:
    return {expert_param(name)[0]: each.expert_ids for name, each in delta.factors.items()}


def _shapes(delta: Delta) -> dict[str, tuple[int, int, int]]:
    """Return what a parser needs to know of the model to read a delta of these shapes."""
    return {
        name: (1 + max(each.expert_ids), each.lora_b.shape[1], each.lora_a.shape[2])
        for name, each in delta.factors.items()
    }


class _Header(BaseModel):
    """The first line of a residual's file."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    base_digest: Digest
    adapter: AdapterFields
    expert_ids: dict[Layer, list[int]]
    sequence: int = Field(ge=0)


class Residuals:
    """The residuals of a device, one file per update: `<sequence>.residual`.

    What an update was made of stays until the one after the next is made: a device that died between keeping a residual
    and queueing its update makes the same update again, from the same bytes.

    Args:
        directory: of the sidecar, created when something is kept.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)

    def carried(self, sequence: int, base_digest: str, like: Delta) -> Delta | None:
        """Return what the last update before this one lost, if it was of the same base, scale, mode and experts.

        Args:
            sequence: of the update that is to be made.
            base_digest: its base.
            like: what was learnt.

        Raises:
            StorageError: a file cannot be read or was altered.
        """
        before = [number for number in self._sequences() if number < sequence]
        if not before:
            return None
        path = self._path(before[-1])
        try:
            line, _, payload = path.read_bytes().partition(b"\n")
            header = _Header.model_validate_json(line)
            spec, ids = header.adapter.spec(), {int(layer): tuple(each) for layer, each in header.expert_ids.items()}
            same = (header.base_digest, spec.mode, spec.seed) == (base_digest, like.spec.mode, like.spec.seed)
            if not same or ids != _ids(like) or not np.isclose(spec.scale, like.spec.scale, rtol=1e-12):
                return None
            return decode(payload, encoding="fp32", spec=spec, expert_ids=ids, shapes=_shapes(like))
        except (OSError, ValidationError, ContractError) as error:
            raise StorageError(
                f"residual {path} is unusable ({type(error).__name__}): remove it; what it held is lost, no update is"
            ) from None

    def keep(self, sequence: int, base_digest: str, residual: Delta) -> None:
        """Write what an update lost, before the update is queued; older ones are let go, save the one it came from.

        Raises:
            StorageError: the disk is full or cannot be written.
        """
        spec = residual.spec
        header = _Header(
            base_digest=base_digest,
            adapter=AdapterFields(rank=spec.rank, alpha=spec.alpha, mode=spec.mode, seed=spec.seed),
            expert_ids={str(layer): list(ids) for layer, ids in _ids(residual).items()},
            sequence=sequence,
        )
        data = canonical_json(header.model_dump(mode="json")) + b"\n" + encode(residual, encoding="fp32", seed=0)
        write_durable(self._path(sequence), data)
        for number in self._sequences()[:-2]:
            self._path(number).unlink(missing_ok=True)

    def _sequences(self) -> list[int]:
        names = (path.stem for path in self.directory.glob("*.residual"))
        return sorted(int(name) for name in names if name.isdecimal())

    def _path(self, sequence: int) -> Path:
        return self.directory / f"{sequence:016d}.residual"
