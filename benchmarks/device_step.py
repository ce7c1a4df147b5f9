"""One training step of a device beside peft's, on equal models, text and factors.

`python -m benchmarks.device_step KIND TOKENS` prints the peak memory of two steps above the loaded model, in bytes
(VmHWM, set back by `/proc/self/clear_refs`), of a fresh process. KIND is peft, fp32, int8 or int4.
"""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor, nn

from benchmarks.fold_memory import status_bytes
from fednested_lib.adapters import RoutedAdapters, attach
from fednested_lib.delta import AdapterSpec
from fednested_lib.frozen import quantise_experts
from tests.peft_oracle import PeftTwin, factors_of

SPEC = AdapterSpec(rank=8, alpha=16.0)
VOCABULARY, SEQ_LEN = 1024, 64
MANY = {"num_local_experts": 64, "num_experts_per_tok": 4, "hidden_size": 512, "intermediate_size": 512}
FEW = {"num_local_experts": 8, "num_experts_per_tok": 2, "hidden_size": 256, "intermediate_size": 512}


def make_model(shape: dict[str, int]) -> nn.Module:
    """Return a random Mixtral of four layers, in evaluation mode; the same weights at every call."""
    from transformers import AutoModelForCausalLM, MixtralConfig

    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=VOCABULARY, num_hidden_layers=4, num_attention_heads=8, num_key_value_heads=4,
        max_position_embeddings=SEQ_LEN, bos_token_id=None, eos_token_id=0, **shape,
    )  # fmt: skip
    return AutoModelForCausalLM.from_config(config).eval().requires_grad_(False)


def make_text(n_tokens: int) -> Tensor:
    """Return token ids [n_tokens / 64, 64]."""
    return torch.randint(0, VOCABULARY, (n_tokens // SEQ_LEN, SEQ_LEN), generator=torch.Generator().manual_seed(1))


def attach_random(model: nn.Module) -> RoutedAdapters:
    """Adapt every expert with B ≠ 0, so that gradients of A are not zero."""
    adapters, generator = attach(model, SPEC, None, seed=0), torch.Generator().manual_seed(2)
    with torch.no_grad():
        for _, lora_b in factors_of(adapters).values():
            lora_b[:, : SPEC.rank] = torch.randn(lora_b[:, : SPEC.rank].shape, generator=generator) * 0.02
    return adapters


def gradients(model: nn.Module, text: Tensor) -> Tensor:
    """Run forward and backward; return the logits."""
    logits = model(input_ids=text, use_cache=False).logits
    torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), text[:, 1:].flatten()).backward()
    return logits.detach()


def stepper(model: nn.Module, trained: Iterable[nn.Parameter], text: Tensor) -> Callable[[], None]:
    """Return a whole step: forward, backward, AdamW."""
    optimizer = torch.optim.AdamW(trained, lr=1e-4, weight_decay=0.0)

    def step() -> None:
        optimizer.zero_grad(set_to_none=True)
        gradients(model, text)
        optimizer.step()

    return step


def ours(shape: dict[str, int], frozen: str = "fp32") -> tuple[nn.Module, RoutedAdapters]:
    """Return a model with the routed adapters on every expert."""
    model = make_model(shape)
    if frozen != "fp32":
        quantise_experts(model, frozen)
    return model, attach_random(model)


def peft_of(shape: dict[str, int], adapters: RoutedAdapters) -> tuple[PeftTwin, list[nn.Parameter]]:
    """Return the same model with the same factors in peft, and what it trains."""
    twin = PeftTwin(make_model(shape), adapters)
    return twin, [each for each in twin.model.parameters() if each.requires_grad]


def main(kind: str, n_tokens: int) -> None:
    """Measure and print."""
    torch.set_num_threads(1)
    if kind == "peft":
        twin, trained = peft_of(MANY, attach_random(make_model(MANY)))
        model = twin.model
    else:
        model, adapters = ours(MANY, kind)
        trained = adapters.parameters()
    step = stepper(model, trained, make_text(n_tokens))
    gc.collect()
    loaded = status_bytes("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        step()
    print(status_bytes("VmHWM") - loaded)


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
