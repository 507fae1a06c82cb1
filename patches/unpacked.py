"""Reads an SGLang that is not installed, by the syntax of its files: see ``reader.Reader``."""

from __future__ import annotations

import ast
import importlib
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.resources.abc import Traversable
from pathlib import Path
from typing import TypeGuard

from step_sglang.patches.reader import MissingError, digest, names_set

_ROOT = "sglang"
_FUNCTION = ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, eq=False)
class _Module:
    name: str
    is_package: bool
    lines: tuple[str, ...]
    names: dict[str, ast.AST]  # what each top-level name is bound to, the last binding

    def text(self, node: ast.stmt) -> str:
        """Of a definition, with its decorators."""
        first = min([node.lineno, *(d.lineno for d in getattr(node, "decorator_list", ()))])
        return "\n".join(self.lines[first - 1 : node.end_lineno])


@dataclass(frozen=True)
class _Found:
    """A definition and the module that it stands in."""

    module: _Module
    node: ast.AST


class Unpacked:
    """An SGLang by its files.

    Args:
        path: a wheel, or a folder that holds ``sglang/``.

    Raises:
        MissingError: it holds no SGLang.
    """

    def __init__(self, path: Path) -> None:
        if not path.exists():
            raise MissingError(f"{path} does not exist")
        self._root: Traversable
        try:
            self._root = zipfile.Path(path) if path.is_file() else path
        except zipfile.BadZipFile as error:
            raise MissingError(f"{path} is not a wheel: {error}") from error
        if not self._root.joinpath(_ROOT, "version.py").is_file():
            raise MissingError(f"{path} holds no SGLang (no {_ROOT}/version.py in it)")
        self._module = cache(self._load)
        self._path = path

    def version(self) -> str:
        """See ``Reader``."""
        name = Path(self._path).name
        if self._path.is_file() and name.count("-") >= 2:
            return name.split("-")[1]
        for found in self._root.iterdir():
            if found.name.startswith("sglang-") and found.name.endswith(".dist-info"):
                return found.name.removeprefix("sglang-").removesuffix(".dist-info")
        return "of unknown version"

    def has(self, path: str) -> None:
        """See ``Reader``."""
        self._find(path)

    def parameters(self, path: str) -> tuple[str, ...]:
        """See ``Reader``."""
        found = self._find(path)
        if found is None:
            raise MissingError(f"{path}, which is not a function of SGLang")
        if isinstance(found.node, ast.ClassDef):
            return self._constructor(found)
        if not isinstance(found.node, _FUNCTION):
            raise MissingError(f"{path}, which is not callable")
        return _parameters(found.node.args)

    def declared(self, path: str) -> set[str]:
        """See ``Reader``."""
        found = self._find(path)
        if found is None or not isinstance(found.node, ast.ClassDef):
            raise MissingError(f"{path}, which is no class")
        names: set[str] = set()
        for base in self._mro(found):
            assert isinstance(base.node, ast.ClassDef)
            names.update(_bound(base.node.body))
            names.update(names_set(base.module.text(base.node)))
        return names

    def digest(self, path: str) -> str:
        """See ``Reader``."""
        found = self._find(path)
        if found is None or not isinstance(found.node, ast.stmt):
            raise MissingError(f"{path}, which is no function")
        return digest(found.module.text(found.node))

    def _load(self, name: str) -> _Module | None:
        *folders, last = name.split(".")
        for path, is_package in (
            (self._root.joinpath(*folders, last, "__init__.py"), True),
            (self._root.joinpath(*folders, f"{last}.py"), False),
        ):
            if path.is_file():
                text = path.read_text(encoding="utf-8")
                return _Module(
                    name, is_package, tuple(text.splitlines()), _bound(ast.parse(text).body)
                )
        return None

    def _find(self, path: str) -> _Found | None:
        """The definition of a path; None for one outside of SGLang that exists."""
        parts = path.split(".")
        for cut in range(len(parts), 0, -1):
            module = self._module(".".join(parts[:cut]))
            if module is not None:
                return self._walk(module, parts[cut:])
        raise MissingError(f"missing (no module {path})")

    def _walk(self, module: _Module, rest: list[str]) -> _Found | None:
        if not rest:
            return _Found(module, ast.Module([], []))
        inner = self._module(f"{module.name}.{rest[0]}") if module.is_package else None
        if rest[0] not in module.names and inner is not None:
            return self._walk(inner, rest[1:])
        if rest[0] not in module.names:
            return self._starred(module, rest)
        found = self._bound_to(module, rest[0])
        for place, name in enumerate(rest[1:], 1):
            if found is None:
                return None
            if isinstance(found.node, ast.Module):
                return self._walk(found.module, rest[place:])
            found = self._member(found, name, last=place == len(rest) - 1)
        return found

    def _starred(self, module: _Module, rest: list[str]) -> _Found | None:
        """A name that a module has by ``import *``."""
        for node in module.names.values():
            if isinstance(node, ast.ImportFrom) and node.names[0].name == "*":
                origin = self._module(_absolute(module, node))
                if origin is not None:
                    with suppress(MissingError):
                        return self._walk(origin, rest)
        raise MissingError(f"missing (module '{module.name}' has no '{rest[0]}')")

    def _bound_to(self, module: _Module, name: str) -> _Found | None:
        """What a module's name is, through its imports; None where it is not SGLang's."""
        node = module.names[name]
        if isinstance(node, ast.Import):
            (alias,) = [a for a in node.names if (a.asname or a.name.split(".")[0]) == name]
            wanted = alias.name if alias.asname else name
            if wanted.split(".")[0] == _ROOT:
                return self._find(wanted)
            _need(wanted)
            return None
        if isinstance(node, ast.ImportFrom):
            (alias,) = [a for a in node.names if (a.asname or a.name) == name]
            origin = _absolute(module, node)
            if origin.split(".")[0] != _ROOT:
                return None
            return self._find(f"{origin}.{alias.name}")
        if isinstance(node, ast.Assign | ast.AnnAssign) and isinstance(node.value, ast.Call):
            # An instance has what its class has.
            made = self._named(module, node.value.func)
            if made is not None and isinstance(made.node, ast.ClassDef):
                return made
        return _Found(module, node)

    def _named(self, module: _Module, node: ast.AST) -> _Found | None:
        """What an expression names, if it is a plain name of SGLang's."""
        if isinstance(node, ast.Subscript):
            node = node.value
        text = ast.unparse(node) if isinstance(node, ast.Name | ast.Attribute) else ""
        if not text or text.split(".")[0] not in module.names:
            return None
        try:
            return self._walk(module, text.split("."))
        except MissingError:
            return None

    def _member(self, found: _Found, name: str, *, last: bool) -> _Found | None:
        if not isinstance(found.node, ast.ClassDef):
            # An object that only running can tell: that it is there has to do.
            if last:
                return None
            raise MissingError(f"missing (cannot tell {name} without running SGLang)")
        for base in self._mro(found):
            assert isinstance(base.node, ast.ClassDef)
            bound = _bound(base.node.body)
            if name in bound:
                return _Found(base.module, bound[name])
        raise MissingError(f"missing (class '{found.node.name}' has no '{name}')")

    def _mro(self, found: _Found) -> list[_Found]:
        """A class and its bases that are SGLang's, each once, the nearest first."""
        order, rest = [], [found]
        while rest:
            cls = rest.pop(0)
            assert isinstance(cls.node, ast.ClassDef)
            order.append(cls)
            bases = [self._named(cls.module, base) for base in cls.node.bases]
            rest += [
                base
                for base in bases
                if base is not None
                and isinstance(base.node, ast.ClassDef)
                and base not in (*order, *rest)
            ]
        return order

    def _constructor(self, found: _Found) -> tuple[str, ...]:
        """Parameters of a class: of its ``__init__``, else its fields."""
        fields: list[str] = []
        for base in self._mro(found):
            assert isinstance(base.node, ast.ClassDef)
            init = _bound(base.node.body).get("__init__")
            if isinstance(init, _FUNCTION):
                return _parameters(init.args)[1:]
            own = [
                node.target.id
                for node in base.node.body
                if isinstance(node, ast.AnnAssign)
                and isinstance(node.target, ast.Name)
                and not ast.unparse(node.annotation).startswith("ClassVar")
            ]
            fields = own + [name for name in fields if name not in own]
        return tuple(fields)


