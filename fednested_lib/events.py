"""Events on the control, telemetry and task topics, as strict, closed records.

`control.federation_rounds` has one partition, so its order is total. Control events are signed by tier 1: a device acts
on no event whose signature its pinned key does not verify, nor on one of another federation on the same log.
"""

from __future__ import annotations

from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, field_validator

from fednested_lib import errors
from fednested_lib.envelope import ClientId, Count, Digest, FederationName, Layer
from fednested_lib.errors import EnvelopeError, FednestedError
from fednested_lib.signing import Signer, canonical_json, verify

ExpertId = Annotated[str, Field(pattern=r"^(0|[1-9][0-9]{0,4})$")]

SIGNATURE_HEADER = "fednested-signature"
MAX_SETTLED = 512  # update ids in one event
MAX_LAYERS, MAX_EXPERTS = 1024, 16_384  # of one telemetry event; the experts of all layers together
TASK_KINDS = ("aggregate", "core_update")  # that a trigger routes unless it is told otherwise
LOOPS = (
    *("core_update", "aggregate_experts", "evaluate_and_promote", "broadcast", "nested_round", "sensed_round"),
    *("data_engine", "evaluate_suites", "aggregate_experts_sharded", "data_engine_regions"),
)
OURS = tuple(k for k, v in vars(errors).items() if isinstance(v, type) and issubclass(v, FednestedError))
ERRORS = (*OURS, "Timeout", "Other")  # classes of our tree; nobody answered a gate in time; anything else
NODE = r"^[a-z0-9-]{0,64}$"


class _Event(BaseModel):
    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    federation: FederationName

    def to_bytes(self) -> bytes:
        """Return canonical bytes; an optional field that is absent is not written, as by releases without it."""
        return canonical_json(self.model_dump(mode="json", exclude_none=True))


class ModelAvailable(_Event):
    """A champion's snapshot may be fetched: `snapshot` is the digest of the manifest blob in the blob store."""

    event: Literal["model_available"] = "model_available"
    version: int = Field(ge=0)
    snapshot: Digest
    base_digest: Digest
    chain_seq: int = Field(ge=0)
    chain_head: Digest


class OnnxAvailable(_Event):
    """A champion may be fetched as an ONNX graph: `record` is the digest of the blob that names its files."""

    event: Literal["onnx_available"] = "onnx_available"
    version: int = Field(ge=0)
    snapshot: Digest
    record: Digest


class FederationEnd(_Event):
    """Devices finish what they hold and stop; one older than the model that a device holds is a replay."""

    event: Literal["federation_end"] = "federation_end"
    chain_seq: int = Field(ge=0)
    reason: Literal["completed", "cancelled"] = "completed"


class UpdatesSettled(_Event):
    """The chain has consumed these updates, folded or refused for good: their devices may let go of them."""

    event: Literal["updates_settled"] = "updates_settled"
    chain_seq: int = Field(ge=0)
    update_ids: Annotated[list[Digest], Field(min_length=1, max_length=MAX_SETTLED)]


class ResendUnsettled(_Event):
    """Tier 1 goes on with a log that lost records: what a device sent and no settlement names is to be sent again."""

    event: Literal["resend_unsettled"] = "resend_unsettled"
    chain_seq: int = Field(ge=0)


class TrainingTelemetry(_Event):
    """What a device tells about one local training: numbers only.

    `expert_tokens` is layer → expert id → tokens, the bucketed counts that the update's envelope declares anyway.
    """

    event: Literal["training"] = "training"
    client_id: ClientId
    sequence: int = Field(ge=0)
    base_version: int = Field(ge=0)
    loss_first: Annotated[float, Field(allow_inf_nan=False)]
    loss_last: Annotated[float, Field(allow_inf_nan=False)]
    tokens: int = Field(ge=0)
    seconds: float = Field(ge=0)
    payload_bytes: int = Field(ge=0)
    expert_tokens: (
        Annotated[
            dict[Layer, Annotated[dict[ExpertId, Count], Field(min_length=1)]],
            Field(max_length=MAX_LAYERS),
        ]
        | None
    ) = None

    @field_validator("expert_tokens")
    @classmethod
    def _bounded(cls, told: dict[str, dict[str, int]] | None) -> dict[str, dict[str, int]] | None:
        if told is not None and (n_experts := sum(map(len, told.values()))) > MAX_EXPERTS:
            raise ValueError(f"{n_experts} experts in all layers together, at most {MAX_EXPERTS} may be named")
        return told


class TaskReason(BaseModel):
    """Why the data engine asks: the worst finding that the task answers, with its numbers, and how many more there are.

    `value` and `bound` are in the finding's own unit (`docs/data-engine.md`); the window ends when the task is made.
    """

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    finding: Literal["drift", "failing", "drop_out", "starving", "saturated"]
    subject: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$")
    value: Annotated[float, Field(allow_inf_nan=False)]
    bound: Annotated[float, Field(allow_inf_nan=False)]
    window_s: float = Field(gt=0, allow_inf_nan=False)
    devices: int = Field(ge=1)
    records: int = Field(ge=1)
    others: int = Field(default=0, ge=0)


class TrainingTask(_Event):
    """Somebody of tier 1 wants a loop to turn: the trigger launches one execution per `task_id`, sent often or once.

    `kind` is a word of the trigger's routes; what the loop trains on is the launch plan's business, never a message's.
    `reason` is for people and records: the trigger launches the same with any.
    """

    event: Literal["training_task"] = "training_task"
    task_id: str = Field(pattern=r"^[a-z0-9][a-z0-9._-]{0,127}$")
    kind: str = Field(pattern=r"^[a-z][a-z0-9_]{0,31}$")
    reason: TaskReason | None = None


class WorkflowFailed(_Event):
    """An execution of tier 1 failed and changed no champion: for whoever watches, a device does nothing about it.

    Every field is a name of ours or one that Flyte gave: what the error said is in no event, for it may quote data.
    """

    event: Literal["workflow_failed"] = "workflow_failed"
    workflow: Literal[LOOPS]
    node: str = Field(pattern=NODE)
    execution: str = Field(pattern=r"^[a-z][a-z0-9-]{0,62}$")
    error: Literal[ERRORS]


Event = Annotated[
    ModelAvailable
    | OnnxAvailable
    | FederationEnd
    | UpdatesSettled
    | ResendUnsettled
    | TrainingTelemetry
    | TrainingTask
    | WorkflowFailed,
    Field(discriminator="event"),
]
_ADAPTER: TypeAdapter = TypeAdapter(Event)


def sign_event(event: _Event, signer: Signer) -> dict[str, bytes]:
    """Return the record headers that carry the signature of an event."""
    return {SIGNATURE_HEADER: signer.sign(event.to_bytes()).encode()}


def parse_event(data: bytes) -> Event:
    """Parse untrusted bytes.

    Raises:
        EnvelopeError: reason ``bad_event``.
    """
    try:
        return _ADAPTER.validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        raise EnvelopeError(
            "bad_event", f"event field {'.'.join(map(str, first['loc'])) or 'event'}: {first['msg']}"
        ) from None


def verify_event(data: bytes, headers: dict[str, bytes], public_key: str) -> Event:
    """Parse an event and check that the holder of `public_key` signed it.

    Raises:
        EnvelopeError: reason ``bad_event`` or ``bad_signature``.
    """
    event = parse_event(data)
    signature = headers.get(SIGNATURE_HEADER, b"").decode("ascii", "replace")
    if not verify(public_key, signature, data):
        raise EnvelopeError(
            "bad_signature", f"control event {event.event} is unsigned or signed by another key than control.public_key"
        )
    return event
