"""What a user sees for each row of "what bad input gets": one line with value, bound and remedy, and an exit code."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import structlog
import yaml

from fednested_lib import cli
from fednested_lib.blobs import BlobStore
from fednested_lib.delta import encode
from fednested_lib.errors import StorageError
from fednested_lib.signing import Signer
from services.embedded import EmbeddedBroker
from tests.federation import Device, device_key, make_federation, make_workspace, random_delta, write_text
from tests.policies import pin_policy
from tier1.federation import open_federation
from tier1.loops.aggregate_experts import fold_updates, take_updates
from tier1.loops.core_update import authorise_training, fold_dense, pack_datasets, train_delta
from tier1.loops.evaluate_and_promote import decide, settle_candidate

ROOT = Path(__file__).resolve().parents[2]


def fednested(capsys, monkeypatch, *arguments):
    """Run the command in this process; return (exit code, standard error)."""
    monkeypatch.setattr(sys, "argv", ["fednested", *map(str, arguments)])
    try:
        with pytest.raises(SystemExit) as exit_info:
            cli.main()
    finally:
        structlog.reset_defaults()  # the command logs to a standard error that ends with this test
    return exit_info.value.code, capsys.readouterr().err


def one_line(error: str) -> str:
    lines = [line for line in error.splitlines() if line.startswith("fednested: ")]
    assert len(lines) == 1, error
    assert "Traceback" not in error
    return lines[0]


def tier2(directory: Path, bootstrap="127.0.0.1:1", text=None, **changes) -> Path:
    """Write a device's configuration and data."""
    directory.mkdir(parents=True, exist_ok=True)
    if text is None:
        write_text(directory / "text.jsonl", 50, 3)
    elif text is not False:
        (directory / "text.jsonl").write_bytes(text)
    device_key("ann").save(directory / "device.key")
    document = {
        "client_id": "ann",
        "key": "device.key",
        "home": "home",
        "data": "text.jsonl",
        "blobs_uri": "blobs",
        "payloads_uri": "payloads",
        "log": {"bootstrap": bootstrap, "timeout_s": 3},
        "control": {"public_key": Signer.from_seed(b"1" * 32).public_key},
        "policy": pin_policy(directory),
        **changes,
    }
    path = directory / "tier2.yaml"
    path.write_text(yaml.safe_dump(document))
    return path


def test_an_unknown_key_is_named_with_its_file_and_the_known_ones(tmp_path, capsys, monkeypatch):
    """A misspelt key at the top of tier2.yaml ends in one line with the key, the file and the keys there are."""
    path = tier2(tmp_path, rounds=3)
    code, error = fednested(capsys, monkeypatch, "tier2", "run-client", "--config", path)
    line = one_line(error)
    assert code == 2
    assert "unknown key rounds" in line
    assert "client_id" in line
    assert str(path) in line


def test_an_unknown_key_in_a_section_names_the_section(tmp_path, capsys, monkeypatch):
    """A misspelt key inside a section of tier1.yaml is named with its section and the right spelling."""
    config = make_workspace(tmp_path, evaluation={"maxregression": 1})
    code, error = fednested(capsys, monkeypatch, "tier1", "status", "--config", config)
    assert code == 2
    assert "unknown key evaluation.maxregression" in one_line(error)
    assert "max_regression" in one_line(error)


def test_a_value_out_of_bounds_names_key_value_and_bound(tmp_path, capsys, monkeypatch):
    """A rank of 0 ends in one line with the key, the value and the bound."""
    path = tier2(tmp_path, adapters={"rank": 0})
    code, error = fednested(capsys, monkeypatch, "tier2", "run-client", "--config", path)
    assert code == 2
    assert "adapters.rank = 0" in one_line(error)
    assert "greater than or equal to 1" in one_line(error)


def test_a_missing_config_names_the_command_that_writes_one(tmp_path, capsys, monkeypatch):
    """A config file that does not exist ends in one line with the command that writes one."""
    code, error = fednested(capsys, monkeypatch, "tier2", "run-client", "--config", tmp_path / "none.yaml")
    assert code == 2
    assert "fednested init-config tier2" in one_line(error)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        (False, "text.jsonl"),
        (b"", "empty"),
        (b"\xff\xfe\x00\x00\n\xff\n", "UTF-8"),
        (b'{"text": ""}\n', "usable"),
    ],
    ids=["missing", "empty", "not UTF-8", "no text in it"],
)
def test_a_device_without_usable_text_stops_at_once(tmp_path, capsys, monkeypatch, text, says):
    """Text that is missing, empty, not UTF-8 or without a usable row ends the device with one line that says which."""
    path = tier2(tmp_path, text=text)
    code, error = fednested(capsys, monkeypatch, "tier2", "run-client", "--config", path)
    assert code == 3
    assert says in one_line(error)


def test_an_unreachable_broker_is_named_within_seconds(tmp_path, capsys, monkeypatch):
    """A broker that does not answer ends the device with one line that has its address."""
    code, error = fednested(capsys, monkeypatch, "tier2", "run-client", "--config", tier2(tmp_path))
    assert code == 5
    assert "127.0.0.1:1" in one_line(error)


