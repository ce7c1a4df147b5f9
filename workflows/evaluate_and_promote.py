"""The outer loop: the automatic gate advances head, a person's decision makes it champion.

    W_head     ← W_candidate   if no domain forgets more than the bound, else halve η and fold again, then reject
    W_champion ← W_head        if SecOps approves, else head is voided and its successors are folded again without it

A rejection, by the gate or by a person, is a recorded result, never a failed execution.
"""

from flytekit import workflow

from tasks.control.decision import ask_secops
from tasks.failures import evaluate_and_promote_failed
from tasks.federation import ConfigFile
from tasks.promotion import NEWEST, decide, report, settle
from tier1.loops.records import Outcome
from workflows.order import in_order


@workflow(on_failure=evaluate_and_promote_failed)
def evaluate_and_promote(config: ConfigFile, candidate: str = NEWEST, channel: str = "console") -> Outcome:
    """W_head ← W_candidate if the automatic gate passes,  W_champion ← W_head if SecOps approves.

    Args:
        config: the federation's tier1.yaml.
        candidate: digest of the candidate; empty means what waits: the newest unsettled one, else the newest undecided
            version.
        channel: how a bare answer reaches the gate, `console` or, in the local profile only, `flag`.

    Returns:
        The verdict and the champion now.
    """
    settled = settle(config=config, candidate=candidate)
    shown = report(config=config, settled=settled)
    answer = ask_secops(settled=settled)
    in_order(shown, answer)
    return decide(config=config, settled=settled, answer=answer, channel=channel)
