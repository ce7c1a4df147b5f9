"""The registry on a real MLflow server: logged models, model versions, aliases; never stages.

Per core update: one run with the metrics of its steps. Per version: one run with what was measured on every suite, one
logged model with `manifest.json` and `snapshot.json` as its artifacts, one model version with the tags that name it.
Weights stay in the blob store; the snapshot names them.

Traps of MLflow 3.17 that this module knows: telemetry is on by default; retries make a dead server hang for minutes; a
missing alias is reported as an invalid parameter; `create_model_version` accepts any foreign source such as `s3://evil`,
so only entries whose source is a logged model (`models:/m-…`) count as ours.
"""

from __future__ import annotations

import contextlib
import os
import tempfile
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from fednested_lib.errors import GovernanceError, TransportError
from tier1.governance.ports import ModelVersion, Registered, TrainingRun
from tier1.governance.registry import RepairableRegistry

OURS = "models:/m-"
ANCHOR = "chain_head"
BATCH = 1000  # metrics that MLflow takes at once
REMEDY = "start the server, or set registry.uri"
# a refused connection and a 500 are both INTERNAL_ERROR to MLflow's client
UNREACHABLE = {
    "INTERNAL_ERROR",
    "TEMPORARILY_UNAVAILABLE",
    "DEADLINE_EXCEEDED",
    "REQUEST_LIMIT_EXCEEDED",
    "RESOURCE_EXHAUSTED",
}
FORCED = {"MLFLOW_DISABLE_TELEMETRY": "true", "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true"}
DEFAULTS = {
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "10",
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "1",
    "MLFLOW_HTTP_REQUEST_BACKOFF_FACTOR": "1",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
}


