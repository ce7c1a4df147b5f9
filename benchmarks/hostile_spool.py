"""Spool files as a hostile trainer may write them, class by class, each with the rule that must refuse it.

A class is a function that changes an honest `Draft` in a way drawn at random. `None` as its rule means that the file is
not refused: what it smuggles does not survive (clipped, withheld, or rounded away), which the figures check apart.
Every draft carries a secret of its own where the class has room for one; none may occur in what leaves.
"""

from __future__ import annotations

import json
import os
import pickle  # noqa: TID251 (written here to be refused, never read)
import random
import socket
import struct
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import cramjam
import numpy as np
from safetensors.numpy import save

from fednested_lib.delta import Delta
from fednested_lib.fixed_a import seed_of
from fednested_lib.signing import canonical_json, sha256_hex

CLASSES: dict[str, tuple[str | None, Callable[[Draft, random.Random], None]]] = {}
FOREIGN = "model.layers.0.self_attn.q_proj.weight"


@dataclass
class Draft:
    """One update about to be spooled: its declaration and its tensors, or raw bytes in the place of either."""

    document: dict
    tensors: dict[str, np.ndarray]
    secret: str
    file: bytes | None = None  # instead of the safetensors file
    frame: bytes | None = None  # instead of the zstd frame
    declaration: bytes | None = None
    digest: str | None = None
    plant: list[Callable[[Path, Path], None]] = field(default_factory=list)

    def write(self, directory: Path) -> str:
        """Write both files; returns the digest of what was written."""
        raw = self.file if self.file is not None else save(self.tensors)
        frame = self.frame if self.frame is not None else bytes(cramjam.zstd.compress(raw, level=3))
        document = {**self.document, "factors_sha256": self.digest or sha256_hex(frame)}
        declaration = self.declaration if self.declaration is not None else canonical_json(document)
        declaration = declaration.replace(b"@digest@", document["factors_sha256"].encode())
        paths = (directory / "000000000007.json", directory / "000000000007.factors")
        for path, data in zip(paths, (declaration, frame), strict=True):
            path.write_bytes(data)
        for change in self.plant:
            change(*paths)
        return sha256_hex(declaration + frame + repr([each.__qualname__ for each in self.plant]).encode())


def draft(delta: Delta, *, base, counts: dict[str, list[int]], secret: str) -> Draft:
    """Return the honest draft of a delta."""
    spec = delta.spec
    adapter = {"rank": spec.rank, "alpha": float(spec.alpha), "mode": spec.mode}
    if spec.seed is not None:
        adapter["seed"] = spec.seed
    ids = {name.split(".")[2]: list(each.expert_ids) for name, each in delta.factors.items()}
    document = {
        "format": "fednested.spool/1",
        "sequence": 7,
        "base_version": base.version,
        "base_digest": base.digest,
        "adapter": adapter,
        "expert_ids": ids,
        "routed_tokens": {layer: [4 * n for n in counts[layer]] for layer in ids},
        "distinct_tokens": {layer: list(counts[layer]) for layer in ids},
        "num_examples": 100,
        "numbers": {"loss_first": 3.5, "loss_last": 3.25, "tokens": 1000, "seconds": 1.5},
    }
    sent = ("lora_b",) if spec.mode == "fixed_a" else ("lora_a", "lora_b")
    tensors = {f"{name}.{each}": getattr(factors, each) for name, factors in delta.factors.items() for each in sent}
    return Draft(document=document, tensors=tensors, secret=secret)


def hostile(name: str, rule: str | None):
    """Register a class of hostile files with the rule that refuses it."""

    def register(change: Callable[[Draft, random.Random], None]):
        assert name not in CLASSES
        CLASSES[name] = (rule, change)
        return change

    return register


def _some(each: Draft, rng: random.Random) -> str:
    return rng.choice(sorted(each.tensors))


def _header(each: Draft) -> dict:
    """Return the safetensors header of the honest file."""
    raw = save(each.tensors)
    (n,) = struct.unpack("<Q", raw[:8])
    return json.loads(raw[8 : 8 + n])


def _file(each: Draft, header: bytes, data: bytes | None = None) -> bytes:
    raw = save(each.tensors)
    (n,) = struct.unpack("<Q", raw[:8])
    return struct.pack("<Q", len(header)) + header + (raw[8 + n :] if data is None else data)


