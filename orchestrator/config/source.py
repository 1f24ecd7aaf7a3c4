"""Owns where values of the configuration come from: one YAML file, the environment, the command line.

Merges the three and remembers which of them, and which line, each value came from.
"""

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from orchestrator.config.environment import ENV_PREFIX, is_setting
from placement.errors import InvalidConfig

MAX_FILE_BYTES = 2**20
_INDEX = re.compile("[0-9]{1,4}")

Key = tuple[str | int, ...]


@dataclass(slots=True, kw_only=True)
class Layers:
    """Holds merged values that are not validated yet.

    Attributes:
        values: what the sections hold.
        sources: where the value under a key came from, in words; a key's own keys share its source.
        changed: keys that the environment or the command line gave.
        errors: what was refused while merging.
    """

    file: str
    values: dict[str, Any] = field(default_factory=dict)
    sources: dict[Key, str] = field(default_factory=dict)
    changed: set[Key] = field(default_factory=set)
    errors: list[InvalidConfig] = field(default_factory=list)

    def source(self, key: Key) -> str:
        """Says where the value, or else the nearest one above it, came from, in words that follow the problem."""
        found = (self.sources[key[:end]] for end in range(len(key), -1, -1) if key[:end] in self.sources)
        return next(found, f"in {self.file}")

    def is_from_file(self, key: Key) -> bool:
        """Tells whether neither the environment nor the command line gave the value."""
        return all(key[:end] not in self.changed for end in range(len(key) + 1))

    def refusal(self, key: Key, value: object, problem: str, fix: str) -> InvalidConfig:
        """Returns the error for a value, with its source named."""
        dotted = ".".join(map(str, key)) or self.file
        return InvalidConfig(field=dotted, value=value, problem=f"{problem}, {self.source(key)}", fix=fix)

    def put(self, dotted: str, text: str, source: str) -> None:
        """Replaces one value. A number in the key is the index of an old or new entry of a list."""
        key = tuple(int(part) if _INDEX.fullmatch(part) else part for part in dotted.split("."))
        changed = _with(self.values, key, _parse_value(text))
        if changed is None:
            fix = "Give the key as section.key; a list entry by its index, which starts at 0."
            problem = f"names no place in the configuration, {source}"
            self.errors.append(InvalidConfig(field=dotted, value=text, problem=problem, fix=fix))
            return
        self.values = changed
        self.sources = {known: where for known, where in self.sources.items() if known[: len(key)] != key}
        self.sources |= {key[:end]: source for end in range(1, len(key)) if key[:end] not in self.sources}
        self.sources[key] = source
        self.changed.add(key)


def read_layers(path: Path, *, overrides: Sequence[str], environ: Mapping[str, str]) -> Layers:
    """Merges the file, the environment and the command line; each counts more than those before it.

    Raises:
        InvalidConfig: the file cannot be read or is no YAML mapping.
    """
    layers = _read_file(path)
    for name, text in sorted(environ.items()):
        if is_setting(name):
            dotted = name.removeprefix(ENV_PREFIX).lower().replace("__", ".")
            layers.put(dotted, text, f"in environment variable {name}")
    for override in overrides:
        dotted, equals, text = override.partition("=")
        if equals:
            layers.put(dotted.strip(), text, "given with --set")
        else:
            fix = "Write --set section.key=value."
            error = InvalidConfig(field="--set", value=override, problem="has no =", fix=fix)
            layers.errors.append(error)
    cluster = layers.values.get("cluster") or {}
    if environ.get("RAY_ADDRESS") and isinstance(cluster, dict) and cluster.get("ray_address") is None:
        layers.put("cluster.ray_address", environ["RAY_ADDRESS"], "in environment variable RAY_ADDRESS")
    return layers


