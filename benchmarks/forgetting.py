"""Five domains of real text, one core update after the other: what a model forgets, and what safeguards save.

    gain_k     = L_k(base) − min_s L_k(s)                      what domain k had gained at the best stage s
    forgetting = mean over the four older domains of (L_k(last) − min_s L_k(s)) / gain_k
    kept       = (L_5(base) − L_5(last)) with safeguards / the same without           what the newest domain gains

L_k is the held-out loss of domain k in nats per token; the base has learned a sixth domain. A stage is a core update as
`tier1/loops/core_update.py` runs it: from the model before, with a new optimiser, on the text of its domain alone. The
safeguards may look at `BUFFER` rows per domain before it (the base's too), a twentieth of what it was trained on. EWC
looks at no old text: its Fisher is taken at the end of every stage. Settings were chosen on the seeds `TUNED_ON`, the
claims are of others. `python -m benchmarks.forgetting --write` makes the table of docs/forgetting.md anew.
"""

from __future__ import annotations

import gzip
import sys
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path

import numpy as np
from torch import nn

from examples.shakespeare.corpus import read_plays
from fednested_lib.text import load_tokenizer, pack
from fednested_lib.training import mean_loss
from tier1.evaluation.suites import evenly_spaced
from tier1.training.model import initial_model
from tier1.training.pace import Frequencies
from tier1.training.safeguarded import SafeguardedBackend
from tier1.training.safeguards import (
    Ewc,
    Freeze,
    Memory,
    Rehearsed,
    Safeguards,
    fisher_diagonal,
)
from tier1.training.settings import TrainSettings
from tier1.training.tokenizer import train_tokenizer
from tier1.training.trainer import train

TUNED_ON, CLAIMED_ON = (0,), (2, 3, 4)
BASE, DOMAINS = "plays", ("readmes", "python", "yaml", "api", "cpp")
SEQ_LEN, TRAIN_ROWS, HELD_OUT_ROWS, BUFFER = 48, 2000, 64, 100
MAX_CHARS = 600_000
DOCUMENT = Path(__file__).resolve().parents[1] / "docs/forgetting.md"
BEGIN, END = "<!-- forgetting: begin -->", "<!-- forgetting: end -->"
MODEL = {
    "vocab_size": 512,
    "hidden_size": 64,
    "intermediate_size": 64,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 8,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "tie_word_embeddings": False,
}
BASE_RUN = {"steps": 300, "batch_size": 16, "learning_rate": 3e-3}
STAGE_RUN = {"steps": 120, "batch_size": 16, "learning_rate": 1e-3}
REHEARSED = Rehearsed(weight=1.0, rows=8)
VARIANTS: dict[str, Safeguards] = {
    "none": Safeguards(),
    "replay": Safeguards(replay=REHEARSED),
    "distillation": Safeguards(distillation=REHEARSED),
    "EWC": Safeguards(ewc=Ewc(weight=30.0, rows=64)),
    "freeze": Safeguards(freeze=Freeze(share=0.13)),  # an even share is 0.125
    "frequencies": Safeguards(frequencies=Frequencies(core=4, router=None, experts=(1, 1, 4, 16))),
    "composed": Safeguards(replay=Rehearsed(weight=0.5, rows=8), distillation=REHEARSED),
}


@dataclass(frozen=True, kw_only=True)
class Text:
    """Rows of one domain, int32 [n, SEQ_LEN + 1]."""

    train: np.ndarray
    held_out: np.ndarray


@dataclass(frozen=True, kw_only=True)
class Remembered:
    """What one sequence ended with.

    Args:
        forgetting: Mean over the older domains, share of what each had gained.
        newest: What the newest domain gained, nats per token.
        gained: Mean gain of the older domains at their best, nats per token.
        base: Rise of the base's own domain over its best, nats per token.
    """

    forgetting: float
    newest: float
    gained: float
    base: float


def remembered(losses: np.ndarray) -> Remembered:
    """Judge the losses [1 + stages, 1 + domains] of one sequence: row 0 and column 0 are the base's."""
    best = losses[:, 1:].min(axis=0)
    gain, lost = losses[0, 1:] - best, losses[-1, 1:] - best
    if gain.min() <= 0:
        raise RuntimeError(f"a domain gained nothing: {gain}")
    return Remembered(
        forgetting=float(np.mean(lost[:-1] / gain[:-1])),
        newest=float(losses[0, -1] - losses[-1, -1]),
        gained=float(gain[:-1].mean()),
        base=float(losses[-1, 0] - losses[:, 0].min()),
    )


@cache
def sequence(variant: str, seed: int) -> Remembered:
    """Run the sequence with one variant's safeguards."""
    return remembered(losses_of(VARIANTS[variant], seed))


def losses_of(safeguards: Safeguards, seed: int) -> np.ndarray:
    """Return the held-out losses [1 + stages, 1 + domains] of a sequence with these safeguards."""
    model, texts, fisher = based(seed), texts_of(seed), {}
    losses, buffer = [_held_out(model, texts)], [_kept(texts[0])]
    for stage, text in enumerate(texts[1:], start=1):
        backend = SafeguardedBackend(safeguards, Memory(rows=np.concatenate(buffer), fisher=fisher))
        settings = TrainSettings(**STAGE_RUN, seed=100 * seed + stage)
        train(model, text.train, settings, family="mixtral", backend=backend)
        losses.append(_held_out(model, texts))
        buffer.append(_kept(text))
        if safeguards.ewc:
            own = fisher_diagonal(model, text.train[evenly_spaced(len(text.train), safeguards.ewc.rows)])
            decay = safeguards.ewc.decay  # as versions add it up (`tier1/aggregation/fisher.py`)
            fisher = {name: tensor + decay * fisher.get(name, 0) for name, tensor in own.items()}
    return np.array(losses)


