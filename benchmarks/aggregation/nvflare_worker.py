"""NVFlare's side in one process; run by the Python of NVFlare's environment, never by ours.

    python nvflare_worker.py client-0.npz client-1.npz …

reads `fedavg` from standard input and answers with one JSON line: what its FedAvg's averaging of the tensors takes
(`WeightedAggregationHelper`, as its controller calls it), with the tensors in memory: no serialisation, no transport.
"""

from __future__ import annotations

import json
import sys
import time

import numpy as np
from nvflare.app_common.aggregators.weighted_aggregation_helper import WeightedAggregationHelper


def tensors(path: str) -> dict[str, np.ndarray]:
    """Split the stacked factors into one tensor per expert and factor, as a peer's adapter has them."""
    with np.load(path) as stored:
        return {
            f"{name}|{expert}": np.ascontiguousarray(each)
            for name in stored.files
            for expert, each in enumerate(stored[name])
        }


def main(paths: list[str]) -> None:
    """Answer commands until standard input ends."""
    clients, last = [tensors(path) for path in paths], {}
    for line in sys.stdin:
        name, *arguments = line.split()
        answer: dict = {}
        if name == "fedavg":
            helper = WeightedAggregationHelper()
            began = time.perf_counter()
            for number, content in enumerate(clients):
                helper.add(content, weight=1.0, contributor_name=str(number), contribution_round=1)
            last = helper.get_result()
            answer = {"seconds": {"aggregate": time.perf_counter() - began}, "tensors": len(last)}
        elif name == "write":
            np.savez(arguments[0], **last)
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
