"""What answers over the network: the update log with its topics, the registry, and by its answers the clock."""

from __future__ import annotations

import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Mapping
from email.utils import parsedate_to_datetime
from typing import Any

from fednested_lib.errors import FednestedError, TransportError
from fednested_lib.finding import Finding, judge
from fednested_lib.log import MAX_RECORD_BYTES, TOPICS, UPDATES
from tier1.federation import MEMORY, Federation, open_log

TIMEOUT_S = 5.0
MAX_SKEW_S = 5.0  # an HTTP date has whole seconds
HOUR_MS = 3_600_000


def log(fed: Federation, *, longest_outage_h: float) -> Iterator[Finding]:
    """Does the log answer, and does it keep records longer than the longest outage?

    Args:
        fed: the federation.
        longest_outage_h: hours for which tier 1 may be down without losing an update.
    """
    servers = fed.config.log.servers()
    if servers.startswith(MEMORY):
        yield Finding(what="log", state="warning", value=f"{servers}, in this process", remedy="for tests only")
        return
    opened = open_log(fed.config.log.model_copy(update={"timeout_s": TIMEOUT_S}))
    try:
        found = _topics(servers)
        yield Finding(what="log", state="ok", value=f"{servers} answers, {len(found)} topics")
        for topic, partitions in TOPICS.items():
            yield from _topic(topic, partitions, found.get(topic), longest_outage_h)
        if UPDATES in found:
            yield from _places(fed, opened)
    finally:
        opened.close()


def _topic(name: str, partitions: int, settings: Mapping | None, longest_outage_h: float) -> Iterator[Finding]:
    what, alter = f"topic {name}", f"kafka-configs --alter --topic {name}"
    if settings is None:
        yield Finding(what=what, state="bad", value="missing", remedy="fednested messaging bootstrap-topics")
        return
    kept_ms, kept_bytes = int(settings.get("retention.ms", -1)), int(settings.get("retention.bytes", -1))
    largest = int(settings.get("max.message.bytes", MAX_RECORD_BYTES))
    kept = "for ever" if kept_ms < 0 else f"{kept_ms / HOUR_MS:g} h"
    yield judge(
        what,
        holds=settings["partitions"] == partitions,
        value=f"{settings['partitions']} partitions, kept {kept}, records of at most {largest} bytes",
        bound=f"{partitions} partitions",
        remedy="a topic of a federation keeps its partitions: begin on a new log",
    )
    if 0 <= kept_ms < longest_outage_h * HOUR_MS:
        bound = f"≥ {longest_outage_h:g} h, the longest outage"
        remedy = f"{alter} --add-config retention.ms={int(longest_outage_h * HOUR_MS)}; what expires unread is lost"
        yield Finding(what=what, state="bad", value=f"kept {kept}", bound=bound, remedy=remedy)
    if kept_bytes >= 0:
        remedy = f"{alter} --delete-config retention.bytes, or see that it lasts for the longest outage"
        yield Finding(what=what, state="warning", value=f"kept {kept_bytes} bytes", bound="no limit", remedy=remedy)
    if largest < MAX_RECORD_BYTES:
        remedy = f"{alter} --add-config max.message.bytes={MAX_RECORD_BYTES}"
        value = f"records of at most {largest} bytes"
        yield Finding(what=what, state="bad", value=value, bound=f"≥ {MAX_RECORD_BYTES}", remedy=remedy)


def _topics(servers: str) -> dict[str, dict[str, Any]]:
    """Return topic → partitions and configuration, as far as the broker tells it."""
    from confluent_kafka import KafkaException
    from confluent_kafka.admin import AdminClient, ConfigResource

    client = AdminClient({"bootstrap.servers": servers, "log_level": 0, "socket.timeout.ms": int(1000 * TIMEOUT_S)})
    try:
        found = client.list_topics(timeout=TIMEOUT_S).topics
        topics = {name: {"partitions": len(found[name].partitions)} for name in TOPICS if name in found}
        if topics:
            resources = [ConfigResource("topic", name) for name in topics]
            for resource, told in client.describe_configs(resources, request_timeout=TIMEOUT_S).items():
                topics[resource.name] |= {key: entry.value for key, entry in told.result(TIMEOUT_S).items()}
    except KafkaException as error:
        raise TransportError(
            f"log {servers} does not answer within {TIMEOUT_S:g} s ({error.args[0].str()}): start the broker, or set "
            "log.bootstrap or FEDNESTED_KAFKA_BOOTSTRAP"
        ) from error
    return topics


def _places(fed: Federation, opened: Any) -> Iterator[Finding]:
    """Are the offsets that the next cut begins with still in the log?"""
    if not fed.chain.exists():
        return
    state = fed.chain.state()
    oldest = {str(partition): low for partition, (low, _) in opened.watermarks(UPDATES).items()}
    lost = {
        partition: (offset, oldest.get(partition))
        for partition, offset in state.offsets.items()
        if offset < (oldest.get(partition) or 0)
    }
    yield judge(
        "next cut",
        holds=not lost,
        value="begins within the log" if not lost else f"expired before it was read: {lost}",
        bound="no offset lost",
        remedy="docs/log-loss.md: fednested tier1 accept-log goes on, and devices send again",
    )


def registry(fed: Federation) -> Iterator[Finding]:
    """Does the registry answer with our rights?"""
    uri = fed.config.registry.uri
    try:
        aliases = fed.registry.aliases()
    except FednestedError as error:
        hint = "; if it wants a login, set MLFLOW_TRACKING_TOKEN" if uri.startswith("http") else ""
        yield Finding(what="registry", state="bad", value=f"{error}{hint}")
        return
    shown = ", ".join(f"{alias} → {number}" for alias, number in sorted(aliases.items())) or "no version yet"
    yield Finding(what="registry", state="ok", value=f"{uri}: {shown}")


def clock(fed: Federation) -> Iterator[Finding]:
    """Does the registry's server have our time? Windows and decisions carry it."""
    uri = fed.config.registry.uri
    if not uri.startswith("http"):
        return
    try:
        with urllib.request.urlopen(uri, timeout=TIMEOUT_S) as answer:
            told = answer.headers.get("Date")
    except urllib.error.HTTPError as refused:  # a login page has a date as well
        told = refused.headers.get("Date")
    except OSError:
        return  # the registry's own finding says it
    if told is None:
        return
    skew_s = abs(time.time() - parsedate_to_datetime(told).timestamp())
    yield judge(
        "clock",
        holds=skew_s <= MAX_SKEW_S,
        value=f"{skew_s:.0f} s from {uri}",
        bound=f"≤ {MAX_SKEW_S:g} s",
        remedy="run NTP on both machines",
        otherwise="warning",
    )
