"""The model card of a fine-tuned model or its adapter: what it was trained from, on what, and how the loss fell."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jaxmerge.files import model_card
from jaxmerge.files.model_card import Card, Ingredient


def write_cards(folder: Path, name: str, path: str, record: Mapping[str, Any], settings: str) -> None:
    """Write the cards of what a run of `sft` made: `hf/`, and `adapter/` where it trained one.

    Args:
      folder: of the run.
      name: of the run; the models are called by it.
      path: the model it began with, "" if with random weights.
      record: of the committed training.
      settings: the run's own, in YAML.
    """
    base = model_card.origin(path)
    for place, adapter in ((folder / "hf", False), (folder / "adapter", True)):
        if place.is_dir() and not (place / model_card.FILE).exists():
            model_card.write_card(place, trained_card(place, name, base, record, settings, adapter=adapter))


def trained_card(
    place: Path, name: str, base: Ingredient, record: Mapping[str, Any], settings: str, *, adapter: bool
) -> Card:
    """Return the card of a tuned model, or of the adapter that tunes it."""
    sources = [(Path(note["source"]).name, note["examples"], note["tokens"]) for note in record["data"]]
    losses = f"The loss went from {record['loss_first']:.3f} to {record['loss_last']:.3f}"
    return Card(
        title=name,
        summary=f"{'A LoRA adapter of' if adapter else ''} {base.name}, fine-tuned by jaxmerge.".strip(),
        usage=model_card.adapter_usage(name, base) if adapter else model_card.usage(place, name),
        ingredients=[base],
        sections={
            "Training": f"{losses} in {record['steps']} steps over {record['tokens']} tokens that were learnt.",
            "Data": model_card.table(("source", "examples", "tokens"), sources) if sources else "",
            "Settings": model_card.folded("config.yaml of the run", settings),
        },
        tags=("lora",) if adapter else ("sft",),
        relation="adapter" if adapter else "finetune",
        library="peft" if adapter else "transformers",
    )
