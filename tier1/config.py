"""Tier-1 configuration: one YAML file, strict, read at call time; every part is read by one component."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from fednested_lib.config import MAX_SEED, LogConfig, PublicKey, Section, load_yaml, resolve_uri
from fednested_lib.envelope import ClientId, FederationName
from fednested_lib.errors import ConfigError
from tier1.training.deepspeed_config import DeepSpeedSettings
from tier1.training.lora_settings import TARGETS, LoraSettings, Quantised, Target
from tier1.training.schedule import Kind, Schedule
from tier1.versions.settings import AggregationSettings, Rates

COMMAND = "fednested init-config tier1"


class IdentityConfig(Section):
    """Who runs tier 1, the key that signs chain entries, and whose signatures are trusted (public key → name)."""

    principal: str = "trainer"
    key: Path
    trusted: dict[PublicKey, str]


Place = Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9-]{0,31}$")]


class DeviceRecord(Section):
    """A registered device: its public key and key epoch, and where the data engine counts it."""

    public_key: PublicKey
    key_epoch: int = Field(default=0, ge=0)
    region: Place = "default"
    device_class: Place = "default"


class ModelConfig(Section):
    """Genesis: a model family, and arguments of its transformers configuration class or a trained model's directory.

    With `pretrained`, shape, vocabulary, weights and tokenizer are that model's.
    """

    family: Literal["mixtral", "qwen3_moe", "olmoe"] = "mixtral"
    config: dict = Field(default_factory=dict)
    vocab_size: int = Field(default=1024, ge=258, le=262_144)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    pretrained: Path | None = None

    @model_validator(mode="after")
    def _one_source(self) -> ModelConfig:
        if self.pretrained and self.model_fields_set & {"config", "vocab_size", "seed"}:
            raise ValueError("pretrained brings shape, vocabulary and weights: leave out config, vocab_size and seed")
        return self


class ClustersConfig(Section):
    """How many tier-1 clusters co-train, each with a key of its own, and how long one waits for the others' deltas."""

    count: int = Field(default=1, ge=1, le=1000)
    max_wait_s: float = Field(default=1800.0, ge=0, le=604_800)


class RehearsalConfig(Section):
    """Text of old domains that safeguards may look at: datasets (name → JSONL path), at most `rows` rows of them."""

    datasets: dict[str, Path] = Field(min_length=1)
    rows: int = Field(default=512, ge=1, le=10_000_000)


class RehearsedConfig(Section):
    """Replay or distillation: its weight in the loss, and how many old rows a step draws, over all ranks."""

    weight: float = Field(default=1.0, gt=0, le=1e4)
    rows: int = Field(default=8, ge=1, le=1_000_000)


class EwcConfig(Section):
    """EWC: its weight, rows that the Fisher information is taken from, and what earlier runs' still counts."""

    weight: float = Field(gt=0, le=1e9)
    rows: int = Field(default=128, ge=1, le=1_000_000)
    decay: float = Field(default=1.0, ge=0, le=1)


class FreezeConfig(Section):
    """Experts that take at least this share of the old rows' assignments in their layer stay as they are."""

    share: float = Field(gt=0, le=1)


Period = Annotated[int, Field(ge=1, le=1_000_000)] | None


class FrequenciesConfig(Section):
    """Steps between two moves of a group, null is frozen; of experts one number, or a list that expert ids go round."""

    core: Period = 1
    router: Period = 1
    experts: Period | Annotated[list[Period], Field(min_length=1)] = 1


class SafeguardsConfig(Section):
    """What keeps a core update from erasing what the model knew; each is off unless it is given, several add up."""

    rehearsal: RehearsalConfig | None = None
    replay: RehearsedConfig | None = None
    distillation: RehearsedConfig | None = None
    ewc: EwcConfig | None = None
    freeze: FreezeConfig | None = None
    frequencies: FrequenciesConfig | None = None

    @model_validator(mode="after")
    def _old_text(self) -> SafeguardsConfig:
        readers = {name: getattr(self, name) for name in ("replay", "distillation", "freeze")}
        for name, section in readers.items():
            if section and not self.rehearsal:
                raise ValueError(f"{name} needs text of old domains, got none: set rehearsal.datasets")
        if self.rehearsal and not any(readers.values()):
            raise ValueError(
                f"rehearsal must be read by one of {', '.join(readers)}, got none of them: set one, or remove rehearsal"
            )
        return self


