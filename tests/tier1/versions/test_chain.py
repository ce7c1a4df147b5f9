from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from fednested_lib.errors import ChainConflict, ChainCorrupt, ChainError
from fednested_lib.signing import Signer, canonical_json
from tests.tier1.versions.scene import COMMITTER, Scene
from tier1.versions.chain import Chain

STRANGER = Signer.from_seed(b"\x02" * 32)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    """A chain of genesis, three versions and a decision; tests copy it."""
    scene = Scene(tmp_path_factory.mktemp("finished"))
    scene.genesis()
    for sequence in range(2):
        for client in scene.clients[:2]:
            scene.send(client, sequence)
        scene.advance()
    scene.settle(scene.fold(scene.dense("run-1")))
    scene.decide("approve", 3)
    return scene.home / "chain"


@pytest.fixture
def chain(finished, tmp_path) -> Chain:
    """A fresh copy of the finished chain."""
    shutil.copytree(finished, tmp_path / "chain")
    return open_chain(tmp_path / "chain")


def open_chain(root: Path, signer: Signer | None = COMMITTER) -> Chain:
    return Chain(root, signer=signer, trusted={COMMITTER.public_key: "committer"})


def path_of(chain: Chain, seq: int) -> Path:
    return chain.root / f"{seq:06d}.json"


def resign(path: Path, signer: Signer, **changes) -> None:
    """Rewrite an entry with a valid signature by `signer`."""
    document = json.loads(path.read_bytes()) | changes | {"signer": signer.public_key}
    document.pop("signature")
    document["signature"] = signer.sign(canonical_json(document))
    path.write_bytes(canonical_json(document))


def test_untouched_chain_reads_back(chain):
    """What was appended verifies, in order, under a reader that holds no private key."""
    reader = open_chain(chain.root, signer=None)
    assert [sealed.entry.body.kind for sealed in reader.entries()] == ["genesis", *["version"] * 3, "decision"]
    assert [sealed.entry.seq for sealed in reader.entries()] == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("seq", range(5))
def test_every_changed_byte_is_detected_and_the_file_named(chain, seq):
    """One flipped bit anywhere in an entry, the last one included, is refused with that entry's file name."""
    path = path_of(chain, seq)
    original = path.read_bytes()
    rng = np.random.default_rng(seq)
    for position in [0, len(original) - 1, *rng.integers(0, len(original), 60).tolist()]:
        altered = bytearray(original)
        altered[position] ^= 1 << int(rng.integers(8))
        path.write_bytes(bytes(altered))
        with pytest.raises(ChainCorrupt, match=path.name):
            chain.entries()
        path.write_bytes(original)
    assert len(chain.entries()) == 5


def test_added_bytes_are_detected(chain):
    """Blanks, another order of keys or a key given twice parse to the same entry and are refused all the same."""
    path = path_of(chain, 4)
    data = path.read_bytes()
    reordered = json.dumps(dict(reversed(json.loads(data).items())), separators=(",", ":")).encode()
    for altered in (
        data + b" ",
        data.replace(b",", b", ", 1),
        reordered,
        data.replace(b'{"body"', b'{"seq":4,"body"', 1),
    ):
        path.write_bytes(altered)
        with pytest.raises(ChainCorrupt, match="000004.json was altered"):
            chain.entries()


def test_a_reader_that_verified_before_still_detects_a_changed_byte(chain):
    """Verification is remembered by the digest of the bytes, so remembering hides nothing."""
    chain.state()
    path = path_of(chain, 2)
    path.write_bytes(path.read_bytes().replace(b'"version":2', b'"version":7'))
    with pytest.raises(ChainCorrupt, match="000002.json was altered"):
        chain.state()


def test_removed_entry_is_named(chain):
    """A hole in the chain names the missing file."""
    path_of(chain, 2).unlink()
    with pytest.raises(ChainCorrupt, match="000002.json is missing"):
        chain.entries()


def test_swapped_entries_are_detected(chain):
    """Two entries that changed places are refused at the first of them."""
    first, second = path_of(chain, 1).read_bytes(), path_of(chain, 2).read_bytes()
    path_of(chain, 1).write_bytes(second)
    path_of(chain, 2).write_bytes(first)
    with pytest.raises(ChainCorrupt, match="000001.json says that its position is 2"):
        chain.entries()


def test_entry_signed_by_an_unknown_key_is_refused(chain):
    """A perfectly signed last entry of a stranger is refused, and the key is named."""
    resign(path_of(chain, 4), STRANGER)
    with pytest.raises(ChainCorrupt, match=f"000004.json is signed by the unknown key {STRANGER.public_key}"):
        chain.entries()


