"""Decisions that a person sends: `fednested approvals`, from the approver's desk to the gate that waits on Flyte.

`commands.py` is the command group, `gates.py` finds and answers gates over FlyteAdmin. A decision is a token of tier 1
(`tier1/governance/approvals.py`); Flyte only carries it, so nothing here can approve on its own.
"""
