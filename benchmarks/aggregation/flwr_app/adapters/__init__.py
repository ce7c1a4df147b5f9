"""A flwr app: FedAvg of LoRA adapters."""

from __future__ import annotations
