"""Write and read the dense update of a tier-1 training run, as it travels on `updates.tier1`.

The document is canonical JSON; its id is derived from its content and signed (Ed25519), so the delta of a run that took
hours is an input that anybody can check later and that folds once, however often it is sent.
"""

from __future__ import annotations

from collections.abc import Mapping

from pydantic import ValidationError

from fednested_lib.errors import EnvelopeError
from fednested_lib.signing import Signer, verify
from tier1.versions.manifest import DenseUpdate


def make_dense(signer: Signer, **fields) -> DenseUpdate:
    """Fill in signer and content-derived id, and sign.

    Args:
        signer: key of the trainer.
        **fields: every field of `DenseUpdate` but format, update_id, signer and signature.
    """
    draft = DenseUpdate(**fields, update_id="0" * 64, signer=signer.public_key, signature="0" * 128)
    update_id = draft.content_id()
    return draft.model_copy(update={"update_id": update_id, "signature": signer.sign(update_id.encode())})


def parse_dense(data: bytes) -> DenseUpdate:
    """Parse the bytes of a record of `updates.tier1`; does not check the signature (see `verify_dense`).

    Raises:
        EnvelopeError: reason ``bad_envelope``.
    """
    try:
        dense = DenseUpdate.model_validate_json(data)
    except ValidationError as error:
        first = error.errors(include_input=False, include_url=False)[0]
        place = ".".join(map(str, first["loc"]))[:120] or "document"
        raise EnvelopeError("bad_envelope", f"dense update field {place}: {first['msg']}") from None
    if dense.to_bytes() != data:
        raise EnvelopeError("bad_envelope", "dense update is not canonical JSON")
    return dense


def verify_dense(dense: DenseUpdate, trusted: Mapping[str, str]) -> None:
    """Check content id and signature of a dense update against the trusted keys (public key → name).

    Raises:
        EnvelopeError: reason ``bad_update_id``, ``unknown_signer`` or ``bad_signature``.
    """
    name = f"dense update {dense.update_id[:12]} of run {dense.run_id}"
    if dense.update_id != dense.content_id():
        raise EnvelopeError("bad_update_id", f"{name}: the id does not match the content: publish the run again")
    if dense.signer not in trusted:
        remedy = "add it to identity.trusted"
        raise EnvelopeError("unknown_signer", f"{name} is signed by the unknown key {dense.signer[:12]}: {remedy}")
    if not verify(dense.signer, dense.signature, dense.update_id.encode()):
        raise EnvelopeError("bad_signature", f"{name} is unsigned or altered: publish the run again")
