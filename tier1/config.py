"""Tier-1 configuration: one YAML file, strict, read at call time; every part is read by one component."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Literal

from pydantic import Field

from fednested_lib.config import MAX_SEED, LogConfig, PublicKey, Section, load_yaml, resolve_uri
from fednested_lib.envelope import ClientId, FederationName
from fednested_lib.errors import ConfigError
from tier1.versions.settings import AggregationSettings, Rates

COMMAND = "fednested init-config tier1"


class IdentityConfig(Section):
    """Who runs tier 1, the key that signs chain entries, and whose signatures are trusted (public key → name)."""

    principal: str = "trainer"
    key: Path
    trusted: dict[PublicKey, str]


class DeviceRecord(Section):
    """A registered device: its public key and key epoch."""

    public_key: PublicKey
    key_epoch: int = Field(default=0, ge=0)


class ModelConfig(Section):
    """Genesis: a model family and the keyword arguments of its transformers configuration class."""

    family: Literal["mixtral", "qwen3_moe", "olmoe"] = "mixtral"
    config: dict = Field(default_factory=dict)
    vocab_size: int = Field(default=1024, ge=258, le=262_144)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)


class CoreUpdateConfig(Section):
    """Training of core and experts on governed datasets (name → JSONL path)."""

    datasets: dict[str, Path]
    steps: int = Field(default=300, ge=1, le=1_000_000_000)
    batch_size: int = Field(default=16, ge=1, le=1_000_000)
    seq_len: int = Field(default=96, ge=8, le=1_000_000)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    threads: int = Field(default=2, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)


class WindowConfig(Section):
    """When the fast loop closes its buffer: K updates or T seconds, with a sensor also B bytes, whichever is first."""

    min_updates: int = Field(default=4, ge=1, le=1_000_000)
    max_updates: int = Field(default=64, ge=1, le=1_000_000)
    max_wait_s: float = Field(default=120.0, ge=0, le=604_800)
    max_bytes: int | None = Field(default=None, ge=1, le=2**40)


class EvaluationConfig(Section):
    """Suites (name → JSONL path) and the automatic gate: largest allowed rise of any suite's loss, nats per token."""

    suites: dict[str, Path]
    max_regression: float = Field(default=0.05, ge=0, le=100)
    max_tokens: int = Field(default=4096, ge=64, le=1_000_000_000)
    max_tries: int = Field(default=3, ge=1, le=16)
    seq_len: int = Field(default=96, ge=8, le=1_000_000)


class RegistryConfig(Section):
    """MLflow tracking URI (http…), or `file` for the file-backed registry."""

    uri: str = "file"
    model_name: str = "fednested-moe"


class GovernanceConfig(Section):
    """Policy file, approvers (public key → name), and whether an unverified console answer may promote."""

    policy: Path
    approvers: dict[PublicKey, str] = Field(default_factory=dict)
    allow_unverified: bool = False


class Tier1Config(Section):
    """One federation as tier 1 sees it. Relative paths are relative to the file's directory."""

    federation: FederationName = "fednested"
    profile: Literal["local", "production"] = "local"
    home: Path
    log: LogConfig = LogConfig()
    identity: IdentityConfig
    devices: dict[ClientId, DeviceRecord] = Field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    core: CoreUpdateConfig
    rates: Rates = Rates()
    aggregation: AggregationSettings = AggregationSettings()
    window: WindowConfig = WindowConfig()
    evaluation: EvaluationConfig
    registry: RegistryConfig = RegistryConfig()
    governance: GovernanceConfig


def load_tier1(path: str | os.PathLike) -> Tier1Config:
    """Load and resolve a tier-1 configuration.

    Raises:
        ConfigError: missing file, unknown key, wrong type or bound, a rule that nobody registered.
    """
    config = load_yaml(path, Tier1Config, command=COMMAND)
    _check_rule(path, config.aggregation)
    base = Path(path).resolve().parent
    core = config.core.model_copy(update={"datasets": {k: base / v for k, v in config.core.datasets.items()}})
    evaluation = config.evaluation.model_copy(
        update={"suites": {k: base / v for k, v in config.evaluation.suites.items()}}
    )
    registry_uri = config.registry.uri
    if registry_uri != "file":
        registry_uri = resolve_uri(registry_uri, base)
    return config.model_copy(
        update={
            "home": base / config.home,
            "identity": config.identity.model_copy(update={"key": base / config.identity.key}),
            "core": core,
            "evaluation": evaluation,
            "registry": config.registry.model_copy(update={"uri": registry_uri}),
            "governance": config.governance.model_copy(update={"policy": base / config.governance.policy}),
        }
    )


def _check_rule(path: str | os.PathLike, settings: AggregationSettings) -> None:
    from tier1.aggregation.registry import choose

    try:
        choose(settings)
    except ConfigError as error:
        raise ConfigError(f"config file {path}: {error}") from None
