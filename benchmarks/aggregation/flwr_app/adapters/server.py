"""The server: a round whenever `deployment.py` leaves `go-<round>`; what it took is written to `done-<round>.json`."""

from __future__ import annotations

import json
import time
from pathlib import Path

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run rounds until `stop` appears."""
    directory, clients, number = Path(context.run_config["directory"]), int(context.run_config["clients"]), 0
    while not (directory / "stop").exists():
        if not (directory / f"go-{number}").exists() or len(list(grid.get_node_ids())) < clients:
            time.sleep(0.2)
            continue
        partial = directory / f"done-{number}.partial"
        partial.write_text(json.dumps(run_round(grid)))
        partial.rename(directory / f"done-{number}.json")
        number += 1


def run_round(grid: Grid) -> dict[str, float]:
    """Ask every client for its adapter and average; seconds count from the first client's first Array on."""
    asked = [
        Message(RecordDict({"config": ConfigRecord({})}), dst_node_id=node, message_type="train")
        for node in grid.get_node_ids()
    ]
    replies = list(grid.send_and_receive(asked))
    received = time.time()
    failed = [str(reply.error) for reply in replies if reply.has_error()]
    if failed:
        return {"error": failed[0]}
    began = min(reply.content["metrics"]["began"] for reply in replies)
    arrays, _ = FedAvg().aggregate_train(1, replies)
    return {"transport": received - began, "aggregate": time.time() - received, "tensors": len(arrays)}
