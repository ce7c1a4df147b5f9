"""The trainer's file: what the process that sees data hands to the sidecar, which sees none.

A spooled update is two files: the exact fp32 factors (`delta.encode`), and a declaration that names their digest and is
written last, so that a declaration that exists stands for a complete update. The sidecar parses both as strictly as if
they came from the network, because to it they do; it follows no link, and reads no more bytes than the declared adapter
can have. Only the trainer writes and removes here.
"""

from __future__ import annotations

import itertools
import os
import re
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from fednested_lib.blobs import write_durable
from fednested_lib.envelope import AdapterFields, Count, Digest, Layer
from fednested_lib.errors import PayloadError, StorageError
from fednested_lib.orders import MAX_SEQUENCE, read_foreign
from fednested_lib.partition import expert_param
from fednested_lib.signing import canonical_json, sha256_hex

if TYPE_CHECKING:
    from fednested_lib.delta import Delta

MAX_DECLARATION_BYTES = 8 << 20
_MOST_ENTRIES = 1000  # of the directory that are looked at; an honest trainer has one update there at a time
_DECLARATION = re.compile(r"(\d{12,16})\.json")
_Loss = Annotated[float, Field(ge=-1e6, le=1e6, allow_inf_nan=False)]


class Numbers(BaseModel):
    """What the trainer tells about one training, for telemetry: losses in nats per token."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    loss_first: _Loss
    loss_last: _Loss
    tokens: Count
    seconds: Annotated[float, Field(ge=0, le=1e8, allow_inf_nan=False)]


class Declaration(BaseModel):
    """What the trainer says about one update; counts are exact here and leave the device in buckets only."""

    model_config = ConfigDict(extra="forbid", strict=True, frozen=True)

    format: Literal["fednested.spool/1"] = "fednested.spool/1"
    sequence: int = Field(ge=0, le=MAX_SEQUENCE)
    base_version: int = Field(ge=0, le=1 << 53)
    base_digest: Digest
    adapter: AdapterFields
    expert_ids: dict[Layer, list[int]]
    routed_tokens: dict[Layer, list[Count]]
    distinct_tokens: dict[Layer, list[Count]]
    num_examples: Count
    factors_sha256: Digest
    numbers: Numbers | None = None

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
        numbers: Numbers | None = None,
    ) -> Declaration:
        """Write one update durably, the declaration last.

        Raises:
            PayloadError: reason ``non_finite``; nothing is written.
            StorageError: the disk is full.
        """
        from fednested_lib.delta import encode

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
            numbers=numbers,
        )
        write_durable(self._factors(sequence), factors)
        write_durable(self._declaration(sequence), canonical_json(declaration.model_dump(mode="json")))
        return declaration

    def has(self, sequence: int) -> bool:
        """Tell whether an update was spooled completely."""
        return self._declaration(sequence).exists()

    def waiting(self) -> list[int]:
        """Return the numbers of what lies here, smallest first; other names are nobody's.

        Raises:
            StorageError: the directory cannot be read.
        """
        try:
            with os.scandir(self.directory) as entries:
                names = [entry.name for entry in itertools.islice(entries, _MOST_ENTRIES)]
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"spool {self.directory} cannot be read ({error.strerror}): fix its rights") from error
        found = (int(match[1]) for match in map(_DECLARATION.fullmatch, names) if match)
        return sorted(number for number in found if number <= MAX_SEQUENCE)

    def read(self, sequence: int, shapes: Mapping[str, tuple[int, int, int]]) -> tuple[Declaration, Delta]:
        """Parse one update strictly.

        Args:
            sequence: which.
            shapes: (experts, d_out, d_in) of the base model's fused expert parameters.

        Raises:
            PayloadError: it is not what it declares, with a machine-readable reason.
        """
        declaration = self.declaration(sequence)
        return declaration, self.delta(declaration, shapes)

    def declaration(self, sequence: int) -> Declaration:
        """Parse what is said about one update.

        Raises:
            PayloadError: reason ``spool_file``, ``bad_declaration`` or ``wrong_sequence``.
        """
        path = self._declaration(sequence)
        data = self._read(path, MAX_DECLARATION_BYTES)
        try:
            declaration = Declaration.model_validate_json(data)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            field = ".".join(str(part) for part in first["loc"])[:120] or "counts"
            raise PayloadError("bad_declaration", f"{path}: {field}: {first['msg']}: train it again") from None
        if canonical_json(declaration.model_dump(mode="json")) != data:
            raise PayloadError("bad_declaration", f"{path} is not canonical JSON: train it again")
        if declaration.sequence != sequence:
            raise PayloadError("wrong_sequence", f"{path} declares number {declaration.sequence}: train it again")
        return declaration

    def delta(self, declaration: Declaration, shapes: Mapping[str, tuple[int, int, int]]) -> Delta:
        """Parse the factors of a declaration.

        Raises:
            PayloadError: reason ``spool_file`` or ``wrong_digest``, and as `delta.decode`.
        """
        from fednested_lib.delta import decode  # numpy, which who only looks what is here does not need

        spec, ids, path = declaration.adapter.spec(), declaration.layers(), self._factors(declaration.sequence)
        most = (len(ids.get(expert_param(name)[0], ())) * (d_out + d_in) for name, (_, d_out, d_in) in shapes.items())
        factors = self._read(path, 5 * spec.rank * sum(most) + (1 << 20))  # a little more than 4 bytes each, and names
        if sha256_hex(factors) != declaration.factors_sha256:
            raise PayloadError("wrong_digest", f"{path} is not what its declaration names: train it again")
        return decode(factors, encoding="fp32", spec=spec, expert_ids=ids, shapes=shapes)

    def remove(self, sequence: int) -> None:
        """Forget an update, the declaration first."""
        _delete(self._declaration(sequence))
        _delete(self._factors(sequence))

    def keep_only(self, sequence: int | None) -> None:
        """Remove every update but one, and what interrupted writes left: for the trainer, at its start."""
        kept = () if sequence is None else (self._declaration(sequence).name, self._factors(sequence).name)
        for path in self.directory.glob("*"):
            if path.name not in kept and path.suffix in (".json", ".factors", ".tmp"):
                _delete(path)

    def _read(self, path: Path, max_bytes: int) -> bytes:
        try:
            return read_foreign(path, max_bytes)
        except OSError as error:
            raise PayloadError("spool_file", f"{path}: {error.strerror}: train it again") from error

    def _declaration(self, sequence: int) -> Path:
        return self.directory / f"{sequence:012d}.json"

    def _factors(self, sequence: int) -> Path:
        return self.directory / f"{sequence:012d}.factors"


def _delete(path: Path) -> None:
    """Remove whatever has this name: a directory, too, must not stop the trainer."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
