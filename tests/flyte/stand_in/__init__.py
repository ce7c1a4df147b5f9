"""A Flyte without a cluster: admin and propeller in one process, pods as processes on this machine.

    server.py       FlyteAdmin, DataProxy and Signal over gRPC, for flytekit's own client and the real `pyflyte`
    catalog.py      what was registered, under admin's rules
    executions.py   executions under admin's rules, and what became of their nodes
    store.py        the object store behind signed URLs; to pods it is a directory
    propeller.py    walks a registered graph: tasks, retries, gates, maps, dynamics, sub-workflows, failure nodes
    literals.py     bindings to literals
    pods.py         runs a task's registered container command; warm_pods.py is a process that forks them
    connectors.py   propeller's side of a connector task, over gRPC

What it does like Flyte 1.16 and what it does not is in `docs/remote-proof.md`.
"""
