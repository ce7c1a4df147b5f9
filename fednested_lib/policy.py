"""What a site lets leave its devices: one signed YAML file that neither the trainer nor the data centre can loosen.

    <name>.yaml       the rules; every key is required (but the floors), every choice is from a closed list, nothing is
                      allowed that it does not list
    <name>.yaml.sig   Ed25519 over "fednested.policy/1", a line feed and the bytes of the file, by the site's key

The device configuration pins the public key. A file that is missing, unsigned, altered, of another federation or older
than one that this device obeyed before (`ledger.py` remembers) stops the sidecar before anything else happens. No
expressions and no rule language: 0.07 ms for 128 tensors in plain Python, 4.5 to 147 ms in the engines we tried.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from functools import cached_property
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from fednested_lib.adapter_spec import MAX_RANK, AdapterSpec, Encoding, Mode
from fednested_lib.blobs import write_durable
from fednested_lib.config import PolicyConfig, parse_document
from fednested_lib.envelope import MAX_PAYLOAD_BYTES, FederationName
from fednested_lib.errors import ConfigError, PolicyRefused
from fednested_lib.signing import Signer, canonical_json, sha256_hex, verify

MAX_POLICY_BYTES = 1 << 20
REMEDY = "fednested tier2 sign-policy --key site-policy.key"
_DOMAIN = b"fednested.policy/1\n"

Expert = Annotated[int, Field(ge=0, le=1 << 16)]


class _Strict(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True, allow_inf_nan=False)


def _word(value: object) -> object:
    """YAML 1.1 reads a bare off and on as booleans."""
    return {False: "off", True: "on"}.get(value, value) if isinstance(value, bool) else value


class AllowedAdapter(_Strict):
    """One shape of adapter; closed, because a free α would be 52 bits of the trainer's choice in every envelope."""

    mode: Mode
    rank: int = Field(ge=1, le=MAX_RANK)
    alpha: float = Field(gt=0, le=1e6)


class DifferentialPrivacy(_Strict):
    """Gaussian noise of `noise_multiplier` · `clip_norm` on every update, and the ε that all of them may spend at δ."""

    clip_norm: float = Field(gt=0, le=1e12)
    noise_multiplier: float = Field(gt=0, le=1e6)
    epsilon_total: float = Field(gt=0, le=1e6)
    delta: float = Field(gt=0, lt=1)


class Policy(_Strict):
    """The rules of one site, in one version; see docs/sidecar.md for each key."""

    format: Literal["fednested.policy/1"]
    version: int = Field(ge=1, le=1 << 31)
    federation: FederationName
    encodings: Annotated[list[Encoding], Field(min_length=1)]
    adapters: Annotated[list[AllowedAdapter], Field(min_length=1, max_length=256)]
    experts: Literal["all"] | dict[Annotated[int, Field(ge=0, le=9999)], list[Expert]]
    experts_period_days: int | None = Field(default=None, ge=1, le=3650)
    min_tokens_per_rank: int = Field(default=4, ge=1, le=1000)
    min_tokens_per_width: int | None = Field(default=None, ge=1, le=1000)
    max_norm: float = Field(gt=0, le=1e12)
    bytes_per_update: int = Field(ge=1, le=MAX_PAYLOAD_BYTES)
    bytes_per_day: int = Field(ge=1, le=1 << 50)
    updates_per_day: int = Field(ge=1, le=1_000_000)
    min_interval_s: float = Field(ge=0, le=2_592_000)
    dp: Annotated[Literal["off"] | DifferentialPrivacy, BeforeValidator(_word)]
    telemetry: Annotated[Literal["off", "on", "noised"], BeforeValidator(_word)]

    @model_validator(mode="after")
    def _fits(self) -> Policy:
        if self.bytes_per_day < self.bytes_per_update:
            raise ValueError("bytes_per_day must be at least bytes_per_update, or such an update waits for ever")
        if self.dp != "off" and any(each.mode != "fixed_a" for each in self.adapters):
            raise ValueError("dp needs mode fixed_a in every adapter: noise on a product of two factors has no known ε")
        if (self.dp != "off") != (self.telemetry == "noised") and self.telemetry != "off":
            raise ValueError("telemetry is noised with dp and never without: exact losses would not be in its ε")
        return self

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the rules; comments and order of keys do not count."""
        return sha256_hex(canonical_json(self.model_dump(mode="json", exclude_none=True)))

    def floor(self, rank: int, width: int) -> int:
        """Return the fewest distinct tokens with which an expert's factors may leave; `width` is the hidden size."""
        return max(self.min_tokens_per_rank * rank, (self.min_tokens_per_width or 0) * width)

    def check_adapter(self, spec: AdapterSpec) -> None:
        """Refuse a mode, rank and α that are not on the list.

        Raises:
            PolicyRefused: reason ``adapter_not_allowed``.
        """
        if not any((each.mode, each.rank, each.alpha) == (spec.mode, spec.rank, spec.alpha) for each in self.adapters):
            raise PolicyRefused(
                "adapter_not_allowed",
                f"policy {self.version} has no adapter of mode {spec.mode}, rank {spec.rank} and alpha "
                f"{spec.alpha:g}: set adapters in tier2.yaml to one it lists, or sign a policy that lists it",
            )

    def check_experts(self, layers: Mapping[int, tuple[int, ...]], model: Mapping[int, int]) -> None:
        """Refuse a layer or an expert that is not on the list, and with differential privacy any other set than it.

        Args:
            layers: layer → adapted experts.
            model: layer → number of experts.

        Raises:
            PolicyRefused: reason ``expert_not_allowed`` or ``experts_incomplete``.
        """
        every = {layer: range(n) for layer, n in model.items()}
        listed = every if self.experts == "all" else {layer: sorted(set(ids)) for layer, ids in self.experts.items()}
        for layer, ids in layers.items():
            if odd := sorted(set(ids) - set(listed.get(layer, ()))):
                raise PolicyRefused(
                    "expert_not_allowed",
                    f"policy {self.version} does not list expert {odd[0]} of layer {layer}: set adapters.experts to "
                    "those it lists, or sign a policy that lists it",
                )
        if self.dp != "off" and any(list(layers.get(layer, ())) != list(ids) for layer, ids in listed.items()):
            raise PolicyRefused(
                "experts_incomplete",
                f"with dp an update has exactly the experts of policy {self.version}: which ones are left out would "
                "tell the routing; set adapters.experts to those it lists",
            )


