"""What an update loses on its way out arrives with the next ones of the same base, and nothing is made twice."""

from __future__ import annotations

from contextlib import closing

import numpy as np
import pytest

from fednested_lib.audit import AuditLog
from fednested_lib.config import OutgoingConfig
from fednested_lib.delta import AdapterSpec, Delta, ExpertFactors, decode, fixed_factor
from fednested_lib.errors import StorageError
from fednested_lib.feedback import KEPT_RANKS, Residuals, joined, shared_out, squeeze, truncated
from fednested_lib.ledger import Ledger
from fednested_lib.outbox import Outbox
from fednested_lib.sidecar import Sidecar
from fednested_lib.signing import Signer
from fednested_lib.snapshot import SnapshotManifest, expert_shapes
from fednested_lib.spool import Spool
from tests.policies import make_policy

MODEL = {
    "model_type": "mixtral", "num_local_experts": 4, "hidden_size": 40, "intermediate_size": 24, "num_hidden_layers": 1,
}  # fmt: skip
BASE = SnapshotManifest(version=3, family="mixtral", model_config=MODEL, tokenizer="0" * 64, blobs={})
SHAPES = expert_shapes(BASE)
IDS = (0, 2, 3)


def _delta(seed: int = 0, *, rank: int = 4, mode: str = "lora") -> Delta:
    rng = np.random.default_rng(seed)
    spec = AdapterSpec(rank=rank, alpha=2.0 * rank, mode=mode, seed="ab" * 16 if mode == "fixed_a" else None)
    factors = {}
    for name, (_, d_out, d_in) in SHAPES.items():
        lora_a = rng.standard_normal((3, rank, d_in)).astype(np.float32)
        if mode == "fixed_a":
            lora_a = fixed_factor(spec, name, IDS, d_in)
        lora_b = rng.standard_normal((3, d_out, rank)).astype(np.float32) * np.float32(0.05)
        factors[name] = ExpertFactors(expert_ids=IDS, lora_a=lora_a, lora_b=lora_b)
    return Delta(spec=spec, factors=factors)


def _dense(delta: Delta) -> np.ndarray:
    parts = [f.lora_b.astype(np.float64) @ f.lora_a.astype(np.float64) for _, f in sorted(delta.factors.items())]
    return delta.spec.scale * np.concatenate([part.ravel() for part in parts])


def _arrived(squeezed) -> np.ndarray:
    ids = {0: IDS}
    return _dense(decode(squeezed.payload, encoding="int4", spec=squeezed.spec, expert_ids=ids, shapes=SHAPES))


def test_truncation_is_the_nearest_of_its_rank():
    """Per expert the error is that of the dense truncated SVD (Eckart and Young), at equal scale and any rank."""
    delta = joined(_delta(0), _delta(1))
    for rank in (1, 3, 7, 8, 9):
        cut = truncated(delta, rank)
        assert (cut.spec.rank, cut.spec.scale) == (min(rank, 8), delta.spec.scale)
        for name, each in delta.factors.items():
            dense, near = each.lora_b @ each.lora_a, cut.factors[name].lora_b @ cut.factors[name].lora_a
            singular = np.linalg.svd(dense.astype(np.float64), compute_uv=False)
            error = np.sqrt(((dense - near) ** 2).sum((1, 2)))
            np.testing.assert_allclose(error, np.sqrt((singular[:, rank:] ** 2).sum(1)), atol=1e-4)


def test_columns_go_to_the_experts_that_need_them():
    """The budget is kept, no expert has more columns than the adapter, and no other choice of columns is nearer."""
    delta = _delta(0)
    for name, each in delta.factors.items():
        each.lora_b[...] *= np.array([1, 0, 4], np.float32)[:, None, None]
        assert each.expert_ids == IDS, name
    for mean_rank, max_rank in ((1, 4), (2, 4), (2, 2), (4, 4)):
        sent = shared_out(delta, mean_rank, max_rank)
        columns = {name: (np.abs(each.lora_b).max(1) > 0).sum(1) for name, each in sent.factors.items()}
        sizes = {name: each.lora_a.shape[2] + each.lora_b.shape[1] for name, each in sent.factors.items()}
        assert all(each[1] == 0 and each.max() <= max_rank for each in columns.values())
        assert sent.spec.rank <= max_rank
        spent = sum(int(each.sum()) * sizes[name] for name, each in columns.items())
        assert spent <= mean_rank * 3 * sum(sizes.values())
        uniform = np.linalg.norm(_dense(truncated(delta, mean_rank)) - _dense(delta))
        if max_rank == 4:
            assert np.linalg.norm(_dense(sent) - _dense(delta)) <= uniform + 1e-4
    assert np.abs(_dense(shared_out(delta, 4, 4)) - _dense(delta)).max() < 1e-5


