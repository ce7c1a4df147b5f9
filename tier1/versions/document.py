"""Documents: immutable, strict, with canonical bytes; what the manifest chain is written in."""

from __future__ import annotations

from typing import ClassVar

from pydantic import BaseModel, ConfigDict, model_serializer

from fednested_lib.signing import canonical_json, sha256_hex


class Document(BaseModel):
    """Base: unknown fields are refused, instances are immutable, floats are finite."""

    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False)

    def to_bytes(self) -> bytes:
        """Return the canonical bytes."""
        return canonical_json(self.model_dump(mode="json"))

    def digest(self) -> str:
        """Return the SHA-256 of the canonical bytes."""
        return sha256_hex(self.to_bytes())


class GrownDocument(Document):
    """A document that got fields after chains were written with it.

    A field of `later` is written only when it is not at its default, and its default never changes: it is what the code
    before it did. So an entry that was signed without it keeps its bytes, and a manifest still says every setting.
    """

    later: ClassVar[frozenset[str]] = frozenset()

    @model_serializer(mode="wrap")
    def _without_defaults(self, handler):
        fields = type(self).model_fields
        absent = {
            name for name in self.later if getattr(self, name) == fields[name].get_default(call_default_factory=True)
        }
        return {name: value for name, value in handler(self).items() if name not in absent}
