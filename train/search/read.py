"""What a reply says, read strictly: a step, a hint, a score. What cannot be read is nothing, never a guess."""

from __future__ import annotations

import re

from .ask import Reply

SCALE = 10
"""The critic's highest score."""
SOLVED = "<end>"
"""What a reflector says of a plan that needs no further step."""

_LABEL = re.compile(r"^\s*(?:[-*#]+\s*)?(?:\*\*)?(?:next\s+)?step\s*\d*\s*[:.)]\s*(?:\*\*)?\s*", re.IGNORECASE)
_NEXT = re.compile(r"\n\s*(?:\*\*)?step\s*\d+\s*[:.)]", re.IGNORECASE)
_SENTENCE = re.compile(r"[.!?;](?=\s|$)")
_SCORE = re.compile(r"score\s*:\s*(\d+)(?:\s*/\s*10)?\s*\.?", re.IGNORECASE)


def read_step(reply: Reply, seen: frozenset[str] = frozenset()) -> tuple[str, str]:
    """(the step, "") or ("", why there is none): empty, repeated, unfinished, context.

    Its label, and all from the next label on, are left out. A step cut off at the token limit ends with its last
    whole sentence.

    Args:
      seen: steps in the form of `normal` that must not come again.

    Example:
      >>> read_step(Reply("Step 2: Sort the list.\\nStep 3: Print it."))
      ('Sort the list.', '')
    """
    if reply.reason == "context":
        return "", "context"
    text = _LABEL.sub("", _NEXT.split(reply.text, maxsplit=1)[0] if reply.text.strip() else "", count=1)
    if reply.reason == "length":
        ends = [m.end() for m in _SENTENCE.finditer(text)]
        if not ends:
            return "", "unfinished"
        text = text[: ends[-1]]
    step = " ".join(text.split())
    if not normal(step):
        return "", "empty"
    return ("", "repeated") if normal(step) in seen else (step, "")


def normal(step: str) -> str:
    """What makes two steps the same: their letters and digits.

    Example:
      >>> normal("Sort  the list.") == normal("sort the List")
      True
    """
    return "".join(c for c in step.casefold() if c.isalnum() or c in "+-*/<>=%")


def read_verdict(reply: Reply, conclusions: tuple[str, str]) -> float | None:
    """What a critique concludes: 1 right, 0 wrong, by which of the two texts stands last in it; None without either.

    Example:
      >>> read_verdict(Reply("Not wrong: 2 + 3 is 5. Conclusion: right"), ("Conclusion: right", "Conclusion: wrong"))
      1.0
    """
    right, wrong = (reply.text.rfind(conclusion) for conclusion in conclusions)
    return None if reply.reason in ("length", "context") or right == wrong else float(right > wrong)


def read_score(reply: Reply) -> float | None:
    """The critic's score on [0, 1]: one line `Score: N` with N from 0 to 10, and no other N; None if it is not there.

    A reply cut off at the token limit counts up to its last whole line: `Score: 1` may have been going to be 10.

    Example:
      >>> read_score(Reply("Score: 7")), read_score(Reply("Score: 7/10\\nbecause")), read_score(Reply("7 of 10"))
      (0.7, 0.7, None)
    """
    lines = reply.text.split("\n")
    if reply.reason in ("length", "context"):
        lines = lines[:-1]
    found = {int(m.group(1)) for line in lines if (m := _SCORE.fullmatch(line.strip().strip("*")))}
    if len(found) != 1 or not 0 <= (score := found.pop()) <= SCALE:
        return None
    return score / SCALE


def read_hint(reply: Reply) -> tuple[str, bool]:
    """(the hint, whether the reflector declared the plan solved).

    Example:
      >>> read_hint(Reply("<end>")), read_hint(Reply("Hint: sort first."))
      (('', True), ('sort first.', False))
    """
    text = re.sub(r"^\s*(?:hint|reflection)\s*:\s*", "", reply.text, count=1, flags=re.IGNORECASE)
    text = " ".join(text.split())
    if text.rstrip(".") == SOLVED:
        return "", True
    return text.replace(SOLVED, "").strip(), False