def _compact(document) -> bytes:
    return json.dumps(document, separators=(",", ":")).encode()


# --- text in the factors' file ---------------------------------------------------------------------------------------


@hostile("text as a tensor's name", "bad_tensors")
def _(each, rng):
    name = _some(each, rng)
    each.tensors[each.secret] = each.tensors.pop(name)


@hostile("text in an added tensor's name", "bad_tensors")
def _(each, rng):
    each.tensors[f"{_some(each, rng)}.{each.secret}"] = np.zeros(rng.randint(0, 3), np.float32)


@hostile("text in an added tensor's values", "bad_tensors")
def _(each, rng):
    each.tensors["note"] = np.frombuffer((each.secret * 4).encode(), np.uint8).copy()


@hostile("text in __metadata__", "not_canonical")
def _(each, rng):
    each.file = save(each.tensors, metadata={rng.choice(["note", "format", "x"]): each.secret})


@hostile("spaces in the header", "not_canonical")
def _(each, rng):
    gaps = rng.randint(1, 300)  # more would be more bytes than the declared adapter has: another rule
    each.file = _file(each, _compact(_header(each)) + b" " * (8 * gaps))


@hostile("spaces between keys of the header", "not_canonical")
def _(each, rng):
    header = json.dumps(_header(each), indent=rng.randint(0, 4)).encode()
    each.file = _file(each, header + b" " * (-len(header) % 8))


@hostile("another order of the header's keys", "not_canonical")
def _(each, rng):
    names = list(_header(each).items())
    names = names[1:] + names[:1]
    header = _compact(dict(names))
    each.file = _file(each, header + b" " * (-len(header) % 8) + b" " * 8 * rng.randint(0, 40))


@hostile("a key twice in the header", "not_canonical")
def _(each, rng):
    name = _some(each, rng)
    entry = _compact(_header(each)[name])
    header = _compact(_header(each))[:-1] + b',"' + name.encode() + b'":' + entry + b"}"
    each.file = _file(each, header + b" " * (-len(header) % 8))


@hostile("an extra field in a header's entry", "not_canonical")
def _(each, rng):
    header = _header(each)
    header[_some(each, rng)]["note"] = each.secret
    text = _compact(header)
    each.file = _file(each, text + b" " * (-len(text) % 8))


@hostile("trailing bytes in the file", "bad_tensors")
def _(each, rng):
    each.file = save(each.tensors) + each.secret.encode() * rng.randint(1, 9)


@hostile("a gap between tensors", "bad_tensors")
def _(each, rng):
    header, shift = _header(each), 8 * rng.randint(1, 8)
    last = max(header, key=lambda name: header[name]["data_offsets"][1])
    header[last]["data_offsets"] = [at + shift for at in header[last]["data_offsets"]]
    raw, text = save(each.tensors), _compact(header)
    (n,) = struct.unpack("<Q", raw[:8])
    cut = 8 + n + header[last]["data_offsets"][0] - shift
    data = raw[8 + n : cut] + each.secret.encode().ljust(shift, b".")[:shift] + raw[cut:]
    each.file = _file(each, text + b" " * (-len(text) % 8), data)


@hostile("overlapping tensors", "bad_tensors")
def _(each, rng):
    header, name = _header(each), _some(each, rng)
    header[name]["data_offsets"] = [0, header[name]["data_offsets"][1] - header[name]["data_offsets"][0]]
    if header[name] == _header(each)[name]:
        header[name]["data_offsets"] = [4, header[name]["data_offsets"][1] + 4]
    text = _compact(header)
    each.file = _file(each, text + b" " * (-len(text) % 8) + b" " * 8 * rng.randint(0, 9))


@hostile("a header that is not JSON", "bad_tensors")
def _(each, rng):
    each.file = _file(each, rng.choice([b"{" * 200, b"[]", b'"x"', b"\xff" * 64, each.secret.encode()]))


@hostile("a header longer than the file", "bad_tensors")
def _(each, rng):
    each.file = struct.pack("<Q", rng.choice([1 << 20, 1 << 40, (1 << 64) - 1])) + save(each.tensors)[8:]


# --- tensors that do not belong --------------------------------------------------------------------------------------


