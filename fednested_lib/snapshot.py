"""A snapshot: the frozen global model a device starts from, as content-addressed slices.

One blob per (layer, projection, expert) and one per core shard, each a safetensors file named by its SHA-256; the
manifest maps slice keys to digests. So after a fold only the experts that changed are new blobs, and a device downloads
only what it does not hold. Slice keys are ``<parameter>/<expert id>`` for an expert and ``core/layers.<n>`` or
``core/rest`` for core and router tensors. Masters are fp32: bf16 swallows small deltas.

An output head that is bitwise the embedding is stored once, which is what tied weights are. Names are the in-memory
(fused) ones of transformers 5; `save_pretrained` writes others, the two must never be mixed.

Reading a manifest, fetching blobs and computing expert shapes need no torch; building a model does.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from fednested_lib.blobs import BlobStore
from fednested_lib.errors import PartitionError, SnapshotError
from fednested_lib.partition import FAMILIES, check_family, expert_name, expert_param, group_of
from fednested_lib.signing import HEX64, canonical_json, sha256_hex

if TYPE_CHECKING:
    import numpy as np
    from torch import Tensor, nn

    from fednested_lib.frozen import FrozenWeight
    from fednested_lib.transport import BlobSource

Frozen = Literal["fp32", "bf16", "int8", "int4"]  # how a device holds the experts in memory; snapshots are fp32
FORMAT = "fednested.snapshot/1"
SLICE_TENSOR = "weight"  # the one tensor of an expert slice; nameless, so that equal slices are one blob
_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"
_CORE_KEY = re.compile(r"core/(?:rest|layers\.\d+)")
# Facts about one installation, not about the model: they would change the digest of equal weights.
_VOLATILE = {"transformers_version", "_name_or_path", "architectures", "dtype", "torch_dtype", "id2label", "label2id"}


@dataclass(frozen=True, kw_only=True)
class SnapshotManifest:
    """What a snapshot consists of.

    Args:
        version: number of the global version.
        family: a key of `partition.FAMILIES`.
        model_config: transformers config as JSON (see `describe_config`).
        tokenizer: digest of the tokenizer.json blob.
        blobs: slice key → digest.
    """

    version: int
    family: str
    model_config: dict[str, Any]
    tokenizer: str
    blobs: Mapping[str, str]

    def _document(self) -> dict[str, Any]:
        return {
            "format": FORMAT,
            "family": self.family,
            "model_config": self.model_config,
            "tokenizer": self.tokenizer,
            "blobs": dict(self.blobs),
        }

    @cached_property
    def digest(self) -> str:
        """SHA-256 of the canonical manifest without the version: equal weights have equal digests."""
        return sha256_hex(canonical_json(self._document()))

    def to_json(self) -> bytes:
        """Return the canonical bytes."""
        return canonical_json({**self._document(), "version": self.version})

    @classmethod
    def from_json(cls, data: bytes) -> SnapshotManifest:
        """Parse manifest bytes strictly.

        Raises:
            SnapshotError: reason ``bad_manifest``; the message names the field.
        """
        try:
            document = json.loads(data)
        except (ValueError, RecursionError):
            raise SnapshotError("bad_manifest", "snapshot manifest is not JSON: publish the snapshot again") from None
        problem = _manifest_problem(document)
        if problem is None:
            manifest = cls(**{key: value for key, value in document.items() if key != "format"})
            if manifest.to_json() == data:
                return manifest
            problem = "is not canonical JSON"
        raise SnapshotError("bad_manifest", f"snapshot manifest {problem}: publish the snapshot again")


def _is_digest(value: object) -> bool:
    return isinstance(value, str) and re.fullmatch(HEX64, value) is not None


def _manifest_problem(document: object) -> str | None:
    fields = {"format", "version", "family", "model_config", "tokenizer", "blobs"}
    if not isinstance(document, dict) or set(document) != fields:
        return f"must have exactly the fields {', '.join(sorted(fields))}"
    checks = {
        "format": document["format"] == FORMAT,
        "version": type(document["version"]) is int and document["version"] >= 0,
        "family": isinstance(document["family"], str) and document["family"] in FAMILIES,
        "model_config": isinstance(document["model_config"], dict)
        and document["model_config"].get("model_type") == document["family"],
        "tokenizer": _is_digest(document["tokenizer"]),
        "blobs": isinstance(document["blobs"], dict)
        and all(_is_slice_key(key) and _is_digest(digest) for key, digest in document["blobs"].items()),
    }
    return next((f"has a bad {field}" for field, good in checks.items() if not good), None)


def _is_slice_key(key: str) -> bool:
    try:
        return _CORE_KEY.fullmatch(key) is not None or expert_of(key) is not None
    except PartitionError:
        return False


def slice_key(param: str, expert: int) -> str:
    """Return the key of one expert slice."""
    return f"{param}/{expert}"


def expert_of(key: str) -> tuple[str, int] | None:
    """Return (parameter, expert id) of an expert slice key, None for a core shard.

    Raises:
        PartitionError: the key is neither.
    """
    if _CORE_KEY.fullmatch(key):
        return None
    param, _, expert = key.rpartition("/")
    expert_param(param)
    if not re.fullmatch(r"0|[1-9]\d{0,5}", expert):
        raise PartitionError("not_an_expert", f"slice key {key[:120]!r} does not end in an expert id")
    return param, int(expert)


def describe_config(config: Any) -> dict[str, Any]:
    """Return a transformers config as the JSON a manifest keeps (without facts of this installation)."""
    return json.loads(canonical_json({key: value for key, value in config.to_dict().items() if key not in _VOLATILE}))


def expert_shapes(manifest: SnapshotManifest) -> dict[str, tuple[int, int, int]]:
    """Return (experts, d_out, d_in) of every fused expert parameter, from the model config alone.

    Raises:
        SnapshotError: reason ``bad_manifest``; the config lacks a dimension.
    """
    config = manifest.model_config
    inner = "moe_intermediate_size" if check_family(manifest.family) == "qwen3_moe" else "intermediate_size"
    experts = "num_local_experts" if "num_local_experts" in config else "num_experts"
    names = (experts, "hidden_size", inner, "num_hidden_layers")
    for name in names:
        if type(config.get(name)) is not int or config[name] < 1:
            raise SnapshotError(
                "bad_manifest",
                f"model config must have a positive {name}, got {config.get(name)!r}: publish the snapshot again",
            )
    n, hidden, intermediate, layers = (config[name] for name in names)
    shapes = {}
    for layer in range(layers):
        # Qwen3-MoE may keep some layers dense (transformers Qwen3MoeDecoderLayer).
        if (
            layer not in (config.get("mlp_only_layers") or [])
            and (layer + 1) % (config.get("decoder_sparse_step") or 1) == 0
        ):
            shapes[expert_name(layer, "gate_up_proj")] = (n, 2 * intermediate, hidden)
            shapes[expert_name(layer, "down_proj")] = (n, hidden, intermediate)
    return shapes


def encode_blob(tensors: Mapping[str, np.ndarray]) -> bytes:
    """Return the safetensors bytes of named arrays; equal arrays give equal bytes."""
    import numpy as np
    from safetensors.numpy import save

    return save({name: np.ascontiguousarray(tensors[name]) for name in sorted(tensors)})


def decode_blob(data: bytes) -> dict[str, np.ndarray]:
    """Parse safetensors bytes.

    Raises:
        SnapshotError: reason ``corrupt_blob``.
    """
    from safetensors import SafetensorError
    from safetensors.numpy import load

    try:
        return load(data)
    except (SafetensorError, ValueError, KeyError, TypeError) as error:
        raise SnapshotError(
            "corrupt_blob", f"blob of {len(data)} bytes is not a safetensors file ({error}): publish the snapshot again"
        ) from error


def _array(tensor: Tensor) -> np.ndarray:
    return tensor.detach().float().cpu().contiguous().numpy()


def _head_is_embedding(state: Mapping[str, Tensor]) -> bool:
    import numpy as np

    if _HEAD not in state or _EMBEDDING not in state:
        return False
    head, embedding = _array(state[_HEAD]), _array(state[_EMBEDDING])
    return head.shape == embedding.shape and np.array_equal(head.view(np.uint32), embedding.view(np.uint32))


def slice_state_dict(state: Mapping[str, Tensor], family: str) -> Iterator[tuple[str, dict[str, np.ndarray]]]:
    """Cut a state dict into slices, one in memory at a time.

    Args:
        state: in-memory names → tensors; widened to fp32.
        family: model family.

    Yields:
        (slice key, named fp32 arrays): core shards first, then experts in order of layer, projection and id.

    Raises:
        PartitionError: a parameter that no rule names.
    """
    shards: dict[str, list[str]] = defaultdict(list)
    experts: list[str] = []
    for name in sorted(state):
        if group_of(name, family) == "experts":
            experts.append(name)
        elif name != _HEAD or not _head_is_embedding(state):
            shards[_shard_of(name)].append(name)
    for shard in sorted(shards):
        yield shard, {name: _array(state[name]) for name in shards[shard]}
    for name in sorted(experts, key=expert_param):
        for expert in range(len(state[name])):
            yield slice_key(name, expert), {SLICE_TENSOR: _array(state[name][expert])}


def _shard_of(name: str) -> str:
    layer = re.match(r"model\.(layers\.\d+)\.", name)
    return f"core/{layer[1]}" if layer else "core/rest"


def write_state_dict(state: Mapping[str, Tensor], family: str, store: BlobStore) -> dict[str, str]:
    """Store every slice of a state dict; slices that the store holds are not written again.

    Returns:
        Slice key → digest.
    """
    return {key: store.put(encode_blob(tensors)) for key, tensors in slice_state_dict(state, family)}


def read_slice(key: str, digest: str, store: BlobStore) -> dict[str, np.ndarray]:
    """Read and verify one slice.

    Raises:
        SnapshotError: reason ``missing_blob`` or ``corrupt_blob``; names slice and digest.
    """
    try:
        return decode_blob(store.get(digest))
    except SnapshotError as error:
        raise SnapshotError(error.reason, f"slice {key}: {error}") from error


def read_state_dict(manifest: SnapshotManifest, store: BlobStore) -> dict[str, Tensor]:
    """Read a whole snapshot as fp32 tensors under in-memory names; tied weights appear once.

    Raises:
        SnapshotError: a blob is missing or corrupt, or slices are missing or of another shape.
    """
    import torch

    # torch's own allocation, because GEMM results may depend on the alignment of their operands.
    return _read(manifest, store, torch.empty)


def _read(
    manifest: SnapshotManifest, store: BlobStore, allocate: Callable[[tuple[int, int, int]], Tensor | FrozenWeight]
) -> dict[str, Tensor | FrozenWeight]:
    import torch

    shapes = expert_shapes(manifest)
    state = {name: allocate(shape) for name, shape in shapes.items()}
    wanted = {slice_key(name, expert) for name, shape in shapes.items() for expert in range(shape[0])}
    found = {key for key in manifest.blobs if expert_of(key) is not None}
    if wanted != found:
        odd = min(wanted ^ found)
        raise SnapshotError("bad_manifest", f"slices differ from the model config at {odd}: publish the snapshot again")
    for key, digest in manifest.blobs.items():
        tensors = read_slice(key, digest, store)
        place = expert_of(key)
        if place is None:
            state |= {name: torch.tensor(array) for name, array in tensors.items()}
            continue
        param, expert = place
        array = tensors.get(SLICE_TENSOR)
        if array is None or array.shape != shapes[param][1:]:
            raise SnapshotError(
                "bad_shape",
                f"slice {key} (blob {digest}) must have shape {list(shapes[param][1:])}: publish the snapshot again",
            )
        state[param][expert] = torch.from_numpy(array.copy())
    return state


def build_model(
    manifest: SnapshotManifest,
    store: BlobStore,
    experts: Literal["grouped_mm", "fednested_lora"] = "grouped_mm",
    frozen: Frozen = "fp32",
) -> nn.Module:
    """Build the transformers model of a snapshot, in evaluation mode.

    Args:
        manifest: which snapshot.
        store: holds all its blobs.
        experts: experts implementation; ``fednested_lora`` is the routed path of `adapters`.
        frozen: hold the experts so; they are quantised one by one as they are read, and only ``fednested_lora``
            computes with them.

    Raises:
        SnapshotError: blobs are missing or corrupt, or do not fit the model config.
        ContractError: reason ``unsupported_experts``: ``int4`` for experts with an odd number of inputs.
    """
    if frozen == "fp32":
        return assemble(manifest, read_state_dict(manifest, store), experts)
    from fednested_lib.frozen import FrozenWeight

    assert experts == "fednested_lora"
    return assemble(manifest, _read(manifest, store, lambda shape: FrozenWeight(shape, frozen)), experts)


def assemble(
    manifest: SnapshotManifest, state: dict[str, Tensor | FrozenWeight], experts: str = "grouped_mm"
) -> nn.Module:
    """Build the model of `manifest` around given weights, which it takes over without a copy."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM
    from transformers.initialization import no_init_weights

    from fednested_lib.adapters import register
    from fednested_lib.frozen import FrozenWeight, hold

    register()
    config = AutoConfig.for_model(**manifest.model_config)
    with no_init_weights():
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32, experts_implementation=experts)
    quantised = {name: weight for name, weight in state.items() if isinstance(weight, FrozenWeight)}
    hold(model, quantised)
    state = {name: tensor for name, tensor in state.items() if name not in quantised}
    tied = {_HEAD} if config.tie_word_embeddings else set()
    if tied and _head_is_embedding(state):
        state = {name: tensor for name, tensor in state.items() if name != _HEAD}
    elif not tied and _HEAD not in state and _EMBEDDING in state:
        state = {**state, _HEAD: state[_EMBEDDING].clone()}
    try:
        missing, unexpected = model.load_state_dict(state, strict=False, assign=True)
    except RuntimeError as error:
        raise SnapshotError(
            "bad_shape", f"snapshot does not fit its model config ({error}): publish it again"
        ) from error
    odd = (set(missing) - tied) | set(unexpected) | (tied & set(state))
    if odd:
        raise SnapshotError("bad_manifest", f"snapshot differs from its model config at {min(odd)}: publish it again")
    model.tie_weights()
    return model.eval()


