"""One process of a device that may be killed, forked from a server that has imported what both need.

The imports cost seconds, the forks do not: so a hundred real processes can be killed in a minute.
"""

from __future__ import annotations

import logging
import multiprocessing
import os
import signal
from pathlib import Path

import structlog
import torch
import transformers.models.mixtral.modeling_mixtral  # noqa: F401

import fednested_lib.adapters
import fednested_lib.kafka_log
import fednested_lib.sidecar_loop
import fednested_lib.trainer_loop  # noqa: F401  (these three: what the processes would import themselves)
from fednested_lib.config import load_tier2
from fednested_lib.errors import ProcessEnded
from fednested_lib.isolation import die_with
from fednested_lib.processes import run_sidecar, run_trainer


def start(role: str, path: Path, failpoint: str) -> multiprocessing.Process:
    """Start `sidecar` or `trainer` of a device; it kills itself at the failpoint."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__])
    process = context.Process(target=_run, args=(role, path, failpoint), daemon=True)
    process.start()
    return process


def _run(role: str, path: Path, failpoint: str) -> None:
    die_with(os.getppid(), signal.SIGKILL)
    os.environ["FEDNESTED_FAILPOINT"] = failpoint
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.CRITICAL))
    torch.set_num_threads(1)
    try:
        {"sidecar": run_sidecar, "trainer": run_trainer}[role](load_tier2(path))
    except ProcessEnded as ended:  # the process that makes updates anew died at the failpoint
        raise SystemExit(ended.exit_code) from None
