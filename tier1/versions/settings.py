"""Settings of F: step sizes and the aggregation pipeline; configuration, and part of every manifest.

The pipeline is always clip → prior → rule → mass → fold (`tier1/aggregation/weights.py` has the formulas); the settings
say what each stage does. Their defaults are those that manifests were signed with and never change; what a new
federation begins with stands in `tier1.workspace`. Bounds are checked here, the rule's name and options by
`tier1.aggregation.registry` when a configuration is loaded, so that a manifest can be read where a user's rule is not
installed.
"""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

from pydantic import Field, model_validator

from tier1.versions.document import Document, GrownDocument


class Rates(Document):
    """Step sizes of the fold."""

    eta_core: float = Field(default=1.0, ge=0, le=1000)
    eta_t1: float = Field(default=1.0, ge=0, le=1000)
    eta_t2: float = Field(default=1.0, ge=0, le=1000)

    def halved(self) -> Rates:
        """Return the rates of the next try after a failed automatic gate."""
        return Rates(eta_core=self.eta_core / 2, eta_t1=self.eta_t1 / 2, eta_t2=self.eta_t2 / 2)


class ReputationSettings(Document):
    """Trust from the history of a client in the versions that lead to the parent (`aggregation.reputation`)."""

    window: int = Field(default=32, ge=1, le=10_000)  # versions back
    pseudo_count: float = Field(default=2.0, gt=0, le=1e6)  # updates that a newcomer is credited with
    newcomer: float = Field(default=1.0, ge=0, le=1)  # score of those
    floor: float = Field(default=0.05, gt=0, le=1)  # least trust: a client can come back


class OuterSettings(GrownDocument):
    """Outer optimiser on −ΔW, per expert matrix of a cut or slice of a round of core updates (`aggregation.outer`)."""

    later: ClassVar[frozenset[str]] = frozenset({"warmup"})

    kind: Literal["momentum", "nesterov", "adam"] = "nesterov"
    beta: float = Field(default=0.9, ge=0, lt=1)  # of momentum and Nesterov; β₁ of Adam
    beta2: float = Field(default=0.99, ge=0, lt=1)
    epsilon: float = Field(default=1e-8, gt=0, le=1)
    warmup: int = Field(default=0, ge=0, le=1_000_000)  # steps of a slice until β of momentum and Nesterov is reached

    @model_validator(mode="after")
    def _adam_corrects_itself(self) -> OuterSettings:
        if self.kind == "adam" and self.warmup:
            raise ValueError(
                f"warmup must be 0 with adam, which corrects its first steps, got {self.warmup}: remove it"
            )
        return self


class OrthogonalSettings(Document):
    """Directions of earlier device folds that a new one keeps clear of (`aggregation.orthogonal`)."""

    versions: int = Field(default=12, ge=1, le=64)  # n: device folds back
    rank: int = Field(default=16, ge=1, le=4096)  # k: directions per expert matrix
    strength: float = Field(default=1.0, gt=0, le=1)  # λ


class AggregationSettings(GrownDocument):
    """The pipeline clip → prior → rule → mass → fold (DESIGN §4); part of F's configuration, hence of the manifest."""

    later: ClassVar[frozenset[str]] = frozenset(
        {"max_expert_norm", "max_step_norm", "staleness", "hinge_delay", "hinge_slope", "reputation"}
        | {"rule_options", "root", "scope", "measure", "outer", "norm_ratio", "expert_norm_ratio", "token_ratio"}
        | {"probe", "mass_ratio", "core_outer", "orthogonal"}
    )

    # admission
    probe: float | None = Field(default=None, ge=0, le=1)  # cosine to what lowers the suites' loss: least is −probe

    # clip
    max_norm: float = Field(default=50.0, gt=0, le=1e12)  # C of the clip; honest updates of the demo measure 17 to 26
    max_expert_norm: float | None = Field(default=None, gt=0, le=1e12)  # the same per expert
    norm_ratio: float | None = Field(default=None, ge=1, le=1e6)  # C, in what is usual among the devices of the cut
    expert_norm_ratio: float | None = Field(default=None, ge=1, le=1e6)  # max_expert_norm, likewise
    max_step_norm: float | None = Field(default=None, gt=0, le=1e12)  # bound of ‖ΔW_agg‖ over all experts
    # prior
    token_cap: int = Field(default=1 << 20, ge=1, le=1 << 53)
    token_ratio: float | None = Field(default=None, ge=1, le=1e6)  # token_cap, in the median of the expert's devices
    staleness: Literal["polynomial", "hinge", "constant"] = "polynomial"
    staleness_exponent: float = Field(default=0.5, ge=0, le=16)
    hinge_delay: int = Field(default=4, ge=0, le=1_000_000)
    hinge_slope: float = Field(default=1.0, ge=0, le=1e6)
    max_staleness: int = Field(default=16, ge=0, le=1_000_000)
    reputation: ReputationSettings | None = None
    # rule
    rule: Annotated[str, Field(pattern=r"^[a-z][a-z0-9_]{0,63}$")] = "weighted_mean"
    rule_options: dict[str, bool | int | float | None] = {}
    root: Annotated[str, Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")] | None = None  # `tier1` or a client id
    scope: Literal["expert", "shared"] = "expert"  # shared: experts covered by the same updates are judged together
    measure: bool = False  # record cosine and distance to the aggregate; implied by reputation and by robust rules
    # mass
    min_mass_tokens: int = Field(default=256, ge=1, le=1 << 53)  # m_min
    min_coverage: int = Field(default=1, ge=1, le=1_000_000)  # k_min
    mass_ratio: float | None = Field(default=None, gt=0, le=1)  # share of the cut's devices for a full step
    # fold
    orthogonal: OrthogonalSettings | None = None
    outer: OuterSettings | None = None
    core_outer: OuterSettings | None = None  # of core updates: ΔW is the mean over the clusters of a round
