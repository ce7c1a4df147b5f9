"""The directories of a device: each is written by one process, and read by the other or by nobody.

    orders    sidecar   read by the trainer   what to train on
    blobs     sidecar   read by the trainer   snapshots
    spool     trainer   read by the sidecar   updates, status
    trainer   trainer   nobody                state, reports
    sidecar   sidecar   nobody                state
    outbox    sidecar   nobody                what is signed and waits

With two users a directory belongs to its writer and, where there is one, to the group of its reader, who may enter it;
nobody else may.
"""

from __future__ import annotations

import os
from pathlib import Path

from fednested_lib.errors import ConfigError, StorageError
from fednested_lib.isolation import Account

ROOMS = {  # name: writer, whether the other process reads it
    "orders": ("sidecar", True),
    "blobs": ("sidecar", True),
    "spool": ("trainer", True),
    "trainer": ("trainer", False),
    "sidecar": ("sidecar", False),
    "outbox": ("sidecar", False),
}


def prepare_rooms(home: Path, accounts: dict[str, Account] | None) -> None:
    """Make the directories, with their rights.

    Args:
        home: the device's; made when it is missing.
        accounts: of `trainer` and `sidecar`; None: both are whoever runs this.

    Raises:
        ConfigError: a directory belongs to somebody else.
        StorageError: the file system refuses.
    """
    try:
        home.mkdir(parents=True, exist_ok=True)
        for name, (writer, shared) in ROOMS.items():
            _prepare(home / name, writer, shared, accounts)
    except OSError as error:
        raise StorageError(f"home {home} cannot be prepared ({error.strerror}): fix its path or its rights") from error


def _prepare(path: Path, writer: str, shared: bool, accounts: dict[str, Account] | None) -> None:
    made = not path.exists()
    path.mkdir(exist_ok=True)
    if accounts is None:
        return
    owner, reader = accounts[writer], accounts["sidecar" if writer == "trainer" else "trainer"]
    descriptor = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
    try:
        uid = os.fstat(descriptor).st_uid
        if not made and uid != owner.uid:
            raise ConfigError(
                f"{path} belongs to uid {uid}, must belong to the {writer}'s user {owner.name}: "
                f"`chown -R {owner.name} {path}`"
            )
        os.fchown(descriptor, owner.uid, reader.gid if shared else owner.gid)
        os.fchmod(descriptor, 0o750 if shared else 0o700)
    finally:
        os.close(descriptor)
