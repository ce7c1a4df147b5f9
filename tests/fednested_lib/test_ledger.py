"""Budgets of a device: exact for any 24 hours, booked once, and never lost to a clock."""

from __future__ import annotations

import random
from dataclasses import replace

import pytest

from fednested_lib.errors import PolicyRefused, PolicyWait
from fednested_lib.ledger import DAY_S, Charge, Ledger
from fednested_lib.privacy import epsilon
from fednested_lib.signing import sha256_hex
from tests.policies import OPEN, make_policy

DP = {"clip_norm": 1.0, "noise_multiplier": 2.0, "epsilon_total": 8.0, "delta": 1e-5}


def _charge(sequence: int, size: int = 100, z: float | None = None, variant: str = "") -> Charge:
    digest = sha256_hex(f"{sequence}{variant}".encode())
    cost = 0.0 if z is None else 1 / z**2
    return Charge(sequence=sequence, payload_sha256=digest, payload_bytes=size, inverse_z2=cost)


def _open(tmp_path) -> Ledger:
    return Ledger(tmp_path / "ledger.db")


def _wait(ledger: Ledger, charge: Charge, policy, now: float) -> float | None:
    """Charge, and return until when it has to wait, or None."""
    try:
        ledger.charge(charge, policy, now=now)
    except PolicyWait as wait:
        return wait.not_before_s
    return None


def test_bytes_and_updates_of_any_day(tmp_path):
    """At random times and sizes no 24 hours hold more than the policy says, and no wait is longer than it must."""
    policy = make_policy(bytes_per_update=400, bytes_per_day=1000, updates_per_day=5, min_interval_s=600)
    rng, ledger, now, released = random.Random(4), _open(tmp_path), 1e9, []
    for sequence in range(120):
        now += rng.choice([10, 1000, 9000])
        size = rng.randint(1, 400)
        while (until := _wait(ledger, _charge(sequence, size), policy, now)) is not None:
            assert until > now
            assert _wait(ledger, _charge(sequence, size), policy, until - 1e-3) is not None
            now = until
        released.append((now, size))
    for when, _ in released:
        window = [(at, size) for at, size in released if when - DAY_S < at <= when]
        assert len(window) <= 5
        assert sum(size for _, size in window) <= 1000
    assert all(b[0] - a[0] >= 600 for a, b in zip(released, released[1:], strict=False))


@pytest.mark.parametrize(
    ("rule", "bounds", "until"),
    [
        ("min_interval", {"min_interval_s": 60.0}, 60.0),
        ("updates_per_day", {"updates_per_day": 1}, DAY_S),
        ("bytes_per_day", {"bytes_per_update": 100, "bytes_per_day": 150}, DAY_S),
    ],
)
def test_each_budget_says_which_it_is_and_until_when(tmp_path, rule, bounds, until):
    """The rule that waits longest is named with the time at which it lets go; the same update again costs nothing."""
    ledger, policy = _open(tmp_path), make_policy(**bounds)
    ledger.charge(_charge(0), policy, now=1e9)
    ledger.charge(_charge(0), policy, now=1e9 + 1)
    with pytest.raises(PolicyWait, match=rule) as caught:
        ledger.charge(_charge(1), policy, now=1e9 + 1)
    assert (caught.value.reason, caught.value.not_before_s) == (rule, 1e9 + until)
    ledger.close()
    again = _open(tmp_path)
    with pytest.raises(PolicyWait):
        again.charge(_charge(1), policy, now=1e9 + until - 1)
    again.charge(_charge(1), policy, now=1e9 + until)


def test_a_clock_set_back_neither_frees_nor_jams(tmp_path):
    """Releases dated in the future count from now on: a budget is not free early, nor closed for years."""
    ledger, policy = _open(tmp_path), make_policy(updates_per_day=1)
    ledger.charge(_charge(0), policy, now=2e9)
    with pytest.raises(PolicyWait) as caught:
        ledger.charge(_charge(1), policy, now=1e9)
    assert caught.value.not_before_s == 1e9 + DAY_S
    ledger.charge(_charge(1), policy, now=1e9 + DAY_S)


