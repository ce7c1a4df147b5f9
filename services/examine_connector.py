"""Does the connector service answer, and does it serve every sensor? Part of `services.examine_flyte`.

FlyteAdmin does not tell of connectors: the service is asked itself, where it can be reached, which is inside the
cluster as a rule.
"""

from __future__ import annotations

from collections.abc import Iterator

from fednested_lib.finding import Finding, judge

SERVED = ("fednested_kafka_window", "sensor")  # task types of tasks/sensors/, which services cannot import
TIMEOUT_S = 5.0


def connector(address: str, namespace: str) -> Iterator[Finding]:
    """Ask the connector at host:port which task types it serves; without an address say how to."""
    import grpc
    from flyteidl.admin import agent_pb2
    from flyteidl.service.agent_pb2_grpc import AgentMetadataServiceStub

    what = "connector service"
    if not address:
        remedy = (
            f"kubectl get endpoints fednested-connector -n {namespace}, then run the doctor in a pod with --connector "
            f"fednested-connector.{namespace}:8000; without it leave sensed_round off"
        )
        yield Finding(what=what, state="warning", value="cannot be seen from here", remedy=remedy)
        return
    remedy = f"kubectl logs -n {namespace} deployment/fednested-connector, or fix the port"
    try:
        with grpc.insecure_channel(address) as channel:
            answer = AgentMetadataServiceStub(channel).ListAgents(agent_pb2.ListAgentsRequest(), timeout=TIMEOUT_S)
    except grpc.RpcError as error:
        value = f"{address} does not answer ({error.code().name})"
        yield Finding(what=what, state="bad", value=value, remedy=remedy)
        return
    served = sorted({each.name for agent in answer.agents for each in agent.supported_task_categories})
    yield judge(
        what,
        holds=set(SERVED) <= set(served),
        value=f"{address} serves {', '.join(served) or 'nothing'}",
        bound=", ".join(SERVED),
        remedy="serve both modules, as `make serve-connector` does",
    )
