"""What the contract asks of an SGLang, installed or not: two readers answer the same questions.

``Installed`` imports it, as the server does. ``Unpacked`` reads the files of one that is not
installed, a wheel or a folder, by their syntax alone: nothing of it runs.
"""

from __future__ import annotations

import hashlib
import inspect
import pkgutil
import re
import textwrap
from typing import Any, Protocol

_SET = re.compile(r"\bself\.(\w+)(?:\s*:[^=\n]+)?(?:\s*,\s*self\.\w+)*\s*=")


class MissingError(Exception):
    """It has nothing of this name, or something of another kind; the text says what."""


class Reader(Protocol):
    """An SGLang. Paths are dotted: module, class, member. Each method raises ``MissingError``."""

    def version(self) -> str:
        """Its version."""

    def has(self, path: str) -> None:
        """Nothing, if there is something of this name."""

    def parameters(self, path: str) -> tuple[str, ...]:
        """Parameters of a function or class, ``self`` and ``cls`` of methods among them."""

    def declared(self, path: str) -> set[str]:
        """Names that a class or its bases declare, or that their methods set on themselves."""

    def digest(self, path: str) -> str:
        """Of a function's text, without its indentation."""


class Installed:
    """The SGLang of this environment."""

    def version(self) -> str:
        """See ``Reader``."""
        from sglang.version import __version__

        return str(__version__)

    def has(self, path: str) -> None:
        """See ``Reader``."""
        self._find(path)

    def parameters(self, path: str) -> tuple[str, ...]:
        """See ``Reader``."""
        raw = self._find(path)
        function = raw.__func__ if isinstance(raw, classmethod | staticmethod) else raw
        try:
            return tuple(inspect.signature(function).parameters)
        except (TypeError, ValueError):
            raise MissingError(f"{raw!r}, which is not callable") from None

    def declared(self, path: str) -> set[str]:
        """See ``Reader``."""
        return declared(self._find(path))

    def digest(self, path: str) -> str:
        """See ``Reader``."""
        try:
            source = inspect.getsource(inspect.unwrap(pkgutil.resolve_name(path)))
        except (ImportError, AttributeError, OSError, TypeError) as error:
            raise MissingError(f"missing ({error})") from error
        return digest(source)

    def _find(self, path: str) -> Any:
        parent, _, name = path.rpartition(".")
        try:
            # A classmethod's function, so that `cls` shows as SGLang's own hooks see it.
            return inspect.getattr_static(pkgutil.resolve_name(parent), name)
        except (ImportError, AttributeError) as error:
            raise MissingError(f"missing ({error})") from error


def digest(source: str) -> str:
    """Of a function's text, without its indentation."""
    lines = (line.rstrip() for line in textwrap.dedent(source).splitlines())
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16]


def declared(cls: type) -> set[str]:
    """Names that a class or its bases declare, or that their methods set on themselves."""
    names = set(dir(cls))
    for base in cls.__mro__[:-1]:
        names.update(getattr(base, "__annotations__", ()))
        try:
            names.update(names_set(inspect.getsource(base)))
        except (OSError, TypeError):
            continue
    return names


def names_set(source: str) -> list[str]:
    """Names that a class's methods set on ``self``."""
    return _SET.findall(source)
