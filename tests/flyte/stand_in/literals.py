"""Bindings to literals, as propeller resolves them before a node starts."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping

import msgpack
from flyteidl.core import literals_pb2, types_pb2

START = "start-node"
NOTHING = literals_pb2.Literal(scalar=literals_pb2.Scalar(none_type=literals_pb2.Void()))

Known = Mapping[str, literals_pb2.LiteralMap]  # node id -> outputs; the graph's inputs are those of START


def bind(bindings: Iterable[literals_pb2.Binding], known: Known) -> literals_pb2.LiteralMap:
    """Return the inputs of a node, or the outputs of a graph."""
    bound = literals_pb2.LiteralMap()
    for binding in bindings:
        bound.literals[binding.var].CopyFrom(_resolve(binding.binding, known))
    return bound


def promised(bindings: Iterable[literals_pb2.Binding]) -> Iterator[str]:
    """Yield the nodes whose outputs are needed."""
    for binding in bindings:
        yield from _sources(binding.binding)


def void_union() -> literals_pb2.Literal:
    """Return the literal of an optional input that is not given."""
    kind = types_pb2.LiteralType(simple=types_pb2.NONE, structure=types_pb2.TypeStructure(tag="none"))
    none = literals_pb2.Union(value=NOTHING, type=kind)
    return literals_pb2.Literal(scalar=literals_pb2.Scalar(union=none))


def error_union(node: str, message: str) -> literals_pb2.Literal:
    """Return the literal of a failure handler's optional `err`, with the tag that flytekit knows it by."""
    error = literals_pb2.Scalar(error=types_pb2.Error(failed_node_id=node, message=message))
    kind = types_pb2.LiteralType(simple=types_pb2.ERROR, structure=types_pb2.TypeStructure(tag="FlyteError"))
    union = literals_pb2.Union(value=literals_pb2.Literal(scalar=error), type=kind)
    return literals_pb2.Literal(scalar=literals_pb2.Scalar(union=union))


def _sources(data: literals_pb2.BindingData) -> Iterator[str]:
    kind = data.WhichOneof("value")
    if kind == "promise":
        yield data.promise.node_id or START
    elif kind == "collection":
        for each in data.collection.bindings:
            yield from _sources(each)
    elif kind == "map":
        for each in data.map.bindings.values():
            yield from _sources(each)


def _resolve(data: literals_pb2.BindingData, known: Known) -> literals_pb2.Literal:
    kind, literal = data.WhichOneof("value"), literals_pb2.Literal()
    if kind == "scalar":
        literal.scalar.CopyFrom(data.scalar)
    elif kind == "promise":
        literal.CopyFrom(known[data.promise.node_id or START].literals[data.promise.var])
        for attribute in data.promise.attr_path:
            literal = _attribute(literal, attribute)
    elif kind == "collection":
        literal.collection.SetInParent()
        literal.collection.literals.extend(_resolve(each, known) for each in data.collection.bindings)
    elif kind == "map":
        literal.map.SetInParent()
        for key, each in data.map.bindings.items():
            literal.map.literals[key].CopyFrom(_resolve(each, known))
    return literal


def _attribute(literal: literals_pb2.Literal, attribute: literals_pb2.PromiseAttribute) -> literals_pb2.Literal:
    key = getattr(attribute, attribute.WhichOneof("value"))
    if literal.HasField("collection"):
        return literal.collection.literals[key]
    if literal.HasField("map"):
        return literal.map.literals[key]
    value = msgpack.unpackb(literal.scalar.binary.value, strict_map_key=False)[key]
    binary = literals_pb2.Binary(value=msgpack.packb(value), tag="msgpack")
    return literals_pb2.Literal(scalar=literals_pb2.Scalar(binary=binary))
