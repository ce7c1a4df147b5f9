"""What a hostile trainer can do: attempts in its place, through the function that `run-client` starts a trainer with.

A machine where two users or the namespace are not possible reads 0, which is short.
"""

from __future__ import annotations

from functools import cache

from benchmarks.isolation_scene import NotPossible, Outcome, attack
from benchmarks.registry import figure

KINDS = ("network", "reading", "writing", "power")


@cache
def _attacked(users: bool) -> Outcome | None:
    """Attack once and list every attempt."""
    try:
        found = attack(users=users)
    except NotPossible as reason:
        print(f"isolation cannot be shown here: {reason}")
        return None
    for kind in KINDS:
        for name, why in found.attempts[kind].items():
            print(f"{found.level:8} {kind:8} {name:45} {why or 'WORKED'}")
    if missing := {name: why for name, why in found.attempts["own"].items() if why is not None}:
        raise RuntimeError(f"a trainer could not do its work: {missing}")
    return found


@figure("isolation.attempts", unit="1", bound=">= 20", cls="full")
def isolation_attempts() -> float:
    """Ways that a hostile trainer tries: sockets, the sidecar's files and process, directories not its own."""
    found = _attacked(True)
    return found.refused(*KINDS)[1] if found else 0.0


@figure("isolation.attempts_refused", unit="%", bound="== 100", cls="full")
def isolation_attempts_refused() -> float:
    """Of these, refused with two users and an empty network namespace; unconfined, the same attempts work."""
    found = _attacked(True)
    if found is None:
        return 0.0
    refused, of = found.refused(*KINDS)
    return 100 * refused / of


@figure("isolation.network_refused", unit="%", bound="== 100", cls="full")
def isolation_network_refused() -> float:
    """Of the attempts to reach anybody, refused with one user only, where the kernel gives a network namespace."""
    found = _attacked(False)
    if found is None:
        return 0.0
    refused, of = found.refused("network")
    return 100 * refused / of