@hostile("a tensor of the base model", "bad_tensors")
def _(each, rng):
    name = rng.choice([FOREIGN, "lm_head.weight", "model.norm.weight", "model.layers.0.mlp.gate.weight"])
    each.tensors[name] = np.full((2, rng.randint(1, 9)), 0.5, np.float32)


@hostile("the base's expert beside its factors", "bad_tensors")
def _(each, rng):
    name = _some(each, rng).rsplit(".", 1)[0]
    each.tensors[name] = np.full((1, 2, rng.randint(1, 9)), 0.5, np.float32)


@hostile("a router's bias", "bad_tensors")
def _(each, rng):
    each.tensors[f"model.layers.{rng.randint(0, 2)}.mlp.gate.bias"] = np.full(rng.randint(1, 6), 0.5, np.float32)


@hostile("a scale that fp32 does not have", "bad_tensors")
def _(each, rng):
    each.tensors[f"{_some(each, rng)}.scale"] = np.full((1, rng.randint(1, 9)), 0.5, np.float32)


@hostile("a missing tensor", "bad_tensors")
def _(each, rng):
    del each.tensors[_some(each, rng)]


@hostile("no tensor", "bad_tensors")
def _(each, rng):
    each.tensors = {}
    each.file = rng.choice([save({}), b"", struct.pack("<Q", 2) + b"{}", struct.pack("<Q", 8) + b"{}      "])


@hostile("a wrong type", "bad_shape")
def _(each, rng):
    name, kind = _some(each, rng), rng.choice([np.float64, np.float16, np.int32, np.int8, np.uint8, np.int64])
    each.tensors[name] = (each.tensors[name] * np.float32(rng.uniform(1, 100))).astype(kind)


@hostile("token ids as a tensor", "bad_shape")
def _(each, rng):
    name = _some(each, rng)
    each.tensors[name] = np.array([rng.randrange(50_000) for _ in range(64)], np.int64)


@hostile("a wrong shape", "bad_shape")
def _(each, rng):
    name = _some(each, rng)
    n, rows, columns = each.tensors[name].shape
    shapes = [
        (n, columns, rows),
        (n * rows, columns),
        (n, rows * columns),
        (1, n * rows, columns),
        (n, rows, columns, 1),
    ]
    each.tensors[name] = each.tensors[name].reshape(rng.choice([s for s in shapes if s != (n, rows, columns)]))


@hostile("an undeclared expert", "bad_shape")
def _(each, rng):
    name = _some(each, rng)
    each.tensors[name] = np.concatenate([each.tensors[name], each.tensors[name][:1] * np.float32(rng.random())])


@hostile("factors of another rank than declared", "bad_shape")
def _(each, rng):
    for name in each.tensors:
        axis = 1 if name.endswith("lora_a") else 2
        values = each.tensors[name]
        each.tensors[name] = np.take(values, range(rng.randint(1, values.shape[axis] - 1)), axis=axis)


# --- containers ------------------------------------------------------------------------------------------------------


@hostile("a pickle", "bad_frame")
def _(each, rng):
    each.frame = pickle.dumps({"state": each.secret, "n": rng.random()}, protocol=rng.randint(0, 5))


@hostile("a pickle in a frame", "bad_tensors")
def _(each, rng):
    each.file = pickle.dumps({"state": each.secret, "n": rng.random()}, protocol=rng.randint(0, 5))


@hostile("no frame", "bad_frame")
def _(each, rng):
    gzip, raw = bytes(cramjam.gzip.compress(save(each.tensors))), save(each.tensors)
    each.frame = rng.choice([gzip, raw, b"", raw[:5], b"PK\x03\x04" + each.secret.encode(), os.urandom(200)])


@hostile("a skippable frame", "bad_frame")
def _(each, rng):
    honest = bytes(cramjam.zstd.compress(save(each.tensors), level=3))
    text = each.secret.encode() * rng.randint(1, 9)
    skipped = struct.pack("<II", 0x184D2A50 + rng.randrange(16), len(text)) + text
    each.frame = rng.choice([skipped + honest, honest + skipped])


@hostile("a second frame", "bad_frame")
def _(each, rng):
    honest = save(each.tensors)
    cut = rng.randrange(1, len(honest))
    each.frame = b"".join(bytes(cramjam.zstd.compress(part)) for part in (honest[:cut], honest[cut:]))


