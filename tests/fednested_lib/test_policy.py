"""The policy of a site: only what it lists, only as it was signed, never an older one."""

from __future__ import annotations

import pytest
import yaml
from typer.testing import CliRunner

from fednested_lib.cli import app
from fednested_lib.config import Tier2Config
from fednested_lib.delta import AdapterSpec
from fednested_lib.errors import AuditError, ConfigError, PolicyRefused
from fednested_lib.ledger import Ledger
from fednested_lib.outbox import Outbox
from fednested_lib.policy import EXAMPLE, load_policy, sign_policy, signature_path, write_policy
from fednested_lib.sidecar import open_sidecar
from fednested_lib.signing import Signer, canonical_json, sha256_hex
from tests.audit_tampering import write_log
from tests.policies import OPEN, SITE, make_policy, pin_policy

cli = CliRunner()
STRANGER = Signer.from_seed(b"x" * 32)
CHOSEN = {"rank": 8, "alpha": 16.0, "experts": "auto", "budget": {"experts": 2}}


def _written(tmp_path, **changes):
    pinned = write_policy(tmp_path / "policy.yaml", SITE, federation="fednested", **changes)
    return pinned.file


def test_the_example_is_valid_and_closed(tmp_path):
    """What `init-config` writes loads, allows the default adapter, and no key of it but the floor may be left out."""
    path = _written(tmp_path)
    policy = load_policy(path, SITE.public_key)
    policy.check_adapter(AdapterSpec(rank=8, alpha=16.0))
    assert (policy.dp, policy.telemetry, policy.floor(8, 64)) == ("off", "on", 32)
    document = yaml.safe_load(EXAMPLE.format(federation="fednested"))
    for key in document.keys() - {"min_tokens_per_rank"}:
        path.write_text(yaml.safe_dump({name: value for name, value in document.items() if name != key}))
        with pytest.raises(ConfigError, match=f"key {key} is missing"):
            sign_policy(path, SITE)


@pytest.mark.parametrize(
    "change",
    [
        {"extra": 1},
        {"version": 0},
        {"version": "1"},
        {"encodings": []},
        {"encodings": ["zip"]},
        {"adapters": []},
        {"adapters": [{"mode": "lora", "rank": 8}]},
        {"experts": "some"},
        {"experts": {-1: [0]}},
        {"max_norm": float("inf")},
        {"min_tokens_per_width": 0},
        {"bytes_per_day": 1},
        {"telemetry": "noised"},
        {"telemetry": "maybe"},
        {"dp": {"clip_norm": 1.0, "noise_multiplier": 1.0, "epsilon_total": 8.0, "delta": 1e-5}, "telemetry": "off"},
    ],
)
def test_anything_else_is_not_a_policy(tmp_path, change):
    """An unknown key or word, a wrong type, a value out of bounds, DP on a product: refused before it is signed."""
    path = _written(tmp_path)
    before = signature_path(path).read_bytes()
    path.write_text(yaml.safe_dump({**yaml.safe_load(path.read_text()), **change}))
    with pytest.raises(ConfigError) as caught:
        sign_policy(path, SITE)
    assert "\n" not in str(caught.value)
    assert signature_path(path).read_bytes() == before


def test_a_changed_byte_or_another_key_is_refused(tmp_path):
    """Every byte is signed, comments included, by the pinned key; a signature of other text of that key is none."""
    path = _written(tmp_path)
    signature, text = signature_path(path), path.read_bytes()
    path.write_bytes(text + b"#")
    with pytest.raises(ConfigError, match="was altered or signed by another key"):
        load_policy(path, SITE.public_key)
    path.write_bytes(text)
    with pytest.raises(ConfigError, match="another key"):
        load_policy(path, STRANGER.public_key)
    for wrong in (SITE.sign(text), STRANGER.sign(b"fednested.policy/1\n" + text), "", "ä" * 200):
        signature.write_text(wrong)
        with pytest.raises(ConfigError, match="another key"):
            load_policy(path, SITE.public_key)
    signature.unlink()
    with pytest.raises(ConfigError, match="has no signature"):
        load_policy(path, SITE.public_key)
    path.unlink()
    with pytest.raises(ConfigError, match="cannot be read"):
        load_policy(path, SITE.public_key)


def test_an_older_policy_is_not_obeyed_again(tmp_path):
    """The highest version counts, also after a restart; other rules under its number are refused, comments are not."""
    ledger = Ledger(tmp_path / "ledger.db")
    assert ledger.obey(make_policy(version=2))
    assert not ledger.obey(make_policy(version=2))
    ledger.close()
    ledger = Ledger(tmp_path / "ledger.db")
    for other in (make_policy(version=1), make_policy(version=2, max_norm=51.0)):
        with pytest.raises(ConfigError, match="raise its `version` above 2"):
            ledger.obey(other)
    assert ledger.obey(make_policy(version=3, max_norm=51.0))


