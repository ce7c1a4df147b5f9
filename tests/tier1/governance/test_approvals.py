"""A decision token is worth something for one version, from one registered person, unaltered."""

from __future__ import annotations

import base64
import json

import pytest

from fednested_lib.errors import GovernanceError
from fednested_lib.signing import Signer, canonical_json
from tier1.governance.approvals import issue, parse_decision

SAM = Signer.from_seed(bytes(range(32)))
EVE = Signer.from_seed(bytes(range(1, 33)))
APPROVERS = {SAM.public_key: "sam"}
MANIFEST = "ab" * 32
OTHER = "cd" * 32


def _token(signer: Signer = SAM, **changes) -> str:
    fields = {
        "verdict": "approve",
        "manifest_digest": MANIFEST,
        "approver": "sam",
        "issued_at": 1_800_000_000,
        "reason": "ok",
    }
    return issue(signer, **{**fields, **changes})


def _repacked(token: str, **changes) -> str:
    payload, signature = token.split(".")
    document = json.loads(base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))) | changes
    return base64.urlsafe_b64encode(canonical_json(document)).rstrip(b"=").decode() + "." + signature


@pytest.mark.parametrize("verdict", ["approve", "reject"])
def test_a_token_round_trips(verdict: str):
    """What was issued is what is read, with a verified identity, even with blanks around it."""
    token = _token(verdict=verdict, reason="Verluste gesunken, 7 von 9 Szenen")
    decision = parse_decision(f"  {token}\n", APPROVERS, manifest_digest=MANIFEST)
    assert (decision.verdict, decision.approver, decision.reason) == (
        verdict,
        "sam",
        "Verluste gesunken, 7 von 9 Szenen",
    )
    assert (decision.identity, decision.channel, decision.issued_at) == ("verified", "token", 1_800_000_000)


def test_a_token_survives_a_flyte_string_input():
    """A token is one word of URL-safe characters, so no console or shell changes it."""
    assert set(_token()) <= set("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_.")


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (_token(manifest_digest=OTHER), "is for manifest cdcdcdcdcdcd, but abababababab waits"),
        (_token(EVE), f"unknown key {EVE.public_key[:12]}"),
        (_token(EVE, approver="eve"), f"unknown key {EVE.public_key[:12]}"),
        (_token(approver="boss"), "names approver boss, but its key is that of sam"),
        (_repacked(_token(verdict="reject"), verdict="approve"), "was altered"),
        (_repacked(_token(manifest_digest=OTHER), manifest_digest=MANIFEST), "was altered"),
        (_repacked(_token(EVE), public_key=SAM.public_key), "was altered"),
        (_repacked(_token(), scope="all"), "scope"),
        (_repacked(_token(), format="fednested.decision/2"), "format"),
        (_repacked(_token(), issued_at="today"), "issued_at"),
        (_token()[:-40], "was altered"),
        (_token()[:60] + _token()[91:], "malformed"),
        ("e30.e30", "malformed"),
        ("a.b", "base64url|malformed"),
        (base64.urlsafe_b64encode(b"[" * 6000).decode() + ".AA", "malformed"),
        ("yes", "neither approve, reject"),
        ("approved", "neither approve, reject"),
        ("", "neither approve, reject"),
        ("approve\nreject", "neither approve, reject"),
        ("reject: " + "x" * 401, "neither approve, reject"),
        ("A" * 9000 + ".A", "neither approve, reject"),
    ],
)
def test_anything_else_is_refused(token: str, message: str):
    """A token for another version, of a stranger, under another name or altered by one byte decides nothing."""
    with pytest.raises(GovernanceError, match=message):
        parse_decision(token, APPROVERS, manifest_digest=MANIFEST)


def test_a_signature_under_another_document_is_no_decision():
    """An approver who signs the payload's bytes as some other document has not decided."""
    payload, _ = _token().split(".")
    message = base64.urlsafe_b64decode(payload + "=" * (-len(payload) % 4))
    forged = payload + "." + base64.urlsafe_b64encode(bytes.fromhex(SAM.sign(message))).rstrip(b"=").decode()
    with pytest.raises(GovernanceError, match="was altered"):
        parse_decision(forged, APPROVERS, manifest_digest=MANIFEST)


@pytest.mark.parametrize(
    ("text", "verdict", "reason"),
    [
        ("approve", "approve", ""),
        (" Approve ", "approve", ""),
        ("reject", "reject", ""),
        ("reject: loss rises on the comedies", "reject", "loss rises on the comedies"),
        ("REJECT:\x1b[2Jno", "reject", "[2Jno"),
    ],
)
def test_a_bare_value_is_understood_and_unverified(text: str, verdict: str, reason: str):
    """A console answer counts as a decision about the version that was shown, with nobody's key behind it."""
    decision = parse_decision(text, APPROVERS, manifest_digest=MANIFEST, channel="flag", console_user="kim")
    assert (decision.verdict, decision.reason, decision.manifest_digest) == (verdict, reason, MANIFEST)
    assert (decision.identity, decision.channel, decision.approver) == ("unverified", "flag", "kim")


@pytest.mark.parametrize(
    "change", [{"reason": "x" * 401}, {"reason": "two\nlines"}, {"manifest_digest": "abc"}, {"verdict": "maybe"}]
)
def test_a_token_out_of_bounds_is_not_issued(change: dict):
    """The issuer learns of a bad field, not the workflow that waits for the token."""
    with pytest.raises(GovernanceError, match=next(iter(change))):
        _token(**change)
