"""Versions as a function of the log: cut, manifest chain, replay, audit."""