class ScheduleConfig(Section):
    """How the learning rate goes: shares of the steps that rise and (wsd) fall, and the factor at the end."""

    kind: Kind = "cosine"
    warmup: float = Field(default=0.05, ge=0, le=1)
    final: float = Field(default=0.1, ge=0, le=1)
    decay: float = Field(default=0.2, gt=0, le=1)

    @model_validator(mode="after")
    def _parts_of_one_run(self) -> ScheduleConfig:
        default = {name: field.default for name, field in ScheduleConfig.model_fields.items()}
        if self.decay != default["decay"] and self.kind != "wsd":
            raise ValueError(f"decay is of kind wsd alone, got it with {self.kind}: leave it out or set kind to wsd")
        if self.final != default["final"] and self.kind == "constant":
            raise ValueError("final must be left out with kind constant, whose rate does not fall: or set kind to wsd")
        if self.kind == "wsd" and self.warmup + self.decay > 1:
            raise ValueError(f"warmup + decay must be at most 1, got {self.warmup + self.decay:g}: lower one of them")
        return self

    def schedule(self) -> Schedule:
        """Return what the trainer reads."""
        return Schedule(**self.model_dump())


class LoraConfig(Section):
    """Low-rank training of the core update: rank, alpha, and which projections of attention and experts."""

    rank: int = Field(default=8, ge=1, le=65_536)
    alpha: float = Field(default=16.0, gt=0, le=1e6)
    targets: list[Target] = Field(default=list(TARGETS), min_length=1)
    quantize: Quantised = "none"

    def settings(self) -> LoraSettings:
        """Return what the trainer reads."""
        return LoraSettings(**self.model_dump() | {"targets": tuple(sorted(set(self.targets)))})


Weight = Annotated[float, Field(gt=0, le=1e9)]
Rate = Annotated[float, Field(ge=0, le=1)]
OPTIMISER = {"expert_learning_rate", "router_learning_rate", "weight_decay", "aux_loss", "grad_clip"}


class CoreUpdateConfig(Section):
    """Training of core and experts on governed datasets (name → JSONL or Parquet path)."""

    datasets: dict[str, Path]
    steps: int = Field(default=300, ge=1, le=1_000_000_000)
    batch_size: int = Field(default=16, ge=1, le=1_000_000)
    seq_len: int = Field(default=96, ge=8, le=1_000_000)
    learning_rate: float = Field(default=3e-3, gt=0, le=1)
    expert_learning_rate: Rate | None = None
    router_learning_rate: Rate | None = None
    weight_decay: float = Field(default=0.1, ge=0, le=1)
    aux_loss: float = Field(default=0.02, ge=0, le=1000)
    grad_clip: float = Field(default=1.0, gt=0, le=1e9)
    threads: int = Field(default=2, ge=1, le=1024)
    seed: int = Field(default=0, ge=0, le=MAX_SEED)
    checkpoint_every: int | None = Field(default=100, ge=1, le=1_000_000_000)
    micro_batch: int | None = Field(default=None, ge=1, le=1_000_000)
    activation_checkpointing: bool = False
    dedupe: bool = False
    document_masks: bool = False
    mixture: dict[str, Weight] | None = None
    deepspeed: DeepSpeedSettings | None = None
    lora: LoraConfig | None = None
    metrics_every: int | None = Field(default=10, ge=1, le=1_000_000_000)
    peak_flops: float | None = Field(default=None, gt=0, le=1e18)
    rank_timeout_s: float = Field(default=1800.0, ge=1, le=86_400)
    schedule: ScheduleConfig = ScheduleConfig()
    schedule_steps: int | None = Field(default=None, ge=1, le=1_000_000_000)
    delta_dtype: Literal["float32", "float16"] = "float32"
    clusters: ClustersConfig = ClustersConfig()
    safeguards: SafeguardsConfig = SafeguardsConfig()

    @model_validator(mode="after")
    def _lora_alone(self) -> CoreUpdateConfig:
        guarded = "safeguards" if any(section for _, section in self.safeguards) else ""
        others = [name for name in ("deepspeed", "schedule_steps") if getattr(self, name)] + [guarded] * bool(guarded)
        if self.lora and others:
            raise ValueError(
                f"lora must be alone in a core update, got it with {', '.join(others)}: remove one of them"
            )
        return self

    @model_validator(mode="after")
    def _rates_of_factors(self) -> CoreUpdateConfig:
        targets = self.lora.targets if self.lora else TARGETS
        still = {"router": self.lora is not None, "expert": not {"gate_up_proj", "down_proj"} & {*targets}}
        for group, rests in still.items():
            if rests and (rate := getattr(self, f"{group}_learning_rate")) is not None:
                raise ValueError(
                    f"{group}_learning_rate must be left out where no target of lora is of that group, got {rate:g}: "
                    f"remove it{' or add gate_up_proj to lora.targets' * (group == 'expert')}"
                )
        return self

    @model_validator(mode="after")
    def _a_weight_each(self) -> CoreUpdateConfig:
        names = sorted(self.datasets)
        if self.mixture is not None and sorted(self.mixture) != names:
            raise ValueError(
                f"mixture must have a weight for each of datasets ({', '.join(names)}) and no other, got "
                f"{', '.join(sorted(self.mixture)) or 'none'}: name the same under both, or leave mixture out"
            )
        return self

    @model_validator(mode="after")
    def _one_file_per_name(self) -> CoreUpdateConfig:
        rehearsal = self.safeguards.rehearsal
        for name, path in rehearsal.datasets.items() if rehearsal else ():
            if self.datasets.get(name, path) != path:
                raise ValueError(f"dataset {name} must be one file, got {self.datasets[name]} and {path}: rename one")
        return self