class MlflowRegistry(RepairableRegistry):
    """Versions of one registered model on one MLflow server.

    Args:
        uri: tracking URI, e.g. ``http://127.0.0.1:5000``.
        model_name: name of the registered model and of the experiment that holds its runs.
    """

    def __init__(self, uri: str, model_name: str):
        self.uri = uri
        self.model_name = model_name

    def register(self, version: ModelVersion) -> Registered:
        """Store a version unless an entry with its manifest is there.

        Raises:
            TransportError: the server cannot be reached, or failed; calling again is safe.
        """
        known = (entry for entry in self.versions() if entry.manifest_digest == version.manifest_digest)
        return next(known, None) or self.add(version)

    def versions(self) -> tuple[Registered, ...]:
        """Return our registered versions, oldest first."""
        found: list[Any] = []
        token = None
        with self._client() as client:
            while True:
                page = client.search_model_versions(f"name = '{self.model_name}'", page_token=token)
                found.extend(page)
                token = page.token
                if not token:
                    break
        ours = (entry for entry in found if (entry.source or "").startswith(OURS))
        return tuple(_registered(entry) for entry in sorted(ours, key=lambda entry: int(entry.version)))

    def aliases(self) -> Mapping[str, str]:
        """Return alias → registry number."""
        model = self._model()
        return {} if model is None else {alias: str(number) for alias, number in model.aliases.items()}

    def anchor(self) -> str | None:
        """Return the remembered chain head."""
        model = self._model()
        return None if model is None else model.tags.get(ANCHOR)

    def artifacts(self, registered: Registered) -> Mapping[str, bytes]:
        """Return the artifacts of an entry that are there."""
        with self._client() as client, tempfile.TemporaryDirectory() as directory:
            from mlflow.artifacts import download_artifacts

            model = _or_none(lambda: client.get_logged_model(registered.source.removeprefix("models:/")))
            if model is None or not client.list_logged_model_artifacts(model.model_id):
                return {}
            # not `models:/m-…`: MLflow resolves that against the process-wide tracking URI, not against this one
            place = download_artifacts(model.artifact_location, dst_path=directory, tracking_uri=self.uri)
            return {path.name: path.read_bytes() for path in Path(place).iterdir() if path.is_file()}

    def add(self, version: ModelVersion) -> Registered:
        """Store a version in a new entry."""
        tags = version.tags() | {ANCHOR: version.chain_head}
        with self._client() as client:
            _create_if_absent(lambda: client.create_registered_model(self.model_name))
            experiment = self._experiment(client)
            run_id = client.create_run(experiment, run_name=f"version {version.version}", tags=tags).info.run_id
            _log_metrics(client, run_id, version)
            model_id = self._log_model(client, experiment, run_id, version, tags)
            entry = client.create_model_version(
                self.model_name, f"models:/{model_id}", run_id, tags=tags, await_creation_for=0, model_id=model_id
            )
            client.set_terminated(run_id, "FINISHED")
        return _registered(entry)

    def point(self, alias: str, number: str | None) -> None:
        """Let an alias point at an entry; None removes it."""
        with self._client() as client:
            if number is None:
                client.delete_registered_model_alias(self.model_name, alias)
            else:
                client.set_registered_model_alias(self.model_name, alias, number)

    def set_tags(self, number: str, tags: Mapping[str, str]) -> None:
        """Set tags of an entry, leaving its other tags alone."""
        with self._client() as client:
            for name, value in tags.items():
                client.set_model_version_tag(self.model_name, number, name, value)

    def set_anchor(self, digest: str) -> None:
        """Remember a chain head."""
        with self._client() as client:
            client.set_registered_model_tag(self.model_name, ANCHOR, digest)

    def record_run(self, run: TrainingRun) -> None:
        """Show the metrics of a run's steps as an MLflow run, unless it is there already.

        Raises:
            TransportError: the server cannot be reached, or failed; calling again goes on with the same MLflow run.
        """
        with self._client() as client:
            experiment = self._experiment(client)
            known = client.search_runs([experiment], filter_string=f"tags.update_id = '{run.update_id}'")
            if known and known[0].info.status == "FINISHED":
                return
            made = known[0] if known else client.create_run(experiment, run_name=run.name, tags=run.tags())
            _log_steps(client, made.info.run_id, run)
            client.set_terminated(made.info.run_id, "FINISHED")

    def _model(self) -> Any | None:
        with self._client() as client:
            return _or_none(lambda: client.get_registered_model(self.model_name))

    def _experiment(self, client: Any) -> str:
        if client.get_experiment_by_name(self.model_name) is None:
            _create_if_absent(lambda: client.create_experiment(self.model_name))
        experiment = client.get_experiment_by_name(self.model_name)
        if experiment.lifecycle_stage == "deleted":
            client.restore_experiment(experiment.experiment_id)
        return experiment.experiment_id

    def _log_model(self, client: Any, experiment: str, run_id: str, version: ModelVersion, tags: dict[str, str]) -> str:
        model = client.create_logged_model(
            experiment, name=self.model_name, source_run_id=run_id, model_type="fednested snapshot", tags=tags
        )
        with tempfile.TemporaryDirectory() as directory:
            Path(directory, "manifest.json").write_bytes(version.manifest)
            Path(directory, "snapshot.json").write_bytes(version.snapshot)
            client.log_model_artifacts(model.model_id, directory)
        client.finalize_logged_model(model.model_id, "READY")
        return model.model_id

    @contextlib.contextmanager
    def _client(self) -> Iterator[Any]:
        """Yield an MLflow client; its failures become ours."""
        os.environ.update(FORCED)
        for name, value in DEFAULTS.items():
            os.environ.setdefault(name, value)
        from mlflow import MlflowClient
        from mlflow.exceptions import MlflowException
        from requests.exceptions import RequestException

        try:
            yield MlflowClient(tracking_uri=self.uri, registry_uri=self.uri)
        except RequestException as error:
            line = type(error).__name__
            raise TransportError(f"MLflow at {self.uri} cannot be reached ({line}): {REMEDY}") from error
        except MlflowException as error:
            line = " ".join(str(error).split())[:120]
            if error.error_code in UNREACHABLE:
                raise TransportError(f"MLflow at {self.uri} cannot be reached ({line}): {REMEDY}") from error
            raise GovernanceError(
                f"MLflow at {self.uri} refused ({line}): check permissions and registry.uri"
            ) from error


def _log_metrics(client: Any, run_id: str, version: ModelVersion) -> None:
    from mlflow.entities import Metric

    named = {f"loss.{suite}": loss for suite, loss in version.losses.items()} | dict(version.metrics)
    now_ms = int(time.time() * 1000)
    metrics = [Metric(name, value, now_ms, version.version) for name, value in sorted(named.items())]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _log_steps(client: Any, run_id: str, run: TrainingRun) -> None:
    """Log every number of every step; MLflow keeps one that is logged twice at the same time once."""
    from mlflow.entities import Metric

    metrics = [
        Metric(f"train.{name}", value, int(row["at_ms"]), int(row["step"]))
        for row in run.steps
        for name, value in row.items()
        if name not in ("step", "at_ms")
    ]
    for start in range(0, len(metrics), BATCH):
        client.log_batch(run_id, metrics=metrics[start : start + BATCH])


def _registered(entry: Any) -> Registered:
    return Registered(
        platform="mlflow",
        number=str(entry.version),
        run_id=entry.run_id or "",
        source=entry.source,
        tags=dict(entry.tags),
    )


def _or_none(call: Any) -> Any | None:
    from mlflow.exceptions import MlflowException

    try:
        return call()
    except MlflowException as error:
        if error.error_code == "RESOURCE_DOES_NOT_EXIST":
            return None
        raise


def _create_if_absent(call: Any) -> None:
    from mlflow.exceptions import MlflowException

    try:
        call()
    except MlflowException as error:
        if error.error_code != "RESOURCE_ALREADY_EXISTS":
            raise
