"""One exception tree for both tiers.

    FednestedError                    exit code 1
    ├── ConfigError                   2   wrong key, type or bound; a file the configuration names is missing
    ├── DataError                     3   empty, non-UTF-8 or unusable training data
    ├── ContractError(reason)         4   bytes from outside break the contract; `reason` is machine readable
    │   ├── EnvelopeError                 unsigned, altered or malformed envelope
    │   ├── PayloadError                  a delta that does not match its envelope, or is not finite
    │   │   └── PolicyRefused             the device's policy will never let this update leave
    │   ├── PartitionError                a parameter that no rule names
    │   └── SnapshotError                 a missing or corrupt blob
    ├── TransportError                5   a server or store cannot be reached (recoverable: try again)
    ├── StorageError                  6   full disk, missing permission
    │   └── OutboxFull                    no room for another update (recoverable: wait for receipts)
    ├── LogError                      7   the update log lost or re-used offsets
    ├── ChainError                    8
    │   ├── ChainConflict                 another committer was first (recoverable: fold again on the new head)
    │   └── ChainCorrupt                  an entry was altered, removed or signed by a stranger
    ├── GovernanceError               9
    │   ├── PolicyDenied                  the policy does not allow it, or cannot decide
    │   ├── PolicyWait(reason)            the device's policy does not let an update leave yet (recoverable: wait)
    │   ├── AuditError                    the device's audit log was edited, shortened or cannot be verified
    │   └── PromotionBlocked              a requirement of promotion is missing
    ├── TrainingError                10   the loss is not finite
    ├── IsolationError               11   the device cannot keep its trainer apart as its configuration requires
    └── ProcessEnded                 as the process   one of a device's two processes ended with an error

A message has the name, the value, the bound and the remedy. Our errors are for users, `assert` is for programmers.
"""

from __future__ import annotations


class FednestedError(Exception):
    """Base of every error that a user of fednested can meet."""

    exit_code = 1

    def to_document(self) -> dict:
        """Return what `error_of` makes this error of again, in another process."""
        return {"type": type(self).__name__, "message": str(self), "fields": vars(self)}


class ConfigError(FednestedError):
    """The configuration is wrong."""

    exit_code = 2


class DataError(FednestedError):
    """The training or evaluation data cannot be used."""

    exit_code = 3


class ContractError(FednestedError):
    """Bytes from outside break the contract.

    Args:
        reason: machine-readable word, e.g. ``bad_signature``; written to the quarantine topic and the manifest.
        message: the sentence for a person.
    """

    exit_code = 4

    def __init__(self, reason: str, message: str):
        super().__init__(message)
        self.reason = reason


class EnvelopeError(ContractError):
    """The envelope is malformed, unsigned or altered."""


class PayloadError(ContractError):
    """The payload is not what its envelope declares."""


class PolicyRefused(PayloadError):
    """The device's policy will never let this update leave."""


class PartitionError(ContractError):
    """A parameter name is in no group of its model family."""


class SnapshotError(ContractError):
    """A blob of a snapshot is missing or corrupt."""


class TransportError(FednestedError):
    """A server or store cannot be reached; trying again may help.

    Args:
        message: the sentence for a person.
        retry_after_s: the server's word on how long to wait, None if it gave none.
    """

    exit_code = 5

    def __init__(self, message: str, *, retry_after_s: float | None = None):
        super().__init__(message)
        self.retry_after_s = retry_after_s


class StorageError(FednestedError):
    """The file system refuses: disk full, no permission."""

    exit_code = 6


class OutboxFull(StorageError):
    """The outbox keeps as many bytes as it may; receipts make room."""


class LogError(FednestedError):
    """The update log lost or re-used offsets that a cut names."""

    exit_code = 7


class ChainError(FednestedError):
    """The manifest chain refuses."""

    exit_code = 8


class ChainConflict(ChainError):
    """Another committer appended first; fold again on the new head."""


class ChainCorrupt(ChainError):
    """A chain entry was altered, removed, or signed by an unknown key."""


class GovernanceError(FednestedError):
    """Governance refuses."""

    exit_code = 9


class PolicyDenied(GovernanceError):
    """The policy denies, or cannot decide, which is the same."""


class PolicyWait(GovernanceError):
    """The device's policy does not let an update leave yet.

    Args:
        reason: machine-readable rule.
        message: the sentence for a person.
        not_before_s: when it may, seconds since the epoch; None: not under this policy.
    """

    def __init__(self, reason: str, message: str, *, not_before_s: float | None):
        super().__init__(message)
        self.reason = reason
        self.not_before_s = not_before_s


class AuditError(GovernanceError):
    """The audit log of a device is not what its keys and its anchor say."""


class PromotionBlocked(GovernanceError):
    """A candidate lacks something that promotion requires."""


class TrainingError(FednestedError):
    """Training produced a loss that is not finite."""

    exit_code = 10


class IsolationError(FednestedError):
    """The trainer cannot be kept apart as the configuration requires."""

    exit_code = 11


class ProcessEnded(FednestedError):
    """One of a device's two processes ended with an error.

    Args:
        message: which one, and its last words.
        exit_code: that it ended with; 128 and the signal if one killed it.
    """

    def __init__(self, message: str, exit_code: int):
        super().__init__(message)
        self.exit_code = exit_code


def error_of(document: dict) -> FednestedError:
    """Return the error that another process wrote down with `to_document`."""
    kind = globals()[document["type"]]
    error = kind.__new__(kind)
    error.args = (document["message"],)
    vars(error).update(document["fields"])
    return error