def signature_path(path: str | os.PathLike) -> Path:
    """Return where the signature of a policy lies."""
    return Path(f"{os.fspath(path)}.sig")


def sign_policy(path: str | os.PathLike, signer: Signer) -> Policy:
    """Check a policy file and write its signature beside it.

    Raises:
        ConfigError: it is not a valid policy; nothing is signed.
    """
    data = _read(path)
    policy = _parse(data, path)
    write_durable(signature_path(path), signer.sign(_DOMAIN + data).encode() + b"\n")
    return policy


def write_policy(path: str | os.PathLike, signer: Signer, *, federation: str, **changes: object) -> PolicyConfig:
    """Write the example policy, with changes, and sign it.

    Args:
        path: replaced.
        signer: the site's key.
        federation: that updates may go to.
        **changes: keys of `Policy` and their values.

    Returns:
        The section `policy` of a device configuration that pins it.
    """
    import yaml

    text = EXAMPLE.format(federation=federation)
    if changes:
        text = yaml.safe_dump({**yaml.safe_load(text), **changes}, sort_keys=False)
    write_durable(path, text.encode())
    sign_policy(path, signer)
    return PolicyConfig(file=Path(path), public_key=signer.public_key)


def load_policy(path: str | os.PathLike, public_key: str) -> Policy:
    """Load a policy that the holder of `public_key` signed; the bytes that were verified are the bytes that are parsed.

    Raises:
        ConfigError: it, or its signature, is missing, altered, signed by another key, or breaks the schema.
    """
    data = _read(path)
    try:
        signature = signature_path(path).read_bytes()[:1024].decode("ascii", "replace").strip()
    except OSError as error:
        raise ConfigError(
            f"policy {path} has no signature {signature_path(path)} ({error.strerror}): nothing may leave this device; "
            f"sign it with `{REMEDY} {path}`"
        ) from error
    if not verify(public_key, signature, _DOMAIN + data):
        raise ConfigError(
            f"policy {path} was altered or signed by another key than policy.public_key {public_key[:12]}…: nothing "
            f"may leave this device; restore it, or sign it with `{REMEDY} {path}`"
        )
    return _parse(data, path)


def _parse(data: bytes, path: str | os.PathLike) -> Policy:
    try:
        text = data.decode("utf-8")
    except UnicodeDecodeError as error:
        raise ConfigError(f"policy {path} is not UTF-8 ({error}): restore it") from None
    return parse_document(text, path, Policy, command="fednested init-config tier2")


def _read(path: str | os.PathLike) -> bytes:
    try:
        with open(path, "rb") as file:
            data = file.read(MAX_POLICY_BYTES + 1)
    except OSError as error:
        raise ConfigError(
            f"policy {path} cannot be read ({error.strerror}): nothing may leave this device; write one with "
            "`fednested init-config tier2` or fix policy.file"
        ) from error
    if len(data) > MAX_POLICY_BYTES:
        raise ConfigError(f"policy {path} has more than {MAX_POLICY_BYTES} bytes: restore it")
    return data


EXAMPLE = """\
# What may leave this device; docs/sidecar.md explains each key. Whoever answers for the site's data changes it, raises
# `version` and signs it anew: `fednested tier2 sign-policy --key site-policy.key policy.yaml`
format: fednested.policy/1
version: 1
federation: {federation}
encodings: [int8, int4]       # fp16 and fp32 carry what a lying trainer hides in low bits
adapters:                     # nothing else may be sent
  - {{mode: lora, rank: 8, alpha: 16.0}}
experts: all                  # or layer: [ids], e.g. {{0: [0, 3], 1: [2]}}
min_tokens_per_rank: 4        # an expert that saw fewer than this × rank distinct tokens leaves as zeros
# min_tokens_per_width: 8     # the same × the model's hidden size, which stops every attack that we know
max_norm: 50.0                # an update is clipped to it
bytes_per_update: 268435456
bytes_per_day: 1073741824     # of any 24 hours; what is over it waits
updates_per_day: 10000
min_interval_s: 0
dp: off                       # or {{clip_norm: 1.0, noise_multiplier: 2.0, epsilon_total: 8.0, delta: 0.00001}}
telemetry: on                 # off, on, noised
"""
