"""`fednested tier2 doctor` names what is wrong with a device, with the remedy, and changes nothing."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.x509.oid import NameOID

from fednested_lib import cli, doctor
from fednested_lib.finding import Finding
from fednested_lib.log import InMemoryLog
from fednested_lib.outbox import Outbox
from fednested_lib.schedule import Readings
from fednested_lib.transport import open_transport

KEY = "ab" * 32


class Device:
    """The directory that `init-config tier2` writes, and what the doctor says about it."""

    def __init__(self, root: Path):
        self.root, self.config = root, root / "tier2.yaml"
        cli._init_tier2(root, "device-1")
        self.replace('public_key: ""', f'public_key: "{KEY}"')
        (root / "text.jsonl").write_text('{"text": "to be or not to be"}\n')
        (root / "site-policy.key").unlink()

    def replace(self, old: str, new: str) -> None:
        text = self.config.read_text()
        assert old in text
        self.config.write_text(text.replace(old, new))

    def findings(self) -> dict[str, Finding]:
        return {each.what: each for each in doctor.examine(self.config)}


@pytest.fixture
def device(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Device:
    log = InMemoryLog()
    log.create_topics({"control.federation_rounds": 1})
    monkeypatch.setattr(doctor, "open_transport", lambda config: open_transport(config, log=log))
    return Device(tmp_path)


def _files(root: Path) -> dict[str, bytes]:
    return {str(path): path.read_bytes() for path in sorted(root.rglob("*")) if path.is_file()}


def test_fresh_device_is_healthy_and_untouched(device: Device) -> None:
    """What two commands of a newcomer make has nothing bad, and looking at it writes nothing."""
    before = _files(device.root)
    found = device.findings()
    assert {name: str(each) for name, each in found.items() if each.state == "bad"} == {}
    assert {"key", "text", "policy", "disk", "memory", "outbox", "isolation", "schedule", "tier 1"} <= set(found)
    assert _files(device.root) == before


def _loosen(device: Device) -> None:
    path = device.root / "policy.yaml"
    path.write_text(path.read_text().replace("max_norm: 50", "max_norm: 5000"))


def _fill(device: Device) -> None:
    device.replace("outgoing: {", "outgoing: {outbox_bytes: 1000000000000000, ")


BROKEN: dict[str, tuple[Callable[[Device], object], str]] = {
    "configuration": (lambda device: device.config.unlink(), "does not exist"),
    "key": (lambda device: (device.root / "device.key").chmod(0o644), "chmod 600"),
    "text": (lambda device: (device.root / "text.jsonl").unlink(), "text.jsonl"),
    "policy": (_loosen, "sig"),
    "disk": (_fill, "outgoing.outbox_bytes"),
    "isolation": (lambda device: device.replace("key: device", "isolation: {require: users}\nkey: device"), "root"),
}


@pytest.mark.parametrize("what", BROKEN)
def test_each_fault_is_named_alone(device: Device, what: str) -> None:
    """One broken part is one bad finding with a remedy, and the rest is still looked at."""
    spoil, remedy = BROKEN[what]
    spoil(device)
    bad = {name: str(each) for name, each in device.findings().items() if each.state == "bad"}
    assert list(bad) == [what]
    assert remedy in bad[what]


def test_adapter_that_the_policy_does_not_list(device: Device) -> None:
    """A device whose every update would be refused is told before it trains one."""
    device.replace("rank: 8", "rank: 5")
    assert "rank 5" in str(device.findings()["policy"])


def test_dead_updates_are_shown(device: Device) -> None:
    """What was refused for good is a warning with its reason, read while the sidecar holds the outbox."""
    with Outbox(device.root / "device-home" / "outbox", max_bytes=1 << 20) as box:
        box.put(0, "a" * 64, "updates", b"key", b"payload", b"envelope")
        box.mark_dead("a" * 64, "gateway: unknown client")
        found = device.findings()
    assert found["outbox"].state == "ok"
    assert "unknown client" in str(found["refused for good"])


def test_policy_key_left_behind_is_a_warning(device: Device) -> None:
    """The key that could loosen the policy does not belong on the device."""
    (device.root / "site-policy.key").write_text("0" * 64)
    assert device.findings()["site's policy key"].state == "warning"


def test_bound_without_a_sensor_is_bad(device: Device, monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that would never train, because nothing can be read that its bound needs, is told so."""
    nothing = Readings(on_mains=None, battery_percent=None, temperature_c=None, load_per_core=None)
    monkeypatch.setattr(doctor, "read_device", lambda: nothing)
    device.replace("key: device.key", "schedule: {max_temperature_c: 60}\nkey: device.key")
    assert "never train" in str(device.findings()["schedule"])


def test_dead_broker_is_named(tmp_path: Path) -> None:
    """Where nothing listens, the finding names the address."""
    device = Device(tmp_path)
    device.replace("bootstrap: 127.0.0.1:9092", "bootstrap: 127.0.0.1:9\n  timeout_s: 0.5\n ")
    found = device.findings()["tier1"]
    assert found.state == "bad"
    assert "127.0.0.1:9" in str(found)


def _certificate(path: Path, *, begins_days: float, ends_days: float) -> None:
    key, now = ec.generate_private_key(ec.SECP256R1()), datetime.now(timezone.utc)
    name = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, "gateway")])
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now + timedelta(days=begins_days))
        .not_valid_after(now + timedelta(days=ends_days))
        .sign(key, hashes.SHA256())
    )
    path.write_bytes(made.public_bytes(serialization.Encoding.PEM))


@pytest.mark.parametrize(
    ("begins_days", "ends_days", "state"), [(-1, 300, "ok"), (-1, 5, "warning"), (-9, -1, "bad"), (2, 300, "bad")]
)
def test_certificates_by_their_days(device: Device, begins_days: int, ends_days: int, state: str) -> None:
    """An expired certificate, or one of the future, stops the device; one that expires soon is worth a word."""
    _certificate(device.root / "ca.pem", begins_days=begins_days, ends_days=ends_days)
    device.replace(
        "key: device.key",
        'transport: http\ngateway: {url: "https://127.0.0.1:9", ca_file: ca.pem, timeout_s: 1}\nkey: device.key',
    )
    assert device.findings()["gateway.ca_file"].state == state


def test_certificate_that_is_none(device: Device) -> None:
    """A file that holds something else is named."""
    (device.root / "ca.pem").write_text("not a certificate")
    device.replace(
        "key: device.key", 'transport: http\ngateway: {url: "https://127.0.0.1:9", ca_file: ca.pem}\nkey: device.key'
    )
    assert "no PEM certificate" in str(device.findings()["certificates"])


def test_command_counts_and_fails(device: Device) -> None:
    """The command prints a line for each finding, a count, and ends with 1 when something is bad."""
    from typer.testing import CliRunner

    (device.root / "text.jsonl").unlink()
    result = CliRunner().invoke(cli.app, ["tier2", "doctor", "--config", str(device.config)])
    assert result.exit_code == 1
    states = Counter(finding.state for finding in device.findings().values())  # isolation is a warning on some machines
    assert states["bad"] == 1
    assert result.output.splitlines()[-1].endswith(f"{states['bad']} bad, {states['warning']} warnings")
