"""From measurements to findings and tasks: hysteresis, cooldown and budget, as pure functions.

    not open   value ≥ raise_at             → raised
    open       value ≥ clear_at, or unknown → open
    open       value < clear_at             → cleared

A finding that is open asks for its loop when it has not done so within `cooldown_s`, open all the while or not, so that
a value that swings through both bounds does not ask at every swing. What is asked for in one turn under one loop is one
task: a core update answers three drifting regions at once. A day has a budget of tasks; what it refuses is asked for
when there is room again, the worst first.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from fednested_lib.events import TaskReason, TrainingTask
from tier1.config import DataEngineConfig, FindingBounds
from tier1.loops.fleet_statistics import Measurement
from tier1.loops.records import Finding

DAY_S = 86_400.0


@dataclass(frozen=True, kw_only=True)
class Open:
    """A finding that is open: since when, and when it was last measured, seconds since the epoch."""

    opened_at: float
    measured_at: float


@dataclass(frozen=True, kw_only=True)
class Asked:
    """A task that was asked for, and the findings it answers."""

    at: float
    task_id: str
    findings: tuple[str, ...]


@dataclass(frozen=True, kw_only=True)
class Decision:
    """What one turn makes of its measurements."""

    findings: list[Finding]
    tasks: list[TrainingTask]
    opened: dict[str, Open]
    asked: list[Asked]


def bounds_of(settings: DataEngineConfig, kind: str) -> FindingBounds:
    """Return the bounds of a kind of finding."""
    return getattr(settings, kind)


def decide(
    measured: Sequence[Measurement],
    opened: Mapping[str, Open],
    asked: Sequence[Asked],
    *,
    now: float,
    settings: DataEngineConfig,
    federation: str,
) -> Decision:
    """Return findings, tasks and what to remember.

    Args:
        measured: this turn's statistics.
        opened: key → findings that were open before.
        asked: tasks of the past, at least those of the last day and cooldown.
        now: seconds since the epoch; ends the window.
        settings: bounds, cooldown, budget.
        federation: whose tasks these are.
    """
    # What lies in the future is of a clock that was set back: it would hold the budget until then.
    asked = [each for each in asked if 0 <= now - each.at < max(DAY_S, settings.cooldown_s)]
    status = {each.key: _status(each, opened, settings) for each in measured}
    noted = [each for each in measured if status[each.key]]
    still = _still_open(noted, status, opened, now, settings.reference_s)
    wishes, refused = _wishes([each for each in noted if each.key in still], asked, now, settings)
    tasks, over_budget = _tasks(wishes, asked, now, settings, federation)
    answered = {key: task.task_id for task, keys in tasks for key in keys}
    why = refused | dict.fromkeys(over_budget, "budget")
    findings = [
        Finding(
            kind=each.kind,
            subject=each.subject,
            status=status[each.key],
            value=each.value,
            raise_at=bounds_of(settings, each.kind).raise_at,
            clear_at=bounds_of(settings, each.kind).clear_at,
            window_s=settings.window_s,
            devices=each.devices,
            records=each.records,
            opened_at=still[each.key].opened_at if each.key in still else opened[each.key].opened_at,
            task_id=answered.get(each.key, ""),
            why_no_task="" if each.key in answered else why.get(each.key, "cleared"),
        )
        for each in noted
    ]
    new = [Asked(at=now, task_id=task.task_id, findings=keys) for task, keys in tasks]
    return Decision(findings=findings, tasks=[task for task, _ in tasks], opened=still, asked=asked + new)


def _status(each: Measurement, opened: Mapping[str, Open], settings: DataEngineConfig) -> str:
    bounds = bounds_of(settings, each.kind)
    if each.key in opened:
        return "open" if each.value >= bounds.clear_at else "cleared"
    return "raised" if each.value >= bounds.raise_at else ""


def _still_open(
    noted: list[Measurement], status: Mapping[str, str], opened: Mapping[str, Open], now: float, reference_s: float
) -> dict[str, Open]:
    """Return what is open after this turn; what nobody could measure for as long as rows are kept is forgotten."""
    still = {
        key: each for key, each in opened.items() if key not in status and 0 <= now - each.measured_at < reference_s
    }
    for each in noted:
        if status[each.key] != "cleared":
            since = opened[each.key].opened_at if each.key in opened else now
            still[each.key] = Open(opened_at=since, measured_at=now)
    return still


def _wishes(
    current: list[Measurement], asked: Sequence[Asked], now: float, settings: DataEngineConfig
) -> tuple[dict[str, list[Measurement]], dict[str, str]]:
    """Return loop → findings that ask for it now, the worst first; and key → why the others do not ask."""
    cooling = {key for each in asked if now - each.at < settings.cooldown_s for key in each.findings}
    wishes: dict[str, list[Measurement]] = {}
    refused: dict[str, str] = {}
    for each in sorted(current, key=lambda each: -each.value / bounds_of(settings, each.kind).raise_at):
        loop = bounds_of(settings, each.kind).task
        if loop is None:
            refused[each.key] = "no_loop"
        elif each.key in cooling:
            refused[each.key] = "cooldown"
        else:
            wishes.setdefault(loop, []).append(each)
    return wishes, refused


def _tasks(
    wishes: Mapping[str, list[Measurement]],
    asked: Sequence[Asked],
    now: float,
    settings: DataEngineConfig,
    federation: str,
) -> tuple[list[tuple[TrainingTask, tuple[str, ...]]], list[str]]:
    """Return tasks with the findings that each answers, as many as the day has room for; and the findings left out."""
    room = settings.tasks_per_day - sum(now - each.at < DAY_S for each in asked)
    tasks, left_out = [], []
    for loop, group in wishes.items():
        keys = tuple(each.key for each in group)
        if len(tasks) >= room:
            left_out += keys
        else:
            tasks.append((_task(loop, group, now, settings, federation), keys))
    return tasks, left_out


def _task(loop: str, group: list[Measurement], now: float, settings: DataEngineConfig, federation: str) -> TrainingTask:
    """Return the task about a group of findings, named after the worst and the end of its window.

    Not after a count of turns: an engine that lost its state would count anew, and Flyte admits a name once, for ever.
    """
    worst = group[0]
    ended = time.strftime("%Y%m%dt%H%M%S", time.gmtime(now))
    return TrainingTask(
        federation=federation,
        task_id=f"{worst.key}.{ended}",
        kind=loop,
        reason=TaskReason(
            finding=worst.kind,
            subject=worst.subject,
            value=worst.value,
            bound=bounds_of(settings, worst.kind).raise_at,
            window_s=settings.window_s,
            devices=worst.devices,
            records=worst.records,
            others=len(group) - 1,
        ),
    )
