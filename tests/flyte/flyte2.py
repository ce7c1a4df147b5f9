"""The workflows as `pyflyte-migrate` runs them on Flyte 2, called with a path and otherwise as they are.

The command line of Flyte 2 hands over files of its own kind, which flyte-migrate 0.0.3 does not take for a FlyteFile.
"""

from __future__ import annotations

from flytekit import task, workflow

from tasks.federation import ConfigFile
from tier1.loops.records import CandidateRef, EngineReport, Outcome, Published, SuitesMeasured
from workflows.aggregate_experts import aggregate_experts
from workflows.aggregate_experts_sharded import aggregate_experts_sharded
from workflows.broadcast import broadcast
from workflows.core_update import core_update
from workflows.data_engine import data_engine
from workflows.data_engine_regions import data_engine_regions
from workflows.evaluate_and_promote import evaluate_and_promote
from workflows.evaluate_suites import evaluate_suites
from workflows.nested_round import Round, nested_round


@task
def file_at(path: str) -> ConfigFile:
    return ConfigFile(path)


@workflow
def core_update_at(path: str) -> CandidateRef:
    return core_update(config=file_at(path=path), run="first")


@workflow
def aggregate_experts_at(path: str) -> CandidateRef:
    return aggregate_experts(config=file_at(path=path))


@workflow
def evaluate_and_promote_at(path: str) -> Outcome:
    return evaluate_and_promote(config=file_at(path=path), candidate="", channel="console")


@workflow
def broadcast_at(path: str) -> Published:
    return broadcast(config=file_at(path=path))


@workflow
def data_engine_at(path: str) -> EngineReport:
    return data_engine(config=file_at(path=path))


@workflow
def aggregate_experts_sharded_at(path: str) -> CandidateRef:
    return aggregate_experts_sharded(config=file_at(path=path), shards=2)


@workflow
def evaluate_suites_at(path: str) -> SuitesMeasured:
    return evaluate_suites(config=file_at(path=path), candidate="")


@workflow
def data_engine_regions_at(path: str) -> EngineReport:
    return data_engine_regions(config=file_at(path=path))


@workflow
def nested_round_at(path: str) -> Round:
    return nested_round(config=file_at(path=path), core=True, channel="console")
