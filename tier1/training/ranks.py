"""The ranks of one training run: n processes that hold the same weights and share the rows of every batch.

    g = (1/n) · Σ_r g_r      gradient of the global batch, because every rank takes an equal share of its rows

They find each other through torchrun's environment (RANK, WORLD_SIZE, LOCAL_RANK, MASTER_ADDR, MASTER_PORT): gloo
between CPUs, NCCL between GPUs. Sums are taken over buckets of a fixed layout, not in the order in which gradients
happen to be ready, so that a resumed run adds in the order of the uninterrupted one, to the bit.

What only one may do (choose the base, read and write checkpoints, publish) rank 0 does for all, and its error is
everybody's: one line, the same from whichever rank it is read. Importing this module loads no torch.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, TypeVar

from fednested_lib import errors
from fednested_lib.errors import ConfigError, ContractError, FednestedError, TransportError
from fednested_lib.signing import canonical_json

if TYPE_CHECKING:
    from torch import Tensor

BUCKET_ELEMENTS = 1 << 24  # 64 MiB of fp32 at a time: large enough for the network, small beside the gradients
_CONNECTION = ("gloo", "nccl", "connection", "timed out")
T = TypeVar("T")


@dataclass(frozen=True, kw_only=True)
class Ranks:
    """This process among the ranks; alone by default, and then every method does nothing or the obvious.

    Args:
        rank: Number of this process, 0..world_size − 1.
        world_size: Number of processes.
        device: Where this one computes: ``cpu`` or ``cuda:<i>``.
    """

    rank: int = 0
    world_size: int = 1
    device: str = "cpu"

    def share_of(self, batch_size: int) -> slice:
        """Return which rows of a batch are this rank's.

        Raises:
            ConfigError: The rows do not divide among the ranks.
        """
        n = self.world_size
        if batch_size % n:
            below, above = batch_size // n * n, (batch_size // n + 1) * n
            sizes = f"{below} or {above}" if below else f"{above}"
            fitting = ", ".join(str(k) for k in range(1, n) if batch_size % k == 0)
            raise ConfigError(
                f"core.batch_size must be a multiple of the number of ranks, got {batch_size} on {n} ranks: "
                f"set it to {sizes}, or train on {fitting} rank(s)"
            )
        size = batch_size // n
        return slice(self.rank * size, (self.rank + 1) * size)

    def mean_(self, tensors: Sequence[Tensor]) -> None:
        """Replace tensors of one layout by their means over the ranks.

        Raises:
            TransportError: Another rank is gone.
        """
        if self.world_size == 1:
            return
        import torch
        import torch.distributed as dist

        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self.together():
                dist.all_reduce(flat)
            flat /= self.world_size
            for tensor, mean in zip(bucket, flat.split([tensor.numel() for tensor in bucket]), strict=True):
                tensor.copy_(mean.view_as(tensor))

    def first(self, call: Callable[[], T]) -> T:
        """Let rank 0 call; its JSON result, or its error, is everybody's.

        Raises:
            FednestedError: What `call` raised on rank 0.
            TransportError: Another rank is gone.
        """
        if self.world_size == 1:
            return call()
        raised, said = None, None
        if self.rank == 0:
            try:
                said = {"value": call()}
            except FednestedError as error:
                raised = error
                said = {"type": type(error).__name__, "message": str(error), "reason": getattr(error, "reason", "")}
        said = self._tell(said)
        if raised:
            raise raised
        if "type" in said:
            kind = getattr(errors, said["type"], FednestedError)
            of_contract = issubclass(kind, ContractError)
            raise kind(said["reason"], said["message"]) if of_contract else kind(said["message"])
        return said["value"]

    def share(self, tensors: Mapping[str, Tensor] | None) -> dict[str, Tensor]:
        """Give every rank the named CPU tensors that rank 0 has; the others pass None.

        Raises:
            TransportError: Another rank is gone.
        """
        if self.world_size == 1:
            return dict(tensors)
        import torch
        import torch.distributed as dist

        layout = self.first(lambda: {name: [str(t.dtype)[6:], list(t.shape)] for name, t in tensors.items()})
        if self.rank:
            tensors = {name: torch.empty(shape, dtype=getattr(torch, dtype)) for name, (dtype, shape) in layout.items()}
        for name in sorted(tensors):
            with self.together():
                dist.broadcast(tensors[name], src=0)
        return dict(tensors)

    def _tell(self, document: Any) -> Any:
        """Return rank 0's document on every rank, as canonical JSON over the wire."""
        import json

        import torch
        import torch.distributed as dist

        data = torch.frombuffer(bytearray(canonical_json(document)), dtype=torch.uint8)
        size = torch.tensor([len(data)])
        with self.together():
            dist.broadcast(size, src=0)
            data = data if self.rank == 0 else torch.empty(int(size), dtype=torch.uint8)
            dist.broadcast(data, src=0)
        return json.loads(bytes(data.numpy()))

    @contextmanager
    def together(self) -> Iterator[None]:
        """Name what a broken or silent connection between ranks means.

        Raises:
            TransportError: Another rank is gone.
        """
        try:
            yield
        except RuntimeError as error:
            if not _of_connection(error):
                raise
            raise TransportError(
                f"rank {self.rank} of {self.world_size} lost another rank (it was killed, failed, or did not answer "
                "within core.rank_timeout_s): run again under the same name, it goes on from the newest checkpoint"
            ) from error