def test_adapters_and_experts_are_lists():
    """A mode, rank, α, layer or expert that is not listed is refused by its rule; DP wants all the listed experts."""
    policy = make_policy(adapters=[{"mode": "lora", "rank": 4, "alpha": 8.0}], experts={0: [0, 2]})
    policy.check_adapter(AdapterSpec(rank=4, alpha=8.0))
    for spec in (
        AdapterSpec(rank=5, alpha=8.0),
        AdapterSpec(rank=4, alpha=8.000001),
        AdapterSpec(rank=4, alpha=8.0, mode="fixed_a", seed="0" * 32),
    ):
        with pytest.raises(PolicyRefused) as caught:
            policy.check_adapter(spec)
        assert caught.value.reason == "adapter_not_allowed"
    model = {0: 4, 1: 4}
    policy.check_experts({0: (2,)}, model)
    for layers in ({0: (1,)}, {1: (0,)}):
        with pytest.raises(PolicyRefused) as caught:
            policy.check_experts(layers, model)
        assert caught.value.reason == "expert_not_allowed"
    private = _private(experts={0: [0, 2]})
    private.check_experts({0: (0, 2)}, model)
    with pytest.raises(PolicyRefused) as caught:
        private.check_experts({0: (2,)}, model)
    assert caught.value.reason == "experts_incomplete"
    _private().check_experts({0: (0, 1, 2, 3), 1: (0, 1, 2, 3)}, model)
    with pytest.raises(PolicyRefused, match="exactly the experts"):
        _private().check_experts({0: (0, 1, 2, 3)}, model)


def _private(**changes):
    dp = {"clip_norm": 1.0, "noise_multiplier": 2.0, "epsilon_total": 8.0, "delta": 1e-5}
    adapters = [each for each in OPEN["adapters"] if each["mode"] == "fixed_a"]
    return make_policy(dp=dp, adapters=adapters, telemetry="noised", **changes)


@pytest.mark.parametrize(
    ("changes", "problem"),
    [
        ({"federation": "stage"}, "is for federation fednested, this device is in stage"),
        ({"outgoing": {"encoding": "fp32"}}, "outgoing.encoding = fp32 is not among encodings int8"),
        ({"adapters": {"rank": 9}}, "has no adapter of mode lora, rank 9"),
        ({"adapters": {**CHOSEN, "period_days": 7}}, "period_days = 7, but policy 1 lets .* only with its version"),
        ({"policy": {"public_key": STRANGER.public_key}}, "signed by another key"),
    ],
)
def test_the_sidecar_does_not_start_without_its_policy(tmp_path, changes, problem):
    """A policy of somebody else, or a configuration that asks for more than it lists, is one line at the start."""
    SITE.save(tmp_path / "device.key")
    pinned = pin_policy(tmp_path, encodings=["int8"], adapters=[{"mode": "lora", "rank": 8, "alpha": 16.0}])
    document = {
        "client_id": "romeo",
        "key": tmp_path / "device.key",
        "home": tmp_path / "home",
        "data": tmp_path / "text.jsonl",
        "blobs_uri": "x",
        "payloads_uri": "x",
        "control": {"public_key": "0" * 64},
        **changes,
        "policy": {**pinned, **changes.get("policy", {})},
    }
    with Outbox(tmp_path / "outbox", max_bytes=1 << 20) as outbox:
        with pytest.raises(ConfigError, match=problem) as caught:
            open_sidecar(Tier2Config.model_validate(document), outbox, now=0.0)
        assert "\n" not in str(caught.value)


def test_the_commands_sign_and_verify(tmp_path):
    """`init-config` signs what it writes and names the key to move away; a change is signed anew; a log is verified."""
    told = cli.invoke(app, ["init-config", "tier2", "--dir", str(tmp_path)]).output
    assert "site-policy.key" in told
    assert "move it off this device" in told
    key, path = tmp_path / "site-policy.key", tmp_path / "policy.yaml"
    public = (tmp_path / "site-policy.pub").read_text().strip()
    assert public in (tmp_path / "tier2.yaml").read_text()
    assert load_policy(path, public).version == 1
    path.write_text(path.read_text().replace("version: 1", "version: 2"))
    told = cli.invoke(app, ["tier2", "sign-policy", "--key", str(key), str(path)]).output
    assert "signed version 2" in told
    assert load_policy(path, public).version == 2
    config = tmp_path / "tier2.yaml"
    config.write_text(config.read_text().replace('public_key: "" ', f'public_key: "{public}" '))
    write_log(tmp_path / "device-home" / "sidecar", 3)
    told = cli.invoke(app, ["tier2", "audit", "verify", "--config", str(config)]).output
    assert "audit log holds: 3 records" in told
    log = tmp_path / "device-home/sidecar/audit/log.jsonl"
    log.write_bytes(log.read_bytes().replace(b"released", b"refused", 1))
    found = cli.invoke(app, ["tier2", "audit", "verify", "--config", str(config)])
    assert isinstance(found.exception, AuditError)
    assert "record 0 was edited" in str(found.exception)


def test_the_wider_floor_counts_and_one_that_is_off_changes_no_policy():
    """Of two floors the higher one holds; a policy from before has the digest that devices remember."""
    policy = make_policy(min_tokens_per_width=8)
    assert (policy.floor(4, 64), policy.floor(64, 16)) == (512, 256)
    rules = make_policy().model_dump(mode="json")
    assert {rules.pop(name) for name in ("min_tokens_per_width", "experts_period_days")} == {None}
    assert make_policy().digest == sha256_hex(canonical_json(rules)) != policy.digest
