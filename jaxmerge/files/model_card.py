r"""Model cards: README.md of a folder that holds a model or an adapter, in the form that the Hugging Face hub reads.

A card says what the model is, how to load it, how and of what it was made, under which licences, and what was measured.
It is meant to be published, so models are called by their hub names, and those that have none by the name of their
folder alone, without its path.
"""

from __future__ import annotations

import dataclasses
import inspect
import pathlib
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import yaml

from jaxmerge.contract import Rule
from jaxmerge.files.checkpoints.hub import is_hub_name
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.documents import parse_yaml, read_json
from jaxmerge.rules import FORMULA, as_text, plain

FILE = "README.md"
TAG = "jaxmerge"
MAX_FRONT = 1 << 16  # characters of a card in which its front matter must end
CACHED = re.compile(r"(?:^|/)models--([^/]+?)--([^/]+)")  # how the hub's client calls the folder of a model
UNSTATED = "not stated"
RANDOM = "random weights"


@dataclasses.dataclass(frozen=True)
class Ingredient:
    """A model that another one was made of.

    name: what readers see. hub: its names on the hub, those of model and adapter. licences: what their cards say.
    """

    name: str
    hub: tuple[str, ...] = ()
    licences: tuple[str, ...] = ()


@dataclasses.dataclass(frozen=True)
class Card:
    """What a card says; `write_card` gives it its form.

    title: the folder's name. summary: one sentence. usage: how to load it (`usage`). sections: heading → Markdown.
    tags: beside "jaxmerge". relation: to its ingredients, in the hub's words: merge, finetune or adapter.
    """

    title: str
    summary: str
    usage: str
    ingredients: Sequence[Ingredient] = ()
    sections: Mapping[str, str] = dataclasses.field(default_factory=dict)
    tags: tuple[str, ...] = ()
    relation: str = "finetune"
    library: str = "transformers"


def write_card(folder: pathlib.Path, card: Card) -> None:
    """Write README.md into a folder."""
    (folder / FILE).write_text(text_of(card), encoding="utf-8")


def text_of(card: Card) -> str:
    """Return the text of a card: front matter that the hub reads, and Markdown for people."""
    hub = list(dict.fromkeys(name for ingredient in card.ingredients for name in ingredient.hub))
    licence = common_licence(card.ingredients)
    front: dict[str, Any] = {"library_name": card.library, "tags": [*card.tags, TAG]}
    front |= {"license": licence} if licence else {}
    front |= {"base_model": hub, "base_model_relation": card.relation} if hub else {}
    parts = [f"# {card.title}", card.summary, f"## Use\n\n{card.usage}"]
    if card.ingredients:
        rows = [(i.name, ", ".join(i.licences) or UNSTATED) for i in card.ingredients]
        parts.append(f"## Made of\n\n{table(('model', 'licence'), rows)}")
    parts += [f"## {heading}\n\n{text}" for heading, text in card.sections.items() if text]
    body = "\n\n".join(part.strip() for part in parts)
    return f"---\n{yaml.safe_dump(front, sort_keys=False, allow_unicode=True)}---\n{body}\n"


def table(head: Sequence[str], rows: Iterable[Sequence[Any]]) -> str:
    """Return a Markdown table."""
    lines = [head, ["---"] * len(head), *rows]
    return "\n".join("| " + " | ".join(str(cell).replace("|", "\\|") for cell in line) + " |" for line in lines)


def folded(title: str, text: str) -> str:
    """Return long YAML, shown when its title is clicked."""
    return f"<details><summary>{title}</summary>\n\n```yaml\n{text.strip()}\n```\n\n</details>"


def ingredient(name: str, folders: Iterable[pathlib.Path] = ()) -> Ingredient:
    """Describe a model by the string that names it, `model` or `model+adapter`, and the folders it lies in.

    Example:
      >>> ingredient("/home/me/llama-tuned+org/adapter@main")
      Ingredient(name='llama-tuned+org/adapter', hub=('org/adapter',), licences=())
    """
    parts = [name] if pathlib.Path(name).expanduser().exists() else name.split("+")
    hubs = [hub_name(part) for part in parts]
    shown = [hub or _last(part) for hub, part in zip(hubs, parts, strict=True)]
    found = [licence for folder in dict.fromkeys(folders) if (licence := licence_of(folder)) is not None]
    return Ingredient("+".join(shown), tuple(hub for hub in hubs if hub), tuple(dict.fromkeys(found)))


def origin(path: str) -> Ingredient:
    """Describe the model that a training began with, "" if with random weights."""
    return ingredient(path, [pathlib.Path(path)] if pathlib.Path(path).is_dir() else []) if path else Ingredient(RANDOM)


def ingredient_of(source: Source) -> Ingredient:
    """Describe an open checkpoint; one that was made here of models of the hub, and lies only here, by these too."""
    found = ingredient(source.name, [source.folder, *(file.parent for file in source.files)])
    front = front_matter(source.folder / FILE)
    if found.hub or TAG not in (front.get("tags") or ()):
        return found
    made_of = front.get("base_model") or []
    return dataclasses.replace(found, hub=tuple(made_of) if isinstance(made_of, list) else (str(made_of),))