@hostile("trailing bytes after the frame", "bad_frame")
def _(each, rng):
    each.frame = bytes(cramjam.zstd.compress(save(each.tensors))) + each.secret.encode() * rng.randint(1, 9)


@hostile("a torn frame", "bad_frame")
def _(each, rng):
    honest = bytes(cramjam.zstd.compress(save(each.tensors)))
    each.frame = honest[: rng.randrange(1, len(honest))]


@hostile("a decompression bomb", "bad_frame")
def _(each, rng):
    each.frame = bytes(cramjam.zstd.compress(bytes(rng.randint(1 << 20, 1 << 26))))


@hostile("a bomb behind an honest file", "bad_frame")
def _(each, rng):
    each.frame = bytes(cramjam.zstd.compress(save(each.tensors) + bytes(rng.randint(1 << 20, 1 << 24))))


@hostile("a frame that lies about its size", "bad_frame")
def _(each, rng):
    each.frame = b"\x28\xb5\x2f\xfd\xe0" + struct.pack("<Q", rng.randrange(1 << 40, 1 << 60)) + b"\x01\x00\x00"


# --- values ----------------------------------------------------------------------------------------------------------


@hostile("a value that is not finite", "non_finite")
def _(each, rng):
    name = _some(each, rng)
    values = each.tensors[name].copy()
    values.flat[rng.randrange(values.size)] = rng.choice([np.nan, np.inf, -np.inf])
    each.tensors[name] = values


@hostile("text in mantissas", None)
def _(each, rng):
    bits = np.unpackbits(np.frombuffer((each.secret * 64).encode(), np.uint8))
    for name in each.tensors:
        words = each.tensors[name].view(np.uint32).copy()
        flat = words.reshape(-1)
        k = min(len(bits), flat.size)
        flat[:k] = (flat[:k] & ~np.uint32(1)) | bits[:k]
        each.tensors[name] = words.view(np.float32)


@hostile("text as the bytes of values", None)
def _(each, rng):
    name = _some(each, rng)
    values = each.tensors[name].copy().reshape(-1)
    words = np.frombuffer((each.secret * 8).encode()[: 4 * min(values.size, 40)], np.float32)
    values[: len(words)] = np.nan_to_num(words, nan=0.0, posinf=1.0, neginf=-1.0)
    each.tensors[name] = np.clip(values, -1e15, 1e15).reshape(each.tensors[name].shape)


@hostile("over the norm", None)
def _(each, rng):
    for name in each.tensors:
        each.tensors[name] = each.tensors[name] * np.float32(10 ** rng.uniform(2, 6))


# --- what is declared ------------------------------------------------------------------------------------------------


def _allowed(each: Draft) -> str:
    return sorted(each.document["expert_ids"])[0]


@hostile("an expert outside the policy", "expert_not_allowed")
def _(each, rng):
    layer = _allowed(each)
    each.document["expert_ids"][layer][-1] = rng.choice([4, 5, 6, 1 << 16, (1 << 16) + rng.randrange(1 << 60)])


@hostile("a layer outside the policy", "expert_not_allowed")
def _(each, rng):
    layer, other = _allowed(each), str(rng.choice([2, 3, 40, 9999]))
    for name in ("expert_ids", "routed_tokens", "distinct_tokens"):
        each.document[name][other] = each.document[name][layer]


@hostile("an expert twice", "bad_expert_ids")
def _(each, rng):
    ids = each.document["expert_ids"][_allowed(each)]
    ids[-1] = rng.choice(ids[:-1])


@hostile("experts out of order", "bad_expert_ids")
def _(each, rng):
    ids = each.document["expert_ids"][_allowed(each)]
    ids.reverse()
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("an expert with a negative number", "expert_not_allowed")
def _(each, rng):
    each.document["expert_ids"][_allowed(each)][0] = -rng.randint(1, 1 << 40)


