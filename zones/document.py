"""YAML files that people write and review: plain values, the line of each, strict models. Reads files; nothing else.

Rules:

1. Every error is a :class:`ConfigError` with file and line.
2. An unknown key, a key given twice, an alias or a value of another type is an error:
   a reviewed file means what it says, or nothing starts.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, NoReturn, TypeVar

import yaml
from pydantic import AfterValidator, BaseModel, ConfigDict, ValidationError, model_validator
from pydantic_core import PydanticCustomError

from zones.errors import ConfigError, did_you_mean
from zones.model import check_id

#: Where a value stands in a document, e.g. ``("datasets", "randhie", "path")``.
Loc = tuple[str | int, ...]


class FileModel(BaseModel):
    """Strict, and unknown keys are refused with the nearest known one."""

    model_config = ConfigDict(strict=True, frozen=True, extra="forbid")

    @model_validator(mode="before")
    @classmethod
    def _known_keys(cls, data: Any) -> Any:
        for key in data if isinstance(data, dict) else ():
            if key not in cls.model_fields:
                known = ", ".join(cls.model_fields)
                message = f"unknown key {key!r}{did_you_mean(key, cls.model_fields)}; known: {known}"
                raise PydanticCustomError("unknown_key", "{text}", {"text": message, "key": key})
        return data


def distinct(values: list[str]) -> list[str]:
    """Refuse a list in which a value stands twice; for use with pydantic's ``AfterValidator``."""
    for index, value in enumerate(values):
        if value in values[:index]:
            raise PydanticCustomError("twice", "{text}", {"text": f"{value} stands here twice", "key": index})
    return values


#: An id, and a list of ids of which none stands there twice.
Id = Annotated[str, AfterValidator(lambda text: check_id(text, what="name"))]
Ids = Annotated[list[Id], AfterValidator(distinct)]

_F = TypeVar("_F", bound=FileModel)


class Document:
    """One YAML file: its plain values, and the line of each."""

    def __init__(self, content: bytes, path: Path) -> None:
        self.path = path
        self._lines: dict[Loc, int] = {(): 1}
        text = content.decode("utf-8")
        try:
            loader = _Loader(text)
            node = loader.get_single_node()
            self.value = None if node is None else self._plain(loader, node, ())
        except yaml.reader.ReaderError as problem:
            self._fail("a character that YAML does not allow", text.count("\n", 0, problem.position) + 1)
        except yaml.MarkedYAMLError as problem:
            mark = problem.problem_mark
            self._fail(problem.problem or "not valid YAML", mark.line + 1 if mark else 1)
        except RecursionError:
            self._fail("nested too deep", 1)

    def check(self, model: type[_F]) -> _F:
        """Return the document as *model*; the first error found raises :class:`ConfigError`."""
        try:
            return model.model_validate(self.value)
        except ValidationError as problem:
            error = problem.errors()[0]
            key = error.get("ctx", {}).get("key")
            message = error["msg"].removeprefix("Value error, ")
            if error["type"] == "missing":
                # It has no line of its own, so the line cannot say which.
                message = f"{message}: {error['loc'][-1]}"
            self.refuse((*error["loc"], *([] if key is None else [key])), message)

    def line(self, loc: Loc) -> int:
        """Return the line of the value at *loc*, or of the nearest that stands around it."""
        return self._lines[self._nearest(loc)]

    def refuse(self, loc: Loc, message: str) -> NoReturn:
        """Raise :class:`ConfigError` for the value at *loc*, or the nearest that stands around it."""
        where = self._nearest(loc)
        label = ".".join(str(part) for part in where)
        self._fail(f"{label}: {message}" if label else message, self._lines[where])

    def _nearest(self, loc: Loc) -> Loc:
        while loc not in self._lines:
            loc = loc[:-1]
        return loc

    def _fail(self, message: str, line: int) -> NoReturn:
        raise ConfigError(f"{self.path}:{line}: {message}; correct the file", file=str(self.path), line=line)

    def _plain(self, loader: yaml.SafeLoader, node: yaml.Node, loc: Loc) -> Any:
        self._lines.setdefault(loc, node.start_mark.line + 1)
        if isinstance(node, yaml.SequenceNode):
            return [self._plain(loader, item, (*loc, index)) for index, item in enumerate(node.value)]
        if not isinstance(node, yaml.MappingNode):
            return self._scalar(loader, node)
        result: dict[str, Any] = {}
        for key_node, item in node.value:
            line = key_node.start_mark.line + 1
            if key_node.tag != "tag:yaml.org,2002:str":
                self._fail("a key must be text; put it in quotes", line)
            if key_node.value in result:
                self._fail(f"{key_node.value} stands here twice", line)
            self._lines[(*loc, key_node.value)] = line
            result[key_node.value] = self._plain(loader, item, (*loc, key_node.value))
        return result

    def _scalar(self, loader: yaml.SafeLoader, node: yaml.Node) -> Any:
        try:
            return loader.construct_object(node)
        except ValueError as problem:
            self._fail(str(problem), node.start_mark.line + 1)


class _Loader(yaml.SafeLoader):
    """Safe loader without aliases: a few bytes of them can stand for gigabytes, and hide what a reviewer reads."""

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise yaml.MarkedYAMLError(problem="aliases are not allowed; write it out", problem_mark=self.get_mark())
        return super().compose_node(parent, index)


def read_text_file(path: Path) -> bytes:
    """Return a file's content, which is UTF-8.

    Raises:
        ConfigError: It is missing, cannot be read, or is not UTF-8.
    """
    try:
        content = path.read_bytes()
        content.decode("utf-8")
    except OSError as problem:
        raise ConfigError(f"{path}: {problem.strerror}; create it or fix its permissions", file=str(path)) from problem
    except UnicodeDecodeError as problem:
        line = content.count(b"\n", 0, problem.start) + 1
        raise ConfigError(f"{path}:{line}: not UTF-8; save it as UTF-8", file=str(path), line=line) from problem
    return content
