"""The device library and the contract both tiers share.

Importing this package costs nothing: heavy modules (torch, transformers, confluent-kafka) are imported by the module
that needs them, at the time it needs them.
"""

from __future__ import annotations

__version__ = "0.1.0"
