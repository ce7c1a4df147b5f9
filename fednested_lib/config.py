"""Device configuration: one YAML file, strict; and the loader both tiers share.

An unknown key, a wrong type or a value out of bounds is one line that names the key, the value, the bound and the file.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fednested_lib.adapter_spec import INT4_LEVELS, Encoding, Mode
from fednested_lib.envelope import ClientId, FederationName
from fednested_lib.errors import ConfigError
from fednested_lib.signing import HEX64
from fednested_lib.snapshot import Frozen

UserName = Annotated[str, Field(pattern=r"^[a-z_][a-z0-9_-]{0,31}$")]
PublicKey = Annotated[str, Field(pattern=HEX64)]
MAX_SEED = (1 << 63) - 1  # what every random generator takes


class Section(BaseModel):
    """Base of configuration sections: unknown keys are refused, numbers are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)


class LogConfig(Section):
    """Where the update log is; the environment variable FEDNESTED_KAFKA_BOOTSTRAP wins."""

    bootstrap: str = "127.0.0.1:9092"
    timeout_s: float = Field(default=20.0, gt=0, le=600)

    def servers(self) -> str:
        """Return the bootstrap servers in force now."""
        return os.environ.get("FEDNESTED_KAFKA_BOOTSTRAP") or self.bootstrap


class GatewayConfig(Section):
    """Where tier 1's gateway is, who vouches for it, and this device's certificate if it is asked for one."""

    url: Annotated[str, Field(pattern=r"^https?://[^\s?#@]+$")]
    ca_file: Path | None = None
    cert_file: Path | None = None
    key_file: Path | None = None
    timeout_s: float = Field(default=30.0, gt=0, le=600)
    chunk_bytes: int = Field(default=1 << 20, ge=1 << 12, le=8 << 20)


class ModelConfig(Section):
    """How the frozen experts are held: `fp32`, `bf16` (half its memory), `int8` (a quarter) or `int4` (a seventh)."""

    frozen: Frozen = "fp32"


class BudgetConfig(Section):
    """How many experts a device chooses for itself: `experts` per layer, or `megabytes` of fp32 factors in all."""

    experts: int | None = Field(default=None, ge=1, le=1 << 16)
    megabytes: float | None = Field(default=None, gt=0, le=1e6)

    @model_validator(mode="after")
    def _one(self) -> BudgetConfig:
        if (self.experts is None) == (self.megabytes is None):
            raise ValueError("give either experts (per layer) or megabytes")
        return self


class AdaptersConfig(Section):
    """Low-rank adapters: `experts` lists the expert ids adapted in every layer, null means all.

    `experts: auto` chooses those that the device's own text is routed to most, within `budget` (`expert_choice.py`).
    `mode` is `lora` (A and B are trained and sent) or `fixed_a` (B alone; A follows from the base version's digest).
    """

    mode: Mode = "lora"
    rank: int = Field(default=8, ge=1, le=256)
    alpha: float = Field(default=16.0, gt=0, le=1e6)
    experts: list[Annotated[int, Field(ge=0)]] | Literal["auto"] | None = None
    budget: BudgetConfig | None = None
    period_days: int | None = Field(default=None, ge=1, le=3650)
    router_bias: bool = False

    @model_validator(mode="after")
    def _budgeted(self) -> AdaptersConfig:
        if (self.experts == "auto") != (self.budget is not None):
            raise ValueError("experts: auto needs a budget, and nothing else has one")
        if self.period_days is not None and self.experts != "auto":
            raise ValueError("period_days is of experts: auto, which alone are chosen")
        return self


class LocalTrainingConfig(Section):
    """Local training of one update: several AdamW steps on the device's own text."""

    steps: int = Field(default=20, ge=2, le=100_000)
    batch_size: int = Field(default=4, ge=1, le=4096)
    micro_batch_size: int | None = Field(default=None, ge=1, le=4096)
    memory_limit_mb: int | None = Field(default=None, ge=1, le=10_000_000)
    checkpoint_every: int | None = Field(default=None, ge=1, le=100_000)
    seq_len: int = Field(default=96, ge=8, le=8192)
    learning_rate: float = Field(default=4e-3, gt=0, le=1)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    updates_per_base: int = Field(default=1, ge=1, le=1000)
    max_updates: int | None = Field(default=None, ge=1)
    pace_s: float = Field(default=0.0, ge=0, le=86_400)


class PolicyConfig(Section):
    """What may leave is in a file of its own (`policy.py`), signed by the key that is pinned here."""

    file: Path
    public_key: PublicKey


class OutgoingConfig(Section):
    """How it leaves, within the policy: encoding, rank, error feedback, room for updates that nobody confirmed yet."""

    encoding: Encoding = "int8"
    levels: int = Field(default=INT4_LEVELS, ge=2, le=INT4_LEVELS)
    mean_rank: float | None = Field(default=None, gt=0, le=256)
    error_feedback: bool = False
    outbox_bytes: int = Field(default=256 << 20, ge=1 << 20)

    @model_validator(mode="after")
    def _levels_of_int4(self) -> OutgoingConfig:
        if self.levels != INT4_LEVELS and self.encoding != "int4":
            raise ValueError(f"levels = {self.levels} is of encoding int4, got encoding = {self.encoding}")
        return self