def test_rewritten_middle_breaks_the_link(chain):
    """Even the committer's own key cannot change an entry that another one follows."""
    resign(path_of(chain, 2), COMMITTER, seq=2, prev=json.loads(path_of(chain, 2).read_bytes())["prev"])
    assert len(chain.entries()) == 5  # the same content gives the same bytes: Ed25519 is deterministic
    body = json.loads(path_of(chain, 2).read_bytes())["body"] | {"created_at": "2031-01-01T00:00:00+00:00"}
    resign(path_of(chain, 2), COMMITTER, body=body)
    with pytest.raises(ChainCorrupt, match=r"000003\.json follows .* 000002\.json was altered or replaced"):
        chain.entries()


def test_rewritten_or_cut_off_end_shows_against_the_anchor(chain):
    """What hash links cannot show, a rewritten or removed last entry, the anchor does."""
    state = chain.state()
    chain.verify_anchor(state.seq, state.digest)
    chain.verify_anchor(2, chain.entries()[2].digest)
    body = json.loads(path_of(chain, 4).read_bytes())["body"] | {"verdict": "reject"}
    resign(path_of(chain, 4), COMMITTER, body=body)
    chain.entries()
    with pytest.raises(ChainCorrupt, match="000004.json was rewritten"):
        chain.verify_anchor(state.seq, state.digest)
    path_of(chain, 4).unlink()
    with pytest.raises(ChainCorrupt, match=r"000004\.json is missing.*ends at 3"):
        chain.verify_anchor(state.seq, state.digest)


def test_second_append_at_a_position_conflicts_and_changes_nothing(chain):
    """Compare-and-swap: the position is taken, so the later committer gets a conflict and the entry stays."""
    before = path_of(chain, 4).read_bytes()
    with pytest.raises(ChainConflict, match="000004.json exists"):
        chain.append(chain.entries()[4].entry.body, 4)
    assert path_of(chain, 4).read_bytes() == before


def test_append_past_the_end_is_refused(chain):
    """No hole can be made."""
    with pytest.raises(ChainError, match="has 5 entries, cannot append at position 9"):
        chain.append(chain.entries()[4].entry.body, 9)


def test_append_needs_a_trusted_key(chain):
    """A chain opened without a key, or with an untrusted one, appends nothing."""
    body = chain.entries()[4].entry.body
    with pytest.raises(ChainError, match="without a key"):
        open_chain(chain.root, signer=None).append(body, 5)
    with pytest.raises(ChainError, match="not among the 1 trusted keys"):
        open_chain(chain.root, signer=STRANGER).append(body, 5)
    assert len(chain.entries()) == 5


def test_entry_that_contradicts_the_chain_is_not_written(chain):
    """The committer's own bug cannot enter the chain: a version not built on head is refused before the write."""
    version = chain.entries()[1].entry.body
    with pytest.raises(ChainCorrupt, match="was head"):
        chain.append(version, 5)
    assert len(chain.entries()) == 5


def test_store_without_create_if_absent_is_refused():
    """Remote stores cannot compare and swap through fsspec; the line says so and what to do."""
    for root in ("s3://bucket/chain", "memory://chain"):
        with pytest.raises(ChainError, match="no create-if-absent"):
            Chain(root, trusted={})


def test_file_uri_and_leftovers_of_a_crash(chain):
    """A file:// URI is a directory, and a half-written temporary file is not an entry."""
    (chain.root / ".000005.json.abc.tmp").write_bytes(b"{")
    assert len(Chain(f"file://{chain.root}", trusted=chain.trusted).entries()) == 5


def test_empty_chain_says_what_to_do(tmp_path):
    """Without genesis there is no state, and no traceback either."""
    chain = open_chain(tmp_path / "nothing")
    assert not chain.exists()
    assert chain.entries() == []
    with pytest.raises(ChainError, match="run `fednested tier1 core-update --config"):
        chain.state()


def test_genesis_from_before_offsets_were_recorded_still_reads(tmp_path):
    """An entry without the field keeps its bytes and its digest; one with it starts the chain's offsets there."""
    scene = Scene(tmp_path)
    sealed = scene.genesis()
    assert b"offsets" not in sealed.entry.to_bytes()
    assert open_chain(scene.chain.root).state().offsets == {}
    later = Scene(tmp_path / "later")
    body = sealed.entry.body.model_copy(update={"offsets": {"0": 7, "1": 0}})
    later.chain.append(body, 0)
    assert open_chain(later.chain.root).state().offsets == {"0": 7, "1": 0}
