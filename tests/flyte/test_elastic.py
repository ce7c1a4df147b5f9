"""The tasks on several ranks: what they compile to, that they really run on two, and how they end and go on."""

from __future__ import annotations

import json
import re
import signal
from collections import OrderedDict
from functools import partial
from pathlib import Path

import pytest
from flytekit.configuration import Image, ImageConfig, SerializationSettings
from flytekit.core.checkpointer import SyncCheckpoint
from flytekit.core.context_manager import FlyteContextManager
from flytekit.exceptions.user import FlyteRecoverableException, FlyteUserRuntimeException
from flytekit.tools.translator import get_serializable
from flytekit.types.file import FlyteFile
from torch.distributed.elastic.multiprocessing.errors import ChildFailedError, ProcessFailure

from fednested_lib.errors import EnvelopeError, FednestedError, StorageError, TransportError
from services.embedded import EmbeddedBroker
from tasks.gpu.checkpoints import FlyteMirror
from tasks.gpu.elastic import _told
from tasks.gpu.train import train_2_cpu, train_2x8_gpu, train_8_gpu
from tests.federation import make_workspace
from tier1.training.checkpoint import SLOTS
from tier1.training.core_update import _HOW
from workflows.core_update import core_update
from workflows.core_update_elastic import core_update_2_cpu


def compiled(shell):
    image = Image(name="default", fqn="localhost:30000/fednested-tier1", tag="test")
    settings = SerializationSettings(image_config=ImageConfig(default_image=image, images=[image]), version="v")
    return get_serializable(OrderedDict(), settings, shell).template


def test_one_node_is_a_pod_and_two_are_a_pytorch_job():
    """Guards the compiled sizes: what the training operator is asked for, and that Flyte, not elastic, retries."""
    assert [compiled(shell).type for shell in (train_2_cpu, train_8_gpu)] == ["python-task", "python-task"]
    job = compiled(train_2x8_gpu)
    assert job.type == "pytorch"
    assert job.custom["workerReplicas"] == {"replicas": 2}
    elastic = job.custom["elasticConfig"]
    assert (elastic["nprocPerNode"], elastic["minReplicas"], elastic["maxReplicas"]) == (8, 2, 2)
    assert "maxRestarts" not in elastic
    assert job.custom["runPolicy"]["cleanPodPolicy"] == "CLEANPOD_POLICY_ALL"