class AuditConfig(Section):
    """Where the audit log's anchor and first key lie, apart from the log; null: `sidecar/anchor` in the home."""

    anchor: Path | None = None


class ControlConfig(Section):
    """The control topic: tier 1's public key (pinned), how often to look, when to send again what nobody names."""

    public_key: PublicKey
    poll_s: float = Field(default=0.5, gt=0, le=3600)
    resend_after_s: float = Field(default=600.0, gt=0, le=2_592_000)


class EnergyConfig(Section):
    """Energy for training per day: what the device draws while it trains, and how many watt-hours it may spend so."""

    watts: float = Field(gt=0, le=1e5)
    wh_per_day: float = Field(gt=0, le=1e6)


class ScheduleConfig(Section):
    """When the device may train; null means no bound, and a bound without a reading forbids (`schedule.py`)."""

    power: Literal["any", "mains"] = "any"
    min_battery_percent: float | None = Field(default=None, ge=0, le=100)
    max_temperature_c: float | None = Field(default=None, ge=0, le=150)
    max_load_per_core: float | None = Field(default=None, gt=0, le=1000)
    window: Annotated[str, Field(pattern=r"^([01]\d|2[0-3]):[0-5]\d-([01]\d|2[0-3]):[0-5]\d$")] | None = None
    energy: EnergyConfig | None = None
    check_s: float = Field(default=10.0, gt=0, le=3600)


class IsolationConfig(Section):
    """Users that trainer and sidecar run as when `run-client` starts as root; the least isolation that will do."""

    trainer_user: UserName | None = None
    sidecar_user: UserName | None = None
    require: Literal["none", "network", "users"] = "none"

    @model_validator(mode="after")
    def _both(self) -> IsolationConfig:
        if (self.trainer_user is None) != (self.sidecar_user is None) or (
            self.trainer_user is not None and self.trainer_user == self.sidecar_user
        ):
            raise ValueError("trainer_user and sidecar_user must be two different users, or both left out")
        return self


class Tier2Config(Section):
    """One device. Relative paths are relative to the file's directory."""

    federation: FederationName = "fednested"
    client_id: ClientId
    key_epoch: int = Field(default=0, ge=0)
    key: Path
    home: Path
    data: Path
    heldout: Path | None = None
    transport: Literal["kafka", "http"] = "kafka"
    blobs_uri: str | None = None
    payloads_uri: str | None = None
    gateway: GatewayConfig | None = None
    log: LogConfig = LogConfig()
    control: ControlConfig
    model: ModelConfig = ModelConfig()
    adapters: AdaptersConfig = AdaptersConfig()
    training: LocalTrainingConfig = LocalTrainingConfig()
    schedule: ScheduleConfig = ScheduleConfig()
    isolation: IsolationConfig = IsolationConfig()
    policy: PolicyConfig
    outgoing: OutgoingConfig = OutgoingConfig()
    audit: AuditConfig = AuditConfig()


Model = TypeVar("Model", bound=BaseModel)


def load_yaml(path: str | os.PathLike, model: type[Model], *, command: str) -> Model:
    """Load one YAML document into a strict model.

    Args:
        path: the file.
        model: pydantic class that describes it.
        command: the command that writes a valid example, named as the remedy.

    Raises:
        ConfigError: the file is missing or unreadable, and as `parse_document`.
    """
    try:
        text = Path(path).read_text(encoding="utf-8")
    except FileNotFoundError as error:
        raise ConfigError(f"config file {path} does not exist: write one with `{command}`") from error
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"config file {path} cannot be read ({error}): it must be UTF-8 YAML") from error
    return parse_document(text, path, model, command=command)


def parse_document(text: str, path: str | os.PathLike, model: type[Model], *, command: str) -> Model:
    """Parse the text of one YAML document into a strict model.

    Args:
        text: of the file.
        path: where it was read, for messages.
        model: pydantic class that describes it.
        command: as for `load_yaml`.

    Raises:
        ConfigError: not YAML, a key twice, unknown key, wrong type or value.
    """
    document = _parse_yaml(text, path, command)
    if not isinstance(document, dict):
        raise ConfigError(
            f"config file {path} must hold a mapping, got {type(document).__name__}: write one with `{command}`"
        )
    try:
        return model.model_validate(document)
    except ValidationError as error:
        raise ConfigError(_first_problem(path, error, model, command)) from None


def _parse_yaml(text: str, path: str | os.PathLike, command: str):
    import yaml

    try:
        loader = yaml.SafeLoader(text)
        root = loader.get_single_node()
        _refuse_repeated_keys(root, path)
        return None if root is None else loader.construct_document(root)
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f" at line {mark.line + 1}" if mark else ""
        raise ConfigError(f"config file {path} is not YAML{place}: compare with `{command}`") from None
    except (ValueError, RecursionError) as error:  # an impossible date, a number of thousands of digits, deep nesting
        raise ConfigError(
            f"config file {path} cannot be understood ({type(error).__name__}: {str(error)[:100]}): "
            f"compare with `{command}`"
        ) from None


