"""The client: its adapter, one tensor per expert and factor, as an ArrayRecord."""

from __future__ import annotations

import time
from pathlib import Path

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    """Read what training would have left in memory, note the time, and reply."""
    path = Path(context.run_config["directory"]) / f"client-{context.node_config['partition-id']}.npz"
    with np.load(path) as stored:
        content = {
            f"{name}|{expert}": np.ascontiguousarray(each)
            for name in stored.files
            for expert, each in enumerate(stored[name])
        }
    began = time.time()
    arrays = ArrayRecord({name: Array(array) for name, array in content.items()})
    metrics = MetricRecord({"num-examples": 1, "began": began})
    return Message(RecordDict({"arrays": arrays, "metrics": metrics}), reply_to=message)
