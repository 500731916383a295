"""The configs that come with the code: their names, what each is for, and the verb it is of."""

from __future__ import annotations

import re
import textwrap
from pathlib import Path

from ..resolve import SHIPPED, shipped_names

WIDTH = 100


def purpose(text: str) -> tuple[str, str]:
    """The verb of a config and the first sentence of its head comment.

    Example:
      >>> purpose("# Makes a model. It is small.\\n#   jaxmerge sft configs/a.yaml\\nmodel: {}\\n")
      ('sft', 'Makes a model.')
    """
    head = [line.removeprefix("#").rstrip() for line in text.split("\n") if line.startswith("#")]
    command = next((match[1] for line in head if (match := re.match(r"   jaxmerge ([\w-]+) ", line))), "improve")
    words = " ".join(line.strip() for line in head if not line.startswith("   "))
    sentence = re.match(r".*?[.?](?= |$)", words)
    return command, sentence[0] if sentence else words


def listing(folder: Path = SHIPPED) -> str:
    """Each config: the command that runs it, and its purpose."""
    lines = []
    for name in shipped_names():
        verb, sentence = purpose((folder / f"{name}.yaml").read_text(encoding="utf-8"))
        lines.append(f"jaxmerge {verb} {name}")
        lines += textwrap.wrap(sentence, WIDTH, initial_indent="    ", subsequent_indent="    ")
    return "\n".join([*lines, "", f"They lie in {folder}. A copy of one with another name is a config of your own."])
