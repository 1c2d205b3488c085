"""One file of Cedar rules: checked, parsed once, asked often. Owns ``cedarpy``.

Reads no file: it is given the content. Rules:

1. A file that does not fit the schema, names what does not exist, or holds a rule without ``@id`` and ``@reason`` is
   refused, with file and line.
2. Cedar skips a rule that fails while it is evaluated, a forbid as well: so a failed rule denies here, and so does
   whatever else goes wrong.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import cedarpy
from cedarpy import pst

from zones.errors import ConfigError, did_you_mean

#: What decides where no rule does. No rule may take this id.
DEFAULT_RULE = "default"


@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What one policy file says."""

    allowed: bool
    rules: tuple[str, ...]
    reasons: tuple[str, ...]


def no(reason: str) -> Answer:
    """Return a refusal for which no rule stands."""
    return Answer(allowed=False, rules=(DEFAULT_RULE,), reasons=(reason,))


class RuleFile:
    """One Cedar file, checked and parsed once.

    Args:
        path: Of the file, for messages.
        content: Of the file, UTF-8.
        schema: Which every rule must fit.
        known: Entity type or part of the context to the names that rules may compare it with; others are not checked.

    Raises:
        ConfigError: The file is wrong; file and line say where.
    """

    def __init__(
        self, path: Path, content: bytes, schema: cedarpy.Schema, known: Mapping[str, Collection[str]]
    ) -> None:
        self.path = path
        #: ``@id`` of each rule to the line that it begins on.
        self.lines: dict[str, int] = {}
        #: Entity types and parts of the context, each with a name that some rule compares it with.
        self.names: set[tuple[str, str]] = set()
        self._schema = schema
        text = content.decode("utf-8")
        for line, statement in _statements(text):
            name = self._checked(statement, line, known)
            if name in self.lines:
                self._fail(line, f"rule {name} stands here twice (line {self.lines[name]}); give it another @id")
            self.lines[name] = line
        self._policies = cedarpy.PolicySet.from_str(text)
        #: Cedar's own id of a rule (``policy0``, by position) to its ``@id`` and ``@reason``.
        self._rules = {
            own: (rule.annotations["id"], rule.annotations["reason"])
            for own, rule in self._policies.to_pst().static_policies.items()
        }

    def ask(self, request: dict[str, Any], entities: list[dict[str, Any]]) -> Answer:
        """Put *request* to the rules. Never raises."""
        try:
            result = cedarpy.is_authorized(request, self._policies, entities, self._schema)
            failed = result.diagnostics.errors
            if not failed:
                allowed = result.decision is cedarpy.Decision.Allow
                return self._answer(allowed, result.diagnostics.reasons)
        except Exception as problem:  # noqa: BLE001 - whatever goes wrong denies
            return no(f"{self.path.name} could not be evaluated ({type(problem).__name__})")
        # Cedar's own text can quote the request; rule ids cannot.
        named = re.findall(r"`(policy\d+)`", " ".join(failed))
        ids = sorted({self._rules[own][0] for own in named if own in self._rules})
        return no(f"rule {', '.join(ids)} failed" if ids else "the request does not fit the policy schema")

    def _answer(self, allowed: bool, deciding: Iterable[str]) -> Answer:
        found = [self._rules[own] for own in sorted(deciding, key=lambda own: int(own.removeprefix("policy")))]
        if not found:
            return no(f"no rule of {self.path.name} permits it")
        return Answer(allowed=allowed, rules=tuple(name for name, _ in found), reasons=tuple(why for _, why in found))

    def _checked(self, statement: str, line: int, known: Mapping[str, Collection[str]]) -> str:
        """Check one rule, which begins on *line*, and return its ``@id``."""
        try:
            nodes = cedarpy.policies_to_pst(statement)
        except ValueError as problem:
            self._fail(line, f"not a Cedar rule: {problem}")
        if len(nodes.static_policies) != 1:
            self._fail(line, "a template decides nothing until it is linked; write the rule out")
        found = cedarpy.validate_policies(statement, self._schema)
        if not found.validation_passed:
            self._fail(line, found.errors[0].error if found.errors else "does not fit the schema")
        (rule,) = nodes.static_policies.values()
        name, reason = rule.annotations.get("id", ""), rule.annotations.get("reason", "")
        if not name or not reason or name == DEFAULT_RULE:
            self._fail(line, f'a rule has @id("...") and @reason("..."), and its id is not "{DEFAULT_RULE}"')
        named = list(_named(rule))
        self.names.update(named)
        for kind, value in named:
            if kind in known and value not in known[kind]:
                self._fail(
                    line,
                    f"rule {name}: no {kind} {value!r}{did_you_mean(value, known[kind])}; "
                    f"known: {', '.join(sorted(known[kind]))}",
                )
        return name

    def _fail(self, line: int, message: str) -> NoReturn:
        raise ConfigError(f"{self.path}:{line}: {message}; correct the file", file=str(self.path), line=line)


#: A comment, a string, or the end of a statement: Cedar has no other place for a semicolon.
_TOKEN = re.compile(r'//[^\n]*|"(?:[^"\\]|\\.)*"|;|[^\s;/"]+|[/"]', re.DOTALL)


def _statements(text: str) -> Iterator[tuple[int, str]]:
    """Yield each statement of Cedar text with the 1-based line it begins on."""
    start = None
    end = 0
    for token in _TOKEN.finditer(text):
        if token[0].startswith("//"):
            continue
        start = token.start() if start is None else start
        end = token.end()
        if token[0] == ";":
            yield text.count("\n", 0, start) + 1, text[start:end]
            start = None
    if start is not None:
        yield text.count("\n", 0, start) + 1, text[start:end]


def _named(rule: pst.Template) -> Iterator[tuple[str, str]]:
    """Yield ``(kind, name)`` for each pool, and each literal that the rule compares with a part of the context.

    A forbid about a class that does not exist never holds, which no reviewer sees.
    """
    for uid in pst.entity_uids(rule):
        yield uid.type.basename, uid.id
    stack: list[Any] = [clause.expr for clause in rule.clauses]
    while stack:
        node = stack.pop()
        if isinstance(node, pst.BinaryOp):
            for one, other in ((node.left, node.right), (node.right, node.left)):
                if isinstance(one, pst.GetAttr):
                    elements = other.elements if isinstance(other, pst.Set) else (other,)
                    yield from ((one.attr, item.value) for item in elements if isinstance(item, pst.StringLit))
        if isinstance(node, tuple):
            stack.extend(node)
        elif hasattr(node, "__dataclass_fields__"):
            stack.extend(getattr(node, name) for name in node.__dataclass_fields__)


def read_schema(path: Path, content: bytes) -> cedarpy.Schema:
    """Return the schema in a file's content; *path* is for messages.

    Raises:
        ConfigError: It is none; file and line say where.
    """
    text = content.decode("utf-8")
    try:
        return cedarpy.Schema.from_str(text)
    except ValueError as problem:
        # Cedar names no line: the one that is meant mentions the last word of its message.
        word = str(problem).split()[-1].strip("`")
        line = next((n for n, row in enumerate(text.splitlines(), 1) if word in row.partition("//")[0]), 1)
        raise ConfigError(f"{path}:{line}: {problem}; correct the file", file=str(path), line=line) from problem
