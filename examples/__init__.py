"""Runnable examples: each starts the real processes of a federation on data that anybody may have."""