class WindowConfig(Section):
    """When the fast loop closes its buffer: K updates or T seconds, with a sensor also B bytes, whichever is first."""

    min_updates: int = Field(default=4, ge=1, le=1_000_000)
    max_updates: int = Field(default=64, ge=1, le=1_000_000)
    max_wait_s: float = Field(default=120.0, ge=0, le=604_800)
    max_bytes: int | None = Field(default=None, ge=1, le=2**40)


class FindingBounds(Section):
    """A finding is raised at `raise_at`, stays open until its value is below `clear_at`, and asks for `task` (or none).

    Subclasses give the bounds of one kind, in its unit.
    """

    raise_at: float
    clear_at: float
    task: Literal["aggregate", "core_update"] | None = None

    @model_validator(mode="after")
    def _hysteresis(self) -> FindingBounds:
        if self.clear_at >= self.raise_at:
            raise ValueError(f"clear_at must be below raise_at, got {self.clear_at:g} and {self.raise_at:g}")
        return self


class DriftBounds(FindingBounds):
    """Rise of a region's loss, nats per token."""

    raise_at: float = Field(default=0.2, gt=0, le=100)
    clear_at: float = Field(default=0.1, ge=0, le=100)
    task: Literal["aggregate", "core_update"] | None = "core_update"


class ShareBounds(FindingBounds):
    """Share of devices; one device of the least that are looked at, three, must not reach it."""

    raise_at: float = Field(default=0.5, ge=0.34, le=1)
    clear_at: float = Field(default=0.25, ge=0, le=1)


class StarvingBounds(FindingBounds):
    """1 − an expert's tokens over the even share: 1 is an expert without a token."""

    raise_at: float = Field(default=0.95, gt=0, le=1)
    clear_at: float = Field(default=0.8, ge=0, le=1)
    task: Literal["aggregate", "core_update"] | None = "core_update"


class SaturatedBounds(FindingBounds):
    """An expert's tokens over the even share."""

    raise_at: float = Field(default=4.0, gt=1, le=1e6)
    clear_at: float = Field(default=2.0, ge=0, le=1e6)
    task: Literal["aggregate", "core_update"] | None = "core_update"