def _need(module: str) -> None:
    """Python's own or another package's module: looked for in this environment."""
    try:
        importlib.import_module(module)
    except ImportError as error:
        raise MissingError(f"missing ({error})") from error


def _absolute(module: _Module, node: ast.ImportFrom) -> str:
    """The module that an import names, also a relative one."""
    if not node.level:
        return node.module or ""
    parts = module.name.split(".")
    parts = parts[: len(parts) - node.level + (1 if module.is_package else 0)]
    return ".".join([*parts, *([node.module] if node.module else [])])


def _parameters(args: ast.arguments) -> tuple[str, ...]:
    names = [arg.arg for arg in (*args.posonlyargs, *args.args)]
    names += [args.vararg.arg] if args.vararg else []
    names += [arg.arg for arg in args.kwonlyargs]
    names += [args.kwarg.arg] if args.kwarg else []
    return tuple(names)


def _is_name(node: ast.AST) -> TypeGuard[ast.Name]:
    return isinstance(node, ast.Name)


def _bound(body: list[ast.stmt]) -> dict[str, ast.AST]:
    """Names that statements bind, also under conditions, and what to."""
    names: dict[str, ast.AST] = {}
    for node in body:
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                names[node.name] = node
            case ast.Import():
                names.update({(a.asname or a.name.split(".")[0]): node for a in node.names})
            case ast.ImportFrom():
                # Each `import *` is kept, under a name that nothing else has.
                origin = f"*{node.level}{node.module}"
                names.update(
                    {origin if a.name == "*" else (a.asname or a.name): node for a in node.names}
                )
            case ast.Assign():
                # A class that is bound anew is wrapped: it still has what it declares.
                assigned = {n.id for t in node.targets for n in ast.walk(t) if _is_name(n)}
                wrapped = {n for n in assigned if isinstance(names.get(n), ast.ClassDef)}
                names.update(dict.fromkeys(assigned - wrapped, node))
            case ast.AnnAssign(target=ast.Name(id=name)):
                names[name] = node
            case ast.If() | ast.Try() | ast.With():
                inner = [*node.body, *getattr(node, "orelse", [])]
                for handler in getattr(node, "handlers", []):
                    inner += handler.body
                for name, bound in _bound(inner).items():
                    names.setdefault(name, bound)
    return names