def hub_name(name: str) -> str | None:
    """Return the hub name `org/name` of a model that is on the hub or lies in the cache of its client, else None."""
    path = pathlib.Path(name).expanduser()
    cached = CACHED.search(str(path.absolute()))
    if path.exists():
        return f"{cached[1]}/{cached[2]}" if cached else None
    return name.partition("@")[0] if is_hub_name(name) else None


def _last(name: str) -> str:
    path = pathlib.PurePath(name)
    return path.name or pathlib.Path(name).absolute().name


def licence_of(folder: pathlib.Path) -> str | None:
    """Return the licence that the card in a folder states, by the identifier of the hub or by name."""
    front = front_matter(folder / FILE)
    licence, named = front.get("license"), front.get("license_name")
    if isinstance(licence, list):
        licence = ", ".join(map(str, licence))
    found = named if licence in (None, "other") and named else licence
    return str(found) if found else None


def front_matter(path: pathlib.Path) -> Mapping[str, Any]:
    """Return the front matter of a card; nothing where there is no card, or none that can be read."""
    if not path.is_file():  # a pipe would hold us up
        return {}
    try:
        with open(path, encoding="utf-8") as file:
            text = file.read(MAX_FRONT)
        found = re.match(r"---\n(.*?)\n---", text, re.DOTALL)
        documents = parse_yaml(found[1], path) if found else []
    except (OSError, ValueError):
        return {}
    return documents[0] if documents and isinstance(documents[0], Mapping) else {}


def common_licence(ingredients: Sequence[Ingredient]) -> str | None:
    """Return the licence that every ingredient states, if it is one: a result may be under no other."""
    stated = {licence for i in ingredients for licence in (i.licences or (UNSTATED,))}
    (only, *more) = stated or {UNSTATED}
    return None if more or only == UNSTATED else only


def usage(folder: pathlib.Path, name: str) -> str:
    """Return how a Hugging Face folder is loaded, in Python; `name` is what it will be called."""
    config = read_json(folder / "config.json")
    if not config:
        lines = ["from safetensors.torch import load_file", "", f'tensors = load_file("{name}/model.safetensors")']
        return "\n".join(["```python", *lines, "```"])
    remote = ", trust_remote_code=True" if "auto_map" in config else ""
    kind = next(iter(config.get("architectures") or ()), "AutoModel")
    if kind.endswith(("ForCausalLM", "LMHeadModel")) or remote:
        kind = "AutoModelForCausalLM"
    lines = [f'model = {kind}.from_pretrained("{name}"{remote})']
    kinds = [kind]
    if (folder / "tokenizer_config.json").exists() or (folder / "tokenizer.json").exists():
        kinds.append("AutoTokenizer")
        lines.append(f'tokenizer = AutoTokenizer.from_pretrained("{name}"{remote})')
    return "\n".join(["```python", f"from transformers import {', '.join(kinds)}", "", *lines, "```"])


def gguf_usage(file: str, name: str) -> str:
    """Return how a GGUF file is run with llama.cpp, and how transformers reads it."""
    return f"""```sh
llama-cli -m {file}
```

```python
from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("{name}", gguf_file="{file}")
```"""


def adapter_usage(name: str, base: Ingredient) -> str:
    """Return how an adapter is loaded with PEFT, and how it is merged here."""
    model = base.hub[0] if base.hub else f"path/of/{base.name}"
    return f"""```python
from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("{model}")
model = PeftModel.from_pretrained(base, "{name}")
```

In a recipe of `jaxmerge merge` the adapted model is `{model}+path/of/{name}`."""


def describe_rule(rule: Rule) -> str:
    """Return what a rule does: the first sentence of its docstring, its formula, and the papers."""
    text = inspect.getdoc(rule) or ""
    formula = FORMULA.search(text)
    papers = re.search(r"References:\n((?:[ \t]+\S.*(?:\n|$))+)", text)
    lines = [as_text(text.partition("\n")[0])]
    if formula and plain(formula[1]) not in lines[0]:
        lines.append(f"    {plain(formula[1])}")
    if papers:
        lines.append("\n".join(f"- {line.strip()}" for line in papers[1].strip().splitlines()))
    return "\n\n".join(lines)


def extracted_card(
    base: Source, tuned: Source, out: pathlib.Path, *, rank: int, alpha: float, explained: float
) -> Card:
    """Return the card of an adapter that holds the change between two checkpoints.

    Args:
      base, tuned: the checkpoints.
      out: folder of the adapter.
      rank, alpha: of its factors.
      explained: share of the squared norm of the change that is in the adapter.
    """
    first, second = ingredient_of(base), ingredient_of(tuned)
    made = (
        f"Of each matrix's change, the best approximation of rank {rank} (lora_alpha {alpha:g}). "
        f"{100 * explained:.1f} % of the squared norm of the change is in the adapter."
    )
    return Card(
        title=out.name,
        summary=f"The change from {first.name} to {second.name} as a LoRA adapter, extracted by jaxmerge.",
        usage=adapter_usage(out.name, first),
        ingredients=[first, second],
        sections={"How it was made": made},
        tags=("lora",),
        relation="adapter",
        library="peft",
    )
