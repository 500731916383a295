"""The prompt file of a search: read, checked, rendered."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..log import UserError
from ..resolve import at_least, build, read_yaml

INSTALLED = Path(__file__).with_name("prompts.yaml")
PROMPTS = ("step", "hint", "score", "chain", "write")
LATER = ("critique", "guide", "follow")
"""Prompts that a domain may lack."""
LENGTHS = {"critique": "write", "guide": "write", "follow": "chain"}
"""Prompts whose replies may be as long as those to others."""
SPECIMEN: dict[str, Any] = {"question": "q", "steps": ["s"], "hint": "h", "siblings": ["t"], "text": "x"}
"""What templates may read."""


@dataclasses.dataclass(frozen=True)
class Prompt:
    """One prompt: what is said, how the reply begins, where it ends.

    `plain`: said as it stands, in no chat. `after`: what a reply says before this was thought, and is left out.
    `temperature`: at which it is answered, where the role has none of its own.
    """

    messages: tuple[dict[str, str], ...]
    prefix: str = ""
    stop: tuple[str, ...] = ()
    until: tuple[str, ...] = ()
    plain: bool = False
    after: str = ""
    temperature: float | None = None

    def __post_init__(self):
        if not self.messages or any(set(m) != {"role", "content"} for m in self.messages):
            raise UserError("prompts: messages is a list of {role, content}, one or more")
        if "" in self.stop + self.until:
            raise UserError("prompts: stop and until hold no empty string")
        if self.temperature is not None:
            at_least(self, "prompts", temperature=1e-6)

    def render(self, values: Mapping[str, Any]) -> tuple[list[dict[str, str]], str]:
        """(messages, how the reply begins)."""
        said = [{"role": m["role"], "content": fill(m["content"], values)} for m in self.messages]
        return said, fill(self.prefix, values) if self.prefix else ""


@dataclasses.dataclass(frozen=True)
class Prompts:
    """The prompts of one domain; a model without a `hint` reflects on nothing.

    `conclusions`: with which texts a critique says that a solution is right, and that it is wrong.
    """

    step: Prompt
    score: Prompt
    chain: Prompt
    write: Prompt
    target: str
    complete: str | None = None
    hint: Prompt | None = None
    critique: Prompt | None = None
    guide: Prompt | None = None
    follow: Prompt | None = None
    conclusions: tuple[str, ...] = ("Conclusion: right", "Conclusion: wrong")

    def __post_init__(self):
        if len(self.conclusions) != 2 or "" in self.conclusions or len(set(self.conclusions)) < 2:
            raise UserError(f"prompts: conclusions is {list(self.conclusions)}; two texts, for right and for wrong")

    def __getitem__(self, name: str) -> Prompt:
        return getattr(self, name)


def load_prompts(
    domain: str, path: str | Path | None = None, *, reflects: bool = False, needs: Sequence[str] = ()
) -> Prompts:
    """The prompts of a domain, every template tried on a specimen.

    Args:
      reflects: the search asks for hints.
      needs: prompts of `LATER` that the search puts.
    """
    where = Path(path) if path is not None else INSTALLED
    domains = read_yaml(where)
    if domain not in domains:
        raise UserError(f"{where}: no prompts for {domain}; it has {', '.join(domains) or 'none'}")
    found = build(Prompts, domains[domain], f"{where}: {domain}")
    if reflects and found.hint is None:
        raise UserError(f"{where}: {domain} has no prompt hint; add it, or set search.reflect=false")
    if lacking := [name for name in needs if found[name] is None]:
        raise UserError(f"{where}: {domain} has no prompt {lacking[0]}; add it")
    for name in (p for p in PROMPTS + LATER if found[p] is not None):
        for template in (*(m["content"] for m in found[name].messages), found[name].prefix):
            check(template, f"{where}: {domain}.{name}")
    check(found.target, f"{where}: {domain}.target")
    return found


def check(template: str, where: str) -> None:
    import jinja2

    try:
        fill(template, SPECIMEN)
    except jinja2.TemplateError as error:
        raise UserError(f"{where}: {error}; templates read {', '.join(SPECIMEN)}") from error


def fill(template: str, values: Mapping[str, Any]) -> str:
    """A Jinja template with its values; what it reads and is not there is an error."""
    return compiled(template).render(**values)


@functools.lru_cache(maxsize=256)
def compiled(template: str) -> Any:
    import jinja2
    from jinja2.sandbox import ImmutableSandboxedEnvironment

    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, keep_trailing_newline=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(template)
