from __future__ import annotations

import json
import math
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from fednested_lib.errors import ConfigError, DataError
from fednested_lib.text import load_tokenizer
from tier1.evaluation import suites as suites_module
from tier1.evaluation.completions import exact_matches, pack_pairs
from tier1.evaluation.suites import SuiteRegistry, evaluate, evenly_spaced, measure, pack_suite
from tier1.training.model import initial_model
from tier1.training.tokenizer import train_tokenizer

TEXTS = [f"Speech {i}: the {i * 13 % 17} winds blow, and crack your cheeks; rage, blow!" for i in range(80)]
CONFIG = {
    "vocab_size": 300,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "num_local_experts": 4,
    "max_position_embeddings": 64,
    "bos_token_id": 0,
    "eos_token_id": 0,
}


@pytest.fixture(scope="module")
def tokenizer():
    return train_tokenizer(TEXTS, 300)


@pytest.fixture(scope="module")
def model():
    return initial_model("mixtral", CONFIG, 0).eval()


def write(path, texts):
    path.write_text("".join(json.dumps({"text": text}) + "\n" for text in texts), encoding="utf-8")
    return path


@pytest.fixture
def suite(tmp_path):
    return write(tmp_path / "suite.jsonl", TEXTS)


def test_the_loss_is_the_mean_over_all_tokens(model, tokenizer, suite):
    """Guards the measure against a plain reference: one row at a time, double precision."""
    packed = pack_suite(suite, tokenizer, seq_len=16, max_tokens=10**6)
    total = 0.0
    with torch.no_grad():
        for row in torch.from_numpy(packed.tokens.astype(np.int64)):
            logits = model(input_ids=row[None, :-1]).logits[0].double()
            total += torch.nn.functional.cross_entropy(logits, row[1:], reduction="sum").item()
    found = measure(model, packed)
    assert found.n_tokens == packed.tokens[:, 1:].size
    assert found.nats_per_token == pytest.approx(total / found.n_tokens, abs=1e-5)


def test_bits_per_byte_follow_from_nats(model, tokenizer, suite):
    """Guards the unit that compares tokenizers: total bits over the bytes of the measured text."""
    found = evaluate(model, {"s": suite}, tokenizer, seq_len=16, max_tokens=10**6)["s"]
    n_bytes = sum(len(text.encode()) for text in TEXTS)
    assert found.n_bytes == pytest.approx(n_bytes, rel=0.02)
    assert found.bits_per_byte == pytest.approx(found.nats_per_token * found.n_tokens / n_bytes / math.log(2), rel=0.02)


def test_the_result_does_not_depend_on_the_batch_size(model, tokenizer, suite, monkeypatch):
    """Guards comparability between machines with different memory."""
    packed = pack_suite(suite, tokenizer, seq_len=16, max_tokens=10**6)
    expected = measure(model, packed).nats_per_token
    for rows in (1, 7, 1000):
        monkeypatch.setattr(suites_module, "BATCH_ROWS", rows)
        assert measure(model, packed).nats_per_token == pytest.approx(expected, abs=1e-6)


def test_rows_add_up_to_the_suite_and_say_where_they_begin(model, tokenizer, suite):
    """Guards what intervals and verdicts stand on: each row's loss, hits and first line against a plain reference."""
    packed = pack_suite(suite, tokenizer, seq_len=16, max_tokens=10**6)
    found = measure(model, packed)
    assert np.mean(found.row_nats) == pytest.approx(found.nats_per_token, rel=1e-12)
    with torch.no_grad():
        row = torch.from_numpy(packed.tokens[5].astype(np.int64))
        logits = model(input_ids=row[None, :-1]).logits[0]
    assert found.row_nats[5] == pytest.approx(torch.nn.functional.cross_entropy(logits, row[1:]).item(), abs=1e-5)
    assert found.row_hits[5] == (logits.argmax(-1) == row[1:]).float().mean().item()
    encoder, starts = load_tokenizer(tokenizer), []
    for number, text in enumerate(TEXTS, start=1):
        starts += [number] * (len(encoder.encode(text).ids) + 1)
    assert found.lines == starts[: 16 * len(packed.tokens) : 16]


@pytest.mark.parametrize("family", ["mixtral", "olmoe", "qwen3_moe"])
def test_routing_is_what_the_routers_choose(family, tokenizer, suite):
    """Guards the counts against the largest router logits, for every family, over all batches."""
    own = {"num_local_experts": 4} if family == "mixtral" else {"num_experts": 4, "num_experts_per_tok": 2}
    config = {k: v for k, v in CONFIG.items() if k != "num_local_experts"} | own
    model = initial_model(family, config, 3).eval()
    packed = pack_suite(suite, tokenizer, seq_len=16, max_tokens=1000)
    rows = torch.from_numpy(packed.tokens.astype(np.int64))
    assert len(rows) > suites_module.BATCH_ROWS
    with torch.no_grad():
        output = model(input_ids=rows[:, :-1], output_router_logits=True, use_cache=False)
    chosen = [torch.topk(logits, 2, dim=-1)[1].flatten() for logits in output.router_logits]
    wanted = {str(layer): torch.bincount(each, minlength=4).tolist() for layer, each in enumerate(chosen)}
    hooks = [len(module._forward_hooks) for module in model.modules()]
    assert measure(model, packed).routed == wanted
    assert [len(module._forward_hooks) for module in model.modules()] == hooks


class Parrot(torch.nn.Module):
    """Always expects the token that it was just given."""

    device = "cpu"

    def forward(self, input_ids, use_cache):
        return SimpleNamespace(logits=torch.nn.functional.one_hot(input_ids, 300).float())


