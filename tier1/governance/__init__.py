"""Governance at tier 1: who may, what was made from what, which version serves, and who approved it."""