@pytest.mark.parametrize(("text", "says"), [(b"", "empty"), (b"\xff\xff\n", "UTF-8")], ids=["empty", "not UTF-8"])
def test_tier1_text_that_cannot_be_used_is_one_line(tmp_path, text, says):
    """The line that a person sees through `pyflyte run` (tested below for one case), at the step that raises it."""
    from fednested_lib.errors import DataError

    fed = make_federation(tmp_path)
    (tmp_path / "data/train.jsonl").write_bytes(text)
    with pytest.raises(DataError, match=says):
        pack_datasets(fed, authorise_training(fed, "r1"))
    assert not fed.chain.exists()


@pytest.fixture
def fed(tmp_path):
    fed = make_federation(tmp_path)
    settled = settle_candidate(
        fed, fold_dense(fed, train_delta(fed, pack_datasets(fed, authorise_training(fed, "r")), "r"))
    )
    decide(fed, settled, "approve", "console")
    return fed


def refused(fed) -> list[str]:
    """Fold what is in the log and return the reasons of what was refused."""
    settle_candidate(fed, fold_updates(fed, take_updates(fed)))
    body = fed.chain.entries()[-1].entry.body
    return [row.reason for row in body.candidate.refused]


def test_bad_updates_go_to_quarantine_and_the_rest_is_folded(fed):
    """Unknown base, foreign digest, unsigned, altered, NaN: each refused with its reason; the good ones are folded."""
    Device(fed, "ann").send()
    bob = Device(fed, "bob")
    bob.send(base_version=99)
    bob.send(base_digest="0" * 64)
    unsigned = bob.send().model_copy(update={"signature": "0" * 128})
    bob.append(unsigned.model_copy(update={"sequence": 7}).to_bytes(), b"")
    bob.append(unsigned.to_bytes(), b"")
    bob.append(b"not an envelope", b"")
    mallory = random_delta(fed.chain.state().head.snapshot, seed=1, size=0.1, rank=2)
    next(iter(mallory.factors.values())).lora_a[0, 0, 0] = np.nan
    payload = _encode_unchecked(mallory)
    from fednested_lib.signing import sha256_hex

    cyd = Device(fed, "cyd")
    envelope = cyd.send(
        encoding="fp32", payload_sha256=sha256_hex(payload), payload_bytes=len(payload), payload_uri=None
    )
    cyd.append(envelope.to_bytes(), payload)
    reasons = refused(fed)
    body = fed.chain.entries()[-1].entry.body
    assert len(body.candidate.accepted) == 2
    assert {
        "unknown_base",
        "base_digest_mismatch",
        "bad_update_id",
        "bad_signature",
        "bad_envelope",
        "non_finite",
    } <= set(reasons)
    _, high = fed.log.watermarks("updates.experts.quarantine")[0]
    assert high == len(reasons)


def _encode_unchecked(delta) -> bytes:
    """Encode as a hostile device would, past our own encoder's check for NaN."""
    import cramjam
    from safetensors.numpy import save

    tensors = {}
    for name, factors in delta.factors.items():
        tensors[f"{name}.lora_a"], tensors[f"{name}.lora_b"] = factors.lora_a, factors.lora_b
    return bytes(cramjam.zstd.compress(save(tensors), level=3))


def test_our_own_encoder_lets_no_nan_out(fed):
    """A device's own delta that is not finite is refused before it is sent, with the remedy."""
    from fednested_lib.errors import PayloadError

    delta = random_delta(fed.chain.state().head.snapshot, seed=1, size=0.1, rank=2)
    next(iter(delta.factors.values())).lora_b[0, 0, 0] = np.inf
    with pytest.raises(PayloadError, match="not sent; lower the learning rate"):
        encode(delta, seed=1)


def test_a_corrupt_blob_is_named_by_verify_and_stops_a_broadcast(fed, capsys, monkeypatch):
    """A blob whose bytes changed is named by `verify` and stops a broadcast."""
    from fednested_lib.errors import SnapshotError
    from tier1.loops.broadcast import publish_champion

    digest = next(iter(fed.chain.state().head.blobs.values()))
    path = Path(fed.blobs.location(digest))
    data = bytearray(path.read_bytes())
    data[-1] ^= 1
    path.write_bytes(data)
    with pytest.raises(SnapshotError, match=digest):
        publish_champion(fed)
    code, error = fednested(capsys, monkeypatch, "tier1", "verify", "--config", fed.home.parent / "tier1.yaml")
    assert code == 8
    assert digest in one_line(error)


def test_a_nan_in_training_stops_and_publishes_nothing(tmp_path):
    """A model whose loss is not finite: the run stops with the step and the remedy, no delta is published."""
    from fednested_lib.errors import TrainingError
    from tests.federation import SMALL_MODEL

    fed = make_federation(tmp_path, model={"config": {**SMALL_MODEL, "initializer_range": 1e30}})
    data = pack_datasets(fed, authorise_training(fed, "r"))
    with pytest.raises(TrainingError, match="step 1"):
        train_delta(fed, data, "r")
    assert fed.log.watermarks("updates.tier1")[0] == (0, 0)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small file system needs root")
