"""Configuration files that a person may have meant otherwise end in one line, not in a default or a traceback."""

from __future__ import annotations

import re

import pytest

from fednested_lib.config import TIER2_EXAMPLE, Section, load_tier2, load_yaml
from fednested_lib.errors import ConfigError


class Inner(Section):
    """A section inside."""

    size: float = 1.0
    names: list[dict[str, int]] = []


class Outer(Section):
    """A whole file."""

    inner: Inner = Inner()
    other: Inner = Inner()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("inner: {size: 1}\nother: {}\ninner: {size: 2}\n", "key inner stands 2 times, at lines 1, 3"),
        ("inner:\n  size: 1\n  size: 1\n", "key size stands 2 times, at lines 2, 3"),
        ("inner:\n  names:\n  - {a: 1, b: 2, 'a': 3}\n", "key a stands 2 times, at lines 3, 3"),
        ("inner: {size: .inf}\n", "inner.size = inf"),
        ("inner: {size: .nan}\n", "inner.size = nan"),
        ("inner: {size: 2026-13-45}\n", "cannot be understood (ValueError"),
        ("inner: " + "[" * 5000, "cannot be understood (RecursionError"),
        ("inner: &a [*a]\n", "inner"),
        ("inner: {size: 1", "is not YAML at line 1"),
        ("", "must hold a mapping, got NoneType"),
    ],
)
def test_a_doubtful_file_is_refused_with_its_place(tmp_path, text, message):
    """Repeated keys at any depth, infinite numbers, impossible values and endless nesting are named, never guessed."""
    path = tmp_path / "config.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=re.escape(message)) as caught:
        load_yaml(path, Outer, command="fednested init-config tier1")
    assert "\n" not in str(caught.value)


def test_aliases_and_equal_keys_in_different_sections_are_fine(tmp_path):
    """The same key in two sections, or one section used twice by alias, is no repetition."""
    path = tmp_path / "config.yaml"
    path.write_text("inner: &shared {size: 2}\nother: *shared\n")
    assert load_yaml(path, Outer, command="x").other.size == 2


@pytest.mark.parametrize(
    ("added", "removed", "problem"),
    [
        ("transport: http\ngateway: {url: 'https://g', ca_file: ca.pem}\n", ("blobs_uri", "payloads_uri"), None),
        ("transport: http\n", (), "key gateway is missing: transport http needs it"),
        ("", ("payloads_uri",), "key payloads_uri is missing: transport kafka needs it"),
        ("transport: ftp\n", (), "transport = 'ftp'"),
        ("transport: http\ngateway: {url: 'ftp://g'}\n", (), "gateway.url = 'ftp://g'"),
        ("transport: http\ngateway: {url: 'https://g', chunk_bytes: 1}\n", (), "gateway.chunk_bytes = 1"),
    ],
)
def test_each_transport_says_what_it_needs(tmp_path, added, removed, problem):
    """A device with half a transport does not start; file names are relative to the configuration."""
    example = TIER2_EXAMPLE.format(client_id="romeo", policy_key="0" * 64).replace('""', f'"{"0" * 64}"', 1)
    lines = [line for line in example.splitlines(keepends=True) if not line.startswith(removed or ("-",))]
    (tmp_path / "tier2.yaml").write_text("".join(lines) + added)
    if problem is None:
        assert load_tier2(tmp_path / "tier2.yaml").gateway.ca_file == tmp_path / "ca.pem"
        return
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load_tier2(tmp_path / "tier2.yaml")


@pytest.mark.parametrize(("value", "held"), [(None, "fp32"), ("int4", "int4"), ("nf4", None)])
def test_how_experts_are_held(tmp_path, value, held):
    """Experts are fp32 unless `model.frozen` says otherwise; another word is one line with the key and the choices."""
    path = tmp_path / "tier2.yaml"
    example = TIER2_EXAMPLE.format(client_id="romeo", policy_key="0" * 64).replace('""', f'"{"0" * 64}"', 1)
    path.write_text(example + (f"model: {{frozen: {value}}}\n" if value else ""))
    if held:
        assert load_tier2(path).model.frozen == held
        return
    with pytest.raises(ConfigError, match="model.frozen = 'nf4'.*'fp32', 'bf16', 'int8' or 'int4'") as caught:
        load_tier2(path)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("outgoing", "problem"),
    [
        ("{encoding: int4, levels: 3}", None),
        ("{encoding: int4, levels: 1}", "outgoing.levels = 1"),
        ("{encoding: int4, levels: 8}", "outgoing.levels = 8"),
        ("{encoding: int8, levels: 3}", "levels = 3 is of encoding int4, got encoding = int8"),
        ("{encoding: int8, levels: 7}", None),
    ],
)
def test_levels_are_of_int4(tmp_path, outgoing, problem):
    """Fewer levels than there are, of an encoding that has none, are no silent default."""
    path = tmp_path / "tier2.yaml"
    example = TIER2_EXAMPLE.format(client_id="romeo", policy_key="0" * 64).replace('""', f'"{"0" * 64}"', 1)
    lines = [line for line in example.splitlines(keepends=True) if not line.startswith("outgoing")]
    path.write_text("".join(lines) + f"outgoing: {outgoing}\n")
    if problem is None:
        assert load_tier2(path).outgoing.levels == int(outgoing[-2])
        return
    with pytest.raises(ConfigError, match=re.escape(problem)):
        load_tier2(path)