@hostile("a layer without experts", "empty_update")
def _(each, rng):
    for name in ("expert_ids", "routed_tokens", "distinct_tokens"):
        each.document[name] = rng.choice([{}, {"0": []}, {"1": []}, {"0": [], "1": []}]) if name == "expert_ids" else {}
    for name in ("routed_tokens", "distinct_tokens"):
        each.document[name] = {layer: [] for layer in each.document["expert_ids"]}
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("other experts than before", "experts_changed")
def _(each, rng):
    layer = _allowed(each)
    at = rng.randrange(len(each.document["expert_ids"][layer]))
    for name in ("expert_ids", "routed_tokens", "distinct_tokens"):
        del each.document[name][layer][at]
    for name in each.tensors:
        if f".layers.{layer}." in name:
            each.tensors[name] = np.delete(each.tensors[name], at, axis=0)
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("too few declared tokens", "too_few_tokens")
def _(each, rng):
    for layer, counts in each.document["distinct_tokens"].items():
        each.document["distinct_tokens"][layer] = [rng.randint(0, 15) for _ in counts]


@hostile("too few declared tokens for some", None)
def _(each, rng):
    counts = each.document["distinct_tokens"][_allowed(each)]
    counts[rng.randrange(len(counts))] = rng.randint(0, 15)


@hostile("a rank outside the policy", "adapter_not_allowed")
def _(each, rng):
    each.document["adapter"]["rank"] = rng.choice([1, 3, 5, 64, 256])
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("an alpha outside the policy", "adapter_not_allowed")
def _(each, rng):
    each.document["adapter"]["alpha"] = rng.choice([8.0 + rng.random(), 1e-300 * (1 + rng.random()), 1e300])


@hostile("another mode than the policy's", "adapter_not_allowed")
def _(each, rng):
    adapter = each.document["adapter"]
    adapter["rank"], adapter["alpha"] = rng.choice([(2, 8.0), (3, 8.0), (5, 10.0)])
    adapter["mode"], adapter["seed"] = "fixed_a", f"{rng.getrandbits(128):032x}"


@hostile("a rank or alpha that is none", "bad_declaration")
def _(each, rng):
    key, value = rng.choice(
        [("rank", 0), ("rank", 257), ("rank", -4), ("rank", "4"), ("rank", True), ("alpha", 0.0), ("alpha", -1.0)]
    )
    each.document["adapter"][key] = value
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("A besides B in mode fixed_a", "bad_frame")
def _(each, rng):
    each.document["adapter"] |= {"mode": "fixed_a", "seed": seed_of(each.document["base_digest"])}
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("text in the seed of A", "wrong_seed")
def _(each, rng):
    text = each.secret.encode()[:16].ljust(16, b".").hex()
    each.document["adapter"] |= {"mode": "fixed_a", "seed": text}
    for name in [name for name in each.tensors if name.endswith("lora_a")]:
        del each.tensors[name]


@hostile("a seed without its mode", "bad_declaration")
def _(each, rng):
    seeds = [f"{rng.getrandbits(128):032x}", each.secret, "0" * 31]
    if rng.random() < 0.5:
        each.document["adapter"]["seed"] = rng.choice(seeds)
    else:
        each.document["adapter"] |= {"mode": "fixed_a", "seed": rng.choice([None, *seeds[1:]])}
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("only one factor of two", "bad_tensors")
def _(each, rng):
    factor = rng.choice(["lora_a", "lora_b"])
    each.tensors = {name: values for name, values in each.tensors.items() if not name.endswith(factor)}


@hostile("a base that is not held", "wrong_base")
def _(each, rng):
    if rng.random() < 0.5:
        each.document["base_version"] = rng.randrange(4, 1 << 53)
    else:
        each.document["base_digest"] = each.secret.encode().ljust(32, b".")[:32].hex()


@hostile("another number than ordered", "wrong_sequence")
def _(each, rng):
    each.document["sequence"] = rng.choice([0, 6, 8, 1 << 53, rng.randrange(8, 1 << 53)])


@hostile("a number that is a path", "bad_declaration")
def _(each, rng):
    paths = ["../../etc/passwd", "7/../8", "7\0", -7, 7.0, [7], None, 1 << 60, "7", f"{each.secret}"]
    each.document["sequence"] = rng.choice(paths)
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("text in a field of the declaration", "bad_declaration")
def _(each, rng):
    name = rng.choice(["note", "format", "base_digest", "num_examples", "expert_ids", "adapter", "base_version"])
    each.document[name] = each.secret