def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path):
    """A blob store on a file system of 64 KiB: the write that does not fit is refused, what was there stays whole."""
    small = tmp_path / "small"
    small.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=64k", "tmpfs", small], capture_output=True, check=False
    )
    if mounted.returncode != 0:
        pytest.skip("this sandbox does not allow mounts")
    try:
        store = BlobStore(small / "blobs")
        kept = store.put(b"k" * 1000)
        with pytest.raises(StorageError, match="disk full: cannot write 100000 bytes"):
            store.put(b"x" * 100_000)
        assert store.get(kept) == b"k" * 1000
        assert not list(small.rglob("*.tmp"))
    finally:
        subprocess.run(["umount", small], check=True)


def command(*arguments) -> subprocess.CompletedProcess:
    """Run `fednested` as a user does, without a terminal."""
    return subprocess.run(
        [Path(sys.executable).with_name("fednested"), *map(str, arguments)],
        capture_output=True,
        stdin=subprocess.DEVNULL,
        text=True,
        check=False,
        cwd=ROOT,
    )


def only_line(done: subprocess.CompletedProcess) -> str:
    """Return the only line of a failed command's standard error and output."""
    (line,) = (done.stdout + done.stderr).splitlines()
    assert "Traceback" not in line
    assert not set(line) & set("╭│╰❱")
    return line.removeprefix("fednested: ")


def test_pyflyte_run_ends_with_our_line(tmp_path):
    """A user error inside a workflow is the one line that is printed, with its own exit code, and is not retried."""
    with EmbeddedBroker(tmp_path / "broker") as broker:
        config = make_workspace(tmp_path, bootstrap=broker.bootstrap)
        (tmp_path / "data/train.jsonl").write_bytes(b"")
        done = command("tier1", "core-update", "--config", config)
    assert done.returncode == 3
    name, line = done.stderr.splitlines()
    assert name.startswith("run local-")
    assert "train.jsonl is empty" in line
    assert not done.stdout
    assert not open_federation(config).chain.exists()


def test_a_dead_broker_inside_a_workflow_is_one_line(tmp_path):
    """A recoverable error keeps class and message as well: address, bound and remedy, and the code of a dead server."""
    config = make_workspace(tmp_path, bootstrap="127.0.0.1:1", log={"timeout_s": 2})
    done = command("tier1", "aggregate-experts", "--config", config)
    assert done.returncode == 5
    line = only_line(done)
    assert "127.0.0.1:1 did not answer within 2 s" in line
    assert "start the broker" in line


def test_a_killed_run_goes_on_under_its_name(tmp_path, monkeypatch):
    """`--run NAME` folds what a run that died had trained, without training again, and prints the candidate alone."""
    config = make_workspace(tmp_path)
    monkeypatch.setenv("FEDNESTED_FAILPOINT", "core.after_training")
    died = command("tier1", "core-update", "--config", config, "--run", "night")
    assert died.returncode == 1
    assert "step 6/6" in died.stderr
    monkeypatch.delenv("FEDNESTED_FAILPOINT")
    done = command("tier1", "core-update", "--config", config, "--run", "night")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CandidateRef(digest='")
    assert len(done.stdout.splitlines()) == 1
    assert "step" not in done.stderr


def test_a_killed_run_that_was_given_no_name_says_how_to_go_on(tmp_path, monkeypatch):
    """Without `--run` the first line has the name under which the run trains, and goes on: nothing else tells it."""
    config = make_workspace(tmp_path)
    monkeypatch.setenv("FEDNESTED_FAILPOINT", "core.after_training")
    died = command("tier1", "core-update", "--config", config)
    assert died.returncode == 1
    name = re.fullmatch(
        r"run (local-\S+): should it end early, give --run \1 to go on where it was", died.stderr.splitlines()[0]
    )[1]
    monkeypatch.delenv("FEDNESTED_FAILPOINT")
    done = command("tier1", "core-update", "--config", config, "--run", name)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("CandidateRef(digest='")
    assert "step" not in done.stderr, "it was trained already"


def test_a_decision_is_about_the_candidate_that_was_settled(fed, tmp_path):
    """An approval for a candidate that the gate then rejects approves no older version that waits."""
    config = tmp_path / "tier1.yaml"
    document = yaml.safe_load(config.read_text())
    document["evaluation"]["max_regression"] = 0.0
    document["core"]["learning_rate"] = 1.0
    config.write_text(yaml.safe_dump(document))
    strict = open_federation(config)
    # `fed` has approved version 1; version 2 waits, and the candidate after it makes every loss worse.
    Device(fed, "ann").send()
    assert settle_candidate(fed, fold_updates(fed, take_updates(fed))).version == 2
    fold_dense(strict, train_delta(strict, pack_datasets(strict, authorise_training(strict, "bad")), "bad"))
    done = command("tier1", "promote", "--config", config, "--decision", "approve")
    assert done.returncode == 0, done.stderr
    assert "verdict='gate_rejected'" in done.stdout
    assert open_federation(config).chain.state().champion.version == 1
