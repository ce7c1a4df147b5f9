"""One local update, on the side of the device that sees data and needs no network.

A `Job` is its complete input. Rows are a window of the device's own packed text, adapters start afresh from B = 0, the
seed is HMAC(secret of the device, client, key epoch, sequence), that of a fixed A the base's: the same job on the same
text gives the same factors to the bit, and nobody else can compute the A that they started from (A − A₀ would tell the
tokens, docs/privacy.md). The result goes to the spool, the numbers (never text) to `trainer/reports/<sequence>.json` in
the device's home.
"""

from __future__ import annotations

import hmac
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import numpy as np
import structlog
from pydantic import BaseModel, ConfigDict, Field

from fednested_lib.blobs import BlobStore, write_durable
from fednested_lib.checkpoint import Checkpoint
from fednested_lib.config import Tier2Config
from fednested_lib.delta import AdapterSpec
from fednested_lib.errors import ContractError, FednestedError, SnapshotError, TrainingError
from fednested_lib.expert_choice import DISTINCT_PER_RANK, choice_path, kept_choice, most_adapted
from fednested_lib.failpoints import failpoint
from fednested_lib.fixed_a import seed_of
from fednested_lib.memory import estimate, require, resident_bytes
from fednested_lib.orders import Model, Sequence
from fednested_lib.partition import expert_param
from fednested_lib.signing import canonical_json, sha256_hex
from fednested_lib.snapshot import SnapshotManifest, build_model, expert_shapes
from fednested_lib.spool import Numbers, Spool
from fednested_lib.text import load_tokenizer, pack, read_texts

if TYPE_CHECKING:
    from torch import nn

    from fednested_lib.adapters import RoutedAdapters

_log = structlog.get_logger(__name__)


class Job(BaseModel):
    """The input of one update, written down before it is trained."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    sequence: Sequence
    seed: Annotated[str, Field(pattern=r"^[0-9a-f]{32}$")]
    model: Model
    first_row: int = Field(ge=0)
    n_rows: int = Field(ge=1)


class Interrupted(Exception):
    """Training was told to stop; the job is still to be done."""


@dataclass(frozen=True, kw_only=True)
class LocalReport:
    """Numbers of one local update; losses in nats per token, held-out ones None without a held-out file."""

    sequence: int
    base_version: int
    loss_first: float
    loss_last: float
    heldout_before: float | None
    heldout_after: float | None
    tokens: int
    rows: int
    seconds: float


def job_seed(config: Tier2Config, secret: str, sequence: int) -> str:
    """Return the seed (32 hex digits) of one update's initial A and order of rows; `secret` is that of the orders."""
    text = f"fednested.update/{config.training.seed}/{config.client_id}/{config.key_epoch}/{sequence}"
    return hmac.digest(bytes.fromhex(secret), text.encode(), "sha256")[:16].hex()


def window(rows: np.ndarray, first_row: int, n_rows: int) -> np.ndarray:
    """Return the next `n_rows` rows from `first_row` on, round the end; each at most once."""
    return rows[(first_row + np.arange(min(n_rows, len(rows)))) % len(rows)]


