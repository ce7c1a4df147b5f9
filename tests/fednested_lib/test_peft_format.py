"""What peft opens is what we learnt, and what peft wrote is read to the bit; anything else is refused in one line."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest
import torch
from safetensors.numpy import load_file, save_file

from fednested_lib.adapters import attach
from fednested_lib.delta import AdapterSpec
from fednested_lib.errors import PayloadError
from fednested_lib.peft_format import CONFIG, TENSORS, read_peft, write_peft
from tests.peft_oracle import factors_of

SPEC = AdapterSpec(rank=3, alpha=5.0)
TOKENS = torch.randint(0, 96, (2, 13), generator=torch.Generator().manual_seed(1))
TARGETS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


def _learnt(model, expert_ids=None):
    """Attach adapters with random factors and return them."""
    adapters, generator = attach(model, SPEC, expert_ids, seed=4), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, lora_b in factors_of(adapters).values():
            lora_b[:, : SPEC.rank] = torch.randn(lora_b[:, : SPEC.rank].shape, generator=generator) * 0.2
    return adapters


def _shapes(model):
    return {name: tuple(each.shape) for name, each in model.named_parameters() if ".experts." in name}


def _peft_writes(model, directory, **options):
    from peft import LoraConfig, get_peft_model

    settings = {"r": 3, "lora_alpha": 5, "target_modules": [], "target_parameters": TARGETS, "init_lora_weights": False}
    made = get_peft_model(model, LoraConfig(**{**settings, **options}))
    made.save_pretrained(directory)
    return made


def test_peft_opens_what_we_write(make_model, family, tmp_path):
    """peft's model with our directory has our logits to 1e-5, for a subset that differs by layer."""
    from peft import PeftModel

    model = make_model(family)
    plain, ids = copy.deepcopy(model), {0: (1, 4), 2: (0, 2, 5)}
    delta = _learnt(model, ids).to_delta()
    write_peft(delta, tmp_path, _shapes(plain))
    opened = PeftModel.from_pretrained(copy.deepcopy(plain), tmp_path)
    with torch.no_grad():
        ours, theirs, base = (each(input_ids=TOKENS).logits for each in (model, opened, plain))
    assert (ours - base).abs().max() > 1e-2 * base.abs().max()
    assert (ours - theirs).abs().max() <= 1e-5 * theirs.abs().max()
    again = read_peft(tmp_path, _shapes(plain))
    assert (again.spec, again.factors.keys()) == (delta.spec, delta.factors.keys())
    for name, factors in again.factors.items():
        assert factors.expert_ids == delta.factors[name].expert_ids
        assert factors.lora_a.tobytes() == delta.factors[name].lora_a.tobytes()
        assert factors.lora_b.tobytes() == delta.factors[name].lora_b.tobytes()


def test_we_open_what_peft_writes(make_model, family, tmp_path):
    """Every expert's B·A of a directory that peft wrote is peft's own delta of it, from the same bits."""
    model = make_model(family)
    shapes = _shapes(model)
    made = _peft_writes(model, tmp_path)
    delta = read_peft(tmp_path, shapes)
    assert delta.spec == SPEC
    assert delta.factors.keys() == shapes.keys()
    state = made.state_dict()
    for name, factors in delta.factors.items():
        layer, inner = name.split(".")[2], "base_layer." if name.endswith("gate_up_proj") else ""
        prefix = f"base_model.model.model.layers.{layer}.mlp.experts.{inner}"
        wrapper = made.get_submodule(prefix.rstrip("."))
        expected = wrapper.get_delta_weight("default").detach().numpy()
        n_experts, d_out, d_in = shapes[name]
        kept_a = state[f"{prefix}lora_A.default.weight"].numpy().reshape(n_experts, 3, d_in)
        kept_b = state[f"{prefix}lora_B.default.weight"].numpy().reshape(d_out, 3, n_experts)
        assert factors.expert_ids == tuple(range(n_experts))
        assert np.array_equal(factors.lora_a, kept_a)
        assert np.array_equal(factors.lora_b, kept_b.transpose(2, 0, 1))
        product = delta.spec.scale * factors.lora_b @ factors.lora_a
        np.testing.assert_allclose(product, expected, atol=1e-5 * np.abs(expected).max())


