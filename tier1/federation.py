"""One federation, opened from its configuration: the one place where stores, log and governance adapters are chosen."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from fednested_lib.blobs import BlobStore
from fednested_lib.config import LogConfig
from fednested_lib.errors import ConfigError
from fednested_lib.events import Event, TrainingTask, sign_event
from fednested_lib.log import CONTROL, TASKS, TOPICS, InMemoryLog, KafkaLog, UpdateLog
from fednested_lib.signing import Signer
from tier1.config import Tier1Config, load_tier1
from tier1.governance.audit import AuditedAuthorizer, require_access
from tier1.governance.lineage_outbox import LineageOutbox
from tier1.governance.policy_file import PolicyFile
from tier1.governance.ports import AccessDecision, AccessRequest, Authorizer, Registry
from tier1.versions.chain import Chain

MEMORY = "memory:"
_memory_logs: dict[str, InMemoryLog] = {}


@dataclass(frozen=True, kw_only=True)
class Federation:
    """The open parts of one federation. Servers are reached at first use, so a dead one hurts only who needs it.

    Layout of `home`: blobs/ (weights), payloads/ (the devices' drop box), archive/ (accepted inputs), chain/ (signed
    entries), candidates/, cuts/, folds/, dense/, reports/, data-engine/, lineage.jsonl, audit.jsonl. Devices write
    payloads/ and read blobs/; everything else is for tier 1 alone.
    """

    config: Tier1Config

    @property
    def home(self) -> Path:
        """Root of everything tier 1 writes."""
        return self.config.home

    @cached_property
    def signer(self) -> Signer:
        """Key that signs chain entries and control events."""
        return Signer.load(self.config.identity.key)

    @cached_property
    def blobs(self) -> BlobStore:
        """Weights, content addressed."""
        return BlobStore(self.home / "blobs")

    @cached_property
    def payloads(self) -> BlobStore:
        """The devices' drop box: claim-check payloads, content addressed; a device's word until admitted."""
        return BlobStore(self.home / "payloads")

    @cached_property
    def archive(self) -> BlobStore:
        """What versions are rebuilt from: accepted envelopes, payloads and dense slices; only tier 1 writes it."""
        return BlobStore(self.home / "archive")

    @cached_property
    def chain(self) -> Chain:
        """The manifest chain."""
        return Chain(self.home / "chain", signer=self.signer, trusted=self.config.identity.trusted)

    @cached_property
    def log(self) -> UpdateLog:
        """The update log, its topics created."""
        log = open_log(self.config.log)
        log.create_topics(TOPICS)
        return log

    @cached_property
    def authorizer(self) -> Authorizer:
        """The policy behind the audit journal: no decision without a record."""
        return AuditedAuthorizer(PolicyFile(self.config.governance.policy), self.home / "audit.jsonl")

    @cached_property
    def lineage(self) -> LineageOutbox:
        """DataHub proposals, on disk before anything is shipped."""
        return LineageOutbox(self.home / "lineage.jsonl")

    @cached_property
    def registry(self) -> Registry:
        """MLflow, or its file-backed twin."""
        settings = self.config.registry
        if settings.uri == "file":
            from tier1.governance.registry_file import FileRegistry

            return FileRegistry(self.home / "registry.json")
        from tier1.governance.registry_mlflow import MlflowRegistry

        return MlflowRegistry(settings.uri, settings.model_name)

    @property
    def model_resource(self) -> str:
        """Name of the model in policies."""
        return f"model:{self.config.registry.model_name}"

    def authorise(self, action: str, resource: str, *, principal: str | None = None, **context: str) -> AccessDecision:
        """Ask the policy and return its permission.

        Raises:
            PolicyDenied: the policy denies, cannot decide, or the decision cannot be recorded.
        """
        request = AccessRequest(
            principal=principal or self.config.identity.principal, action=action, resource=resource, context=context
        )
        return require_access(self.authorizer, request)

    def announce(self, event: Event, *, key: bytes) -> None:
        """Tell the devices something, signed by tier 1.

        Raises:
            TransportError: the log does not answer; announce again, twice is harmless.
        """
        self.log.append(CONTROL, key=key, value=event.to_bytes(), headers=sign_event(event, self.signer))

    def request(self, task: TrainingTask) -> None:
        """Ask the trigger for one turn of a loop, signed by tier 1.

        Raises:
            TransportError: the log does not answer; request again, twice under one id is launched once.
        """
        self.log.append(TASKS, key=task.task_id.encode(), value=task.to_bytes(), headers=sign_event(task, self.signer))

    def close(self) -> None:
        """Let go of the log connection, if one was opened."""
        if "log" in self.__dict__:
            self.log.close()


def open_federation(path: str | os.PathLike) -> Federation:
    """Open the federation that a tier1.yaml describes.

    Raises:
        ConfigError: the file is wrong, or a production profile names a place that only this machine can see.
    """
    config = load_tier1(path)
    if config.profile == "production" and config.log.servers().startswith(MEMORY):
        raise ConfigError(f"log.bootstrap = {config.log.servers()} is for tests: set the brokers of the production log")
    if config.profile == "production" and config.governance.allow_unverified:
        raise ConfigError(
            "governance.allow_unverified = true lets anybody at a console decide, which is for profile: local: "
            "set it to false and let approvers sign tokens"
        )
    return Federation(config=config)


def open_log(settings: LogConfig) -> UpdateLog:
    """Open the update log, its topics as they are; `close` it afterwards."""
    servers = settings.servers()
    if servers.startswith(MEMORY):  # public twin for tests: one log per name and process
        return _memory_logs.setdefault(servers, InMemoryLog(name=servers.removeprefix(MEMORY)))
    return KafkaLog(servers, timeout_s=settings.timeout_s)
