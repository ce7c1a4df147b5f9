"""The targets that need a cluster say what they lack, in one line and at once."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.results import ROOT


def make(home: Path, *arguments: str, **variables: str) -> subprocess.CompletedProcess[str]:
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("FEDNESTED_", "FLYTE", "MAKE"))}
    environment = {**kept, "HOME": str(home), **variables}
    command = ["make", f"VENV={sys.prefix}", "STAMP=", *arguments]
    return subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("target", ["register-dev", "register-prod", "activate", "trigger"])
def test_without_a_flyte_the_remedy_is_named(target: str, tmp_path: Path) -> None:
    """Flytekit alone would retry a sandbox's address for a minute."""
    done = make(tmp_path, target)
    assert done.returncode == 2
    assert done.stderr.startswith("no Flyte is named: set FLYTE_PLATFORM_URL")


@pytest.mark.parametrize(
    ("arguments", "lacking"),
    [
        (("register-prod",), "FEDNESTED_REGISTRY is not set: the registry that the cluster pulls from"),
        (("register-prod", "FEDNESTED_REGISTRY=ghcr.io/acme"), "FEDNESTED_CONFIG_URI is not set: where pods find"),
        (("register-prod", "FEDNESTED_REGISTRY=x", "FEDNESTED_CONFIG_URI=s3://x"), "VERSION is not set: a name"),
        (("activate",), "PLAN is not set: nested_round_fast or sensed_round"),
        (("activate", "PLAN=sensed_round"), "VERSION is not set: the registered version"),
    ],
)
def test_each_missing_variable_is_named(arguments: tuple[str, ...], lacking: str, tmp_path: Path) -> None:
    """Name, what it is for, and an example; nothing is registered under a default that nobody chose."""
    done = make(tmp_path, *arguments, FLYTE_PLATFORM_URL="127.0.0.1:1")
    assert done.returncode == 2
    assert done.stderr.startswith(lacking), done.stderr


def test_an_uncommitted_checkout_is_not_registered_for_production(tmp_path: Path) -> None:
    """A version has to be found again; what nobody committed is in no history."""
    question = ["git", "rev-parse", "--absolute-git-dir"]
    where = subprocess.run(question, cwd=ROOT, capture_output=True, text=True, check=True)
    empty = {"GIT_DIR": where.stdout.strip(), "GIT_WORK_TREE": str(tmp_path), "GIT_OPTIONAL_LOCKS": "0"}
    settings = ("FEDNESTED_REGISTRY=x", "FEDNESTED_CONFIG_URI=s3://x", "VERSION=v1")
    done = make(tmp_path, "register-prod", *settings, FLYTE_PLATFORM_URL="127.0.0.1:1", **empty)
    assert done.returncode == 2
    assert "uncommitted changes: commit them so that VERSION=v1" in done.stderr
