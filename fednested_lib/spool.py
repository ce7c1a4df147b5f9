"""The trainer's file: what the process that sees data hands to the sidecar, which sees none.

A spooled update is two files: the exact fp32 factors (`delta.encode`), and a declaration that names their digest and is
written last, so that a declaration that exists stands for a complete update. The sidecar parses both as strictly as if
they came from the network, because to it they do.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fednested_lib.blobs import write_durable
from fednested_lib.delta import Delta, decode, encode
from fednested_lib.envelope import AdapterFields, Count, Digest, Layer
from fednested_lib.errors import PayloadError
from fednested_lib.partition import expert_param
from fednested_lib.signing import canonical_json, sha256_hex


class Declaration(BaseModel):
    """What the trainer says about one update; counts are exact here and leave the device in buckets only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["fednested.spool/1"] = "fednested.spool/1"
    sequence: int = Field(ge=0, le=1 << 53)
    base_version: int = Field(ge=0, le=1 << 53)
    base_digest: Digest
    adapter: AdapterFields
    expert_ids: dict[Layer, list[int]]
    routed_tokens: dict[Layer, list[Count]]
    distinct_tokens: dict[Layer, list[Count]]
    num_examples: Count
    factors_sha256: Digest

    @model_validator(mode="after")
    def _consistent(self) -> Declaration:
        for name in ("routed_tokens", "distinct_tokens"):
            counts = getattr(self, name)
            if {layer: len(ids) for layer, ids in self.expert_ids.items()} != {
                layer: len(each) for layer, each in counts.items()
            }:
                raise ValueError(f"{name} must have one count per adapted expert")
        for layer, routed in self.routed_tokens.items():
            if any(distinct > total for distinct, total in zip(self.distinct_tokens[layer], routed, strict=True)):
                raise ValueError("distinct tokens cannot exceed routed tokens")
        return self

    def layers(self) -> dict[int, tuple[int, ...]]:
        """Return the adapted experts per layer."""
        return {int(layer): tuple(ids) for layer, ids in self.expert_ids.items()}


class Spool:
    """The directory of spooled updates.

    Args:
        directory: created when something is written.
    """

    def __init__(self, directory: Path):
        self.directory = Path(directory)

    def write(
        self,
        delta: Delta,
        *,
        sequence: int,
        base_version: int,
        base_digest: str,
        routed_tokens: Mapping[int, list[int]],
        distinct_tokens: Mapping[int, list[int]],
        num_examples: int,
    ) -> Declaration:
        """Write one update durably, the declaration last.

        Raises:
            PayloadError: reason ``non_finite``; nothing is written.
            StorageError: the disk is full.
        """
        factors = encode(delta, encoding="fp32", seed=0)
        ids = {str(expert_param(name)[0]): list(each.expert_ids) for name, each in delta.factors.items()}
        declaration = Declaration(
            sequence=sequence,
            base_version=base_version,
            base_digest=base_digest,
            adapter=AdapterFields(
                rank=delta.spec.rank, alpha=float(delta.spec.alpha), mode=delta.spec.mode, seed=delta.spec.seed
            ),
            expert_ids=ids,
            routed_tokens={layer: routed_tokens[int(layer)] for layer in ids},
            distinct_tokens={layer: distinct_tokens[int(layer)] for layer in ids},
            num_examples=num_examples,
            factors_sha256=sha256_hex(factors),
        )
        write_durable(self._factors(sequence), factors)
        write_durable(self._declaration(sequence), canonical_json(declaration.model_dump(mode="json")))
        return declaration

    def has(self, sequence: int) -> bool:
        """Tell whether an update was spooled completely."""
        return self._declaration(sequence).exists()

    def read(self, sequence: int, shapes: Mapping[str, tuple[int, int, int]]) -> tuple[Declaration, Delta]:
        """Parse one update strictly.

        Args:
            sequence: which.
            shapes: (experts, d_out, d_in) of the base model's fused expert parameters.

        Raises:
            PayloadError: it is not what it declares, with a machine-readable reason.
        """
        path = self._declaration(sequence)
        try:
            declaration = Declaration.model_validate_json(path.read_bytes())
            factors = self._factors(sequence).read_bytes()
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"]) or "counts"
            raise PayloadError("bad_spool", f"{path}: {field}: {first['msg']}: remove it to train again") from None
        except OSError as error:
            raise PayloadError("bad_spool", f"{path}: {error.strerror}: remove it to train again") from error
        if declaration.sequence != sequence or sha256_hex(factors) != declaration.factors_sha256:
            raise PayloadError("bad_spool", f"{path} and its factors do not belong together: remove it to train again")
        spec, ids = declaration.adapter.spec(), declaration.layers()
        return declaration, decode(factors, encoding="fp32", spec=spec, expert_ids=ids, shapes=shapes)

    def remove(self, sequence: int) -> None:
        """Forget an update, the declaration first."""
        self._declaration(sequence).unlink(missing_ok=True)
        self._factors(sequence).unlink(missing_ok=True)

    def _declaration(self, sequence: int) -> Path:
        return self.directory / f"{sequence:012d}.json"

    def _factors(self, sequence: int) -> Path:
        return self.directory / f"{sequence:012d}.factors"
