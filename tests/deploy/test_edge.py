"""The systemd units of a device: valid, and as closed as they say."""

from __future__ import annotations

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from fednested_lib.rooms import ROOMS

EDGE = Path(__file__).resolve().parents[2] / "deploy" / "edge"
LARGEST = {"sidecar": 1.5, "trainer": 0.5}  # exposure by systemd 252; 10 is a service without any protection

needs_systemd = pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd-analyze is not installed")


def _unit(role: str) -> str:
    return (EDGE / f"fednested-{role}.service").read_text()


def _values(role: str, key: str) -> set[str]:
    return {word for line in re.findall(rf"^{key}=(.*)$", _unit(role), re.MULTILINE) for word in line.split()}


@needs_systemd
def test_units_are_valid(tmp_path):
    """systemd understands every line of both units."""
    for role in LARGEST:
        text = _unit(role).replace("/opt/fednested/bin/fednested", "/bin/true")
        (tmp_path / f"fednested-{role}.service").write_text(text)
    paths = [str(path) for path in sorted(tmp_path.iterdir())]
    done = subprocess.run(["systemd-analyze", "verify", *paths], capture_output=True, text=True, check=False)
    assert (done.returncode, done.stderr.strip()) == (0, "")


@needs_systemd
@pytest.mark.parametrize("role", sorted(LARGEST))
def test_exposure_is_as_small_as_the_readme_says(role):
    """Nobody opens a unit by accident: systemd's own score of it stays low."""
    command = ["systemd-analyze", "security", "--offline=true", str(EDGE / f"fednested-{role}.service")]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    found = re.search(r"exposure level for \S+: (\d+\.\d+)", done.stdout)
    if found is None:
        pytest.skip(f"this systemd cannot judge a unit that is not loaded: {done.stderr.strip()[:100]}")
    assert float(found[1]) <= LARGEST[role]
    assert f" {found[1]} |" in (EDGE / "README.md").read_text()


def test_units_and_tmpfiles_agree_with_the_rooms():
    """Each directory is writable by its own process alone; the trainer has no network and no key."""
    rows = [line.split() for line in (EDGE / "fednested.tmpfiles.conf").read_text().splitlines() if line[:1] == "d"]
    made = {Path(row[1]).name: row[2:5] for row in rows}
    for name, (writer, shared) in ROOMS.items():
        reader = {"sidecar": "trainer", "trainer": "sidecar"}[writer]
        mode, group = ("0750", reader) if shared else ("0700", writer)
        assert made[name] == [mode, f"fednested-{writer}", f"fednested-{group}"], name
        assert f"/var/lib/fednested/{name}" in _values(writer, "ReadWritePaths")
        assert f"/var/lib/fednested/{name}" not in _values(reader, "ReadWritePaths")
    assert _values("trainer", "PrivateNetwork") == {"yes"}
    assert _values("trainer", "RestrictAddressFamilies") == {"none"}
    assert not _values("trainer", "LoadCredential")
    users = {line.split()[1] for line in (EDGE / "fednested.sysusers.conf").read_text().splitlines() if line[:1] == "u"}
    assert users == {"fednested-sidecar", "fednested-trainer"}
