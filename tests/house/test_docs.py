from __future__ import annotations

from pathlib import Path

from pydantic import BaseModel

from fednested_lib.config import Tier2Config
from tier1.config import Tier1Config

ROOT = Path(__file__).resolve().parents[2]


def keys(model: type[BaseModel], prefix: str = "") -> list[str]:
    found = []
    for name, field in model.model_fields.items():
        kind = field.annotation
        inner = isinstance(kind, type) and issubclass(kind, BaseModel)
        found += keys(kind, f"{prefix}{name}.") if inner else [f"{prefix}{name}"]
    return found


def test_every_key_of_both_configurations_is_documented():
    """A new key without a row in docs/configuration.md is red."""
    text = (ROOT / "docs/configuration.md").read_text(encoding="utf-8")
    missing = [key for model in (Tier1Config, Tier2Config) for key in keys(model) if f"`{key}`" not in text]
    assert missing == []
