from __future__ import annotations

import json
import math

import numpy as np
import pytest
import torch

from fednested_lib.errors import ConfigError, DataError
from tier1.evaluation import suites as suites_module
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
