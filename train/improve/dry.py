"""`--dry-run`: the plan of a run, its sizes and its memory, without loading a model."""

from __future__ import annotations

import math
from collections import Counter

from ..log import say
from ..models.decoder import shapes
from ..models.open import random_config, read_config
from ..tasks import build_suite
from .plan import check_sampled, plan
from .settings import Improve


def show_plan(config: Improve) -> None:
    """Print phases, questions, sequences, parameters and bytes."""
    import jax

    check_sampled(config)
    todo, _ = plan(config)
    source = config.model
    model = random_config(source.random) if source.random is not None else read_config(source.path)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(model)))
    suite = build_suite(config.tasks.families, seed=config.tasks.seed, style=config.tasks.style)
    train = len(suite.questions("train", domain="id"))
    tested = sum(len(suite.questions(split)) for split in config.evaluation.splits)
    say(f"model: {count / 1e6:.1f} M parameters, {count * 4 / 1e9:.2f} GB in float32")
    say(f"questions: {train} to train on, {tested} to evaluate")
    for row in suite.majority_baselines():
        if row["split"] == "test":
            say(
                f"  {row['domain']:7} {row['family']:20} n {row['n']:4}  "
                f"always {row['answer']!r}: {row['accuracy']:.0%}"
            )
    for phase in todo.phases:
        size = ""
        if phase.kind == "sample":
            size = f"{train} questions × {phase.settings.samples} samples"
        elif phase.kind == "evaluate":
            size = f"{tested} questions"
        elif phase.kind in ("sft", "merge"):
            size = f"writes {count * 4 / 1e9:.2f} GB"
        shared = f"  (also {', '.join(phase.shared_by)})" if phase.shared_by else ""
        say(f"  {phase.name:32} {size}{shared}")
    kinds = Counter(p.kind for p in todo.phases)
    kept = kinds["sft"] + kinds["merge"]
    if config.keep is not None:
        kept = min(kept, (config.keep + 1) * kept // config.rounds)
    per_device = count * 4 / (config.mesh.fsdp * config.mesh.tensor)
    sampling = config.sampling
    length = config.sampling.max_new_tokens + 128
    cache = 2 * model.num_hidden_layers * sampling.slots * model.num_key_value_heads * length * model.head_dim * 4
    say(
        f"memory a device: fine-tuning {5 * per_device / 1e9:.2f} GB (base, weights, gradients, two moments) and "
        f"activations; sampling {(2 * per_device + cache) / 1e9:.2f} GB (base, weights, {sampling.slots} slots)"
    )
    say(f"disk: {kept * count * 4 / 1e9:.2f} GB of weights, and {3 * count * 4 / 1e9:.2f} GB while fine-tuning")
