"""Held-out suites, the automatic gate, and its report."""
