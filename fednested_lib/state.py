"""What one process of the device remembers between two starts: a strict JSON file that only it reads."""

from __future__ import annotations

from pathlib import Path
from typing import TypeVar

from pydantic import BaseModel, ValidationError

from fednested_lib.blobs import write_durable
from fednested_lib.errors import StorageError
from fednested_lib.signing import canonical_json

_State = TypeVar("_State", bound=BaseModel)


def load_state(path: Path, kind: type[_State]) -> _State:
    """Read a state file; who has none starts with the defaults of `kind`.

    Raises:
        StorageError: the file cannot be read or was altered.
    """
    try:
        return kind.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return kind()
    except (OSError, ValidationError) as error:
        problem = error.strerror if isinstance(error, OSError) else "not what this version writes"
        raise StorageError(
            f"state file {path} is unusable ({problem}): move it away; numbers go on from what the other process knows"
        ) from None


def save_state(path: Path, state: BaseModel) -> None:
    """Replace a state file durably.

    Raises:
        StorageError: the disk is full or the path cannot be written.
    """
    write_durable(path, canonical_json(state.model_dump(mode="json")))
