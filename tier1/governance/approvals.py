r"""Decision tokens: what a person's approval or rejection of one version is made of.

    token = b64url(payload) "." b64url(Ed25519(key, "fednested.decision/1\0" ‖ payload))
    payload = canonical JSON {format, verdict, manifest_digest, reason, approver, issued_at, public_key}

A token binds a named approver to one manifest digest, so it passes through consoles, chat and Flyte's string input
unharmed, and is worth nothing for another version. The prefix keeps an approver's signature under any other document
from being replayed as a decision. A bare `approve` or `reject: reason` typed at a console is understood as well, and is
recorded as identity *unverified*; only a policy that allows this promotes on it (`promotion.py`).
"""

from __future__ import annotations

import base64
import binascii
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from fednested_lib.errors import GovernanceError
from fednested_lib.signing import HEX64, Signer, canonical_json, sha256_hex, verify

FORMAT = "fednested.decision/1"
DOMAIN = FORMAT.encode() + b"\0"
MAX_TOKEN_CHARS = 8192
MAX_REASON_CHARS = 400
BARE = re.compile(rf"^(approve|reject)(?:\s*:\s*(.{{0,{MAX_REASON_CHARS}}}))?$", re.IGNORECASE)
TOKEN = re.compile(r"^[A-Za-z0-9_-]+\.[A-Za-z0-9_-]+$")

Verdict = Literal["approve", "reject"]


class Payload(BaseModel):
    """The signed part of a token."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["fednested.decision/1"] = FORMAT
    verdict: Verdict
    manifest_digest: Annotated[str, Field(pattern=HEX64)]
    reason: Annotated[str, Field(max_length=MAX_REASON_CHARS, pattern=r"^[^\x00-\x1f\x7f]*$")]
    approver: Annotated[str, Field(min_length=1, max_length=200)]
    issued_at: Annotated[int, Field(ge=0)]
    public_key: Annotated[str, Field(pattern=HEX64)]


@dataclass(frozen=True, kw_only=True)
class DecisionInput:
    """A decision as it came in, checked.

    Args:
        verdict: approve or reject.
        manifest_digest: the version that was decided on.
        reason: the approver's words; may be empty.
        approver: name of the approver, for a bare value the name that the console gave.
        channel: how it came: ``token``, ``console`` or ``flag``.
        issued_at: seconds since the epoch; None for a bare value.
        public_key: key that signed the token; None for a bare value.
        token_sha256: digest of the token's text; None for a bare value.
    """

    verdict: Verdict
    manifest_digest: str
    reason: str
    approver: str
    channel: Literal["token", "console", "flag"]
    issued_at: int | None = None
    public_key: str | None = None
    token_sha256: str | None = None

    @property
    def verified(self) -> bool:
        """Whether a registered key stands behind the approver's name."""
        return self.public_key is not None

    @property
    def identity(self) -> Literal["verified", "unverified"]:
        """The same, as the word that records carry."""
        return "verified" if self.verified else "unverified"


def issue(
    signer: Signer, *, verdict: Verdict, manifest_digest: str, approver: str, issued_at: int, reason: str = ""
) -> str:
    """Make a decision token.

    Args:
        signer: the approver's key.
        verdict: approve or reject.
        manifest_digest: digest of the version's manifest, 64 hex digits.
        approver: the approver's registered name.
        issued_at: seconds since the epoch.
        reason: one line of at most 400 characters.

    Raises:
        GovernanceError: a field is out of bounds.
    """
    try:
        payload = Payload(
            verdict=verdict,
            manifest_digest=manifest_digest,
            reason=reason,
            approver=approver,
            issued_at=issued_at,
            public_key=signer.public_key,
        )
    except ValidationError as error:
        raise GovernanceError(f"a decision token cannot be issued: {_first_problem(error)}") from None
    message = canonical_json(payload.model_dump())
    return f"{_encode(message)}.{_encode(bytes.fromhex(signer.sign(DOMAIN + message)))}"


def parse_decision(
    text: str,
    approvers: Mapping[str, str],
    *,
    manifest_digest: str,
    channel: Literal["console", "flag"] = "console",
    console_user: str = "console",
) -> DecisionInput:
    """Read a token or a bare `approve`, `reject` or `reject: reason`.

    Args:
        text: what was typed or pasted.
        approvers: public key → name of those who may issue tokens.
        manifest_digest: the version that waits for the decision.
        channel: how a bare value came in.
        console_user: name recorded for a bare value.

    Raises:
        GovernanceError: neither of the two, an altered token, an unknown key, a name that is not the key's, or a token
            for another version.
    """
    text = text.strip()
    if bare := BARE.match(text):
        return DecisionInput(
            verdict=bare[1].lower(),
            manifest_digest=manifest_digest,
            reason=_printable(bare[2] or ""),
            approver=console_user,
            channel=channel,
        )
    payload = _open_token(text, approvers)
    if payload.manifest_digest != manifest_digest:
        raise GovernanceError(
            f"decision token of {payload.approver} is for manifest {payload.manifest_digest[:12]}, but "
            f"{manifest_digest[:12]} waits for a decision: issue a token for {manifest_digest}"
        )
    return DecisionInput(
        verdict=payload.verdict,
        manifest_digest=payload.manifest_digest,
        reason=payload.reason,
        approver=payload.approver,
        channel="token",
        issued_at=payload.issued_at,
        public_key=payload.public_key,
        token_sha256=sha256_hex(text.encode()),
    )


def _open_token(text: str, approvers: Mapping[str, str]) -> Payload:
    if len(text) > MAX_TOKEN_CHARS or not TOKEN.match(text):
        raise GovernanceError(
            f"decision of {len(text)} characters is neither approve, reject, `reject: reason` nor a token of at most "
            f"{MAX_TOKEN_CHARS} characters: issue a token with `fednested approvals`"
        )
    message, signature = (_decode(part) for part in text.split("."))
    try:
        payload = Payload.model_validate(json.loads(message))
    except ValidationError as error:
        raise GovernanceError(f"decision token is malformed: {_first_problem(error)}: issue it again") from None
    except (ValueError, RecursionError):
        raise GovernanceError("decision token is malformed: its payload is not JSON: paste it whole") from None
    name = approvers.get(payload.public_key)
    if name is None:
        raise GovernanceError(
            f"decision token is signed by the unknown key {payload.public_key[:12]}: add it under governance.approvers "
            "or let a registered approver sign"
        )
    if name != payload.approver:
        raise GovernanceError(
            f"decision token names approver {payload.approver}, but its key is that of {name}: issue it as {name}"
        )
    if not verify(payload.public_key, signature.hex(), DOMAIN + message):
        raise GovernanceError(f"decision token of {name} was altered, its signature does not match: issue it again")
    return payload


def _encode(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _decode(text: str) -> bytes:
    try:
        return base64.urlsafe_b64decode(text + "=" * (-len(text) % 4))
    except (binascii.Error, ValueError):
        raise GovernanceError("decision token is not base64url: paste it whole or issue it again") from None


def _printable(text: str) -> str:
    return "".join(character for character in text if character.isprintable())


def _first_problem(error: ValidationError) -> str:
    first = error.errors(include_url=False, include_input=False)[0]
    return f"{'.'.join(str(part) for part in first['loc'])}: {first['msg']}"