class LocalTrainer:
    """Trains jobs; keeps the model of the last one.

    Args:
        config: this device.
        blobs: its own blob store, which holds every snapshot that a job names.
        spool: where updates go.
    """

    def __init__(self, config: Tier2Config, blobs: BlobStore, spool: Spool):
        self.config, self.blobs, self.spool = config, blobs, spool
        self.loaded: str | None = None  # the snapshot that was built last and found fit
        self._model: nn.Module | None = None
        self._adapters: RoutedAdapters | None = None
        self._rows: dict[str, np.ndarray] = {}
        self._heldout_before: float | None = None
        self._process_bytes = resident_bytes()  # now: later it holds what an old model left

    def train(self, job: Job, stopped: Callable[[], bool]) -> LocalReport:
        """Train one job and spool the update.

        Args:
            job: what to train.
            stopped: asked after every step.

        Raises:
            Interrupted: `stopped` said so; nothing is spooled.
            DataError: the device has no usable text, or too little.
            SnapshotError: a blob of the snapshot is missing or corrupt.
            TrainingError: the loss is not finite.
        """
        from fednested_lib.router_bias import keep_bias, load_bias
        from fednested_lib.training import train_adapters

        started = time.monotonic()
        how, seed = self.config.training, int(job.seed, 16)
        self._load(job.model)
        self._adapters.reset(seed)
        bias = self._adapters.router_bias
        if bias is not None:
            bias.load(load_bias(self._bias_path, job.model.base_digest, job.sequence))
            before = bias.values()

        def check(step: int, _loss: float) -> None:
            if step == 0:
                _log.info("trainer.first_step", sequence=job.sequence)
            if stopped():
                raise Interrupted

        rows = window(self._rows["data"], job.first_row, job.n_rows)
        checkpoint = Checkpoint(
            self.config.home / "trainer" / "checkpoint",
            training=self._identity(job, rows),
            every=how.checkpoint_every,
        )
        trained = train_adapters(
            self._model,
            self._adapters,
            rows,
            steps=how.steps,
            batch_size=how.batch_size,
            learning_rate=how.learning_rate,
            seed=seed,
            micro_batch_size=how.micro_batch_size,
            on_step=check,
            checkpoint=checkpoint,
        )
        failpoint("trainer.after_training")
        report = LocalReport(
            sequence=job.sequence,
            base_version=job.model.version,
            loss_first=trained.loss_first,
            loss_last=trained.loss_last,
            heldout_before=self._heldout_before,
            heldout_after=self._heldout_loss(),
            tokens=trained.tokens,
            rows=len(rows),
            seconds=round(time.monotonic() - started, 3),
        )
        if bias is not None:  # before the update is spooled: it is never trained again once it is
            keep_bias(self._bias_path, job.model.base_digest, job.sequence, before=before, after=bias.values())
        self._keep(job, report)
        checkpoint.remove()
        return report

    @property
    def _bias_path(self) -> Path:
        return self.config.home / "trainer" / "router_bias.json"

    def _identity(self, job: Job, rows: np.ndarray) -> str:
        """Return the digest of all that the factors of a job are a function of."""
        config = self.config
        how = {name: getattr(config, name).model_dump(mode="json") for name in ("model", "adapters", "training")}
        chosen = {str(layer): list(ids) for layer, ids in self._adapters.expert_ids.items()}
        document = [job.model_dump(mode="json"), how, chosen, sha256_hex(rows.tobytes())]
        return sha256_hex(canonical_json(document))

    def _keep(self, job: Job, report: LocalReport) -> None:
        path = self.config.home / "trainer/reports" / f"{job.sequence:012d}.json"
        write_durable(path, canonical_json(vars(report)))
        self.spool.write(
            self._adapters.to_delta(),
            sequence=job.sequence,
            base_version=job.model.version,
            base_digest=job.model.base_digest,
            routed_tokens=self._adapters.tokens,
            distinct_tokens=self._adapters.distinct_tokens,
            num_examples=report.rows,
            numbers=Numbers(
                loss_first=report.loss_first, loss_last=report.loss_last, tokens=report.tokens, seconds=report.seconds
            ),
        )
        failpoint("trainer.after_spool")
        _log.info("trainer.trained", **vars(report))

    def _load(self, model: Model) -> None:
        """Build the model of a snapshot and see that it is fit: its loss on the device's text is finite."""
        if self.loaded == model.snapshot:
            return
        self.loaded = self._model = self._adapters = None  # let go of the old model before the new one is built
        try:
            self._build(model)
        except SnapshotError:
            raise
        except TrainingError as error:
            raise SnapshotError("non_finite_loss", f"version {model.version} is not fit: {error}") from error
        except Exception as error:  # whatever transformers, tokenizers and torch make of it
            if isinstance(error, FednestedError) and not isinstance(error, ContractError):
                raise
            said = str(error).partition("\n")[0][:200]
            raise SnapshotError(
                "not_loadable",
                f"version {model.version} cannot be built here ({type(error).__name__}: {said}): publish a newer one",
            ) from error
        self.loaded = model.snapshot

    def _build(self, model: Model) -> None:
        from fednested_lib.adapters import attach
        from fednested_lib.training import mean_loss

        manifest = SnapshotManifest.from_json(self.blobs.get(model.snapshot))
        self._require_memory(manifest)
        self._rows = self._pack(manifest)
        self._model = build_model(manifest, self.blobs, experts="fednested_lora", frozen=self.config.model.frozen)
        how = self.config.adapters
        seed = seed_of(model.base_digest) if how.mode == "fixed_a" else None
        spec = AdapterSpec(rank=how.rank, alpha=how.alpha, mode=how.mode, seed=seed)
        self._adapters = attach(self._model, spec, self._experts(manifest), seed=0, router_bias=how.router_bias)
        mean_loss(self._model, self._rows["data"][: self._micro_batch_size], 1)
        self._heldout_before = self._heldout_loss()

    @property
    def _micro_batch_size(self) -> int:
        how = self.config.training
        return min(how.micro_batch_size or how.batch_size, how.batch_size)

    def _require_memory(self, manifest: SnapshotManifest) -> None:
        """Refuse a snapshot that does not fit; where experts are yet to be chosen, count the most."""
        how, limit = self.config.training, self.config.training.memory_limit_mb
        if limit is None:
            return
        micro = self._micro_batch_size
        need = estimate(
            manifest,
            frozen=self.config.model.frozen,
            rank=self.config.adapters.rank,
            n_adapted=most_adapted(self.config.adapters, expert_shapes(manifest)),
            tokens=micro * how.seq_len,
            process_bytes=self._process_bytes,
        )
        require(need, limit, micro_batch_size=micro, frozen=self.config.model.frozen)

    def _experts(self, manifest: SnapshotManifest) -> dict[int, tuple[int, ...]] | None:
        how, shapes = self.config.adapters, expert_shapes(manifest)
        if how.experts == "auto":
            return kept_choice(
                choice_path(self.config.home),
                self._model,
                self._rows["data"],
                how.budget,
                rank=how.rank,
                min_distinct=DISTINCT_PER_RANK * how.rank,
                shapes=shapes,
                base_version=manifest.version,
                now=time.time(),
                period_days=how.period_days,
            ).layers()
        layers = sorted({expert_param(name)[0] for name in shapes})
        return None if how.experts is None else dict.fromkeys(layers, tuple(sorted(set(how.experts))))

    def _pack(self, manifest: SnapshotManifest) -> dict[str, np.ndarray]:
        tokenizer = load_tokenizer(self.blobs.get(manifest.tokenizer))
        paths = {"data": self.config.data, "heldout": self.config.heldout}
        rows = {}
        for name, path in paths.items():
            if path is None:
                continue
            texts, bad = read_texts(path)
            if bad:
                _log.warning("trainer.bad_rows", file=name, count=len(bad), line=bad[0].line, reason=bad[0].reason)
            rows[name] = pack(texts, tokenizer, self.config.training.seq_len, source=path, key="training.seq_len")
        return rows

    def _heldout_loss(self) -> float | None:
        from fednested_lib.training import mean_loss

        if "heldout" not in self._rows:
            return None
        return mean_loss(self._model, self._rows["heldout"], self._micro_batch_size)[0]