def test_a_step_that_lost_columns_is_as_long():
    """What leaves has the norm of what should have left, no more: the clip holds, and no step is shortened."""
    target = _delta(0)
    squeezed = squeeze(target, max_rank=4, mean_rank=1.5, encoding="fp32", seed=0, feedback=True)
    sent = _dense(decode(squeezed.payload, encoding="fp32", spec=squeezed.spec, expert_ids={0: IDS}, shapes=SHAPES))
    assert np.linalg.norm(sent) == pytest.approx(np.linalg.norm(_dense(target)), rel=1e-5)
    np.testing.assert_allclose(sent + _dense(squeezed.residual), _dense(target), atol=1e-5)
    nothing = truncated(target, 1)
    for each in nothing.factors.values():
        each.lora_b[...] = 0
    empty = squeeze(nothing, max_rank=1, mean_rank=1, encoding="int4", seed=0, feedback=False)
    assert not _arrived(empty).any()


@pytest.mark.parametrize("mode", ["lora", "fixed_a"])
def test_sent_and_residual_make_the_target(mode):
    """What arrives and what is kept add up to what should have left, without truncation to fp32 rounding."""
    target = _delta(0, mode=mode)
    squeezed = squeeze(target, max_rank=4, mean_rank=None, encoding="int4", seed=1, feedback=True)
    assert squeezed.residual.spec.rank == (4 if mode == "fixed_a" else KEPT_RANKS * 4)
    np.testing.assert_allclose(_arrived(squeezed) + _dense(squeezed.residual), _dense(target), atol=1e-5)
    assert np.linalg.norm(_dense(squeezed.residual)) > 0.02 * np.linalg.norm(_dense(target))


@pytest.mark.parametrize("encoding", ["int8", "int4"])
def test_scales_of_a_cost_next_to_nothing(encoding):
    """Every row of A that is made anew peaks at one; the product is what it was, up to the rounding."""
    target, how = _delta(0), {"max_rank": 4, "encoding": encoding, "seed": 0, "feedback": False}

    def found(target, **more):
        made = squeeze(target, **how, **more)
        return decode(made.payload, encoding=encoding, spec=made.spec, expert_ids={0: IDS}, shapes=SHAPES)

    anew = found(target, mean_rank=4.0)
    for each in anew.factors.values():
        assert np.abs(np.abs(each.lora_a).max(axis=2) - 1).max() < 1 / 6
    assert np.linalg.norm(_dense(anew) - _dense(target)) < 0.3 * np.linalg.norm(_dense(target))
    for name, each in found(target, mean_rank=None).factors.items():
        trained = target.factors[name].lora_a
        np.testing.assert_allclose(each.lora_a, trained, atol=np.abs(trained).max() / 6)
    zero = Delta(
        spec=target.spec,
        factors={
            name: ExpertFactors(expert_ids=IDS, lora_a=0 * each.lora_a, lora_b=each.lora_b)
            for name, each in target.factors.items()
        },
    )
    assert not _dense(found(zero, mean_rank=4.0)).any()


@pytest.mark.parametrize(("mode", "rank"), [("lora", None), ("lora", 2), ("fixed_a", 4)])
def test_errors_of_a_base_do_not_add_up(mode, rank):
    """Over eight updates what arrived lacks of what was learnt one update's loss; without feedback far more."""
    learnt, error = np.zeros(1), {}
    for feedback in (True, False):
        arrived, carried, learnt = np.zeros(1), None, np.zeros(1)
        for step in range(8):
            delta = _delta(1, mode=mode)  # the same every time, so that truncation always takes the same
            due = delta if carried is None else joined(delta, carried)
            squeezed = squeeze(due, max_rank=4, mean_rank=rank, encoding="int4", seed=step, feedback=feedback)
            carried, arrived, learnt = squeezed.residual, arrived + _arrived(squeezed), learnt + _dense(delta)
        error[feedback] = np.linalg.norm(arrived - learnt)
    assert error[True] < 0.6 * error[False]