class DataEngineConfig(Section):
    """What the data engine makes of telemetry: windows, least evidence, budget of tasks, bounds of each finding."""

    window_s: float = Field(default=21_600.0, ge=1, le=2_592_000)
    reference_s: float = Field(default=604_800.0, ge=2, le=31_536_000)
    min_devices: int = Field(default=5, ge=3, le=1_000_000)
    cooldown_s: float = Field(default=86_400.0, ge=0, le=31_536_000)
    tasks_per_day: int = Field(default=2, ge=0, le=1000)
    drift: DriftBounds = DriftBounds()
    failing: ShareBounds = ShareBounds()
    drop_out: ShareBounds = ShareBounds()
    starving: StarvingBounds = StarvingBounds()
    saturated: SaturatedBounds = SaturatedBounds()

    @model_validator(mode="after")
    def _windows(self) -> DataEngineConfig:
        if self.reference_s <= self.window_s:
            raise ValueError(f"reference_s must be above window_s, got {self.reference_s:g} and {self.window_s:g}")
        return self


class SuiteBound(Section):
    """What one suite's rise is held against, where it is not the default of all suites."""

    max_regression: float | None = Field(default=None, ge=0, le=100)
    judged_by: Literal["low", "mean", "high"] | None = None


class EvaluationConfig(Section):
    """Suites (name → JSONL path) and the automatic gate: largest allowed rise of any suite's loss, nats per token."""

    suites: dict[str, Path]
    max_regression: float = Field(default=0.05, ge=0, le=100)
    judged_by: Literal["low", "mean", "high"] = "mean"
    bounds: dict[str, SuiteBound] = Field(default_factory=dict)
    max_tokens: int = Field(default=4096, ge=64, le=1_000_000_000)
    max_tries: int = Field(default=3, ge=1, le=16)
    seq_len: int = Field(default=96, ge=8, le=1_000_000)


class BroadcastConfig(Section):
    """What is made of a champion besides its snapshot; `onnx` needs the extra of that name."""

    onnx: bool = False


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
    """One federation as tier 1 sees it. Relative paths are relative to the file's directory.

    `home_is_shared` says that every pod of a cluster has the same volume at `home`.
    """

    federation: FederationName = "fednested"
    profile: Literal["local", "production"] = "local"
    home: Path
    home_is_shared: bool = False
    log: LogConfig = LogConfig()
    identity: IdentityConfig
    devices: dict[ClientId, DeviceRecord] = Field(default_factory=dict)
    model: ModelConfig = ModelConfig()
    core: CoreUpdateConfig
    rates: Rates = Rates()
    aggregation: AggregationSettings = AggregationSettings()
    window: WindowConfig = WindowConfig()
    data_engine: DataEngineConfig = DataEngineConfig()
    evaluation: EvaluationConfig
    broadcast: BroadcastConfig = BroadcastConfig()
    registry: RegistryConfig = RegistryConfig()
    governance: GovernanceConfig

    @model_validator(mode="after")
    def _shared_home(self) -> Tier1Config:
        if self.home_is_shared and not self.home.is_absolute():
            raise ValueError(f"home must be an absolute path with home_is_shared: true, got {self.home}")
        return self


def load_tier1(path: str | os.PathLike) -> Tier1Config:
    """Load and resolve a tier-1 configuration.

    Raises:
        ConfigError: missing file, unknown key, wrong type or bound, a rule that nobody registered.
    """
    config = load_yaml(path, Tier1Config, command=COMMAND)
    _check_rule(path, config.aggregation)
    base = Path(path).resolve().parent
    pretrained = config.model.pretrained
    core = config.core.model_copy(
        update={
            "datasets": {k: base / v for k, v in config.core.datasets.items()},
            "safeguards": _resolved(config.core.safeguards, base),
        }
    )
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
            "model": config.model.model_copy(update={"pretrained": base / pretrained if pretrained else None}),
            "evaluation": evaluation,
            "registry": config.registry.model_copy(update={"uri": registry_uri}),
            "governance": config.governance.model_copy(update={"policy": base / config.governance.policy}),
        }
    )


def _resolved(safeguards: SafeguardsConfig, base: Path) -> SafeguardsConfig:
    if safeguards.rehearsal is None:
        return safeguards
    datasets = {name: base / path for name, path in safeguards.rehearsal.datasets.items()}
    return safeguards.model_copy(update={"rehearsal": safeguards.rehearsal.model_copy(update={"datasets": datasets})})


def _check_rule(path: str | os.PathLike, settings: AggregationSettings) -> None:
    from tier1.aggregation.registry import choose

    try:
        choose(settings)
    except ConfigError as error:
        raise ConfigError(f"config file {path}: {error}") from None
