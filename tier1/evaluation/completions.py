"""Task accuracy of a suite of {"prompt", "completion"} records: how often the model would write the completion itself.

    accuracy = #{records : every token of the completion is argmax p(· | prompt, the tokens before it)} / #records

This is greedy exact match: `is_greedy` of a loglikelihood request in EleutherAI's lm-evaluation-harness, what it counts
as accuracy for LAMBADA. The prompt and its newline are tokenized alone and with the completion; what the longer one has
more is the completion, as there. The prompt is cut on the left to the row length that the suite is measured with; a
record whose completion alone is longer is left out.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from fednested_lib.text import Row, load_tokenizer, read_jsonl

if TYPE_CHECKING:
    from torch import nn

IGNORED = -1  # in the wanted tokens: not part of the completion


def read_pairs(path: Path) -> list[tuple[str, str]]:
    """Return (prompt, completion) of the usable records that have both and no text of their own, in file order.

    Raises:
        DataError: the file is missing or empty.
    """
    usable = {record.line for record in read_jsonl(path) if isinstance(record, Row)}
    pairs = []
    with path.open("rb") as file:
        for number, line in enumerate(file, start=1):
            if number in usable:
                record = json.loads(line.decode("utf-8-sig" if number == 1 else "utf-8"))
                if "text" not in record and record["completion"].strip():
                    pairs.append((record["prompt"], record["completion"]))
    return pairs


def pack_pairs(pairs: list[tuple[str, str]], tokenizer: bytes, *, seq_len: int) -> tuple[np.ndarray, np.ndarray]:
    """Lay pairs into rows, one each, filled up on the right; a causal model does not see what comes after.

    Args:
        pairs: of prompt and completion.
        tokenizer: bytes of the snapshot's ``tokenizer.json``.
        seq_len: predicted tokens per row.

    Returns:
        (given, wanted): int64 [n, seq_len] each; `wanted` is `IGNORED` where the completion is not.
    """
    encoder = load_tokenizer(tokenizer)
    given, wanted = [], []
    for prompt, completion in pairs:
        whole = encoder.encode(f"{prompt}\n{completion}", add_special_tokens=False).ids
        n_given = len(encoder.encode(f"{prompt}\n", add_special_tokens=False).ids)
        n_completion = len(whole) - n_given
        if not 1 <= n_completion <= seq_len:
            continue
        row = whole[-(seq_len + 1) :]
        fill = seq_len + 1 - len(row)
        given.append([*row[:-1], *[row[-1]] * fill])
        wanted.append([*[IGNORED] * (len(row) - 1 - n_completion), *row[-n_completion:], *[IGNORED] * fill])
    shape = (len(given), seq_len)
    return np.array(given, np.int64).reshape(shape), np.array(wanted, np.int64).reshape(shape)


def exact_matches(model: nn.Module, given: np.ndarray, wanted: np.ndarray, batch_size: int) -> list[int]:
    """Return 1 for each record whose completion the model would write greedily, else 0.

    Args:
        model: put into evaluation mode.
        given: int64 [n, seq_len], of `pack_pairs`.
        wanted: likewise.
        batch_size: rows at a time; memory only.
    """
    import torch

    from fednested_lib.training import deterministic

    model.eval()
    found: list[int] = []
    with deterministic(), torch.inference_mode():
        for start in range(0, len(given), batch_size):
            batch = torch.from_numpy(given[start : start + batch_size]).to(model.device)
            choice = model(input_ids=batch, use_cache=False).logits.argmax(dim=-1).cpu().numpy()
            target = wanted[start : start + batch_size]
            found += ((choice == target) | (target == IGNORED)).all(axis=1).astype(int).tolist()
    return found
