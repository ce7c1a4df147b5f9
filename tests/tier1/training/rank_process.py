"""Ranks of a small training run as processes of their own, so that they can be killed and the rest be watched.

They are forked from one process that has imported torch and nothing else, so that a run takes a second. The rank that a
run is told to kill dies at a failpoint; all others must end by themselves, with an error or a result.
"""

from __future__ import annotations

import hashlib
import json
import os
import resource
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

if TYPE_CHECKING:
    from torch import nn

    from tier1.training.backends import Backend
    from tier1.training.ranks import Ranks

ROOT = Path(__file__).resolve().parents[3]
STUCK_S = 240  # a rank that is not done by then is ended by SIGALRM, which no test expects
ROWS = np.random.default_rng(0).integers(0, 40, size=(96, 17)).astype(np.int32)
# Old rows have no tokens of their own: where distillation alone sees one its gradient begins as rounding, which AdamW
# makes a step of.
OLD = np.random.default_rng(1).integers(0, 40, size=(12, 17)).astype(np.int32)
MODEL = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
    "attention_dropout": 0.1,
    "router_jitter_noise": 0.01,
}
STILL = {"attention_dropout": 0.0, "router_jitter_noise": 0.0}  # no random numbers: n ranks can equal one


@dataclass(frozen=True, kw_only=True)
class Ended:
    """How one rank ended: its exit status (negative: a signal), what it had to say; times on one monotonic clock.

    `deepspeed`: whether its process has imported it, which takes memory also where it is not used.
    """

    status: int
    weights: str = ""
    losses: tuple[float, ...] = ()
    rows: tuple[dict[str, float], ...] = ()
    began_s: float = 0.0
    steps_s: tuple[float, ...] = ()
    ended_s: float = 0.0
    peak_mib: float = 0.0
    deepspeed: bool = False
    error: str = ""
    message: str = ""


class RankRunner:
    """Starts the ranks of one run after another."""

    def __init__(self, scratch: Path, *imported: str):
        self._scratch = scratch
        scratch.mkdir(parents=True, exist_ok=True)
        self._errors = (scratch / "stderr.txt").open("ab")
        self._process = subprocess.Popen(
            [sys.executable, "-m", "tests.tier1.training.rank_process", *imported],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self._errors,
            text=True,
        )

    def run(self, world_size: int, *, kill: dict[int, str] | None = None, **job: object) -> list[Ended]:
        """Train on so many ranks; `kill` maps a rank to the failpoint at which it dies. See `_train` for the rest."""
        from torch.distributed import TCPStore

        store = TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
        order = {"ranks": world_size, "port": store.port, "scratch": str(self._scratch), "kill": kill or {}, "job": job}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        answer = self._process.stdout.readline()
        if not answer:
            raise RuntimeError(f"the runner ended: {(self._scratch / 'stderr.txt').read_text()[-2000:]}")
        found = []
        for rank, status in enumerate(json.loads(answer)):
            said = self._scratch / f"rank-{rank}.json"
            found.append(Ended(status=status, **(json.loads(said.read_text()) if said.exists() else {})))
            said.unlink(missing_ok=True)
        return found

    def __enter__(self) -> RankRunner:
        return self

    def __exit__(self, *_: object) -> None:
        self._process.stdin.close()
        self._process.wait(60)
        self._process.stdout.close()
        self._errors.close()


def _serve() -> None:
    import torch.distributed  # noqa: F401
    import transformers.models.mixtral.modeling_mixtral  # noqa: F401

    import tier1.training.core_update
    import tier1.training.model  # noqa: F401

    if "deepspeed" in sys.argv:
        os.environ["DS_ACCELERATOR"] = "cpu"
        import deepspeed  # noqa: F401
    assert threading.active_count() == 1, "a fork would copy a lock that a thread holds"
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what a rank prints is not an answer
    for line in sys.stdin:
        order = json.loads(line)
        pids = []
        for rank in range(order["ranks"]):
            pid = os.fork()
            if pid == 0:
                _be_rank(rank, order)
            pids.append(pid)
        print(json.dumps([os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]), file=answers, flush=True)
    os._exit(0)  # taking torch down takes seconds


def _be_rank(rank: int, order: dict) -> None:
    from fednested_lib.errors import FednestedError

    signal.alarm(STUCK_S)
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(order["ranks"]), MASTER_ADDR="127.0.0.1")
    os.environ.update(
        MASTER_PORT=str(order["port"]), TORCHELASTIC_USE_AGENT_STORE="True", TORCHELASTIC_RESTART_COUNT="0"
    )
    if str(rank) in order["kill"]:
        os.environ["FEDNESTED_FAILPOINT"] = order["kill"][str(rank)]
    status, said = 1, {"losses": [], "rows": [], "began_s": time.monotonic(), "steps_s": []}
    try:
        said["weights"] = _train(said, **order["job"])
        status = 0
    except FednestedError as error:
        said |= {"error": type(error).__name__, "message": str(error)}
    except BaseException as error:
        said |= {"error": type(error).__name__, "message": repr(error)}
    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
    said |= {"ended_s": time.monotonic(), "deepspeed": "deepspeed" in sys.modules}
    (Path(order["scratch"]) / f"rank-{rank}.json").write_text(json.dumps(said))
    os._exit(status)


