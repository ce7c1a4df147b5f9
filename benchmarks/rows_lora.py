"""Low-rank training at tier 1: what it keeps of AdamW's state, and what int4 keeps of the weights and of the gain."""

from __future__ import annotations

import numpy as np

from benchmarks.registry import Reading, figure

SEEDS = (1, 2, 3)


@figure("training.lora_state", unit="%", cls="full")
def lora_state() -> float:
    """Share of AdamW's state that `core.lora` of rank 8 on every target keeps, of the demo's model."""
    from tier1.training.backends import TorchBackend
    from tier1.training.lora import LoraBackend
    from tier1.training.lora_settings import LoraSettings
    from tier1.training.model import TINY_MIXTRAL, initial_model
    from tier1.training.settings import TrainSettings
    from tier1.training.trainer import train

    rows = np.random.default_rng(0).integers(0, 1024, size=(2, 33)).astype(np.int32)
    sizes = []
    for backend in (LoraBackend(LoraSettings(rank=8)), TorchBackend()):
        model = initial_model("mixtral", TINY_MIXTRAL, 0)
        train(model, rows, TrainSettings(steps=1, batch_size=2), family="mixtral", backend=backend)
        state = backend.training_state()
        sizes.append(sum(t.nbytes for name, t in state.items() if name.startswith("optimizer.exp_avg")))
    return 100 * sizes[0] / sizes[1]


@figure("training.qlora_weights", unit="%", bound="<= 15", cls="full")
def qlora_weights() -> float:
    """Bytes in which `core.lora.quantize: int4` holds the frozen targets while they are trained, of those of fp32."""
    from tier1.training.lora import LoraBackend
    from tier1.training.lora_settings import LoraSettings
    from tier1.training.model import TINY_MIXTRAL, initial_model
    from tier1.training.settings import TrainSettings

    sizes = []
    for form in ("int4", "none"):
        model, backend = initial_model("mixtral", TINY_MIXTRAL, 0), LoraBackend(LoraSettings(quantize=form))
        backend.prepare(model, TrainSettings(steps=1, batch_size=2), "mixtral")
        targets = backend.delta().keys()
        places = {name.rpartition(".")[0] for name in targets}
        held = {id(t): t for place in places for t in _tensors(model.get_submodule(place)) if not t.requires_grad}
        sizes.append(sum(tensor.nbytes for tensor in held.values()))
    return 100 * sizes[0] / sizes[1]


def _tensors(module) -> list:
    return [*module.parameters(), *module.buffers()]


@figure("training.qlora_gain", unit="%", bound=">= 95", cls="full")
def qlora_gain() -> Reading:
    """Held-out gain of low-rank training on int4 weights, published for fp32, of that on fp32; a new domain."""
    from benchmarks.forgetting import STAGE_RUN, based, texts_of
    from fednested_lib.training import mean_loss
    from tier1.training.lora import LoraBackend
    from tier1.training.lora_settings import LoraSettings
    from tier1.training.settings import TrainSettings
    from tier1.training.trainer import train

    shares = []
    for seed in SEEDS:
        text, gains = texts_of(seed)[1], []
        for form in ("int4", "none"):
            backend, base = LoraBackend(LoraSettings(quantize=form)), based(seed).state_dict()
            settings = TrainSettings(**STAGE_RUN | {"learning_rate": 1e-2}, seed=seed)
            train(based(seed), text.train, settings, family="mixtral", backend=backend)
            published = based(seed)
            published.load_state_dict(base | {name: base[name] + delta for name, delta in backend.delta().items()})
            gains.append(mean_loss(based(seed), text.held_out)[0] - mean_loss(published, text.held_out)[0])
        if gains[1] <= 0.05:
            raise RuntimeError(f"seed {seed}: low-rank training gains {gains[1]:.3f} nats, nothing to keep")
        shares.append(100 * gains[0] / gains[1])
    return Reading.of(shares)
