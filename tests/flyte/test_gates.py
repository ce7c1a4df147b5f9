"""The approval gate on this machine: asked when a version waits, answerable at the terminal and by a provider."""

from __future__ import annotations

import io
import sys

import click
import pytest

from services.gates import answer_gates
from tasks.control.decision import ask_secops
from tier1.loops.records import Settled

WAITING = Settled(status="head", version=3, manifest="ab" * 32, candidate="cd" * 32, tries=1, reason="")
EMPTY = Settled(status="nothing", version=2, manifest="", candidate="", tries=0, reason="nothing arrived")
REFUSED = Settled(status="rejected", version=2, manifest="ab" * 32, candidate="cd" * 32, tries=3, reason="comedy rose")


def test_a_provider_answers_once_when_the_version_waits() -> None:
    """The provider is called when the question is asked, once, and its answer arrives whole."""
    token = "eyJ." + "x" * 3000  # longer than a terminal's line buffer
    answers = iter([token])
    stdin = sys.stdin
    with answer_gates(lambda: next(answers)):
        assert ask_secops(settled=WAITING) == token
    assert sys.stdin is stdin


@pytest.mark.parametrize("settled", [EMPTY, REFUSED], ids=lambda settled: settled.status)
def test_nobody_is_asked_when_there_is_nothing_to_decide(settled: Settled) -> None:
    """A scheduled round that was empty or refused by the gate must not wait two days for a person."""

    def nobody() -> str:
        raise AssertionError("asked")

    with answer_gates(nobody):
        assert ask_secops(settled=settled) == ""


def test_an_answer_typed_at_the_terminal(monkeypatch: pytest.MonkeyPatch) -> None:
    """A person can type the decision with a reason; an empty line is asked again and never approves."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n\nreject: sonnets got worse\n"))
    assert ask_secops(settled=WAITING) == "reject: sonnets got worse"


def test_no_answer_aborts_and_gives_the_terminal_back() -> None:
    """An empty answer ends the run instead of approving or asking for ever; standard input is restored all the same."""
    stdin = sys.stdin
    with pytest.raises(click.Abort), answer_gates(lambda: "  "):
        ask_secops(settled=WAITING)
    assert sys.stdin is stdin


def test_an_answer_is_one_line() -> None:
    """A token pasted with line breaks must not answer the next gate as well."""
    with answer_gates(lambda: "reject: two\nlines"):
        assert ask_secops(settled=WAITING) == "reject: two lines"
