"""What a device tells about its training: made by the sidecar, from numbers that the trainer declares.

Losses are rounded to four digits and seconds to one, counts are those of the envelope: nothing here has room for more.
"""

from __future__ import annotations

from fednested_lib.envelope import Envelope
from fednested_lib.events import MAX_EXPERTS, MAX_LAYERS, TrainingTelemetry
from fednested_lib.spool import Declaration


def training_telemetry(declaration: Declaration, envelope: Envelope) -> TrainingTelemetry | None:
    """Return the event about one update, None when the trainer told no numbers."""
    told = declaration.numbers
    if told is None:
        return None
    return TrainingTelemetry(
        federation=envelope.federation,
        client_id=envelope.client_id,
        sequence=envelope.sequence,
        base_version=envelope.base_version,
        loss_first=round(told.loss_first, 4),
        loss_last=round(told.loss_last, 4),
        tokens=told.tokens,
        seconds=round(told.seconds, 1),
        payload_bytes=envelope.payload_bytes,
        expert_tokens=expert_tokens(envelope),
    )


def expert_tokens(envelope: Envelope) -> dict[str, dict[str, int]] | None:
    """Return layer → expert → tokens as the envelope declares them, None for a model that telemetry has no room for."""
    experts = {
        layer: dict(zip(map(str, ids), envelope.tokens[layer], strict=True))
        for layer, ids in envelope.expert_ids.items()
        if ids
    }
    fits = len(experts) <= MAX_LAYERS and sum(map(len, experts.values())) <= MAX_EXPERTS
    return experts if fits else None
