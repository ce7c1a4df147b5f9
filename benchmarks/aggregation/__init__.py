"""Aggregation side by side with peers: `python -m benchmarks.aggregation` (see `__main__.py`)."""

from __future__ import annotations
