"""What is wrong before anything runs: each a clear line from the command that was typed, and nothing is launched."""

from __future__ import annotations

import grpc
import pytest
from flyteidl.admin import execution_pb2
from flyteidl.core import identifier_pb2, literals_pb2
from flyteidl.service.admin_pb2_grpc import AdminServiceStub

from tests.e2e_flyte.conftest import PLACE, Site, registration
from tests.flyte.stand_in.server import FlyteStandIn


@pytest.fixture
def admitted(flyte: FlyteStandIn):
    """Guard that a refused command launches nothing."""
    before = list(flyte.admitted)
    yield
    assert flyte.admitted == before


@pytest.mark.usefixtures("admitted")
def test_an_input_of_the_wrong_type_is_named(site: Site) -> None:
    """The command line takes no value for a flag, and says so; what it cannot know, admin refuses (below)."""
    said = site.launch("nested_round", "wrong", "--core", "maybe").end()
    assert said.status == 2
    assert "Got unexpected extra argument (maybe)" in said.words


@pytest.mark.usefixtures("admitted")
def test_an_unknown_launch_plan_is_named(site: Site) -> None:
    """A plan that nobody registered is not found, and the name is in the line."""
    said = site.call("pyflyte", "run", *PLACE, "remote-launchplan", "nested_round_hourly")
    assert said.status != 0
    assert "nested_round_hourly" in said.text


@pytest.mark.usefixtures("admitted")
def test_an_image_that_does_not_exist_stops_the_registration(site: Site, flyte: FlyteStandIn) -> None:
    """With FLYTE_IMG_FAST_FAIL nothing is registered for an image that cannot be seen."""
    before = flyte.rpcs["AdminService/CreateTask"]
    said = site.call("pyflyte", *registration("no-image"), FLYTE_IMG_FAST_FAIL="1")
    assert said.status != 0
    assert "FLYTE_IMG_FAST_FAIL" in said.words, said.text
    assert flyte.rpcs["AdminService/CreateTask"] == before


@pytest.mark.usefixtures("admitted")
def test_a_launch_plan_registered_twice(site: Site, flyte: FlyteStandIn) -> None:
    """The same again changes nothing; another one under the same version is refused, and so are wrong inputs.

    A version is for ever: what runs under it must not depend on who registered last.
    """
    uri = str(site.config)
    first = site.call("pyflyte", *registration("again"), FEDNESTED_CONFIG_URI=uri)
    assert first.status == 0, first.text
    same = site.call("pyflyte", *registration("again"), FEDNESTED_CONFIG_URI=uri)
    assert same.status == 0, same.text
    assert "already" in same.text.lower()
    other = site.call("pyflyte", *registration("again"), FEDNESTED_CONFIG_URI="s3://elsewhere/tier1.yaml")
    assert other.status != 0
    loop = "workflows.nested_round.nested_round"
    assert refusal(flyte, "again", "nested_round_fast", "core") == "invalid input core"  # the plan fixes it
    assert refusal(flyte, "again", loop, "core") == "invalid core input wrong type. Expected BOOLEAN"
    assert refusal(flyte, "again", loop, "channel") == "expected_inputs config missing"


def test_a_secret_that_is_not_there_fails_the_task_at_once(site: Site, flyte: FlyteStandIn) -> None:
    """A pod without tier 1's key says which file is missing and what to do; no retry, nothing is published."""
    site.crown()
    key = site.fed.config.identity.key
    key.rename(key.with_suffix(".away"))
    said = site.launch("broadcast", "no-key").end()
    assert said.status != 0
    assert f"{key}" in said.words
    (publish,) = flyte.runs["no-key"].tasks("publish")
    assert len(publish.attempts) == 1
    key.with_suffix(".away").rename(key)
    assert site.fed.chain.state().champion.version == 1


def refusal(flyte: FlyteStandIn, version: str, plan: str, name: str) -> str:
    """Launch a plan with a text as the input of this name, and return why admin does not."""
    identifier = identifier_pb2.Identifier(
        resource_type=identifier_pb2.LAUNCH_PLAN,
        project="fednested",
        domain="development",
        name=plan,
        version=version,
    )
    text = literals_pb2.Literal(scalar=literals_pb2.Scalar(primitive=literals_pb2.Primitive(string_value="x")))
    request = execution_pb2.ExecutionCreateRequest(
        project="fednested",
        domain="development",
        name="refused",
        spec=execution_pb2.ExecutionSpec(launch_plan=identifier),
        inputs=literals_pb2.LiteralMap(literals={name: text}),
    )
    with grpc.insecure_channel(f"127.0.0.1:{flyte.port}") as channel, pytest.raises(grpc.RpcError) as refused:
        AdminServiceStub(channel).CreateExecution(request)
    assert refused.value.code() == grpc.StatusCode.INVALID_ARGUMENT
    return refused.value.details()