def _train(
    said: dict[str, list],
    *,
    steps: int = 12,
    batch_size: int = 8,
    every: int = 4,
    directory: str | None = None,
    still: bool = False,
    router_noise: bool = True,
    aux_loss: float = 0.02,
    poisoned_rank: int | None = None,
    file_limit: int | None = None,
    timeout_s: float = 120.0,
    large: bool = False,
    clip: float = 1.0,
    rate: float = 1e-2,
    expert_rate: float | None = None,
    router_rate: float | None = None,
    decay: float = 0.1,
    engine: dict | None = None,
    micro_batch: int | None = None,
    recompute: bool = False,
    starved_rank: int | None = None,
    n_rows: int | None = None,
    token: int | None = None,
    document_end: int | None = None,
    safeguards: list[str] | None = None,
) -> str:
    """Be one rank of a run and return the digest of its weights.

    Args:
        said: receives losses and times of the steps, and of every fourth what is measured.
        steps: optimiser steps.
        batch_size: rows per step, over all ranks.
        every: steps between checkpoints.
        directory: where they are; None is off.
        still: no dropout and no router noise.
        router_noise: False is none, but dropout.
        aux_loss: coefficient of the balancing loss.
        poisoned_rank: the rank whose model yields NaN from step 6 on.
        file_limit: largest file that rank 0 may write, bytes: a full disk.
        timeout_s: longest wait for another rank.
        large: the demo's model and rows of its length in place of the small ones.
        clip: largest norm of the gradient.
        rate: learning rate.
        expert_rate: of the experts, where it is another.
        router_rate: of the router.
        decay: weight decay.
        engine: settings of DeepSpeed; None is plain torch.
        micro_batch: rows per pass.
        recompute: activation checkpointing.
        starved_rank: the rank that gets no memory from step 6 on.
        n_rows: use so many of the rows.
        token: the last of the last row is this one.
        document_end: token at which rows stop looking back.
        safeguards: names of those that are on; what they protect is learned from the model before the run.
    """
    from tier1.training.checkpoint import Checkpoints
    from tier1.training.model import TINY_MIXTRAL, initial_model
    from tier1.training.ranks import join_ranks
    from tier1.training.settings import TrainSettings
    from tier1.training.step_metrics import StepMetrics
    from tier1.training.trainer import train

    config, rows = MODEL | (STILL if still else {}) | ({} if router_noise else {"router_jitter_noise": 0.0}), ROWS
    if large:
        config, rows = TINY_MIXTRAL, np.random.default_rng(0).integers(0, 1024, size=(256, 97)).astype(np.int32)
    rows = rows[:n_rows].copy()
    if token is not None:
        rows[-1, -1] = token
    with join_ranks(timeout_s) as ranks:
        model = initial_model("mixtral", config, 0)
        settings = TrainSettings(
            steps=steps,
            batch_size=batch_size,
            learning_rate=rate,
            expert_learning_rate=expert_rate,
            router_learning_rate=router_rate,
            weight_decay=decay,
            aux_loss=aux_loss,
            grad_clip=clip,
            micro_batch=micro_batch,
            activation_checkpointing=recompute,
            document_end=document_end,
        )
        backend = _backend(engine)
        if safeguards is not None:
            backend = _safeguarded(backend if engine else None, safeguards, model, ranks)
        checkpoints = Checkpoints(directory=Path(directory), every=every, run={"steps": steps}) if directory else None

        def on_step(step: int, loss: float) -> None:
            said["losses"].append(loss)
            said["steps_s"].append(time.monotonic())
            if step == 5 and ranks.rank == starved_rank:
                model.model.norm.register_forward_hook(lambda module, args, output: output.new_empty(1 << 60))
            if step == 5 and ranks.rank == poisoned_rank:
                model.model.norm.register_forward_hook(lambda module, args, output: output * float("nan"))

        if file_limit and ranks.rank == 0:
            resource.setrlimit(resource.RLIMIT_FSIZE, (file_limit, resource.RLIM_INFINITY))
        train(
            model,
            rows,
            settings,
            family="mixtral",
            backend=backend,
            ranks=ranks,
            checkpoints=checkpoints,
            on_step=on_step,
            metrics=StepMetrics(every=4, write=said["rows"].append),
        )
        # Before the weights are gathered, which an engine that cuts them does not do in training.
        said["peak_mib"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        weights = backend.state_dict()
    digest = hashlib.sha256()
    for name, tensor in sorted(weights.items()):
        digest.update(name.encode() + tensor.numpy().tobytes())
    return digest.hexdigest()


def _backend(engine: dict | None) -> Backend:
    if engine is None:
        from tier1.training.backends import TorchBackend

        return TorchBackend()
    from tier1.training.deepspeed_backend import DeepSpeedBackend
    from tier1.training.deepspeed_config import DeepSpeedSettings

    return DeepSpeedBackend(DeepSpeedSettings(**engine))


def _safeguarded(backend: Backend | None, names: list[str], base: nn.Module, ranks: Ranks) -> Backend:
    from tier1.training.pace import Frequencies
    from tier1.training.safeguarded import safeguarded
    from tier1.training.safeguards import Ewc, Freeze, Memory, Rehearsed, Safeguards, fisher_diagonal

    every = {
        "replay": Rehearsed(weight=0.7, rows=4),
        "distillation": Rehearsed(weight=0.7, rows=4),
        "ewc": Ewc(weight=50.0),
        "freeze": Freeze(share=0.26),
        "frequencies": Frequencies(core=2, router=5, experts=(1, 3, None, 4)),
    }
    chosen = Safeguards(**{name: every[name] for name in names})
    return safeguarded(chosen, Memory(rows=OLD, fisher=fisher_diagonal(base, OLD, ranks)), backend)


if __name__ == "__main__":
    _serve()
