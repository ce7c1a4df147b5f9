"""flwr's side in one process; run by the Python of flwr's environment, never by ours.

    python flwr_worker.py client-0.npz client-1.npz …

reads a command a line from standard input, answers with one JSON line each:

    fedavg          Array and ArrayRecord of every tensor → deflate → object store → pull and inflate → FedAvg
    krum F          the same records through Krum with F malicious nodes, aggregation alone
    nan             FedAvg where every number of the first client is NaN
    write PATH      the last aggregate, as .npz
    load PATH …     other clients' tensors instead of the ones it was started with

`fedavg` is what flwr cannot do without, and less than it does: its own serialisation and its own in-memory object store
with its own push and pull functions in one process, so no HTTP, no process, no polling and one hop instead of three.
"""

from __future__ import annotations

import json
import logging
import sys
import time

import numpy as np
from flwr.app import Array, ArrayRecord, Message, MetricRecord, RecordDict
from flwr.serverapp.strategy import FedAvg, Krum
from flwr.supercore.inflatable.inflatable_object import (
    get_all_nested_objects,
    get_object_tree,
    no_object_id_recompute,
)
from flwr.supercore.inflatable.inflatable_utils import pull_and_inflate_object_from_tree, push_objects
from flwr.supercore.object_store.in_memory_object_store import InMemoryObjectStore
from flwr.supercore.task_identity import TaskIdentity

logging.getLogger("flwr").setLevel(logging.ERROR)
TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1


def tensors(path: str) -> dict[str, np.ndarray]:
    """Split the stacked factors into one tensor per expert and factor, as a peer's adapter has them."""
    with np.load(path) as stored:
        return {
            f"{name}|{expert}": np.ascontiguousarray(each)
            for name in stored.files
            for expert, each in enumerate(stored[name])
        }


def reply(content: dict[str, np.ndarray], client: int) -> Message:
    """Build a client's reply as an app does."""
    arrays = ArrayRecord({name: Array(array) for name, array in content.items()})
    record = RecordDict({"arrays": arrays, "metrics": MetricRecord({"num-examples": 1})})
    return Message(content=record, message_type="train", dst_node_id=client)


def through_store(message: Message) -> tuple[Message, int]:
    """Deflate, push, pull and inflate; returns the message and the bytes of its objects."""
    store = InMemoryObjectStore()
    with no_object_id_recompute():
        objects, tree = get_all_nested_objects(message), get_object_tree(message)
        missing = store.preregister(1, tree)
        push_objects(objects, store.put, object_ids_to_push=set(missing))
    size = sum(len(entry.content) for entry in store.store.values())
    return pull_and_inflate_object_from_tree(tree, store.get, store.delete, return_type=Message), size


def fedavg(clients: list[dict[str, np.ndarray]]) -> tuple[ArrayRecord, dict]:
    """Run the path once and time its phases."""
    began = time.perf_counter()
    received = [through_store(reply(content, number)) for number, content in enumerate(clients)]
    moved = time.perf_counter()
    arrays, _ = FedAvg().aggregate_train(1, [message for message, _ in received])
    ended = time.perf_counter()
    seconds = {"transport": moved - began, "aggregate": ended - moved}
    return arrays, {"seconds": seconds, "bytes": received[0][1], "tensors": len(arrays)}


def krum(clients: list[dict[str, np.ndarray]], f: int) -> tuple[ArrayRecord, dict]:
    """Time Krum's aggregation alone, with the records built before."""
    replies = [reply(content, number) for number, content in enumerate(clients)]
    began = time.perf_counter()
    arrays, _ = Krum(num_malicious_nodes=f).aggregate_train(1, replies)
    return arrays, {"seconds": {"aggregate": time.perf_counter() - began}, "tensors": len(arrays)}


def nan(clients: list[dict[str, np.ndarray]]) -> tuple[ArrayRecord, dict]:
    """Count the NaN that a client whose every number is NaN leaves in FedAvg's result."""
    broken = {name: np.full_like(array, np.nan) for name, array in clients[0].items()}
    replies = [reply(content, number) for number, content in enumerate([broken, *clients[1:]])]
    arrays, _ = FedAvg().aggregate_train(1, replies)
    found = [np.isnan(array.numpy()) for array in arrays.values()]
    return arrays, {"nan": int(sum(each.sum() for each in found)), "of": int(sum(each.size for each in found))}


def main(paths: list[str]) -> None:
    """Answer commands until standard input ends."""
    clients, last = [tensors(path) for path in paths], None
    for line in sys.stdin:
        name, *arguments = line.split()
        answer: dict = {}
        if name == "load":
            clients = [tensors(path) for path in arguments]
        elif name == "fedavg":
            last, answer = fedavg(clients)
        elif name == "krum":
            last, answer = krum(clients, int(arguments[0]))
        elif name == "nan":
            last, answer = nan(clients)
        elif name == "write":
            np.savez(arguments[0], **{key: array.numpy() for key, array in last.items()})
        print(json.dumps(answer), flush=True)


if __name__ == "__main__":
    main(sys.argv[1:])