@pytest.mark.parametrize("shell", [train_8_gpu, train_2x8_gpu])
def test_a_gpu_size_asks_for_what_it_needs(shell):
    """Guards resources, shared memory (NCCL's), accelerator, interruption, and retries that outlast one."""
    template = compiled(shell)
    assert template.extended_resources.gpu_accelerator.device == "nvidia-h100"
    assert template.extended_resources.shared_memory.size_limit == "64Gi"
    assert {each.name: each.value for each in template.container.resources.requests}[2] == "8"
    assert template.container.resources.requests == template.container.resources.limits
    assert template.metadata.interruptible
    assert template.metadata.retries.retries == 3
    assert template.metadata.timeout.total_seconds() == 24 * 3600
    assert template.container.env["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"


def test_the_cpu_size_is_bounded_as_well():
    """Guards the neighbours on its node: a rank that grows is ended and said so, not they."""
    resources = compiled(train_2_cpu).container.resources
    assert resources.requests == resources.limits != []


@pytest.mark.slow
def test_two_ranks_go_on_where_one_was_interrupted_and_fold_a_candidate(tmp_path, monkeypatch, capfd):
    """Guards the local run: two processes really train, from the newest checkpoint under the run's name."""
    with EmbeddedBroker(tmp_path / "broker") as broker:
        core = {"steps": 6, "batch_size": 4, "seq_len": 16, "learning_rate": 1e-3, "threads": 1, "checkpoint_every": 2}
        config = FlyteFile(str(make_workspace(tmp_path / "federation", bootstrap=broker.bootstrap, core=core)))
        monkeypatch.setattr("tier1.training.trainer.failpoint", interrupt_at("core.after_step", 5))
        with pytest.raises(KeyboardInterrupt):
            core_update(config=config, run="night")
        capfd.readouterr()
        candidate = core_update_2_cpu(config=config, run="night")
    assert (candidate.n_accepted, candidate.parent_version) == (1, 0)
    told = "".join(capfd.readouterr())  # by two processes at once: a line of one may go on in the other's
    assert (told.count("core.resumed"), sorted(re.findall(r"rank=(\d) +step=4", told))) == (2, ["0", "1"])
    assert not list((tmp_path / "federation/home/dense").glob("*.checkpoints")), "published: nothing to go on from"


def interrupt_at(name: str, nth: int):
    """Return a failpoint that interrupts this process, which must not die of SIGKILL."""
    passed: list[str] = []

    def failpoint(point: str) -> None:
        passed.append(point)
        if passed.count(name) == nth:
            raise KeyboardInterrupt

    return failpoint


def failed(tmp_path: Path, exitcode: int, message: str = "") -> ProcessFailure:
    error_file = tmp_path / "error.json"
    if message:
        error_file.write_text(json.dumps({"message": {"message": message, "extraInfo": {"timestamp": "0"}}}))
    return ProcessFailure(local_rank=1, pid=1, exitcode=exitcode, error_file=str(error_file))


def test_the_failed_rank_speaks_for_the_run(tmp_path):
    """Guards class and text of the one error: a signal passes, a user's error keeps its class, a bug too."""
    told = partial(_told, run="night")
    assert type(told(1, failed(tmp_path, -signal.SIGKILL), False)) is TransportError
    lost = told(1, failed(tmp_path, 1, "Recoverable: rank 1 of 2 lost another rank"), True)
    assert (type(lost), str(lost)) == (TransportError, "rank 1 of 2 lost another rank")
    full = told(1, failed(tmp_path, 1, "StorageError: cannot write: free space"), False)
    assert (type(full), str(full)) == (StorageError, "cannot write: free space")
    forged = told(1, failed(tmp_path, 1, "EnvelopeError: unsigned"), False)
    assert (type(forged), forged.reason) == (EnvelopeError, "rank_failed")
    bug = told(1, failed(tmp_path, 1, "KeyError: 'x'"), False)
    assert (type(bug), str(bug)) == (FednestedError, "rank 1 failed: KeyError: 'x'")


def test_what_a_killed_rank_is_told_to_change_leaves_the_run_what_it_is(tmp_path):
    """Guards the progress: the line names the run and keys of how it trains; another batch would be another run's."""
    line = str(_told(1, failed(tmp_path, -signal.SIGKILL), False, run="night"))
    assert "under the same name (night)," in line
    named = set(re.findall(r"core\.(\w+)", line))
    assert named == {"micro_batch", "activation_checkpointing"}
    assert named <= _HOW


def test_an_error_that_no_rank_caused_stays_what_it_is(tmp_path, monkeypatch):
    """Guards against an AttributeError in place of the reason: flytekit's own failures have no rank to name."""
    told = ValueError("no such start method")
    ended = ChildFailedError("train", {1: failed(tmp_path, -signal.SIGKILL)})

    def execute(*_: object, **__: object) -> None:
        if raised is ended:
            try:
                raise ended
            except ChildFailedError as error:
                raise FlyteUserRuntimeException(KeyError("between")) from error
        raise FlyteUserRuntimeException(raised)

    monkeypatch.setattr("tasks.gpu.elastic.PytorchElasticFunctionTask.execute", execute)
    raised = told
    with pytest.raises(FlyteUserRuntimeException, match="no such start method"):
        train_2_cpu.execute()
    raised = ended
    with pytest.raises(FlyteRecoverableException, match=r"rank 1 was ended by SIGKILL .* same name \(night\),"):
        train_2_cpu.execute(run="night")


@pytest.fixture
def attempt(monkeypatch, tmp_path):
    """Return a function that makes this the nth attempt, with its predecessor's checkpoints, as propeller does."""

    def begin(number: int) -> Path:
        before = str(tmp_path / f"remote-{number - 1}") if number else None
        checkpoint = SyncCheckpoint(checkpoint_dest=str(tmp_path / f"remote-{number}"), checkpoint_src=before)
        parameters = FlyteContextManager.current_context().user_space_params
        monkeypatch.setattr(parameters, "_checkpoint", checkpoint)
        directory = tmp_path / f"pod-{number}"
        directory.mkdir()
        FlyteMirror().restore(directory)
        return directory

    return begin


def test_flyte_carries_checkpoints_past_an_attempt_that_saved_none(attempt):
    """Guards what flytekit leaves open: an attempt sees its predecessor's directory alone, even an empty one."""
    first = attempt(0)
    assert not list(first.iterdir())
    for round_, name in enumerate((*SLOTS, SLOTS[0])):
        (first / name).write_bytes(bytes([round_]))
        FlyteMirror().save(first / name)
    attempt(1)  # restored, died before a checkpoint of its own
    third = attempt(2)
    assert {path.name: path.read_bytes() for path in third.iterdir()} == {SLOTS[0]: b"\x02", SLOTS[1]: b"\x01"}


def test_an_attempt_after_one_that_saved_nothing_begins_anew(attempt):
    """Guards the first minutes of a run: a predecessor without any checkpoint is no error."""
    attempt(0)
    assert not list(attempt(1).iterdir())


def test_a_store_that_refuses_does_not_end_the_training(attempt, monkeypatch, tmp_path):
    """Guards that a lost copy is a warning: the checkpoint itself is on disk."""
    directory = attempt(0)
    (directory / SLOTS[0]).write_bytes(b"1")
    (tmp_path / "remote-0").write_text("a file where the store's directory should be")
    FlyteMirror().save(directory / SLOTS[0])
