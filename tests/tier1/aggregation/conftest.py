from __future__ import annotations

import logging
import tempfile
from collections.abc import Iterator
from pathlib import Path

import pytest
import structlog

MEMORY = Path("/dev/shm")


@pytest.fixture(scope="module")
def many_folds() -> Iterator[None]:
    """Thousands of folds: scratch files in memory where there is such a place, and no line per refused record."""
    before = tempfile.tempdir
    tempfile.tempdir = str(MEMORY) if MEMORY.is_dir() else before
    structlog.configure(wrapper_class=structlog.make_filtering_bound_logger(logging.ERROR))
    yield
    structlog.reset_defaults()
    tempfile.tempdir = before
