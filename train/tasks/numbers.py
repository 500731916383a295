"""Numbers as people and models write them, and GSM8K's in a solution: where its authors put it, or the last one."""

from __future__ import annotations

import re
from decimal import Decimal
from fractions import Fraction

from ..log import UserError

MINUS = dict.fromkeys(map(ord, "\u2010\u2011\u2012\u2013\u2212\ufe63\uff0d"), "-")
"""Hyphens, dashes and minus signs other than ASCII's; the em dash is none, as it stands between words."""
_GROUPS = re.compile(r"(?<=\d)(?:\{,\}|\\[,!;: ]|,\\!|[\u00a0\u2009\u202f])(?=\d{3}(?!\d))")
_FRACTION = re.compile(r"\\[dt]?frac\s*\{(\d+)\}\s*\{(\d+)\}")

_NUMBER = r"-?\$?(?:\d[\d,]*(?:\.\d+)?|\.\d+)"
_RATIO = r"-?\d[\d,]*\s*/\s*\d+"
_MARK = r"(?:####|[Tt]he answer is:?)\s*\$?\s*"
_STRICT = re.compile(rf"{_MARK}(-?\$?[0-9][0-9.,]*)")
_STRICT_RATIO = re.compile(rf"{_MARK}({_RATIO}|-?\$?[0-9][0-9.,]*)")
# A sign counts only where no number or bracket stands before it: in `10-12` the 12 is positive.
_SIGNED = r"(?:(?<![\w.,)\]}%])(?=-)|(?!-))"
_ANY = re.compile(rf"{_SIGNED}{_NUMBER}")
_ANY_RATIO = re.compile(rf"{_SIGNED}(?:{_RATIO}|{_NUMBER})")
_WHOLE = r"(?:\d{1,3}(?:,\d{2,3})*,\d{3}|\d+)"
_GOLD = re.compile(rf"([+-]?\$?(?:{_WHOLE}\s*/\s*\d+|{_WHOLE}?\.\d+|{_WHOLE}))(?:\s*%|\s+[^\W\d_][^\d]*)?\.?")


def plain(text: str) -> str:
    r"""Write a text's numbers plainly: one minus sign, one thousands comma, no dollar of LaTeX's, fractions with `/`.

    Example:
      >>> plain("\u22125"), plain("9{,}500"), plain("70\\,000"), plain("\\$18"), plain("\\frac{1}{2}")
      ('-5', '9,500', '70,000', '$18', '1/2')
    """
    text = group(text.translate(MINUS).replace("\\$", "$").replace("\\%", "%"))
    return _FRACTION.sub(r"\1/\2", text)


def group(text: str) -> str:
    r"""Put a comma between thousands where LaTeX or a narrow space parts them.

    Example:
      >>> group("32,\\!348"), group("70\\,000"), group("100~200")
      ('32,348', '70,000', '100~200')
    """
    return _GROUPS.sub(",", text)


def strict(text: str, *, ratio: bool = False) -> str | None:
    """Find the number after the last `####` or `The answer is`.

    Args:
      ratio: `1/2` is one number.

    Example:
      >>> strict("48 + 24 = 72\\n#### 72"), strict("The answer is $1,400."), strict("it is 72")
      ('72', '1400', None)
    """
    found = (_STRICT_RATIO if ratio else _STRICT).findall(plain(text))
    return canonical(found[-1]) if found else None


def flexible(text: str, *, ratio: bool = False) -> str | None:
    """Find the last number, wherever it stands.

    Args:
      ratio: `1/2` is one number.

    Example:
      >>> flexible("She has 1,400.50 dollars left."), flexible("35 - 40 = -5."), flexible("so 1/2", ratio=True)
      ('1400.50', '-5', '1/2')
    """
    found = (_ANY_RATIO if ratio else _ANY).findall(plain(text))
    return canonical(found[-1]) if found else None


def canonical(number: str) -> str:
    """Leave out dollars, thousands commas, spaces and a final full stop."""
    return re.sub(r"[$,\s]", "", number).rstrip(".")


def read_gold(answer: str) -> str:
    """The number of a gold answer: a percent sign or a unit behind it does not count.

    Raises:
      UserError: there is no number, or more than one.

    Example:
      >>> read_gold("1,250"), read_gold("18 dollars"), read_gold("50%"), read_gold("1/2")
      ('1250', '18', '50', '1/2')
    """
    found = _GOLD.fullmatch(plain(answer.strip()).strip("$ "))
    number = "" if found is None else canonical(found.group(1))
    if not number or re.search(r"/0+$", number):
        raise UserError(
            f"the gold answer {answer!r:.60} cannot be read; wanted one number, perhaps with a unit or % behind it,"
            " or a fraction such as 1/2"
        )
    return number


def is_ratio(number: str) -> bool:
    return "/" in number


def same(found: str | None, gold: str) -> bool:
    """Whether two numbers are equal: 72 and 72.00 are, 72 and nothing are not.

    Example:
      >>> same("72.00", "72"), same("7.2", "72"), same(None, "72"), same("2/4", "1/2")
      (True, False, False, True)
    """
    try:
        return found is not None and value(found) == value(gold)
    except (ValueError, ArithmeticError):
        return False


def value(number: str) -> Fraction:
    above, _, below = canonical(plain(number)).partition("/")
    return Fraction(Decimal(above)) / (Fraction(below) if below else 1)