@dataclass(frozen=True, kw_only=True)
class FetchReport:
    """What a fetch did: `blobs` and `size_bytes` downloaded, `skipped` blobs held before."""

    blobs: int
    size_bytes: int
    skipped: int


def fetch(manifest: SnapshotManifest, source: BlobSource, target: BlobStore, *, verify: bool = False) -> FetchReport:
    """Copy the blobs that `target` does not hold; an interrupted fetch continues where it stopped.

    Args:
        manifest: what to fetch.
        source: where tier 1 publishes; every blob is verified on the way.
        target: the device's own store.
        verify: also read the held blobs and replace corrupt ones (a damaged disk heals).

    Raises:
        SnapshotError: a blob is missing or corrupt at the source.
        TransportError: the source does not answer.
    """
    names = {digest: key for key, digest in manifest.blobs.items()} | {manifest.tokenizer: "tokenizer"}
    blobs = size_bytes = 0
    for digest, key in names.items():
        if target.has(digest) and not (verify and _discard_if_corrupt(target, digest)):
            continue
        try:
            data = source.get(digest)
        except SnapshotError as error:
            raise SnapshotError(error.reason, f"slice {key}: {error}") from error
        target.put(data)
        blobs, size_bytes = blobs + 1, size_bytes + len(data)
    return FetchReport(blobs=blobs, size_bytes=size_bytes, skipped=len(names) - blobs)


def prune(store: BlobStore, snapshots: Collection[str]) -> int:
    """Delete every blob of a device's own store that none of these snapshots needs.

    Args:
        store: a local store that nobody else uses.
        snapshots: digests of manifest blobs to keep, with all that they name.

    Returns:
        The number of blobs deleted.
    """
    manifests = [SnapshotManifest.from_json(store.get(snapshot)) for snapshot in snapshots]
    kept = set(snapshots).union(*({each.tokenizer, *each.blobs.values()} for each in manifests))
    unneeded = [digest for digest in store.digests() if digest not in kept]
    for digest in unneeded:
        Path(store.location(digest)).unlink(missing_ok=True)
    return len(unneeded)


def _discard_if_corrupt(store: BlobStore, digest: str) -> bool:
    try:
        store.get(digest)
    except SnapshotError as error:
        if error.reason == "unreadable_blob":  # no file: a person has to look
            raise
        Path(store.location(digest)).unlink(missing_ok=True)
        return True
    return False
