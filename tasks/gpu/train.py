"""Training on several ranks: one function per size, because a size is compiled into the task.

    train_2_cpu      one pod, 2 ranks on CPUs (gloo): a laptop, a test
    train_8_gpu      one pod, 8 GPUs (NCCL)
    train_2x8_gpu    a PyTorchJob of 2 pods, 8 GPUs each

All are `tasks.training.train` on more ranks. A killed rank or pod is retried by Flyte from the newest checkpoint; the
last attempt of an interruptible task runs where nothing interrupts it.
"""

from datetime import timedelta
from functools import partial

from flytekit import Resources, task
from flytekit.extras.accelerators import H100

from images import specs
from tasks.errors import retry_recoverable
from tasks.federation import ConfigFile, opened
from tasks.gpu.elastic import DEADLINE_S, Ranks
from tier1.loops.records import DenseRef, PackedData

ranked = partial(task, container_image=specs.tier1, retries=3, timeout=timedelta(seconds=DEADLINE_S))
CPUS = Resources(cpu="2", mem="8Gi")
GPUS = Resources(cpu="64", mem="512Gi", gpu="8", ephemeral_storage="500Gi")
NCCL = {
    "CUBLAS_WORKSPACE_CONFIG": ":4096:8",  # deterministic sums
    "TORCH_NCCL_ASYNC_ERROR_HANDLING": "1",
    "TORCH_NCCL_HEARTBEAT_TIMEOUT_SEC": "600",  # a rank out of memory would hang the others for hours
}
on_gpus = partial(
    ranked,
    requests=GPUS,
    limits=GPUS,
    shared_memory="64Gi",
    accelerator=H100,
    environment=NCCL,
    interruptible=True,
)


@ranked(task_config=Ranks(nproc_per_node=2), requests=CPUS, limits=CPUS, shared_memory="1Gi")
@retry_recoverable
def train_2_cpu(config: ConfigFile, data: PackedData, run: str) -> DenseRef:
    """Train core and experts from head on 2 CPU ranks and publish the signed dense delta on updates.tier1."""
    return _train(config, data, run)


@on_gpus(task_config=Ranks(nproc_per_node=8))
@retry_recoverable
def train_8_gpu(config: ConfigFile, data: PackedData, run: str) -> DenseRef:
    """Train core and experts from head on 8 GPUs and publish the signed dense delta on updates.tier1."""
    return _train(config, data, run)


@on_gpus(task_config=Ranks(nnodes=2, nproc_per_node=8))
@retry_recoverable
def train_2x8_gpu(config: ConfigFile, data: PackedData, run: str) -> DenseRef:
    """Train core and experts from head on 2 nodes of 8 GPUs and publish the signed dense delta on updates.tier1."""
    return _train(config, data, run)


def _train(config: ConfigFile, data: PackedData, run: str) -> DenseRef:
    from tasks.gpu.checkpoints import FlyteMirror
    from tier1.loops.core_update import train_delta
    from tier1.training.ranks import join_ranks

    with opened(config) as fed, join_ranks(fed.config.core.rank_timeout_s) as ranks:
        return train_delta(fed, data, run, ranks=ranks, mirror=FlyteMirror())