def test_epsilon_is_spent_once_and_for_ever(tmp_path):
    """ε is that of all releases together whatever their noise; over the budget nothing leaves until a new policy."""
    adapters = [each for each in OPEN["adapters"] if each["mode"] == "fixed_a"]
    policy = make_policy(dp=DP, adapters=adapters, telemetry="off")
    ledger, left = _open(tmp_path), 0
    while epsilon(2.0, left + 1, 1e-5) <= 8.0:
        for _ in range(2):
            spent = ledger.charge(_charge(left, z=2.0), policy, now=1e9)
        left += 1
        assert spent == pytest.approx(epsilon(2.0, left, 1e-5), rel=1e-9)
    with pytest.raises(PolicyWait) as caught:
        ledger.charge(_charge(left, z=2.0), policy, now=1e9)
    assert (caught.value.reason, caught.value.not_before_s) == ("epsilon_total", None)
    assert left > 1
    larger = make_policy(version=2, dp={**DP, "epsilon_total": 20.0}, adapters=adapters, telemetry="off")
    spent = ledger.charge(_charge(left, z=1.0), larger, now=1e9)
    assert spent == pytest.approx(epsilon(1 / (left / 4 + 1) ** 0.5, 1, 1e-5), rel=1e-9)


def test_other_bytes_of_one_number_cost_anew(tmp_path):
    """What a new policy makes of an update that was booked before a crash is booked besides, never instead."""
    ledger, policy = _open(tmp_path), make_policy(updates_per_day=2)
    ledger.charge(_charge(0), policy, now=1e9)
    ledger.charge(_charge(0, variant="other"), policy, now=1e9)
    with pytest.raises(PolicyWait):
        ledger.charge(_charge(1), policy, now=1e9)


def test_equal_bytes_under_another_number_cost_anew(tmp_path):
    """Factors that round to the same bytes are an update each time: a trainer that repeats them is booked each time."""
    ledger, policy = _open(tmp_path), make_policy(updates_per_day=1)
    first = _charge(0)
    ledger.charge(first, policy, now=1e9)
    with pytest.raises(PolicyWait):
        ledger.charge(replace(first, sequence=1), policy, now=1e9)


def test_the_set_of_experts_is_fixed_per_policy(tmp_path):
    """The first update under a policy version fixes its experts; another set needs a new version."""
    ledger = _open(tmp_path)
    for now in (1e9, 2e9):
        ledger.fix_experts(make_policy(), "a" * 64, now=now)
    with pytest.raises(PolicyRefused) as caught:
        ledger.fix_experts(make_policy(), "b" * 64, now=3e9)
    assert caught.value.reason == "experts_changed"
    ledger.fix_experts(make_policy(version=2), "b" * 64, now=3e9)


def test_with_a_period_the_set_changes_once_in_so_many_days(tmp_path):
    """Another set waits until the period is over, counted from the last change; a clock set back shortens nothing."""
    ledger, policy, day = _open(tmp_path), make_policy(experts_period_days=7), 86_400
    ledger.fix_experts(policy, "a" * 64, now=1e9)
    for early in (1e9, 1e9 + 7 * day - 1):
        with pytest.raises(PolicyWait) as caught:
            ledger.fix_experts(policy, "b" * 64, now=early)
        assert (caught.value.reason, caught.value.not_before_s) == ("experts_changed", 1e9 + 7 * day)
    ledger.fix_experts(policy, "b" * 64, now=1e9 + 7 * day)
    with pytest.raises(PolicyWait):
        ledger.fix_experts(policy, "a" * 64, now=1e9 + 8 * day)
    with pytest.raises(PolicyWait) as caught:
        ledger.fix_experts(policy, "a" * 64, now=1e9)
    assert caught.value.not_before_s == 1e9 + 7 * day