def _read_file(path: Path) -> Layers:
    layers = Layers(file=path.name)
    text = _read_text(path)
    try:
        loader = _Loader(text)
        node = loader.get_single_node()
        if not isinstance(node, yaml.MappingNode):
            problem = "holds no section" if node is None else "is not a mapping of sections"
            raise InvalidConfig(
                field=path.name, value=None, problem=problem, fix="Start it with:\nmodel:\n  path: DIRECTORY"
            )
        _visit(node, (), layers)
        layers.values = loader.construct_document(node)
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        raise _not_yaml(path, error) from None
    return layers


def _read_text(path: Path) -> str:
    fix = "Give the path of a cluster YAML file, for instance deploy/local.yaml."
    try:
        with path.open("rb") as file:
            data = file.read(MAX_FILE_BYTES + 1)
        if len(data) <= MAX_FILE_BYTES:
            return data.decode()
        problem = f"is larger than {MAX_FILE_BYTES} bytes"
    except UnicodeDecodeError:
        problem = "is not UTF-8 text"
    except OSError as error:
        problem = f"cannot be read: {(error.strerror or str(error)).lower()}"
    raise InvalidConfig(field="config file", value=str(path), problem=problem, fix=fix)


class _Loader(yaml.SafeLoader):
    """Loads as yaml.safe_load does, but refuses aliases, whose expansion has no bound."""

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            mark = self.peek_event().start_mark  # type: ignore[no-untyped-call]
            raise yaml.MarkedYAMLError(problem="aliases are not read; write the value out", problem_mark=mark)
        return super().compose_node(parent, index)


def _visit(node: yaml.Node, key: Key, layers: Layers) -> None:
    """Notes the line of every value, and refuses keys that come twice."""
    line = f"on line {node.start_mark.line + 1} in {layers.file}"
    layers.sources[key] = line if key else f"in {layers.file}"
    if isinstance(node, yaml.SequenceNode):
        for index, child in enumerate(node.value):
            _visit(child, (*key, index), layers)
    if not isinstance(node, yaml.MappingNode):
        return
    seen: dict[str, int] = {}
    for name_node, child in node.value:
        name, name_line = str(name_node.value), name_node.start_mark.line + 1
        if name in seen:
            error = InvalidConfig(
                field=".".join(map(str, (*key, name))),
                value=name,
                problem=f"stands twice, on lines {seen[name]} and {name_line} in {layers.file}",
                fix="Keep one of the two.",
            )
            layers.errors.append(error)
        seen.setdefault(name, name_line)
        _visit(child, (*key, name), layers)


def _not_yaml(path: Path, error: Exception) -> InvalidConfig:
    mark = getattr(error, "problem_mark", None)
    what = getattr(error, "problem", None) or str(error)
    where = "" if mark is None else f" on line {mark.line + 1}, column {mark.column + 1}"
    fix = "Indent with spaces, and quote text that holds any of : # { } [ ] , & * ."
    return InvalidConfig(field=path.name, value=None, problem=f"is not valid YAML{where}: {what}", fix=fix)


def _parse_value(text: str) -> Any:
    """Reads a value as YAML; what is none is taken as it is, so that ``[::1]:50051`` needs no quotes."""
    try:
        return yaml.load(text, _Loader)
    except (yaml.YAMLError, ValueError, RecursionError):
        return text


def _with(holder: Any, key: Key, value: Any) -> Any | None:
    """Returns a copy of ``holder`` with ``value`` under ``key``; None where there is no such place."""
    if not key:
        return value
    part, rest = key[0], key[1:]
    if isinstance(part, int):
        entries = [] if holder is None else holder
        if not isinstance(entries, list) or part > len(entries):
            return None
        changed = _with(entries[part] if part < len(entries) else None, rest, value)
        whole: Any = [*entries[:part], changed, *entries[part + 1 :]]
    else:
        section = {} if holder is None else holder
        if not isinstance(section, dict) or not part:
            return None
        changed = _with(section.get(part), rest, value)
        whole = {**section, part: changed}
    return None if rest and changed is None else whole
