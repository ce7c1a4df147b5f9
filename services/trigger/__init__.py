"""The trigger: turns tasks on `tasks.training` into Flyte executions, each task into exactly one.

    inbox    where reading goes on (a Kafka group's committed offsets), and what can never be launched (dead letters)
    launch   what an execution is called, and the port that launches it
    remote   that port over FlyteRemote, the one module of the services that imports flytekit
    service  the loop between them

Run it with `make trigger` or `python -m services.trigger --help`.
"""
