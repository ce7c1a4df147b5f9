"""The gateway: who may ask, what passes, what is kept of an upload, and what a connection may take."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import closing, contextmanager, suppress
from datetime import datetime, timedelta, timezone
from pathlib import Path

import pytest
from typer.testing import CliRunner

from benchmarks.chaos import Chaos
from benchmarks.faults import run_faults
from fednested_lib.blobs import BlobStore
from fednested_lib.envelope import HEADER, make_envelope
from fednested_lib.errors import ConfigError, PayloadError, SnapshotError, StorageError, TransportError
from fednested_lib.events import TrainingTelemetry, sign_event
from fednested_lib.gateway_http import GatewayHttp
from fednested_lib.gateway_log import GatewayLog
from fednested_lib.gateway_store import GatewayStore
from fednested_lib.log import CONTROL, TELEMETRY, TOPICS, UPDATES, InMemoryLog
from fednested_lib.signing import Signer, sha256_hex
from services.embedded import EmbeddedBroker
from services.gateway.__main__ import app as command
from services.gateway.admit import Buckets, device_checks
from services.gateway.server import BoundedProtocol, Limits, open_gateway
from tests.federation import device_key, make_workspace
from tests.gateway import CLIENT, DEVICE, DEVICES, connect, make_gateway, serving
from tier1.federation import open_federation

CHUNK = 4096
LARGE = bytes(range(256)) * 80  # five chunks
ROOT = Path(__file__).resolve().parents[2]
STRANGER = Signer.from_seed(b"x" * 32)


class World:
    """A gateway over a log in memory, as tier 1 opens it, and one device."""

    def __init__(self, directory: Path, **options):
        self.directory, self.log = directory, InMemoryLog()
        self.log.create_topics(TOPICS)
        self.payloads = BlobStore(directory / "payloads")
        self.gateway = make_gateway(directory, self.log, readable=(CONTROL,), checks={}, **options)
        self.gateway._checks = device_checks("fednested", DEVICES, self.gateway._uploads.holds)

    def envelope(self, payload: bytes, *, sequence: int = 0, signer: Signer = DEVICE, **changes):
        digest = sha256_hex(payload)
        fields = {
            "federation": "fednested",
            "client_id": CLIENT,
            "key_epoch": 0,
            "sequence": sequence,
            "base_version": 0,
            "base_digest": "0" * 64,
            "adapter": {"rank": 2, "alpha": 4.0},
            "expert_ids": {"0": [1]},
            "tokens": {"0": [8]},
            "num_examples": 8,
            "encoding": "int8",
            "payload_sha256": digest,
            "payload_bytes": len(payload),
            "payload_uri": f"blob:{digest}" if len(payload) > 16384 else None,
        }
        return make_envelope(signer, **{**fields, **changes})

    def post(self, device: GatewayLog, payload: bytes, envelope=None, **changes) -> tuple[int, int]:
        envelope = envelope or self.envelope(payload, **changes)
        value = b"" if envelope.payload_uri else payload
        return device.append(UPDATES, key=CLIENT.encode(), value=value, headers={HEADER: envelope.to_bytes()})

    def records(self):
        return list(self.log.read(UPDATES, self.log.watermarks(UPDATES)))


@pytest.fixture
def world(tmp_path: Path) -> World:
    return World(tmp_path / "gateway")


@pytest.fixture
def url(world: World):
    with serving(world.gateway.app()) as url:
        yield url


@pytest.fixture
def device(url: str):
    with closing(GatewayLog(connect(url))) as device:
        yield device


def _store(url: str, directory: Path) -> GatewayStore:
    return GatewayStore(connect(url), directory / "partials", chunk_bytes=CHUNK)


def test_an_update_passes_unchanged_and_the_same_one_has_one_place(world, url, device, tmp_path):
    """What a device signed is what the log holds; asking again after a lost answer gives the same answer."""
    small, large = world.envelope(b"s" * 100), world.envelope(LARGE, sequence=1)
    first = world.post(device, b"s" * 100, small)
    _store(url, tmp_path).put(LARGE)
    second = world.post(device, LARGE, large)
    assert [world.post(device, b"s" * 100, small), world.post(device, LARGE, large)] == [first, second]
    assert [(record.value, dict(record.headers)[HEADER]) for record in world.records()] == [
        (b"s" * 100, small.to_bytes()),
        (b"", large.to_bytes()),
    ]
    assert {record.key for record in world.records()} == {CLIENT.encode()}


def test_a_record_that_the_log_lost_gets_a_new_place(world, device):
    """A remembered place must not keep an update out of a log that lost it and gave its offset to another."""
    envelope = world.envelope(b"a")
    partition, offset = world.post(device, b"a", envelope)
    world.log._records[UPDATES][partition].clear()
    world.post(device, b"b", sequence=1)
    assert world.post(device, b"a", envelope) == (partition, offset + 1)
    assert world.post(device, b"a", envelope) == (partition, offset + 1)
    assert [record.value for record in world.records()] == [b"b", b"a"]


@pytest.mark.parametrize(
    ("reason", "changes"),
    [
        ("bad_signature", {"signer": STRANGER}),
        ("unknown_client", {"client_id": "juliet"}),
        ("foreign_federation", {"federation": "other"}),
        ("wrong_key_epoch", {"key_epoch": 1}),
        ("corrupt_payload", {"payload_bytes": 2}),
        ("corrupt_payload", {"payload_sha256": "1" * 64}),
    ],
)
def test_what_tier_1_would_refuse_is_refused_for_good(world, device, reason, changes):
    """A 4xx about the update itself ends its retries, with the reason that admission would give."""
    with pytest.raises(PayloadError) as refused:
        world.post(device, b"p", **changes)
    assert refused.value.reason == reason
    assert world.records() == []


def test_other_records_do_not_pass(world, device):
    """A device cannot append to tier 1's topics, add headers, or send what is no record; nor read others' updates."""
    envelope = world.envelope(b"p").to_bytes()
    attempts = [
        (CONTROL, CLIENT, {HEADER: envelope}),
        (UPDATES, CLIENT, {HEADER: envelope, "more": b"1"}),
        (UPDATES, CLIENT, {}),
        (UPDATES, "juliet", {HEADER: envelope}),
        (TELEMETRY, CLIENT, {HEADER: envelope}),
    ]
    for topic, key, headers in attempts:
        with pytest.raises(PayloadError):
            device.append(topic, key=key.encode(), value=b"p", headers=headers)
    for topic in (UPDATES, TELEMETRY):
        with pytest.raises(TransportError, match="do not read topic"):
            list(device.read(topic, {0: (0, 1)}))
    answer = device._gateway.ask("POST", f"/v1/topics/{UPDATES}/records", body=b"{")
    assert answer.status == 422
    assert all(high == 0 for topic in TOPICS for _, high in world.log.watermarks(topic).values())


def test_telemetry_passes_in_the_devices_own_name(world, device):
    """Numbers of a training reach their topic; signed by another key they do not."""
    event = TrainingTelemetry(
        federation="fednested",
        client_id=CLIENT,
        sequence=0,
        base_version=0,
        loss_first=1.0,
        loss_last=0.5,
        tokens=8,
        seconds=1.0,
        payload_bytes=8,
    )
    for signer in (DEVICE, STRANGER):
        headers = sign_event(event, signer)
        if signer is STRANGER:
            with pytest.raises(PayloadError):
                device.append(TELEMETRY, key=CLIENT.encode(), value=event.to_bytes(), headers=headers)
        else:
            assert device.append(TELEMETRY, key=CLIENT.encode(), value=event.to_bytes(), headers=headers) == (0, 0)


def test_a_pointer_without_its_payload_waits(world, device):
    """An update is no update before its payload is whole: the device uploads it and asks again."""
    with pytest.raises(TransportError, match="upload it first"):
        world.post(device, LARGE)
    assert world.records() == []


def test_only_registered_devices_are_served(world, url):
    """Strangers, forged names and altered requests get no byte; who asked hears why, and keeps its updates."""
    world.log.append(CONTROL, key=b"k", value=b"v", headers={})
    for signer, client_id in ((STRANGER, CLIENT), (DEVICE, "juliet")):
        with closing(GatewayLog(connect(url, signer, client_id))) as stranger:
            with pytest.raises(TransportError, match="401.*regist"):
                stranger.watermarks(CONTROL)
            with pytest.raises(TransportError, match="401"):
                world.post(stranger, b"p")
    gateway = connect(url)
    gateway._signed = lambda method, target: GatewayHttp._signed(gateway, method, target + "?start=0")
    with pytest.raises(TransportError, match="401"):
        gateway.ask("GET", f"/v1/topics/{CONTROL}")


def test_a_clock_that_is_off_is_allowed_for(url):
    """The server's Date tells the offset; the device signs with it, and its own clock stays as it is."""
    offset_s = 0
    gateway = connect(url, clock=lambda: time.time() + offset_s)
    for offset_s in (-86_400, 0, 3 * 86_400):
        assert GatewayLog(gateway).identity(CONTROL)
        assert abs(gateway.skew_s + offset_s) < 60