def _of_connection(error: RuntimeError) -> bool:
    """Return whether ranks did not reach each other; for gloo's errors torch has no class of their own."""
    import torch.distributed as dist

    return isinstance(error, dist.DistError) or any(word in str(error).lower() for word in _CONNECTION)


ALONE = Ranks()


@contextmanager
def join_ranks(timeout_s: float) -> Iterator[Ranks]:
    """Join the ranks that torchrun's environment names, on a GPU each where torch sees GPUs; alone without it.

    Args:
        timeout_s: Longest that a rank waits for another one, seconds.

    Raises:
        ConfigError: This machine has GPUs, but fewer than ranks.
        TransportError: The others were not there in time.
    """
    import torch
    import torch.distributed as dist

    on_gpu = torch.cuda.is_available()
    device = _own_gpu() if on_gpu else "cpu"
    ranks = Ranks(
        rank=int(os.environ.get("RANK", "0")), world_size=int(os.environ.get("WORLD_SIZE", "1")), device=device
    )
    if ranks.world_size == 1:
        yield ranks
        return
    with ranks.together():
        if on_gpu:
            torch.cuda.set_device(device)
        # What ranks say to each other goes over gloo, also on GPUs: NCCL carries the gradients.
        dist.init_process_group("cpu:gloo,cuda:nccl" if on_gpu else "gloo", timeout=timedelta(seconds=timeout_s))
    try:
        yield ranks
    finally:
        dist.destroy_process_group()


def _own_gpu() -> str:
    """Return the GPU of this rank; every rank of a machine with too few refuses, so that none waits for another."""
    import torch

    own, gpus = int(os.environ.get("LOCAL_RANK", "0")), torch.cuda.device_count()
    wanted = max(own + 1, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if wanted > gpus:
        raise ConfigError(
            f"ranks of one machine must be 1..{gpus}, its number of GPUs, got {wanted}: start torchrun with "
            f"--nproc_per_node {gpus}, or with CUDA_VISIBLE_DEVICES empty to train on the CPU"
        )
    return f"cuda:{own}"


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    bucket, size = [], 0
    for tensor in tensors:
        if bucket and size + tensor.numel() > BUCKET_ELEMENTS:
            yield bucket
            bucket, size = [], 0
        bucket.append(tensor)
        size += tensor.numel()
    if bucket:
        yield bucket
