"""What a device needs of the update log, over HTTP: the same contract as `KafkaLog` for append, read and watermarks.

The gateway checks, appends, and answers after the broker's acknowledgement. A record whose answer was lost is posted
again: for a device update the gateway then gives the place it has already. Offsets, identity and records are the
broker's own, so a device may change its transport without anybody noticing.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from urllib.parse import quote, urlencode

from pydantic import BaseModel, ValidationError

from fednested_lib.errors import ConfigError, LogError, PayloadError, TransportError
from fednested_lib.gateway_http import Answer, GatewayHttp
from fednested_lib.gateway_wire import Page, Place, TopicState, WireRecord, parse_refusal
from fednested_lib.log import Record, check_size


class GatewayLog:
    """A device's half of `UpdateLog` through the gateway; safe for threads.

    Attributes:
        next_poll_s: how long the gateway asks to wait before the next look at a topic (pace steering).
    """

    def __init__(self, gateway: GatewayHttp):
        self.next_poll_s = 0.0
        self._gateway = gateway

    @property
    def skew_s(self) -> float:
        """The gateway's clock minus ours after its last answer, in seconds."""
        return self._gateway.skew_s

    def create_topics(self, topics: Mapping[str, int]) -> None:
        """Refuse: topics are tier 1's.

        Raises:
            ConfigError: always.
        """
        raise ConfigError(
            f"topics {', '.join(topics)} are created at tier 1: run `fednested messaging bootstrap-topics`"
        )

    def append(self, topic: str, *, key: bytes, value: bytes, headers: Mapping[str, bytes]) -> tuple[int, int]:
        """See `UpdateLog.append`.

        Raises:
            PayloadError: the gateway refuses the record for good; with its reason.
        """
        check_size(topic, key, value, headers)
        target = f"/v1/topics/{quote(topic, safe='')}/records"
        body = WireRecord.of(key, value, dict(headers)).model_dump_json(exclude_none=True).encode()
        answer = self._gateway.ask("POST", target, body=body, headers={"Content-Type": "application/json"})
        if answer.status >= 400:
            raise _refused(f"record for {topic}", answer)
        place = self._parse(target, answer, Place)
        return place.partition, place.offset

    def read(self, topic: str, ranges: Mapping[int, tuple[int, int]]) -> Iterator[Record]:
        """See `UpdateLog.read`."""
        for partition, (start, end) in sorted(ranges.items()):
            offset = start
            while offset < end or offset == start:  # an empty range is checked too
                page = self._page(topic, partition, offset, end)
                for record in page:
                    if record.offset != offset or offset >= end:
                        raise self._gateway.unintelligible(
                            f"offset {offset} of {topic}[{partition}]", f"offset {record.offset}"
                        )
                    yield record
                    offset += 1
                if not page:
                    break
            if offset < end:
                raise self._gateway.unintelligible(f"offset {offset} of {topic}[{partition}]", "no records")

    def watermarks(self, topic: str) -> dict[int, tuple[int, int]]:
        """See `UpdateLog.watermarks`."""
        return {int(partition): (low, high) for partition, (low, high) in sorted(self._state(topic).watermarks.items())}

    def identity(self, topic: str) -> str:
        """See `UpdateLog.identity`."""
        return self._state(topic).identity

    def close(self) -> None:
        """See `UpdateLog.close`."""
        self._gateway.close()

    def _state(self, topic: str) -> TopicState:
        target = f"/v1/topics/{quote(topic, safe='')}"
        state = self._parse(target, self._read_answer(target), TopicState)
        self.next_poll_s = state.next_poll_s
        return state

    def _page(self, topic: str, partition: int, start: int, end: int) -> list[Record]:
        query = urlencode({"partition": partition, "start": start, "end": end})
        target = f"/v1/topics/{quote(topic, safe='')}/records?{query}"
        page = self._parse(target, self._read_answer(target), Page)
        try:
            return [each.record(topic, partition) for each in page.records]
        except PayloadError as error:
            raise self._gateway.unintelligible(target.partition("?")[0], str(error)) from None

    def _read_answer(self, target: str) -> Answer:
        answer = self._gateway.ask("GET", target)
        if answer.status < 400:
            return answer
        told = parse_refusal(answer.body)
        if told is not None and told.error == LogError.__name__:
            raise LogError(told.message)
        said = told.message if told else f"status {answer.status}"
        raise TransportError(f"gateway {self._gateway.url} refuses {target.partition('?')[0]}: {said}")

    def _parse(self, target: str, answer: Answer, shape: type[BaseModel]):
        try:
            return shape.model_validate_json(answer.body)
        except ValidationError as error:
            first = error.errors(include_input=False, include_url=False)[0]
            field = ".".join(map(str, first["loc"])) or "body"
            raise self._gateway.unintelligible(target.partition("?")[0], f"a bad {field}: {first['msg']}") from None


def _refused(what: str, answer: Answer) -> PayloadError | TransportError:
    """Return the error for a 4xx: something is not there (yet), or the record will never be taken."""
    told = parse_refusal(answer.body)
    said = told.message if told else "no reason given"
    if answer.status in (404, 409):
        return TransportError(f"gateway does not take the {what} now ({answer.status}): {said}")
    reason = told.reason if told and told.reason else f"http_{answer.status}"
    return PayloadError(reason, f"gateway refuses the {what} ({answer.status}): {said}")