def test_different_ranks_are_refused(make_model, tmp_path):
    """An adapter with a rank of its own in one layer is no update: the line names the key and says what to do."""
    model = make_model("mixtral")
    shapes = _shapes(model)
    _peft_writes(model, tmp_path, rank_pattern={"layers.0.mlp.experts.down_proj": 2})
    with pytest.raises(PayloadError, match=r"rank_pattern = .*layers\.0.* one rank .*: train with a single r$"):
        read_peft(tmp_path, shapes)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"use_rslora": True}, "use_rslora = True is not plain LoRA"),
        ({"use_dora": True}, "use_dora = True"),
        ({"alpha_pattern": {"down_proj": 2}}, "alpha_pattern"),
        ({"some_later_option": 0.5}, "some_later_option"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"target_modules": ["q_proj"]}, "target_modules"),
        ({"target_parameters": TARGETS[:1]}, "adapt both"),
        ({"init_lora_weights": "pissa"}, "changes the base model"),
        ({"peft_type": "IA3"}, "must be LORA"),
        ({"bias": "all"}, "must be none"),
        ({"r": "3"}, "must be an integer"),
        ({"r": 4}, r"must be float32 \[24, "),
    ],
)
def test_options_that_change_the_formula_are_refused(make_model, tmp_path, changes, message):
    """Only plain LoRA on both projections is read; an option that this version does not know is not ignored."""
    model = make_model("mixtral")
    write_peft(_learnt(model).to_delta(), tmp_path, _shapes(model))
    config = json.loads((tmp_path / CONFIG).read_text())
    (tmp_path / CONFIG).write_text(json.dumps({**config, **changes}))
    with pytest.raises(PayloadError, match=message) as caught:
        read_peft(tmp_path, _shapes(model))
    assert caught.value.reason == "bad_peft"


def _half(tensors):
    return {name: each.astype(np.float16) for name, each in tensors.items()}


def _extra(tensors):
    return {**tensors, "base_model.model.lm_head.weight": np.zeros((2, 2), np.float32)}


def _short(tensors):
    name = min(tensors)
    return {**tensors, name: tensors[name][:-1]}


def _missing(tensors):
    return {name: each for name, each in tensors.items() if name != min(tensors)}


def _broken(tensors):
    return {**tensors, min(tensors): np.full_like(tensors[min(tensors)], np.nan)}


@pytest.mark.parametrize(
    ("change", "message"),
    [(_half, "got float16"), (_extra, "not one of"), (_short, r"\[17, 32\]"), (_missing, "missing"), (_broken, "NaN")],
)
def test_tensors_are_read_strictly(make_model, tmp_path, change, message):
    """Another dtype, a tensor too many or too few, another shape or a NaN is refused by name."""
    model = make_model("mixtral")
    write_peft(_learnt(model).to_delta(), tmp_path, _shapes(model))
    save_file(change(load_file(tmp_path / TENSORS)), tmp_path / TENSORS)
    with pytest.raises(PayloadError, match=message):
        read_peft(tmp_path, _shapes(model))


def test_a_pickle_is_never_opened(make_model, tmp_path):
    """A directory with peft's old `.bin` file, bytes that are no safetensors, or far too many of them: refused."""
    model = make_model("mixtral")
    write_peft(_learnt(model).to_delta(), tmp_path, _shapes(model))
    (tmp_path / TENSORS).rename(tmp_path / "adapter_model.bin")
    with pytest.raises(PayloadError, match="is a pickle and is not read"):
        read_peft(tmp_path, _shapes(model))
    (tmp_path / TENSORS).write_bytes(b"\x80\x04K\x01.")
    with pytest.raises(PayloadError, match="is not a safetensors file"):
        read_peft(tmp_path, _shapes(model))
    with (tmp_path / TENSORS).open("wb") as file:
        file.truncate(1 << 30)
    with pytest.raises(PayloadError, match="1073741824 bytes"):
        read_peft(tmp_path, _shapes(model))


def test_a_delta_of_another_model_is_not_written(make_model, tmp_path):
    """Factors that do not fit the model's shapes never become a directory that opens."""
    delta = _learnt(make_model("mixtral")).to_delta()
    for shapes in (_shapes(make_model("mixtral", experts=4)), {"model.layers.0.mlp.experts.down_proj": (6, 32, 48)}):
        with pytest.raises(PayloadError, match="name the snapshot"):
            write_peft(delta, tmp_path / "out", shapes)
    assert not (tmp_path / "out").exists()
