"""The manifest chain on disk: signed entries, hash-linked, created only if nobody else did.

    chain/000000.json, chain/000001.json, …        prev_{n+1} = SHA-256(bytes of entry n)

Advancing is compare-and-swap: whoever creates `<seq>.json` first wins, the other gets `ChainConflict` and folds again
on the new head. That needs create-if-absent, which a local or network file system has (link) and fsspec does not
promise, so other places are refused. Every read verifies every byte: canonical form, hash link, and an Ed25519
signature by a trusted key. What no hash link shows, a rewritten or cut-off end, shows against an *anchor* (position and
digest of the last entry) kept elsewhere, e.g. on the control topic.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path

import structlog
from pydantic import ValidationError

from fednested_lib.blobs import create_exclusive
from fednested_lib.errors import ChainConflict, ChainCorrupt, ChainError, StorageError
from fednested_lib.failpoints import failpoint
from fednested_lib.signing import Signer, sha256_hex, verify
from tier1.versions.manifest import Body, Entry
from tier1.versions.state import ChainState, Sealed, derive, file_name

log = structlog.get_logger()


class Chain:
    """The entries in one directory.

    Args:
        root: the directory, or a ``file://`` URI; made at the first append.
        signer: key for appending; None for a chain that is only read.
        trusted: public key → name of those whose entries count.

    Raises:
        ChainError: `root` is a place without create-if-absent.
    """

    def __init__(self, root: str | os.PathLike, *, signer: Signer | None = None, trusted: Mapping[str, str]):
        place = str(root).removeprefix("file://")
        if "://" in place:
            raise ChainError(
                f"chain root {place} must be a directory: that store has no create-if-absent, so two committers could "
                "overwrite each other; set home to a file system"
            )
        self.root = Path(place)
        self._signer = signer
        self.trusted = dict(trusted)
        self._verified: dict[str, Entry] = {}  # by digest of the bytes read, so a changed byte is verified again
        self._state: ChainState | None = None

    def exists(self) -> bool:
        """Tell whether there is an entry."""
        return bool(self._positions())

    def entries(self) -> list[Sealed]:
        """Read and verify all entries, in order.

        Raises:
            ChainCorrupt: an entry is missing, altered, out of place, or signed by an unknown key; names the file.
        """
        sealed: list[Sealed] = []
        for seq, position in enumerate(self._positions()):
            if position != seq:
                raise ChainCorrupt(f"chain entry {file_name(seq)} is missing from {self.root}: restore it from a copy")
            prev = sealed[-1].digest if sealed else None
            sealed.append(self._read(seq, prev))
        return sealed

    def state(self) -> ChainState:
        """Derive what the chain says now.

        Raises:
            ChainCorrupt: an entry was altered, or contradicts those before it.
            ChainError: the chain has no entry.
        """
        entries = self.entries()
        if not entries:
            raise ChainError(f"chain {self.root} is empty: run `fednested tier1 core-update --config …` first")
        # The last digest fixes all entries before it.
        if self._state is None or self._state.digest != entries[-1].digest:
            self._state = derive(entries)
        return self._state

    def append(self, body: Body, expect_seq: int) -> Sealed:
        """Sign `body` and append it at position `expect_seq`, if nobody else did.

        Args:
            body: what the entry says.
            expect_seq: `next_seq` of the state that the body was made for; 0 for genesis.

        Returns:
            The entry and its digest.

        Raises:
            ChainConflict: the position is taken.
            ChainCorrupt: the chain is damaged, or the entry would contradict it.
            ChainError: no key to sign with, or an untrusted one.
            StorageError: the disk is full.
        """
        signer = self._checked_signer()
        entries = self.entries()
        if len(entries) > expect_seq:
            raise self._conflict(expect_seq)
        if len(entries) < expect_seq:
            raise ChainError(f"chain {self.root} has {len(entries)} entries, cannot append at position {expect_seq}")
        sealed = _seal(body, expect_seq, entries[-1].digest if entries else None, signer)
        derive([*entries, sealed])
        failpoint("commit.before_append")
        if not create_exclusive(self.root / sealed.name, sealed.entry.to_bytes()):
            raise self._conflict(expect_seq)
        failpoint("commit.after_append")
        log.info("chain.appended", seq=expect_seq, kind=body.kind, digest=sealed.digest)
        return sealed

    def verify_anchor(self, seq: int, digest: str) -> None:
        """Check that the chain still holds the entry that an anchor names.

        Raises:
            ChainCorrupt: the chain is shorter, or that entry is another one.
        """
        entries = self.entries()
        if seq >= len(entries):
            raise ChainCorrupt(
                f"chain entry {file_name(seq)} is missing: the anchor names it ({digest[:12]}), the chain ends at "
                f"{len(entries) - 1}; restore its end from a copy"
            )
        if entries[seq].digest != digest:
            raise ChainCorrupt(
                f"chain entry {file_name(seq)} was rewritten: its digest is {entries[seq].digest[:12]}, the anchor "
                f"names {digest[:12]}; restore the chain from a copy"
            )

    def _positions(self) -> list[int]:
        try:
            names = os.listdir(self.root)
        except FileNotFoundError:
            return []
        except OSError as error:
            raise StorageError(f"chain {self.root} cannot be read ({error.strerror}): fix its permissions") from error
        return sorted(int(name[:-5]) for name in names if re.fullmatch(r"\d{6,}\.json", name))

    def _read(self, seq: int, prev: str | None) -> Sealed:
        path = self.root / file_name(seq)
        try:
            data = path.read_bytes()
        except OSError as error:
            raise StorageError(f"chain entry {path} cannot be read ({error.strerror}): fix its permissions") from error
        digest = sha256_hex(data)
        entry = self._verified.get(digest)
        if entry is None:
            entry = self._verified[digest] = self._parse(path, data)
        if entry.seq != seq:
            raise ChainCorrupt(
                f"chain entry {path} says that its position is {entry.seq}: entries were moved; restore it"
            )
        if entry.prev != prev:
            raise ChainCorrupt(
                f"chain entry {path} follows an entry with digest {entry.prev}, but the one before it has {prev}: "
                f"{file_name(max(seq - 1, 0))} was altered or replaced; restore it from a copy"
            )
        return Sealed(entry, digest)

    def _parse(self, path: Path, data: bytes) -> Entry:
        try:
            entry = Entry.model_validate_json(data)
            canonical = entry.to_bytes() == data
        except (ValidationError, ValueError) as error:
            problem = f"{type(error).__name__}"
            raise ChainCorrupt(
                f"chain entry {path} was altered (not a chain entry: {problem}): restore it from a copy"
            ) from None
        if not canonical:
            raise ChainCorrupt(f"chain entry {path} was altered (not canonical JSON): restore it from a copy")
        if entry.signer not in self.trusted:
            raise ChainCorrupt(
                f"chain entry {path} is signed by the unknown key {entry.signer}: it was replaced, or identity.trusted "
                "lacks the key"
            )
        if not verify(entry.signer, entry.signature, entry.signed_part()):
            raise ChainCorrupt(
                f"chain entry {path} was altered: the signature of {self.trusted[entry.signer]} does not match; "
                "restore it from a copy"
            )
        return entry

    def _checked_signer(self) -> Signer:
        if self._signer is None:
            raise ChainError(f"chain {self.root} was opened without a key: set identity.key to append")
        if self._signer.public_key not in self.trusted:
            raise ChainError(
                f"key {self._signer.public_key[:12]} is not among the {len(self.trusted)} trusted keys: add it to "
                "identity.trusted"
            )
        return self._signer

    def _conflict(self, seq: int) -> ChainConflict:
        return ChainConflict(
            f"chain entry {file_name(seq)} exists in {self.root}: another committer was first; fold again on the new "
            "head"
        )


def _seal(body: Body, seq: int, prev: str | None, signer: Signer) -> Sealed:
    draft = Entry(seq=seq, prev=prev, body=body, signer=signer.public_key, signature="0" * 128)
    entry = draft.model_copy(update={"signature": signer.sign(draft.signed_part())})
    return Sealed(entry, entry.digest())
