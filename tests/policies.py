"""Policies of tests and benchmarks: the example, but for the adapters that they use and what they say themselves."""

from __future__ import annotations

from pathlib import Path

import yaml

from fednested_lib.policy import EXAMPLE, Policy, sign_policy, write_policy
from fednested_lib.signing import Signer

SITE = Signer.from_seed(b"site policy key, for tests only!")
ADAPTERS = [{"mode": mode, "rank": r, "alpha": 2.0 * r} for mode in ("lora", "fixed_a") for r in range(1, 65)]
OPEN = {"adapters": ADAPTERS, "encodings": ["int8", "int4", "fp16", "fp32"]}


def make_policy(**changes) -> Policy:
    """Return a policy in memory."""
    example = yaml.safe_load(EXAMPLE.format(federation="fednested"))
    return Policy.model_validate({**example, **OPEN, **changes})


def write_text_policy(path: Path, *, comment: str, rank: int) -> None:
    """Write and sign the example with a comment at its top, for adapters of a rank."""
    text = EXAMPLE.format(federation="fednested").replace("rank: 8, alpha: 16.0", f"rank: {rank}, alpha: {2.0 * rank}")
    path.write_text(f"# {comment}\n{text}")
    sign_policy(path, SITE)


def pin_policy(directory: Path, *, federation: str = "fednested", **changes) -> dict[str, str]:
    """Write and sign a policy, and return the section of a device configuration that pins it."""
    pinned = write_policy(directory / "policy.yaml", SITE, federation=federation, **{**OPEN, **changes})
    return pinned.model_dump(mode="json")
