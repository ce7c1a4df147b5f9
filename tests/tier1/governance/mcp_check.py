"""A strict check of DataHub proposals, offline: what GMS would refuse or silently ignore.

Only tests pay for it: the first call loads DataHub's schemas, which takes most of a second.

`datahub check metadata-file` passes an unknown aspect, an unknown field, a value that is no URN and an aspect on the
wrong entity. This check rests on the schemas that the acryl-datahub wheel ships: entity and aspect names, the aspects
each entity may carry (`ASPECT_INFO` of its key), avro types, unknown fields, and for every field with a `Relationship`
the entity types that its URNs may have. Tagged unions (`schemaMetadata`) raise a false alarm; we emit none.
"""

from __future__ import annotations

import functools
import json
from collections.abc import Iterator, Mapping
from typing import Any

ENVELOPE_KEYS = frozenset(
    {"entityType", "entityUrn", "changeType", "aspectName", "aspect", "systemMetadata", "headers"}
)

Path = tuple[str, ...]


def check_proposal(proposal: Mapping[str, Any]) -> list[str]:
    """Return what is wrong with one MCP, as the outbox stores it; empty means valid."""
    from datahub.metadata.schema_classes import ASPECT_NAME_MAP

    problems = [f"unknown key {key}" for key in proposal if key not in ENVELOPE_KEYS]
    entity, urn, aspect = proposal.get("entityType"), proposal.get("entityUrn"), proposal.get("aspectName")
    problems += _check_urn(urn, allowed=(entity,), what="entityUrn")
    if proposal.get("changeType") != "UPSERT":
        problems.append(f"changeType {proposal.get('changeType')!r} is not UPSERT")
    if aspect not in ASPECT_NAME_MAP:
        return [*problems, f"unknown aspect {aspect!r}"]
    if aspect not in _aspects_of(entity):
        problems.append(f"aspect {aspect} is not allowed on entity {entity!r}")
    body = proposal.get("aspect")
    if not isinstance(body, Mapping) or set(body) != {"json"} or not isinstance(body["json"], Mapping):
        return [*problems, 'aspect is not {"json": {…}}']
    return problems + _check_aspect(aspect, body["json"])


def _check_aspect(name: str, raw: Mapping[str, Any]) -> list[str]:
    from datahub.metadata.schema_classes import ASPECT_NAME_MAP

    try:
        parsed = ASPECT_NAME_MAP[name].from_obj(dict(raw))
        valid = parsed.validate()
    except Exception as error:  # the generated classes raise whatever avro meets first
        return [f"{name} does not parse: {type(error).__name__}: {error}"]
    if not valid:
        return [f"{name} does not match its avro schema"]
    problems = [f"{name} has unknown field {field}" for field in _unknown_fields(raw, parsed.to_obj(), ())]
    for path, allowed, relationship in _relationships(name):
        for value in _values_at(raw, path):
            problems += _check_urn(value, allowed=allowed, what=f"{name}.{'.'.join(path)} ({relationship})")
    return problems


def _check_urn(value: Any, *, allowed: tuple[str | None, ...], what: str) -> list[str]:
    from datahub.metadata.urns import Urn
    from datahub.utilities.urns.urn import guess_entity_type

    try:
        Urn.from_string(value)
        found = guess_entity_type(value)  # not `.entity_type`: a VersionSetUrn has a part of that name
    except Exception as error:  # InvalidUrnError, or whatever a value that is no string causes
        return [f"{what}: {value!r} is not a URN ({type(error).__name__})"]
    if found not in allowed:
        return [f"{what}: {value!r} is a {found}, allowed are {', '.join(map(str, allowed))}"]
    return []


@functools.cache
def _aspects_of(entity: str | None) -> frozenset[str]:
    from datahub.metadata.schema_classes import KEY_ASPECTS

    key = KEY_ASPECTS.get(entity)
    if key is None:
        return frozenset()
    return frozenset({key.ASPECT_NAME, *(key.ASPECT_INFO.get("entityAspects") or ())})


@functools.cache
def _relationships(aspect: str) -> tuple[tuple[Path, tuple[str, ...], str], ...]:
    """Return (path to the URN, entity types it may have, name) of every relationship in an aspect's schema."""
    from datahub.metadata.schema_classes import ASPECT_NAME_MAP

    return tuple(_walk_schema(json.loads(str(ASPECT_NAME_MAP[aspect].RECORD_SCHEMA)), ()))


def _walk_schema(schema: Any, path: Path) -> Iterator[tuple[Path, tuple[str, ...], str]]:
    if isinstance(schema, list):
        for option in schema:
            yield from _walk_schema(option, path)
        return
    if not isinstance(schema, dict):
        return
    for field in schema.get("fields", ()):
        here = (*path, field["name"])
        relationship = field.get("Relationship") or {}
        flat = {"": relationship} if "entityTypes" in relationship else relationship
        for inner, target in flat.items():
            if isinstance(target, dict) and target.get("entityTypes"):
                yield (
                    (*here, *(part for part in inner.split("/") if part)),
                    tuple(target["entityTypes"]),
                    target["name"],
                )
        yield from _walk_schema(field.get("type"), here)
    if "items" in schema:
        yield from _walk_schema(schema["items"], (*path, "*"))
    if isinstance(schema.get("type"), dict | list):
        yield from _walk_schema(schema["type"], path)


def _values_at(document: Any, path: Path) -> Iterator[Any]:
    if document is None:
        return
    if not path:
        yield document
    elif path[0] == "*":
        for item in document if isinstance(document, list) else ():
            yield from _values_at(item, path[1:])
    elif isinstance(document, Mapping):
        yield from _values_at(document.get(path[0]), path[1:])


def _unknown_fields(given: Any, understood: Any, path: Path) -> Iterator[str]:
    if isinstance(given, Mapping) and isinstance(understood, Mapping):
        for key, value in given.items():
            if key in understood:
                yield from _unknown_fields(value, understood[key], (*path, key))
            elif value is not None:
                yield ".".join((*path, key))
    elif isinstance(given, list) and isinstance(understood, list):
        for position, (one, other) in enumerate(zip(given, understood, strict=True)):
            yield from _unknown_fields(one, other, (*path, str(position)))