def test_carried_only_within_base_scale_mode_and_experts(tmp_path):
    """A residual of another base, scale, mode, set of experts or of a later update is not added to anything."""
    residuals, delta = Residuals(tmp_path), _delta()
    lost = squeeze(delta, max_rank=4, mean_rank=2, encoding="int4", seed=0, feedback=True).residual
    residuals.keep(5, BASE.digest, lost)
    found = residuals.carried(6, BASE.digest, delta)
    assert all(np.array_equal(found.factors[name].lora_b, each.lora_b) for name, each in lost.factors.items())
    assert residuals.carried(5, BASE.digest, delta) is None
    assert residuals.carried(6, "b" * 64, delta) is None
    assert residuals.carried(6, BASE.digest, _delta(mode="fixed_a")) is None
    louder = Delta(spec=AdapterSpec(rank=4, alpha=9.0), factors=delta.factors)
    assert residuals.carried(6, BASE.digest, louder) is None
    fewer = {
        name: ExpertFactors(expert_ids=(0, 2), lora_a=each.lora_a[:2], lora_b=each.lora_b[:2])
        for name, each in delta.factors.items()
    }
    assert residuals.carried(6, BASE.digest, Delta(spec=delta.spec, factors=fewer)) is None


def test_an_altered_residual_stops_the_update(tmp_path):
    """A file that cannot be read is named with the remedy, not silently left out."""
    residuals, delta = Residuals(tmp_path), _delta()
    residuals.keep(5, BASE.digest, delta)
    path = next(tmp_path.glob("*.residual"))
    path.write_bytes(path.read_bytes()[:-9])
    with pytest.raises(StorageError, match="remove it; what it held is lost"):
        residuals.carried(6, BASE.digest, delta)


def _held(version: int, digest: str) -> SnapshotManifest | None:
    return BASE if (version, digest) == (BASE.version, BASE.digest) else None


def _sidecar(home, outbox, *, feedback: bool = True) -> Sidecar:
    return Sidecar(
        policy=make_policy(max_norm=1e6, updates_per_day=1000, min_interval_s=0.0),
        outgoing=OutgoingConfig(encoding="int4", mean_rank=2, error_feedback=feedback),
        federation="fednested",
        client_id="romeo",
        key_epoch=0,
        signer=Signer.from_seed(b"d" * 32),
        ledger=Ledger(home / "ledger.db"),
        audit=AuditLog(home / "audit", anchor=home / "anchor"),
        outbox=outbox,
        residuals=Residuals(home / "residuals"),
    )


def _payloads(tmp_path, spool, name, *, die_before: int | None = None, feedback: bool = True) -> list[bytes]:
    """Release updates 0 to 3 of one base; the process dies once between the residual and the queue."""
    home = tmp_path / name
    home.mkdir()
    with (
        Outbox(home / "outbox", max_bytes=1 << 24) as outbox,
        closing(_sidecar(home, outbox, feedback=feedback)) as way,
    ):
        for sequence in range(4):
            if sequence == die_before:
                put, outbox.put = outbox.put, lambda **_: (_ for _ in ()).throw(KeyboardInterrupt)
                with pytest.raises(KeyboardInterrupt):
                    way.release(spool, sequence, held=_held, now=1000.0 * sequence)
                outbox.put = put
                way.residuals = Residuals(home / "residuals")
            way.release(spool, sequence, held=_held, now=1000.0 * sequence)
        return [outbox.payload(item) for item in outbox.pending()]


def test_a_restarted_sidecar_makes_the_same_bytes(tmp_path):
    """Killed after the residual was kept and before the update was queued, it makes every update as if it had not."""
    spool = Spool(tmp_path / "spool")
    for sequence in range(4):
        spool.write(
            _delta(sequence),
            sequence=sequence,
            base_version=3,
            base_digest=BASE.digest,
            routed_tokens={0: [100, 100, 100]},
            distinct_tokens={0: [50, 50, 50]},
            num_examples=10,
        )
    whole = _payloads(tmp_path, spool, "whole")
    assert len(set(whole)) == 4
    assert _payloads(tmp_path, spool, "killed", die_before=2) == whole
    without = _payloads(tmp_path, spool, "without", feedback=False)
    assert without[0] == whole[0]
    assert all(one != other for one, other in zip(without[1:], whole[1:], strict=True))
    assert not (tmp_path / "without/residuals").exists()
    assert len(list((tmp_path / "whole/residuals").iterdir())) == 2
