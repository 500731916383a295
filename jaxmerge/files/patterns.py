"""Regular expressions of strangers' files and configs, matched in time linear in the text: by RE2, not Python's `re`.

RE2 has no lookaround and no back-references. A pattern is taken only if Python reads it too, and if the two mean the
same by it, so that what is accepted matches what the library that wrote the file would match.
"""

from __future__ import annotations

import functools
import re
import warnings

LONGEST = 2000  # characters of a pattern
# `{,3}` is at most three to Python, and those four characters to RE2; `[[:alpha:]]` is a set of `[:alph` and a `]` to
# Python, and a class to RE2.
_DIFFERENT = re.compile(r"\{,\d+\}|\[[^\]]*\[[:.=]")


def matches_module(pattern: object, module: str, where: str) -> bool:
    """Whether PEFT would apply `pattern` to a module: it stands for the whole name, or for its end from a dot on.

    Args:
      pattern: of `rank_pattern` or `alpha_pattern`.
      module: dotted name.
      where: file and key, for errors.

    Raises:
      ValueError: no regular expression, or one that cannot be matched in linear time; one line that names it.

    Example:
      >>> [matches_module(r"layers\\.[01]\\.q", name, "x") for name in ("m.layers.1.q", "m.layers.1.q.v")]
      [True, False]
    """
    return _compiled(pattern, where, r"(?:.*\.)?(?:{})").fullmatch(module) is not None


def is_found(pattern: object, text: str, where: str) -> bool:
    """Whether `pattern` is found anywhere in a text, as `re.search` finds it; errors as of `matches_module`.

    Example:
      >>> is_found("_proj$", "model/layers/3/self_attn/q_proj", "lora.targets")
      True
    """
    return _compiled(pattern, where, "{}").search(text) is not None


@functools.lru_cache(maxsize=4096)
def _compiled(pattern: object, where: str, whole: str):
    import re2

    shown = repr(pattern) if len(str(pattern)) <= 60 else f"{str(pattern)[:60]!r}…"
    if not isinstance(pattern, str) or len(pattern) > LONGEST:
        raise ValueError(f"{where}: pattern {shown} is no text of at most {LONGEST} characters")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", FutureWarning)  # Python's own doubt about what a set means
            re.compile(pattern)
    except (re.error, RecursionError, OverflowError, FutureWarning) as error:
        raise ValueError(f"{where}: pattern {shown} is no regular expression ({error})") from None
    options = re2.Options()
    options.log_errors = False
    try:
        if _DIFFERENT.search(pattern):
            raise re2.error("it means something else to other programs; write {0,n} for {,n}, and no [: in a set")
        return re2.compile(whole.replace("{}", pattern), options)
    except re2.error as error:
        said = error.args[0].decode() if error.args and isinstance(error.args[0], bytes) else str(error)
        raise ValueError(
            f"{where}: pattern {shown} cannot be matched safely ({said}); write it without lookaround, back-references "
            "and large repetitions"
        ) from None