@hostile("text as a layer", "bad_declaration")
def _(each, rng):
    layer, other = _allowed(each), rng.choice([each.secret, "00", "-1", "1.0", " 1", "١", "10000"])
    for name in ("expert_ids", "routed_tokens", "distinct_tokens"):
        each.document[name][other] = each.document[name][layer]
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("counts that contradict themselves", "bad_declaration")
def _(each, rng):
    layer = _allowed(each)
    routed, distinct = each.document["routed_tokens"], each.document["distinct_tokens"]
    changes = [
        lambda: distinct[layer].__setitem__(0, routed[layer][0] + 1 + rng.randrange(99)),
        lambda: routed[layer].append(5),
        lambda: distinct[layer].pop(),
        lambda: distinct[layer].__setitem__(0, -1),
        lambda: routed[layer].__setitem__(0, (1 << 40) + 1 + rng.randrange(99)),
        lambda: routed[layer].__setitem__(0, True),
        lambda: routed[layer].__setitem__(0, 64.5),
        lambda: routed.pop(layer),
    ]
    rng.choice(changes)()
    each.document["num_examples"] = rng.randint(1, 10**6)


@hostile("telemetry that is no number", "bad_declaration")
def _(each, rng):
    field_, value = rng.choice(
        [("loss_first", 1e7), ("loss_last", -1e300), ("tokens", -1), ("seconds", 1e9), ("note", 1), ("tokens", 1.5)]
    )
    each.document["numbers"][field_] = value if rng.random() < 0.7 else each.secret


@hostile("a declaration that is not canonical", "bad_declaration")
def _(each, rng):
    document = {**each.document, "factors_sha256": "@digest@"}
    text = canonical_json(document)
    spaced = json.dumps(document, sort_keys=True).encode()
    repeated = text[:-1] + b',"num_examples":' + str(rng.randint(1, 99)).encode() + b"}"
    shuffled = json.dumps(dict(reversed(document.items())), separators=(",", ":")).encode()
    padded = text + rng.choice([b" ", b"\n", b"\t", b" " * 4000]) * rng.randint(1, 99)
    each.declaration = rng.choice([spaced, repeated, shuffled, padded, b"\xef\xbb\xbf" + text])


@hostile("a declaration that is not JSON", "bad_declaration")
def _(each, rng):
    text = canonical_json(each.document)
    each.declaration = rng.choice(
        [
            b"",
            text[: rng.randrange(len(text))],
            text.decode().encode("utf-16"),
            b"[" * rng.randint(10_000, 100_000),
            b'{"sequence":' + b"9" * rng.randint(5000, 50_000) + b"}",
            text.replace(b"100", b"NaN"),
            os.urandom(300),
            text + each.secret.encode(),
        ]
    )


@hostile("factors of another digest", "wrong_digest")
def _(each, rng):
    each.digest = f"{rng.getrandbits(256):064x}"


# --- paths -----------------------------------------------------------------------------------------------------------


def _elsewhere(path: Path) -> Path:
    return path.parent.parent / f"elsewhere{path.suffix}"


def _replaced(how: str, which: int, text: str) -> Callable[[Path, Path], None]:
    def plant(*paths: Path) -> None:
        path = paths[which]
        data = path.read_bytes()
        path.unlink()
        if how == "link":
            _elsewhere(path).write_bytes(data)
            path.symlink_to(_elsewhere(path))
        elif how == "link to itself":
            path.symlink_to(path.name)
        elif how == "link to a device":
            path.symlink_to("/dev/zero")
        elif how == "pipe":
            os.mkfifo(path)
        elif how == "directory":
            path.mkdir()
            (path / text).write_text(text)
        elif how == "socket":
            with socket.socket(socket.AF_UNIX) as server:
                server.bind(os.path.relpath(path))
        elif how == "huge":
            with open(path, "wb") as file:
                file.truncate(1 << 36)

    plant.__qualname__ = f"{how}/{which}/{text}"
    return plant


for _how in ("link", "link to itself", "link to a device", "pipe", "directory", "socket", "huge", "missing"):

    def _place(each: Draft, rng: random.Random, how: str = _how) -> None:
        which = 1 if how == "missing" else rng.randrange(2)
        each.plant.append(_replaced(how, which, f"{each.secret}-{rng.randrange(10**9)}"))

    hostile(f"a file in the spool: {_how}", "spool_file")(_place)