def test_a_client_that_asks_too_often_waits_as_long_as_it_is_told(tmp_path):
    """429 with Retry-After, for this client alone, and the device obeys it."""
    now = [0.0]
    world = World(tmp_path / "gateway", buckets=Buckets(0.1, 2, clock=lambda: now[0]))
    with serving(world.gateway.app()) as url, closing(GatewayLog(connect(url))) as device:
        assert [device.identity(CONTROL) for _ in range(2)]
        with pytest.raises(TransportError, match="429") as told:
            device.identity(CONTROL)
        assert told.value.retry_after_s == 10
        now[0] += 10
        assert device.identity(CONTROL)


def test_devices_are_spread_over_the_looks_that_tier_1_can_bear(tmp_path):
    """Pace steering: the wait that is asked for grows with the devices of the last minutes."""
    world = World(tmp_path / "gateway", polls_per_s=0.1, min_poll_s=0.5)
    with serving(world.gateway.app()) as url, closing(GatewayLog(connect(url))) as device:
        device.watermarks(CONTROL)
        assert 8 <= device.next_poll_s <= 12


def test_an_upload_goes_on_where_it_was_cut(world, url, tmp_path):
    """Every cut costs at most the chunk that was on its way, whoever of the two was started anew."""
    chaos = Chaos(int(url.rsplit(":", 1)[1]), plan=["cut_request", "lost_reply", "error_503"] * 3, seed=5, share=0.7)
    with closing(chaos):
        for _ in range(200):
            try:
                digest = _store(chaos.url, tmp_path).put(LARGE)
            except TransportError:
                continue
            if not chaos.left:
                break
            Path(world.payloads.location(digest)).unlink()
        assert chaos.left == 0
    assert max(chaos.again["PATCH"]) <= CHUNK
    assert world.payloads.get(digest) == LARGE
    assert not list((world.directory / "uploads").rglob("*.part"))


