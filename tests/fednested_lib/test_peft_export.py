"""An update of the outbox becomes a peft directory of what it says, bit by bit."""

from __future__ import annotations

import pytest

from fednested_lib.blobs import BlobStore, write_durable
from fednested_lib.config import Tier2Config
from fednested_lib.delta import decode
from fednested_lib.errors import DataError
from fednested_lib.orders import Model
from fednested_lib.outbox import Outbox
from fednested_lib.peft_export import export_update
from fednested_lib.peft_format import read_peft
from fednested_lib.sidecar_loop import SidecarState
from fednested_lib.signing import canonical_json
from fednested_lib.spool import Spool
from tests.fednested_lib.test_feedback import BASE, IDS, SHAPES, _delta, _held, _sidecar


@pytest.fixture
def device(tmp_path) -> Tier2Config:
    """A stopped device with one update in its outbox, encoded in int4, and the base that it started from."""
    home = tmp_path / "home"
    spool = Spool(home / "spool")
    counts = {"routed_tokens": {0: [100, 100, 100]}, "distinct_tokens": {0: [50, 3, 50]}}
    spool.write(_delta(), sequence=7, base_version=3, base_digest=BASE.digest, num_examples=10, **counts)
    with Outbox(home / "outbox", max_bytes=1 << 24) as outbox:
        way_out = _sidecar(home, outbox)
        way_out.release(spool, 7, held=_held, now=0.0)
        way_out.close()
    snapshot = BlobStore(home / "blobs").put(BASE.to_json())
    state = SidecarState(models=[Model(version=3, snapshot=snapshot, base_digest=BASE.digest, chain_seq=0)])
    write_durable(home / "sidecar/state.json", canonical_json(state.model_dump(mode="json")))
    return Tier2Config.model_validate(
        {
            "client_id": "romeo",
            "key": tmp_path / "device.key",
            "home": home,
            "data": tmp_path / "text.jsonl",
            "blobs_uri": "unused",
            "payloads_uri": "unused",
            "control": {"public_key": "0" * 64},
            "policy": {"file": tmp_path / "policy.yaml", "public_key": "0" * 64},
        }
    )


def test_the_directory_is_what_leaves(device, tmp_path):
    """Factors are those of the payload, rounding and withheld expert included, and reading them back changes no bit."""
    envelope = export_update(device, 7, tmp_path / "peft")
    with Outbox(device.home / "outbox", max_bytes=1 << 24) as outbox:
        (item,) = outbox.pending()
        payload = outbox.payload(item)
    sent = decode(payload, encoding="int4", spec=envelope.adapter.spec(), expert_ids=envelope.layers(), shapes=SHAPES)
    found = read_peft(tmp_path / "peft", SHAPES)
    assert envelope.layers() == {0: IDS}
    for name, factors in found.factors.items():
        assert factors.expert_ids == (0, 3)  # the expert in between was withheld
        assert factors.lora_a.tobytes() == sent.factors[name].lora_a[[0, 2]].tobytes()
        assert factors.lora_b.tobytes() == sent.factors[name].lora_b[[0, 2]].tobytes()


def test_what_is_not_there_is_named(device, tmp_path):
    """A number that the outbox does not keep, or a base that is gone, is one line with what there is."""
    with pytest.raises(DataError, match=r"update 8 is not in the outbox, which keeps \[7\]"):
        export_update(device, 8, tmp_path / "peft")
    write_durable(device.home / "sidecar/state.json", canonical_json(SidecarState().model_dump(mode="json")))
    with pytest.raises(DataError, match="version 3, which update 7 starts from, is not held any more"):
        export_update(device, 7, tmp_path / "peft")
    assert not (tmp_path / "peft").exists()