def based(seed: int) -> nn.Module:
    """Return a model that has learned the base's domain."""
    model = initial_model("mixtral", MODEL, seed)
    model.load_state_dict(_base_state(seed))
    return model


@cache
def _base_state(seed: int) -> dict:
    model = initial_model("mixtral", MODEL, seed)
    train(model, texts_of(seed)[0].train, TrainSettings(**BASE_RUN, seed=seed), family="mixtral")
    return model.state_dict()


def _held_out(model: nn.Module, texts: Sequence[Text]) -> list[float]:
    return [mean_loss(model, text.held_out)[0] for text in texts]


def _kept(text: Text) -> np.ndarray:
    return text.train[evenly_spaced(len(text.train), BUFFER)]


def texts_of(seed: int) -> list[Text]:
    """Return the base's text and the domains'; the seed chooses which fifth of the rows is held out."""
    found = []
    for rows in _packed():
        rows = rows[: TRAIN_ROWS * 5 // 4]
        held_out = np.arange(len(rows)) % 5 == seed % 5
        if held_out.sum() * 4 != TRAIN_ROWS:
            raise RuntimeError(f"a domain has {len(rows)} rows, needs {TRAIN_ROWS * 5 // 4}")
        unseen = rows[held_out]
        found.append(Text(train=rows[~held_out], held_out=unseen[evenly_spaced(len(unseen), HELD_OUT_ROWS)]))
    return found


@cache
def _packed() -> list[np.ndarray]:
    texts = domain_texts()
    tokenizer = load_tokenizer(train_tokenizer([text for each in texts.values() for text in each], MODEL["vocab_size"]))
    return [pack(texts[name], tokenizer, SEQ_LEN) for name in (BASE, *DOMAINS)]


def domain_texts() -> dict[str, list[str]]:
    """Return the texts of the base and of every domain."""
    return {name: list(_bounded(read())) for name, read in _SOURCES.items()}


def _bounded(texts: Iterable[str]) -> Iterable[str]:
    left = MAX_CHARS
    for text in texts:
        yield text[:left]
        left -= len(text)
        if left <= 0:
            return


def _package(name: str) -> Path:
    return Path(find_spec(name).submodule_search_locations[0])


def _files(root: Path, pattern: str) -> Iterable[str]:
    for path in sorted(root.glob(pattern)):
        yield path.read_text(encoding="utf-8", errors="ignore")


def _readmes() -> Iterable[str]:
    for text in _files(_package("torch").parent, "*.dist-info/METADATA"):
        yield text.partition("\n\n")[2]  # the head is fields, the body is the project's description


def _api() -> Iterable[str]:
    for path in sorted(_package("botocore").glob("data/[i-l]*/*/service-2.json.gz")):
        yield gzip.decompress(path.read_bytes()).decode()


# Text of the packages that this project pins: the plays of the demo, and what its dependencies ship.
_SOURCES: dict[str, Callable[[], Iterable[str]]] = {
    "plays": lambda: (f"{s.speaker.upper()}:\n{s.text}" for s in read_plays() if s.genre == "comedies"),
    "readmes": _readmes,
    "python": lambda: _files(_package("torch"), "nn/modules/*.py"),
    "yaml": lambda: _files(_package("torchgen"), "packaged/ATen/native/native_functions.yaml"),
    "api": _api,
    "cpp": lambda: _files(_package("torch"), "include/ATen/*.h"),
}


def table(seeds: Sequence[int] = CLAIMED_ON) -> str:
    """Return the markdown table of all variants: means over the seeds, of forgetting with the range."""
    lines = [
        "| safeguards | forgetting, % of the gain (range) | against none | newest domain's gain kept, % (least) "
        "| older domains' best gain, nats | base's domain lost, nats |",
        "|---|---|---|---|---|---|",
    ]
    plain = [sequence("none", seed) for seed in seeds]
    for name in VARIANTS:
        own = [sequence(name, seed) for seed in seeds]
        shares, kept = [100 * one.forgetting for one in own], kept_gains(own, plain)
        lines.append(
            f"| {name} | {np.mean(shares):.1f} ({min(shares):.1f} to {max(shares):.1f}) "
            f"| {np.mean(shares) / 100 / mean_forgetting(plain):.2f} × | {np.mean(kept):.1f} ({min(kept):.1f}) "
            f"| {np.mean([one.gained for one in own]):.2f} | {np.mean([one.base for one in own]):.2f} |"
        )
    return "\n".join(lines)


def mean_forgetting(runs: Sequence[Remembered]) -> float:
    """Return the mean of what sequences forgot, a share."""
    return float(np.mean([one.forgetting for one in runs]))


def kept_gains(own: Sequence[Remembered], plain: Sequence[Remembered]) -> list[float]:
    """Return per seed which share of the newest domain's gain is kept, %."""
    return [100 * one.newest / other.newest for one, other in zip(own, plain, strict=True)]


def write_table() -> None:
    """Measure all variants and put the table into docs/forgetting.md."""
    before, rest = DOCUMENT.read_text(encoding="utf-8").split(BEGIN)
    after = rest.split(END)[1]
    DOCUMENT.write_text(f"{before}{BEGIN}\n{table()}\n{END}{after}", encoding="utf-8")


if __name__ == "__main__":
    write_table() if "--write" in sys.argv else print(table(TUNED_ON if "--tuning" in sys.argv else CLAIMED_ON))