def test_a_download_goes_on_where_it_was_cut(world, url, tmp_path):
    """What came is kept over a restart, and nothing partial is left at the end."""
    digest = BlobStore(world.directory / "blobs").put(LARGE)
    chaos = Chaos(int(url.rsplit(":", 1)[1]), plan=["cut_reply"] * 5, seed=5, share=0.7)
    with closing(chaos):
        for _ in range(200):
            try:
                assert _store(chaos.url, tmp_path).get(digest) == LARGE
            except TransportError:
                continue
            if not chaos.left:
                break
        assert chaos.left == 0
    assert max(chaos.again["BLOB"]) <= CHUNK
    assert not list((tmp_path / "partials").iterdir())


TRANSFER = """
import sys
from pathlib import Path
from tests.gateway import connect
from fednested_lib.gateway_store import GatewayStore
url, partials, way, digest = sys.argv[1:]
store = GatewayStore(connect(url), Path(partials), chunk_bytes=4096)
store.put(bytes(range(256)) * 80) if way == "put" else store.get(digest)
"""


@pytest.mark.parametrize(("way", "failpoint"), [("put", "gateway.after_chunk:2"), ("get", "gateway.after_range:2")])
def test_a_device_that_is_killed_goes_on_where_it_was(world, url, tmp_path, way, failpoint):
    """SIGKILL in the middle of a transfer: the next process sends or fetches the rest alone."""
    digest = BlobStore(world.directory / "blobs").put(LARGE)
    chaos = Chaos(int(url.rsplit(":", 1)[1]), plan=[], seed=0)
    command = [sys.executable, "-c", TRANSFER, chaos.url, str(tmp_path / "partials"), way, digest]
    with closing(chaos):
        for name, code in ((failpoint, -signal.SIGKILL), ("", 0)):
            environment = {**os.environ, "FEDNESTED_FAILPOINT": name, "PYTHONPATH": str(ROOT)}
            assert subprocess.run(command, env=environment, check=False, timeout=120).returncode == code
    assert chaos.again == {"PATCH": [0], "BLOB": [0]}
    assert max(chaos.sent_bytes, chaos.fetched_bytes) == len(LARGE)
    assert not list((tmp_path / "partials").glob("*"))