def test_a_completion_counts_if_every_token_of_it_is_the_first_choice(tokenizer):
    """Guards task accuracy: the prompt need not be guessed, each token of the completion must, in rows of any fill."""
    end = load_tokenizer(tokenizer).encode("\n").ids
    assert len(end) == 1
    pairs = [("say", "\n\n"), ("say", "\n\nx"), ("say " * 40, "\n"), ("", "\n"), ("say", "x" * 60)]
    given, wanted = pack_pairs(pairs, tokenizer, seq_len=16)
    assert given.shape == wanted.shape == (4, 16), "a completion that is longer than a row is left out"
    for batch_size in (1, 3):
        assert exact_matches(Parrot(), given, wanted, batch_size) == [1, 0, 1, 1]


def test_a_suite_may_mix_texts_and_completions(model, tokenizer, tmp_path):
    """Guards that task accuracy is of the records that have one, and that a suite of texts has none."""
    path = tmp_path / "mixed.jsonl"
    pairs = [{"prompt": f"Speech {i}:", "completion": " the winds blow"} for i in range(20)]
    path.write_text("".join(json.dumps(row) + "\n" for row in [*pairs, {"text": TEXTS[0]}]) + "broken\n")
    found = evaluate(model, {"s": path}, tokenizer, seq_len=16, max_tokens=10**6)["s"]
    assert len(found.completions) == 20
    assert len(evaluate(model, {"s": path}, tokenizer, seq_len=16, max_tokens=80)["s"].completions) == 5
    texts = write(tmp_path / "texts.jsonl", TEXTS)
    assert evaluate(model, {"s": texts}, tokenizer, seq_len=16, max_tokens=100)["s"].completions == []


def test_a_broken_model_is_measured_as_nan(tokenizer, suite):
    """Guards that a candidate with a NaN weight reaches the gate, which refuses it, instead of ending the run."""
    broken = initial_model("mixtral", CONFIG, 0)
    with torch.no_grad():
        broken.model.norm.weight[0] = math.nan
    assert math.isnan(evaluate(broken, {"s": suite}, tokenizer, seq_len=16, max_tokens=100)["s"].nats_per_token)


def test_two_evaluations_are_equal_to_the_bit(model, tokenizer, suite):
    """Guards the gate: nothing changed, nothing may differ."""
    one, two = (evaluate(model, {"s": suite}, tokenizer, seq_len=16, max_tokens=500) for _ in range(2))
    assert one == two


def test_a_long_suite_is_thinned_to_evenly_spaced_rows(tokenizer, suite):
    """Guards the cap: at most max_tokens, from the whole suite, and its bytes shrink alike."""
    full = pack_suite(suite, tokenizer, seq_len=16, max_tokens=10**6)
    part = pack_suite(suite, tokenizer, seq_len=16, max_tokens=100)
    assert part.tokens.shape == (6, 17)
    assert part.n_bytes == pytest.approx(full.n_bytes * 6 / len(full.tokens), rel=0.1)
    assert evenly_spaced(10, 4).tolist() == [0, 2, 5, 7]
    assert evenly_spaced(3, 10).tolist() == [0, 1, 2]
    assert len(pack_suite(suite, tokenizer, seq_len=16, max_tokens=1).tokens) == 1


def test_a_registered_suite_stays(tmp_path, suite):
    """Guards against a gate that forgets a suite: it survives its file, a call without it, a restart."""
    registry = SuiteRegistry(tmp_path / "registry")
    registry.register({"a": suite})
    content = suite.read_bytes()
    suite.unlink()
    registry.register({"b": write(tmp_path / "b.jsonl", TEXTS[:5])})
    found = SuiteRegistry(tmp_path / "registry").suites()
    assert list(found) == ["a", "b"]
    assert found["a"].path.read_bytes() == content


def test_a_registered_suite_cannot_change(tmp_path, suite):
    """Guards that new content needs a new name, while the same content may be registered again."""
    registry = SuiteRegistry(tmp_path / "registry")
    registry.register({"a": suite})
    registry.register({"a": suite})
    with pytest.raises(ConfigError, match="a registered suite stays"):
        registry.register({"a": write(tmp_path / "easier.jsonl", ["blow! " * 40])})


def test_an_altered_copy_is_named(tmp_path, suite):
    """Guards against an edited or removed copy of a registered suite."""
    registry = SuiteRegistry(tmp_path / "registry")
    registry.register({"a": suite})
    copy = registry.suites()["a"].path
    copy.write_bytes(copy.read_bytes()[:-30])
    with pytest.raises(DataError, match="suite 'a' must have digest"):
        registry.suites()
    copy.unlink()
    with pytest.raises(DataError, match="no file"):
        registry.suites()


@pytest.mark.parametrize("name", ["../a", "", "A", "x" * 64])
def test_suite_names_cannot_leave_the_registry(tmp_path, suite, name):
    """Guards the file names that suite names become."""
    with pytest.raises(ConfigError, match="suite name must match"):
        SuiteRegistry(tmp_path / "registry").register({name: suite})


def test_unusable_suites_are_refused(tmp_path, model, tokenizer):
    """Guards that an empty or too short suite is one line, at registration or at evaluation."""
    empty = write(tmp_path / "empty.jsonl", [])
    with pytest.raises(DataError, match="empty"):
        SuiteRegistry(tmp_path / "registry").register({"a": empty})
    with pytest.raises(DataError, match=r"short\.jsonl has \d+ tokens, needs at least 17 \(evaluation\.seq_len"):
        evaluate(model, {"s": write(tmp_path / "short.jsonl", ["hi"])}, tokenizer, seq_len=16, max_tokens=100)
