"""An answer's form: what is learnt by parsing it once, so that few pairs need math-verify.

:func:`form_of` parses and belongs where it may take long; comparing two forms costs nothing.
What math-verify accepts is the specification: forms only tell pairs that it can accept from those
that it cannot, by the answers' values (at fixed points, if they have variables) and kinds.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from decimal import MAX_EMAX, MIN_EMIN, Context, Decimal
from typing import Any

from step_sglang.voting.answers import parsed, plain_number

# math-verify compares floats by six decimals. Values are compared as asinh(value), which is as
# exact near 0 and relative for large ones; a collection's is the sum of its elements'.
_NEAR = Decimal("2e-6")
_RELATIVE = Decimal("1e-12")
# Towers of powers have exponents beyond the usual context's.
_WIDE = Context(prec=40, Emax=MAX_EMAX, Emin=MIN_EMIN, traps=[])
_CELL = 1e-4  # wide enough for a collection of 25 elements, each of them _NEAR
_MOST_ELEMENTS = 25
_DIGITS = 30
_EXACT_BELOW = 1e60  # larger numbers are not written out
_MAX_BITS = 600
_MAX_SPELLED = 300  # characters
_INFINITY = 7919.0  # stands for an infinite end of an interval


@dataclass(frozen=True)
class Form:
    """What is known of an answer.

    Two answers may be the same only if one is listed under a key that the other seeks; `decide`
    tells more. A form without keys equals only its own text.
    """

    kind: str = "text"  # number, value, name, relation, inequality, collection, matrix, unknown
    text: str = ""  # math-verify's normal text; of equal texts no more is asked
    exact: str = ""  # a rational number, "p/q"
    value: tuple[str, str] | None = None  # real and imaginary part, in decimal digits
    listed: tuple[str, ...] = ()
    sought: tuple[str, ...] = ()

    def to_json(self) -> dict[str, Any]:
        """Plain values for :meth:`from_json`."""
        return asdict(self)

    @staticmethod
    def from_json(fields: Mapping[str, Any]) -> Form:
        """The inverse of :meth:`to_json`."""
        value = fields["value"]
        return Form(
            fields["kind"],
            fields["text"],
            fields["exact"],
            None if value is None else (value[0], value[1]),
            tuple(fields["listed"]),
            tuple(fields["sought"]),
        )


def decide(one: Form, other: Form) -> bool | None:
    """Whether two answers are the same; None: only math-verify can tell."""
    if one.text and one.text == other.text:
        return True
    if "text" in (one.kind, other.kind):
        return False
    if one.exact and other.exact:
        return one.exact == other.exact
    kinds = {one.kind, other.kind}
    if kinds <= {"number", "value"} and one.value is not None and other.value is not None:
        near = all(
            _near(Decimal(a), Decimal(b)) for a, b in zip(one.value, other.value, strict=True)
        )
        return None if near else False
    if kinds == {"number", "inequality"}:
        return False
    return None


def _near(one: Decimal, other: Decimal) -> bool:
    room = _WIDE.add(_NEAR, _WIDE.multiply(max(abs(one), abs(other)), _RELATIVE))
    return abs(_WIDE.subtract(one, other)) <= room


def plain_form(answer: str) -> Form | None:
    """The form of a number such as ``12`` or ``0.5``, without a parser; None for all others."""
    number = plain_number(answer)
    if number is None:
        return None
    cells = _cells(math.asinh(float(number)))
    whole, _, rest = answer.lstrip("+-").partition(".")
    spelled = f"{whole.lstrip('0') or '0'}.{rest.rstrip('0')}"
    same = f"plain {'-' if number < 0 else ''}{spelled}"
    digits = (f"{number:f}", "0")
    if "." in answer:
        return _form("number", same, "", digits, [same], cells, "decimal")
    exact = f"{int(number)}/1"
    return _form("number", same, exact, digits, [same, exact], cells, "exact")


def form_of(answer: str) -> Form:
    """Parse an answer; may take any time and any memory. What math-verify raises passes."""
    found: Sequence[Any] = parsed(answer.strip())
    text = next((part.strip() for part in found if isinstance(part, str)), "")
    expression = next((part for part in found if not isinstance(part, str)), None)
    keys = [f"text {text}"] if text else []
    if expression is None:
        return Form("text", text, "", None, tuple(keys), tuple(keys))
    form = _describe(expression)
    return Form(
        form.kind, text, form.exact, form.value, (*keys, *form.listed), (*keys, *form.sought)
    )


# Exact numbers differ if their digits do, and so do plain decimals: such pairs are never sought.
_OTHERS = {
    "exact": ("decimal", "other"),
    "decimal": ("exact", "other"),
    "other": ("exact", "decimal", "other"),
}


def _form(
    kind: str,
    text: str,
    exact: str,
    value: tuple[str, str] | None,
    keys: Sequence[str],
    cells: Sequence[str],
    cell_kind: str = "other",
) -> Form:
    """A form of one value."""
    here = (f"{cell_kind} {cell}" for cell in cells)
    near = (f"{other} {cell}" for other in _OTHERS[cell_kind] for cell in cells)
    listed = (*keys, *here, "any", "size 1")
    return Form(kind, text, exact, value, listed, (*keys, *near, "loose 1", "wild"))


def _cells(place: float) -> tuple[str, str]:
    """Two keys, of which places that are near each other share at least one."""
    return f"a{math.floor(place / _CELL)}", f"b{math.floor(place / _CELL + 0.5)}"


def _wild(kind: str) -> Form:
    return Form(kind, listed=("any", "wild"), sought=("any",))


def _describe(expression: Any) -> Form:
    from math_verify.grader import is_equation, is_relation, take_last_relation
    from sympy import MatrixBase, MatrixExpr, Set, Tuple

    if is_equation(expression):
        # Against anything but a relation its last right side counts.
        right = _describe(take_last_relation(expression).rhs)
        keys = ("relation",)
        return Form("relation", listed=keys + right.listed, sought=keys + right.sought)
    if is_relation(expression):
        return _wild("inequality")
    if isinstance(expression, MatrixBase | MatrixExpr):
        return Form("matrix", listed=("matrix", "any"), sought=("matrix", "wild"))
    if isinstance(expression, Set | Tuple):
        return _set(expression)
    return _scalar(expression)


def _set(expression: Any) -> Form:
    from sympy import FiniteSet, Interval, Tuple

    if isinstance(expression, Interval):
        return _collection([expression.start, expression.end])
    if isinstance(expression, FiniteSet | Tuple):
        return _collection(list(expression.args))
    return _wild("unknown")


def _collection(elements: Sequence[Any]) -> Form:
    size = len(elements)
    places = [_place_of(element) for element in elements]
    if size > _MOST_ELEMENTS or None in places:
        # Names and equations as elements are compared by rules of their own.
        return Form("collection", listed=(f"loose {size}", "any"),
                    sought=(f"loose {size}", f"size {size}", "wild"))  # fmt: skip
    cells = _cells(math.fsum(place for place in places if place is not None))
    kinds = ("exact", "decimal", "other") if size == 1 else ("other",)
    return Form(
        "collection", "", "", None,
        (*(f"other {cell}" for cell in cells), f"size {size}", "any"),
        (*(f"{kind} {cell}" for kind in kinds for cell in cells), f"loose {size}", "wild"),
    )  # fmt: skip


def _place_of(element: Any) -> float | None:
    from sympy import oo

    if element in (oo, -oo):
        return _INFINITY if element is oo else -_INFINITY
    form = _scalar(element) if hasattr(element, "evalf") and not _is_relation(element) else None
    if form is None or form.kind not in ("number", "value") or form.value is None:
        return None
    return _place(*form.value)


def _is_relation(element: Any) -> bool:
    from math_verify.grader import is_relation

    return bool(is_relation(element))


def _scalar(expression: Any) -> Form:
    from math_verify.grader import get_pct_val
    from sympy import Float, nan, oo, zoo

    name = _name(expression)
    spelled = list({f"name {text}": 0 for text in (_spelled(expression), name) if text})
    if expression in (oo, -oo, zoo, nan):
        return Form("name", listed=(*spelled, "any"), sought=(*spelled, "wild"))
    percent = get_pct_val(expression)
    value = _value(expression if percent is None else percent / 100)
    if value is None:
        return _wild("unknown")
    cells = list(_cells(_place(*value)))
    if percent is not None:  # 9% is both 9 and 0.09
        cells += () if (number := _value(percent)) is None else _cells(_place(*number))
        return _form("percent", "", "", value, spelled, cells)
    if expression.is_Symbol:
        cells = []  # math-verify compares what it is called
    if name is not None or expression.free_symbols:
        return _form("value" if name is None else "name", "", "", value, spelled, cells)
    exact = ""
    if abs(float(value[0])) < _EXACT_BELOW and not expression.has(Float):
        exact = _exact(expression.doit())
    if not exact:
        return _form("number", "", "", value, spelled, cells)
    return _form("number", "", exact, value, [*spelled, exact], cells, "exact")


def _exact(number: Any) -> str:
    if not number.is_Rational:
        return ""
    p, q = int(number.p), int(number.q)
    if p.bit_length() + q.bit_length() > _MAX_BITS:  # Python may refuse to print it
        return _digest(f"{p:x}/{q:x}")
    return f"{p}/{q}"


def _spelled(expression: Any) -> str:
    try:
        text = str(expression).lower()
    except ValueError:  # Python does not print integers of thousands of digits
        return ""
    return text if len(text) <= _MAX_SPELLED else _digest(text)


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _name(expression: Any) -> str | None:
    """The letters of a symbol, or of a product of symbols, as math-verify compares them."""
    from sympy import E, Mul, Symbol

    parts = expression.args if isinstance(expression, Mul) else (expression,)
    if not all(part == E or isinstance(part, Symbol) for part in parts):
        return None
    return "".join(p.name if isinstance(p, Symbol) else "e" for p in parts).lower()


def _value(expression: Any) -> tuple[str, str] | None:
    """Its value in decimal digits, where its variables are fixed positive numbers."""
    from sympy import Float

    points = {symbol: Float(_point(symbol.name), _DIGITS) for symbol in expression.free_symbols}
    number = expression.evalf(_DIGITS, subs=points or None)
    real, imaginary = number.as_real_imag()
    if not (real.is_Float or real.is_Rational) or not (imaginary.is_Float or imaginary.is_Rational):
        return None
    digits = [str(Float(part, _DIGITS)) for part in (real, imaginary)]
    if not all(Decimal(part).is_finite() for part in digits):
        return None
    return digits[0], digits[1]


def _point(name: str) -> str:
    number = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    return f"{1 + number / 2**64:.15f}"


def _place(real: str, imaginary: str) -> float:
    return _asinh(Decimal(real)) + 0.7310585786 * _asinh(Decimal(imaginary))


def _asinh(number: Decimal) -> float:
    exponent = number.adjusted()
    if exponent < 15:
        return math.asinh(float(number))
    digits = number.as_tuple().digits[:17]
    mantissa = int("".join(map(str, digits))) / 10 ** (len(digits) - 1)
    place = math.log(2 * mantissa) + exponent * math.log(10)
    return -place if number.is_signed() else place