def _refuse_repeated_keys(root, path: str | os.PathLike) -> None:
    """YAML keeps the last of two equal keys: a second `deny:` of a policy would silently drop the first."""
    import yaml

    waiting, seen = [root], set()
    while waiting:
        node = waiting.pop()
        if id(node) in seen:  # an alias
            continue
        seen.add(id(node))
        if isinstance(node, yaml.SequenceNode):
            waiting += node.value
        elif isinstance(node, yaml.MappingNode):
            lines: dict[str, list[int]] = {}
            for key, value in node.value:
                waiting += [key, value]
                if isinstance(key, yaml.ScalarNode):
                    lines.setdefault(key.value, []).append(key.start_mark.line + 1)
            for name, places in lines.items():
                if len(places) > 1:
                    raise ConfigError(
                        f"config file {path}: key {name} stands {len(places)} times, at lines "
                        f"{', '.join(map(str, places))}: keep one, or merge them"
                    )


def _first_problem(path, error: ValidationError, model: type[BaseModel], command: str) -> str:
    first = error.errors(include_url=False)[0]
    key = ".".join(str(part) for part in first["loc"])
    if first["type"] == "extra_forbidden":
        known = ", ".join(_fields_at(model, first["loc"][:-1]))
        return f"config file {path}: unknown key {key}: known here are {known}; remove it or fix its spelling"
    if first["type"] == "missing":
        return f"config file {path}: key {key} is missing: add it (`{command}` writes a full example)"
    return f"config file {path}: {key} = {first['input']!r}: {first['msg']}; fix the value"


def _fields_at(model: type[BaseModel], location: tuple) -> list[str]:
    for part in location:
        field = model.model_fields.get(str(part))
        inner = field.annotation if field else None
        if not (isinstance(inner, type) and issubclass(inner, BaseModel)):
            break
        model = inner
    return list(model.model_fields)


def load_tier2(path: str | os.PathLike) -> Tier2Config:
    """Load a device configuration; paths are made absolute relative to the file."""
    config = load_yaml(path, Tier2Config, command="fednested init-config tier2")
    base = Path(path).resolve().parent
    needed = ("gateway",) if config.transport == "http" else ("blobs_uri", "payloads_uri")
    for name in needed:
        if getattr(config, name) is None:
            raise ConfigError(
                f"config file {path}: key {name} is missing: transport {config.transport} needs it "
                "(`fednested init-config tier2` writes a full example)"
            )
    paths = {name: base / getattr(config, name) for name in ("key", "home", "data")}
    if config.heldout is not None:
        paths["heldout"] = base / config.heldout
    paths["policy"] = config.policy.model_copy(update={"file": base / config.policy.file})
    if config.audit.anchor is not None:
        paths["audit"] = AuditConfig(anchor=base / config.audit.anchor)
    uris = {
        name: resolve_uri(uri, base)
        for name in ("blobs_uri", "payloads_uri")
        if (uri := getattr(config, name)) is not None
    }
    gateway = config.gateway
    if gateway is not None:
        files = {name: getattr(gateway, name) for name in ("ca_file", "cert_file", "key_file")}
        gateway = gateway.model_copy(update={name: base / file for name, file in files.items() if file is not None})
    return config.model_copy(update={**paths, **uris, "gateway": gateway})


def resolve_uri(uri: str, base: Path) -> str:
    """Make a plain relative path absolute; leave URIs with a scheme alone."""
    return uri if "://" in uri else str(base / uri)


TIER2_EXAMPLE = """\
# One device. Relative paths are relative to this file. Every key that is not here has a default
# (docs/configuration.md).
federation: fednested           # as in tier1.yaml; events and updates of others on the same log are not ours
client_id: {client_id}
key: device.key                 # Ed25519 seed of this device; its public key is registered at tier 1
home: device-home               # state, outbox, snapshots
data: text.jsonl                # one row per line: {{"text": …}} or {{"prompt": …, "completion": …}}
blobs_uri: ../home/blobs        # where snapshots are fetched from (path or fsspec URI)
payloads_uri: ../home/payloads  # where large payloads are put before their pointer is sent
log:
  bootstrap: 127.0.0.1:9092     # FEDNESTED_KAFKA_BOOTSTRAP wins
# transport: http               # instead of the three above: everything goes through tier 1's gateway
# gateway: {{url: https://gateway.example, ca_file: ca.pem}}
control:
  public_key: ""            # 64 hex digits: tier 1's public key (identity.pub); events of others are ignored
adapters: {{rank: 8, alpha: 16.0, experts: null}}
training: {{steps: 20, batch_size: 4, seq_len: 96, learning_rate: 0.004}}
policy:
  file: policy.yaml             # what may leave; signed
  public_key: "{policy_key}"
outgoing: {{encoding: int8}}
"""