def test_a_gateway_killed_before_it_remembers_a_place_costs_a_duplicate(tmp_path):
    """Between the broker's word and the row: the device asks again, and admission knows the second record by its id."""
    with EmbeddedBroker(tmp_path / "broker") as broker:
        config = make_workspace(tmp_path / "tier1", bootstrap=broker.bootstrap)
        fed, world, signer = open_federation(config), World(tmp_path / "unused"), device_key("ann")
        headers = {HEADER: world.envelope(b"p", signer=signer, client_id="ann").to_bytes()}
        places = []
        for failpoint in ("gateway.after_append", ""):
            with _process(config, failpoint) as url, closing(GatewayLog(connect(url, signer, "ann"))) as device:
                for _ in range(2):
                    with suppress(TransportError):
                        places.append(device.append(UPDATES, key=b"ann", value=b"p", headers=headers))
        records = list(fed.log.read(UPDATES, fed.log.watermarks(UPDATES)))
        assert [record.digest for record in records] == [records[0].digest] * 2
        assert places == [(records[1].partition, records[1].offset)] * 2
        fed.close()


@contextmanager
def _process(config: Path, failpoint: str):
    """Run the gateway of a configuration as its command does."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port = probe.getsockname()[1]
    environment = {**os.environ, "FEDNESTED_FAILPOINT": failpoint, "PYTHONPATH": str(ROOT)}
    command = [sys.executable, "-m", "services.gateway", "--config", str(config), "--port", str(port)]
    process = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    url = f"http://127.0.0.1:{port}"
    try:
        while process.poll() is None and not _answers(port):
            time.sleep(0.05)
        threading.Thread(target=process.stderr.read, daemon=True).start()
        yield url
    finally:
        process.terminate()
        assert process.wait(120) == (-signal.SIGKILL if failpoint else 0)


def _answers(port: int) -> bool:
    with suppress(OSError):
        socket.create_connection(("127.0.0.1", port), timeout=5).close()
        return True
    return False


def test_what_is_kept_of_a_transfer_may_be_rotten(world, url, tmp_path):
    """After a power cut a partial file may hold anything: the digest tells, and the transfer begins anew."""
    digest = BlobStore(world.directory / "blobs").put(LARGE)
    for path in (tmp_path / "partials" / digest, world.directory / "uploads" / CLIENT / f"{digest}.part"):
        path.parent.mkdir(parents=True)
        path.write_bytes(bytes(CHUNK))
    store = _store(url, tmp_path)
    assert store.get(digest) == LARGE
    assert store.put(LARGE) == digest
    assert world.payloads.get(digest) == LARGE


def test_a_rotten_or_missing_blob_is_named(world, url, tmp_path):
    """A blob that is broken at tier 1 is an error that says so, not an endless download."""
    blobs, store = BlobStore(world.directory / "blobs"), _store(url, tmp_path)
    digest = blobs.put(LARGE)
    Path(blobs.location(digest)).write_bytes(b"rot" * 5000)
    for each, reason in ((digest, "corrupt_blob"), ("0" * 64, "missing_blob")):
        with pytest.raises(SnapshotError) as refused:
            store.get(each)
        assert refused.value.reason == reason
    digest = blobs.put(LARGE + b"2")
    with pytest.raises(SnapshotError, match="at most 10 bytes"):
        store.get(digest, max_bytes=10)


def test_one_unfinished_upload_per_client_and_none_that_is_too_large(world, url, tmp_path):
    """A device can fill the disk neither with beginnings nor with one payload."""
    gateway = connect(url)
    for each in (LARGE, LARGE + b"2"):
        headers = {"Content-Range": f"bytes 0-{CHUNK - 1}/{len(each)}"}
        target = f"/v1/payloads/{sha256_hex(each)}"
        assert gateway.ask("PATCH", target, body=each[:CHUNK], headers=headers).headers["upload-offset"] == str(CHUNK)
    assert [path.name for path in (world.directory / "uploads" / CLIENT).iterdir()] == [
        f"{sha256_hex(LARGE + b'2')}.part"
    ]
    with pytest.raises(PayloadError, match="at most 1048576 bytes") as refused:
        _store(url, tmp_path).put(bytes((1 << 20) + 1))
    assert refused.value.reason == "payload_too_large"


@pytest.mark.parametrize(
    "request_bytes",
    [
        b"",
        b"GET /healthz HTTP/1.1\r\nHost: g\r\n",
        b"PATCH /v1/payloads/x HTTP/1.1\r\nHost: g\r\nContent-Length: 9\r\n\r\n1",
    ],
)
def test_a_connection_that_dawdles_is_cut(url, monkeypatch, request_bytes):
    """A head that never ends, or a body that nobody is waiting for, does not hold a connection."""
    monkeypatch.setattr(BoundedProtocol, "head_s", 0.2)
    with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1])), timeout=30) as connection:
        connection.sendall(request_bytes)
        try:
            while connection.recv(1 << 16):
                pass
        except ConnectionResetError:
            pass  # cut before the timeout of 30 s


def test_an_answer_that_is_read_too_slowly_is_cut(world, url, monkeypatch):
    """A whole request has its time too: who does not read the answer loses the connection."""
    monkeypatch.setattr(BoundedProtocol, "request_s", 0.3)
    gate = threading.Event()
    monkeypatch.setattr(world.log, "identity", lambda topic: gate.wait(30) and "")
    with closing(GatewayLog(connect(url))) as device, pytest.raises(TransportError, match="no answer"):
        device.identity(CONTROL)
    gate.set()


class Impostor:
    """Something that is no gateway: answers every connection with the same bytes and closes it."""

    def __init__(self, answer: bytes):
        self._answer, self._socket = answer, socket.create_server(("127.0.0.1", 0))
        self.url = f"http://127.0.0.1:{self._socket.getsockname()[1]}"
        threading.Thread(target=self._serve, daemon=True).start()

    def _serve(self) -> None:
        while True:
            try:
                connection, _ = self._socket.accept()
            except OSError:
                return
            with connection:
                connection.recv(1 << 16)
                connection.sendall(self._answer)

    def close(self) -> None:
        self._socket.close()


@pytest.mark.parametrize(
    ("answer", "said"),
    [
        (b"HTTP/1.1 302 Found\r\nLocation: http://evil/\r\nContent-Length: 0\r\n\r\n", "redirects are not followed"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 15\r\n\r\n<html>hi</html>", "check gateway.url"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\n{}", "bad identity"),
        (b"HTTP/1.1 200 OK\r\nContent-Length: 99\r\n\r\n{", "IncompleteRead"),
        (b"HTTP/1.1 200 OK\r\n\r\n" + b"x" * (9 << 20), "more than 8388608 bytes"),
        (b"SSH-2.0-x\r\n\r\n", "BadStatusLine"),
        (b"", "RemoteDisconnected"),
        (b"HTTP/1.1 500 Oops\r\nContent-Length: 0\r\nRetry-After: 99999999\r\n\r\n", "answered GET .* with 500"),
    ],
)
def test_whatever_answers_that_is_no_gateway_is_one_recoverable_line(answer, said):
    """Captive portals, proxies and cut answers: bounded in size, never obeyed, tried again later."""
    with closing(Impostor(answer)) as impostor, pytest.raises(TransportError, match=said) as error:
        GatewayLog(connect(impostor.url)).identity(CONTROL)
    assert "\n" not in str(error.value)
    assert error.value.retry_after_s in (None, 3600.0)


def _certificate(directory: Path, name: str, issuer=None, *, ca: bool = False):
    """Write `<name>.pem` and `<name>.key`; return what the next one is issued with."""
    import ipaddress

    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, name)])
    issuer_name, issuer_key = issuer or (subject, key)
    now = datetime.now(timezone.utc)
    names = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    certificate = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer_name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - timedelta(days=1))
        .not_valid_after(now + timedelta(days=1))
        .add_extension(x509.BasicConstraints(ca=ca, path_length=None), critical=True)
        .add_extension(x509.SubjectAlternativeName(names), critical=False)
        .sign(issuer_key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    (directory / f"{name}.pem").write_bytes(certificate.public_bytes(pem))
    raw = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    (directory / f"{name}.key").write_bytes(raw)
    return subject, key


def test_tls_both_ways(world, tmp_path):
    """A device trusts its CA alone, and a gateway that asks for certificates serves nobody without one."""
    ca = _certificate(tmp_path, "ca", ca=True)
    for name in ("server", "device"):
        _certificate(tmp_path, name, ca)
    _certificate(tmp_path, "rogue")
    files = {name: tmp_path / f"{name}.pem" for name in ("ca", "server", "device", "rogue")}
    mine = {"cert_file": files["device"], "key_file": tmp_path / "device.key"}
    tls = {"cert_file": files["server"], "key_file": tmp_path / "server.key", "client_ca_file": files["ca"]}
    with serving(world.gateway.app(), **tls) as url:
        assert GatewayLog(connect(url, ca_file=files["ca"], **mine)).identity(CONTROL)
        refused = [
            {"ca_file": files["ca"]},
            {"ca_file": files["rogue"], **mine},
            {**mine},
            {"ca_file": files["ca"], "cert_file": files["rogue"], "key_file": tmp_path / "rogue.key"},
        ]
        for options in refused:
            with pytest.raises(TransportError, match="certificate|SSL|no answer"):
                GatewayLog(connect(url, **options)).identity(CONTROL)
    for options in (
        {"ca_file": tmp_path / "none.pem"},
        {"cert_file": files["device"], "key_file": tmp_path / "ca.key"},
    ):
        with pytest.raises(ConfigError, match="gateway.ca_file"):
            connect(url, **options)


def test_one_gateway_per_home_and_no_key(tmp_path):
    """A second process would break uploads; and the gateway never opens tier 1's signing key."""
    config = make_workspace(tmp_path)
    fed = open_federation(config)
    fed.config.identity.key.unlink()
    with open_gateway(fed, Limits()) as app, serving(app) as url:
        with socket.create_connection(("127.0.0.1", int(url.rsplit(":", 1)[1]))) as connection:
            connection.sendall(b"GET /healthz HTTP/1.1\r\nHost: g\r\nConnection: close\r\n\r\n")
            assert connection.recv(1 << 16).startswith(b"HTTP/1.1 200 OK\r\n")
        with pytest.raises(StorageError, match="already runs"), open_gateway(fed, Limits()):
            pass
    fed.close()


def test_the_command_says_what_is_wrong(tmp_path):
    """Client certificates without TLS, and a certificate that is none, are one line before anything is served."""
    config = str(make_workspace(tmp_path))
    for arguments in (["--client-ca-file", "x"], ["--cert-file", config, "--key-file", config]):
        result = CliRunner().invoke(command, ["--config", config, "--port", "0", *arguments])
        assert isinstance(result.exception, ConfigError), result.exception


def test_a_small_campaign_of_faults_ends_with_every_update_once(tmp_path):
    """The figures' campaign in small: cuts, kills, lost answers; a chain with each number once, no partial file."""
    outcome = run_faults(tmp_path, faults=14, outages=0, clients=("bob",), per_turn=2)
    assert outcome.n_faults >= 14
    assert (outcome.exactly_once, outcome.in_order, outcome.partial_files) == (100, True, 0)
    assert outcome.resent_chunks <= 1
    assert outcome.refetched_chunks <= 1
