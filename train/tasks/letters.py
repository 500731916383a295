"""The letter in an answer to a multiple-choice question."""

from __future__ import annotations

import re

# A small letter counts in brackets only: `the answer is a dog` names no choice.
_SAID = re.compile(r"(?i:answer)\s*(?i:is)?\s*:?\s*(?:\*\*|__)?(?:\(([A-Za-z])\)|([A-Z])(?![A-Za-z'’]))")
_FIRST = re.compile(r"\W*([A-Z])(?:$|[.):,*\n])")
_BRACKETS = re.compile(r"\(([A-Z])\)")
_ALONE = re.compile(r"(?<![A-Za-z'’])([A-Z])(?![A-Za-z'’]| (?!and\b|or\b)[a-z])")


def extract_letter(text: str, choices: int) -> str | None:
    """Find which of the first `choices` letters a text answers with.

    Looked for in this order: the last `Answer: B` or `the answer is (B)`; a letter the text begins with; the last
    letter in brackets; a letter standing alone, if there is only one such and no word follows it (`A dog`).

    Example:
      >>> extract_letter("B. iron", 4), extract_letter("Iron is, so the answer is (b).", 4), extract_letter("A dog", 4)
      ('B', 'B', None)
    """
    known = {chr(ord("A") + i) for i in range(choices)}
    said = [(m.group(1) or m.group(2)).upper() for m in _SAID.finditer(text)]
    if said and said[-1] in known:
        return said[-1]
    first = _FIRST.match(text.strip())
    if first and first.group(1) in known:
        return first.group(1)
    bracketed = [m for m in _BRACKETS.findall(text) if m in known]
    if bracketed:
        return bracketed[-1]
    alone = {m for m in _ALONE.findall(text) if m in known}
    return alone.pop() if len(alone) == 1 else None
