"""GSM8K's number in a solution: where its authors put it, or wherever the last one stands."""

from __future__ import annotations

import re
from decimal import Decimal, InvalidOperation

_STRICT = re.compile(r"(?:####|[Tt]he answer is:?)\s*\$?\s*(-?\$?[0-9][0-9.,]*)")
_ANY = re.compile(r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)")


def strict(text: str) -> str | None:
    """Find the number after `####` or `The answer is`; the first, as what follows is another question.

    Example:
      >>> strict("48 + 24 = 72\\n#### 72"), strict("The answer is $1,400."), strict("it is 72")
      ('72', '1400', None)
    """
    found = _STRICT.search(text)
    return canonical(found.group(1)) if found else None


def flexible(text: str) -> str | None:
    """Find the last number, wherever it stands.

    Example:
      >>> flexible("She has 1,400.50 dollars left."), flexible("35 - 40 = -5.")
      ('1400.50', '-5')
    """
    found = _ANY.findall(text.replace("−", "-"))
    return canonical(found[-1]) if found else None


def canonical(number: str) -> str:
    """Leave out dollars, thousands commas and a final full stop."""
    return number.replace("$", "").replace(",", "").rstrip(".")


def same(found: str | None, gold: str) -> bool:
    """Whether two numbers are equal: 72 and 72.00 are, 72 and nothing are not.

    Example:
      >>> same("72.00", "72"), same("7.2", "72"), same(None, "72")
      (True, False, False)
    """
    if found is None:
        return False
    try:
        return Decimal(found) == Decimal(canonical(gold))
    except InvalidOperation:
        return False
