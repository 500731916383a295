"""What `jaxmerge --help` and `jaxmerge VERB --help` print, from the table of verbs and the settings' docstrings."""

from __future__ import annotations

import shutil
import textwrap
from collections.abc import Mapping

from .words import Verb

HEAD = "jaxmerge: self-improve, extrapolate and merge language models on a JAX mesh"
FOOT = """\
CONFIG is a YAML file, or the name of one that `jaxmerge configs` lists.
MODEL is a Hugging Face folder, a GGUF file, package:NAME/FILE.gguf, a checkpoint of a run, or a hub name.
`jaxmerge VERB --help` lists the keys of a verb with their types, defaults and meanings; docs/config.md lists them all.
"""
WIDEST = 100


def overview(verbs: Mapping[str, Verb]) -> str:
    """Every verb with its arguments and its first sentence."""
    calls = {verb.name: f"jaxmerge {verb.name.ljust(max(map(len, verbs)))} {verb.usage}" for verb in verbs.values()}
    width = max(map(len, calls.values()))
    lines = [f"  {calls[name].ljust(width)}  {verb.prose[0]}".rstrip() for name, verb in verbs.items()]
    return "\n".join([HEAD, "", *lines, "", FOOT])


def explain(verb: Verb) -> str:
    """How a verb is called, what it does, and each key: type, default, sentence."""
    from .keys import REQUIRED, keys  # the overview does not wait for the modules that read source

    width = min(WIDEST, shutil.get_terminal_size((WIDEST, 24)).columns)
    more = " [key=value …]" * bool(verb.keys) + "".join(f" [{flag}]" for flag in verb.flags)
    first, rest = verb.prose
    lines = [f"jaxmerge {verb.name} {usage}{more}".replace("  ", " ") for usage in map(" ".join, verb.arguments)]
    lines += ["", first, *([rest] if rest else [])]
    found = [key for settings in verb.settings for key in keys(settings)]
    if found:
        lines += ["", "Keys, with defaults and types (--key=value and --key value are key=value):", ""]
    for key in found:
        required = key.default == REQUIRED
        lines.append(f"  {key.path}={'' if required else key.default}  {key.kind}{f', {REQUIRED}' * required}")
        lines += textwrap.wrap(key.meaning, width, initial_indent=" " * 6, subsequent_indent=" " * 6)
    return "\n".join([*lines, ""])
