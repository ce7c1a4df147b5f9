"""Flyte's checkpoint of a task as the trainer's second place: what one attempt saved, the next one goes on from.

flytekit keeps one directory per attempt and gives an attempt its predecessor's. So what was restored is saved again at
once, or an attempt that dies before its first checkpoint would leave its successor nothing. A file is uploaded under
its own name over the one before, which object stores do as a whole; what is torn all the same, the trainer refuses.
"""

from pathlib import Path

import structlog
from flytekit import current_context

log = structlog.get_logger()


class FlyteMirror:
    """Copies checkpoint files to and from Flyte; a store that does not answer costs a copy, not the training."""

    def restore(self, directory: Path) -> None:
        """Fetch the files of the attempt before, if there was one and it saved any."""
        try:
            checkpoint = current_context().checkpoint
            if not checkpoint.prev_exists():
                return
            checkpoint.restore(directory)
        except Exception as error:  # the attempt before may have died before its first checkpoint
            log.warning("checkpoint.not_restored", error=type(error).__name__)
            return
        for path in sorted(directory.glob("*.safetensors")):
            log.info("checkpoint.restored", file=path.name)
            self.save(path)

    def save(self, path: Path) -> None:
        """Copy one file."""
        try:
            current_context().checkpoint.save(path)
        except Exception as error:
            log.warning("checkpoint.not_copied", file=path.name, error=type(error).__name__)
