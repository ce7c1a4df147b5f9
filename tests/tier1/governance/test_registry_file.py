"""What only the file-backed registry can do wrong."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from fednested_lib.errors import GovernanceError
from tier1.governance.registry_file import FileRegistry


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"aliases":{}}'])
def test_a_damaged_file_is_named_with_its_remedy(tmp_path: Path, content: str):
    """A file that is no registry is refused, since deleting it is safe and going on with it is not."""
    path = tmp_path / "registry.json"
    path.write_text(content)
    with pytest.raises(GovernanceError, match=r"registry\.json is not a registry: delete it"):
        FileRegistry(path).versions()


def test_a_damaged_artifact_counts_as_missing(tmp_path: Path, made):
    """A changed byte in a stored snapshot makes the artifact unusable, not believable."""
    registry = FileRegistry(tmp_path / "registry.json")
    entry = registry.register(made(1))
    for blob in (tmp_path / "registry").rglob("*"):
        if blob.is_file() and blob.read_bytes() == made(1).snapshot:
            blob.write_bytes(b"x" + made(1).snapshot[1:])
    assert registry.artifacts(entry) == {"manifest.json": made(1).manifest}


def test_a_repair_that_was_killed_is_finished_by_the_next(tmp_path: Path, made):
    """A process killed between two registrations leaves a registry that the next repair completes; nothing twice."""
    path = tmp_path / "registry.json"
    script = (
        "from tier1.governance.ports import ModelVersion, RegistryState\n"
        "from tier1.governance.registry_file import FileRegistry\n"
        "def load(n):\n"
        "    return ModelVersion(version=n, manifest=b'%d' % n, snapshot=b's', weights_digest='w', chain_head='h')\n"
        "manifests = {n: load(n).manifest_digest for n in range(3)}\n"
        "state = RegistryState(candidate=2, champion=0, manifests=manifests, entries=['h'], load=load)\n"
        f"print(len(FileRegistry({str(path)!r}).repair(state)))\n"
    )
    environment = {**os.environ, "FEDNESTED_FAILPOINT": "registry.after_register:2"}
    killed = subprocess.run([sys.executable, "-c", script], env=environment, check=False)
    assert killed.returncode == -9
    assert len(FileRegistry(path).versions()) == 2
    finished = subprocess.run([sys.executable, "-c", script], check=False, capture_output=True)
    assert finished.returncode == 0
    assert [entry.tags["version"] for entry in FileRegistry(path).versions()] == ["0", "1", "2"]
    assert FileRegistry(path).get("champion").tags["version"] == "0"


def test_two_processes_do_not_lose_each_others_entries(tmp_path: Path):
    """Changes of several processes follow one another."""
    path = tmp_path / "registry.json"
    script = (
        "import sys\n"
        "from tier1.governance.ports import ModelVersion\n"
        "from tier1.governance.registry_file import FileRegistry\n"
        "for n in range(10):\n"
        "    name = f'{sys.argv[1]}-{n}'.encode()\n"
        "    version = ModelVersion(version=n, manifest=name, snapshot=name, weights_digest='w', chain_head='h')\n"
        f"    FileRegistry({str(path)!r}).register(version)\n"
    )
    processes = [subprocess.Popen([sys.executable, "-c", script, str(writer)]) for writer in range(3)]
    assert [process.wait() for process in processes] == [0, 0, 0]
    entries = FileRegistry(path).versions()
    assert [entry.number for entry in entries] == [str(number) for number in range(1, 31)]
    assert len({entry.manifest_digest for entry in entries}) == 30
