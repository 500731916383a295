"""`--dry-run`: the plan of a run, its sizes, its memory and its minutes, without loading a model."""

from __future__ import annotations

import math
from collections.abc import Mapping

from ..log import say
from ..models.config import ModelConfig
from ..models.decoder import shapes
from ..models.open import random_config, read_config
from ..tasks import Suite, build_suite
from ..tasks.code import CodeTask
from . import budget
from .devices import DEVICES, GIB
from .plan import Plan, check_sampled, plan
from .settings import Improve


def show_plan(config: Improve) -> None:
    """Print phases, questions, sequences, parameters, bytes and minutes.

    Of a model on the hub the config alone is fetched.
    """
    import jax

    check_sampled(config)
    todo, _ = plan(config)
    source = config.model
    model = random_config(source.random) if source.random is not None else read_config(source.path)
    count = sum(math.prod(x.shape) for x in jax.tree.leaves(shapes(model)))
    suite = build_suite(config.tasks.families, seed=config.tasks.seed, style=config.tasks.style)
    say(f"model: {count / 1e6:.1f} M parameters, {count * 4 / 1e9:.2f} GB in float32")
    show_phases(config, suite, todo, count)
    held = budget.memory(config, model, todo, budget.prompt_tokens(list(suite.all), config.tasks.few_shot))
    show_memory(config, held)
    show_minutes(config, model, suite, todo, max(sum(parts.values()) for parts in held.values()))
    kept = sum(p.keeps_weights for p in todo.phases)
    if config.keep is not None:
        kept = min(kept, (config.keep + 1) * kept // config.rounds)
    say(f"disk: {kept * count * 4 / 1e9:.2f} GB of weights, and {3 * count * 4 / 1e9:.2f} GB while fine-tuning")


def show_phases(config: Improve, suite: Suite, todo: Plan, count: int) -> None:
    """Print how many questions there are and what each phase does with them."""
    train = len(suite.questions("train", domain="id"))
    tested = sum(len(suite.questions(split)) for split in config.evaluation.splits)
    say(f"questions: {train} to train on, {tested} to evaluate")
    for row in suite.majority_baselines():
        if row["split"] == "test":
            program = isinstance(suite.tasks[row["family"]], CodeTask)
            always = "" if program else f"always {row['answer'][:40]!r}: {row['accuracy']:.0%}"
            say(f"  {row['domain']:7} {row['family']:20} n {row['n']:4}  {always}".rstrip())
    for phase in todo.phases:
        size = ""
        if phase.kind == "sample":
            samples = f"{phase.settings.samples} samples" if phase.settings.source == "plain" else phase.settings.source
            size = f"{train} questions × {samples}"
        elif phase.kind == "evaluate":
            size = f"{tested} questions"
        elif phase.keeps_weights:
            size = f"writes {count * 4 / 1e9:.2f} GB"
        shared = f"  (also {', '.join(phase.shared_by)})" if phase.shared_by else ""
        say(f"  {phase.name:32} {size}{shared}")


def show_memory(config: Improve, held: Mapping[str, Mapping[str, float]]) -> None:
    """Print what a device holds in each kind of phase, as `budget.memory` reckons it."""
    devices = config.mesh.devices
    say(f"memory a device, of {devices}, where it needs most:")
    for name, parts in held.items():
        told = ", ".join(f"{what} {bytes / GIB:.2f}" for what, bytes in parts.items() if bytes)
        say(f"  {name:12} {sum(parts.values()) / GIB:6.2f} GiB: {told}")


def show_minutes(config: Improve, model: ModelConfig, suite: Suite, todo: Plan, needed: float) -> None:
    """Print tokens, examples, and minutes on the devices whose data sheets are known.

    Args:
      needed: bytes of a device, where it needs most.
    """
    work = budget.work_of(config, suite, todo)
    answers = budget.by_kind([(phase, w.answers) for phase, w in work])
    answers["sampling"] += answers["training"]  # of phases that sample as they train
    examples = budget.by_kind([(phase, w.examples) for phase, w in work])["training"]
    for name in ("sampling", "evaluating"):
        told = answers[name]
        about = f"about {told.about:,.0f} (answers as long as the worked solutions)"
        say(f"tokens of {name}: {about}, at most {told.most:,.0f}")
    say(
        f"examples to learn, all epochs: about {examples.about:,.0f}, at most {examples.most:,.0f} (every sample right)"
    )
    count = config.mesh.devices
    searched = any(method.probe is not None and method.probe.search for method in config.methods.values())
    left = ["links", "compiling", "loading", *(["what the searches of probes evaluate"] if searched else [])]
    say(
        f"minutes on {count} of a device, about and at most, by data sheets: products at {budget.TRAINING:.0%} of the "
        f"peak, memory at {budget.DECODING:.0%} of its bandwidth; not counted: {', '.join(left)}"
    )
    say(f"  {'':16} {'sampling':>15} {'training':>15} {'evaluating':>15} {'in all':>15}")
    for name, device in DEVICES.items():
        spent = budget.by_kind([(phase, budget.seconds(config, model, w, device)) for phase, w in work])
        total = sum(spent.values(), budget.Amount())
        cells = " ".join(f"{minutes(t.about):>7} {minutes(t.most):>7}" for t in (*spent.values(), total))
        short = f"  {needed / GIB:.1f} of {device.hbm / GIB:.1f} GiB: does not fit" if needed > device.hbm else ""
        say(f"  {name:16} {cells}{short}")


def minutes(seconds: float) -> str:
    """Seconds as minutes in a column.

    Example:
      >>> minutes(0.6), minutes(90.0), minutes(360000.0)
      ('0.01', '1.5', '6,000')
    """
    found = seconds / 60
    return f"{found:,.0f}" if found >= 20 else f"{found:.1f}" if found >= 1 else f"{found:.2f}"
