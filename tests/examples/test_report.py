from __future__ import annotations

import pytest

from examples.shakespeare.report import DemoReport, VersionRow, render_html, shortfall


def row(version, loss, *, kind="devices", status="approved"):
    return VersionRow(
        version=version,
        parent=version - 1,
        kind=kind,
        accepted=1,
        refused=0,
        staleness=(0,),
        bytes_per_update=1,
        status=status,
        losses={"device-a": loss, "device-b": loss + 1},
    )


def report(*rows, **fields):
    return DemoReport(
        title="t",
        versions=[row(0, 6.0, kind="genesis"), row(1, 5.0, kind="core update"), *rows],
        contributors=[],
        device_suites=["device-a", "device-b"],
        bits_per_byte={},
        gap={},
        timings=[],
        **fields,
    )


def test_three_approved_rounds_with_falling_loss_lack_nothing():
    """Guards the demo's exit code 0; a late core update after the rounds does not count."""
    done = report(row(2, 4.9), row(3, 4.8), row(4, 4.7), row(5, 9.0, kind="core update", status="champion"))
    assert shortfall(done, 3, first=1, last=4) == ""


@pytest.mark.parametrize(
    ("rows", "last"),
    [
        ((), 1),
        ((row(2, 4.9), row(3, 4.8)), 3),
        ((row(2, 4.9), row(3, 4.8), row(4, 4.7, status="head")), 3),
        ((row(2, 4.9), row(3, 4.8), row(4, 4.7, status="voided")), 4),
        ((row(2, 4.9), row(3, 4.8), row(4, 4.7, kind="core update")), 4),
    ],
    ids=["no round", "an empty or rejected one", "a blocked one", "a voided one", "not by devices"],
)
def test_rounds_without_an_approved_version_are_no_success(rows, last):
    """Guards against a vacuous success: no version made, none got worse."""
    n = min(len(rows), 2)
    assert shortfall(report(*rows), 3, first=1, last=last).startswith(f"{n} of 3 rounds ended with an approved version")


def test_a_round_that_did_not_help_is_named():
    """Guards that equal or higher loss in any round fails, whatever the last round reached."""
    worse = report(row(2, 4.9), row(3, 4.9), row(4, 4.0, status="champion"))
    said = shortfall(worse, 3, first=1, last=4)
    assert said.startswith("the mean device loss did not fall in every round: version 3 has 5.4000, version 2")


def test_the_report_says_what_was_not_reached():
    """Guards that the page which is still written does not look like a success."""
    assert "2 &lt; 3 rounds" in render_html(report(row(2, 4.9), shortfall="2 < 3 rounds"))
