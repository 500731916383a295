"""What a run will need, by arithmetic: memory a device, tokens to sample, examples to learn, seconds on a device.

From the config, the sizes of the model and the questions; nothing is loaded and nothing is compiled. How long answers
will be is not known before there are any, so every number comes twice: as if they were as long as the worked solutions,
and as if all went on to max_new_tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence

from ..learn.settings import Sft
from ..learn.speed import step_flops, token_flops
from ..models.config import ModelConfig
from ..models.open import read_config
from ..resolve import build
from ..runtime.settings import Mesh
from ..search.settings import Search
from ..tasks import Question, Suite
from . import merge as combine
from . import paper
from .devices import Device
from .phases import drawing_of
from .plan import BASE, Phase, Plan
from .settings import Improve, Learning, Merge, Sampling

CHARACTERS = 3.0
"""Characters of a token: fewer than in prose, for digits are mostly tokens of their own."""
AROUND = 40
"""Tokens that a chat template and the wording put around a question."""
TRAINING, DECODING = 0.4, 0.5
"""Shares of the data sheet that are reckoned with: of the products' peak (training, reading prompts), of the memory's
bandwidth (decoding)."""


@dataclasses.dataclass(frozen=True)
class Amount:
    """Tokens or examples: about, and at most."""

    about: float = 0.0
    most: float = 0.0

    def __add__(self, other: Amount) -> Amount:
        return Amount(self.about + other.about, self.most + other.most)

    def __mul__(self, times: float) -> Amount:
        return Amount(self.about * times, self.most * times)


@dataclasses.dataclass(frozen=True)
class Work:
    """What a phase does.

    Attributes:
      answers: tokens to sample. prompts: tokens to read before them.
      slots: sequences decoded side by side.
      beside: paths of the models that decide with the run's.
      examples: to learn, all epochs. length: tokens of a row.
    """

    answers: Amount = Amount()
    prompts: float = 0.0
    slots: int = 1
    beside: tuple[str, ...] = ()
    examples: Amount = Amount()
    length: Amount = Amount()


@dataclasses.dataclass(frozen=True)
class Program:
    """One of the programs of paper.py, with the names that its formulas read."""

    step: str
    dtype: str
    batch: int = 1
    micro_batch: int | None = None
    length: int = 1
    slots: int = 1
    gather: bool = False
    remat: str = "none"
    masters: str = "float32"
    logits_at_once: int = 1024


def tokens_of(text: str | None) -> float:
    return len(text or "") / CHARACTERS


def mean(values: list[float]) -> float:
    return sum(values) / len(values) if values else 0.0


def prompt_tokens(questions: list[Question], shots: int) -> float:
    """Tokens of a prompt, with its worked examples."""
    asked = mean([tokens_of(q.text) for q in questions])
    solved = mean([tokens_of(q.solution or q.answer) for q in questions])
    return asked + AROUND + shots * (asked + solved)


def answer_tokens(questions: list[Question], most: int) -> Amount:
    """Tokens of an answer."""
    return Amount(min(mean([tokens_of(q.solution or q.answer) for q in questions]), most), most)


# --- what the phases do ------------------------------------------------------------------------------------


def work_of(config: Improve, suite: Suite, todo: Plan) -> list[tuple[Phase, Work]]:
    """The work of every phase that samples or trains."""
    shots = config.tasks.few_shot
    train = suite.questions("train", domain="id")
    tested = [q for split in config.evaluation.splits for q in suite.questions(split)]
    checked = suite.questions("validation")
    learnt: dict[str, Amount] = {}
    found = []
    for phase in todo.phases:
        work = None
        if phase.kind == "sample":
            beside = tuple(phase.settings.decode.paths.values())
            work = dataclasses.replace(sampled(phase.settings, train, shots), beside=beside)
        elif phase.kind == "select":
            earlier = [learnt[name] for role, name in phase.inputs.items() if role.startswith("earlier")]
            learnt[phase.name] = sum(earlier, chosen(config, phase, todo, len(train)))
        elif phase.kind == "part":
            learnt[phase.name] = learnt[phase.inputs["data"]] * (1 / phase.settings["of"])
        elif phase.kind == "sft":
            work = trained(phase.settings, learnt[phase.inputs["data"]], train, shots, config)
        elif phase.kind == "policy":
            work = learned(phase.settings, train, shots)
        elif phase.kind == "evaluate":
            last = phase.round in (0, config.rounds) or config.evaluation.sampled == "all"
            drawn = config.evaluation.samples * len(suite.questions("test")) if last else 0
            work = asked(config, tested, len(tested) + drawn, shots)
        elif phase.kind == "rank":
            kept = config.block(phase.inputs["snapshots"].split("/")[1], "sft").snapshots
            work = asked(config, checked, kept * len(checked), shots)
        elif phase.kind == "merge":
            tried = len(combine.candidates(build(Merge, phase.settings["merge"]), phase.round, config.rounds))
            work = asked(config, checked, tried * len(checked), shots) if tried > 1 else None
        if work is not None:
            found.append((phase, work))
    return found


def sampled(settings: Sampling, questions: list[Question], shots: int) -> Work:
    """Solutions of every question."""
    one, read, count = (
        answer_tokens(questions, settings.max_new_tokens),
        prompt_tokens(questions, shots),
        len(questions),
    )
    if settings.source == "plain":
        each = settings.samples
        return Work(one * (count * each), read * count, settings.slots)
    search, drawing = build(Search, {**settings.search, "kind": settings.source}), drawing_of(settings)
    if settings.source == "dart":
        wanted = Amount(max(search.dart.right, search.dart.samples), search.dart.most)
        answers = Amount(one.about * wanted.about, one.most * wanted.most) * count
        return Work(answers, read * count * wanted.most, settings.slots)
    if not search.plans:  # about as much again is drawn to revise, criticise or follow
        answers = Amount(one.about * 2 * search.samples, one.most * 3 * search.samples) * count
        return Work(answers, read * count * 2 * search.samples, settings.slots)
    # Nodes that are expanded: a hint, then steps, each with a score; then the plan is written out.
    nodes = search.iterations if settings.source == "mcts" else search.depth * search.beam
    hint = drawing.hint if search.reflects else 0
    step = Amount(min(one.about / 2, drawing.step), drawing.step)
    tree = (step + Amount(drawing.score, drawing.score)) * search.children + Amount(hint, hint)
    answers = tree * nodes + one * search.samples
    return Work(answers * count, read * count * nodes * (2 * search.children + 1), settings.slots)


def learned(settings: Learning, questions: list[Question], shots: int) -> Work:
    """Samples that are drawn step by step, each learnt from `iterations` times."""
    improver, each = settings.improver, settings.sampling.samples
    steps = improver.steps * settings.sft.stay.stop_at
    one = answer_tokens(questions, settings.sampling.max_new_tokens)
    count = Amount(steps * improver.questions, steps * improver.questions * (1 + improver.redraws))
    answers = Amount(one.about * count.about, one.most * count.most) * each
    read = prompt_tokens(questions, shots)
    rows = steps * improver.questions * each * improver.iterations
    length = one + Amount(read, read)
    slots = settings.sampling.slots
    return Work(answers, read * count.most, slots, examples=Amount(rows, rows), length=length)


def asked(config: Improve, questions: list[Question], answers: int, shots: int) -> Work:
    """Answers to the questions of an evaluation."""
    block = config.evaluation
    one, read = answer_tokens(questions, block.max_new_tokens), prompt_tokens(questions, shots)
    return Work(one * answers, read * answers, block.slots)


def chosen(config: Improve, phase: Phase, todo: Plan, questions: int) -> Amount:
    """Examples that one round adds: about one solution in two is right and new, at most all are."""
    if "samples" not in phase.inputs:  # the worked solutions of a warm-up
        return Amount(questions, questions)
    selection, source = phase.settings, todo[phase.inputs["samples"]].settings
    search = build(Search, {**source.search, "kind": source.source}) if source.source != "plain" else None
    each = source.samples if search is None else search.dart.most if source.source == "dart" else search.samples
    each = min(each, selection.per_question or each)
    real = selection.real_ratio * questions
    return Amount(real + (questions - real) * max(1.0, each / 2), real + (questions - real) * each)


def trained(settings: Sft, examples: Amount, questions: list[Question], shots: int, config: Improve) -> Work:
    """Updates on the examples, every epoch; a row is as long as the longest example."""
    longest = max((tokens_of(q.text) + tokens_of(q.solution) for q in questions), default=0.0) + AROUND
    one = Amount(min(longest + shots * longest, settings.max_length), settings.max_length)
    return Work(examples=examples * (settings.epochs * settings.stay.stop_at), length=one, slots=config.sampling.slots)


# --- memory and seconds ------------------------------------------------------------------------------------


def memory(config: Improve, model: ModelConfig, todo: Plan, read: float) -> dict[str, dict[str, float]]:
    """Bytes of a device in each kind of phase, by what they are for, where it needs most.

    Args:
      read: tokens of a prompt.
    """
    mesh, dtype, sft = axes(config.mesh), config.model.dtype, config.sft
    one, beside = paper.masters(model, mesh), models_beside(config, todo)
    training = Program(
        "sft", dtype, sft.batch, sft.micro_batch, sft.max_length, remat=sft.step.remat, masters=sft.step.masters,
        logits_at_once=sft.step.logits_at_once,
    )  # fmt: skip
    tuned = paper.sft_memory(model, training, mesh)
    if sft.lora is not None:  # of the adapters alone
        tuned |= dict.fromkeys(("moments", "gradients"), 0.0)
    found = {"fine-tuning": tuned | {"models beside": one * beside.get("sft", 0)}}
    for kind, block in {"sample": config.sampling, "evaluate": config.evaluation}.items():
        length = int(read) + block.max_new_tokens
        program = Program("decode", dtype, slots=block.slots, length=length, gather=config.mesh.gather_to_decode)
        others = [read_config(path) for path in block.decode.paths.values()] if isinstance(block, Sampling) else []
        held = {"models beside": one * beside.get(kind, 0) + sum(paper.masters(other, mesh) for other in others)}
        parts = [paper.decode_memory(part, program, mesh) for part in (model, *others)]
        found[{"sample": "sampling"}.get(kind, "evaluating")] = {k: sum(p[k] for p in parts) for k in parts[0]} | held
    if made := max(beside.get(kind, 0) for kind in ("join", "merge", "probe")):
        found["merging"] = {"models": one * made, "what comes out": one}
    if any(phase.kind == "graft" for phase in todo.phases):
        found["grafting"] = {"models": 2 * one, "mask, its moments and gradient": 4 * one, "the grafted model": 2 * one}
    return found


def models_beside(config: Improve, todo: Plan) -> dict[str, int]:
    """Whole models in float32 on the mesh while a phase of each kind runs, where there are most.

    The original model stays there unless `merge.offload`, and so does all that a later phase reads.
    """
    trained = [name for name, method in config.methods.items() if method.probe is None]
    stays = 0 if any(config.block(name, "merge").offload for name in trained) else 1
    held: set[str] = set()
    most: dict[str, int] = {}
    for index, phase in enumerate(todo.phases):
        here = len(held) + max(stays, int(BASE in phase.inputs.values()))
        most[phase.kind] = max(most.get(phase.kind, 0), here)
        held |= {phase.name} if phase.makes_weights else set()
        held = {name for name in held if todo.last_use(name) > index}
    return most


def axes(mesh: Mesh) -> Mapping[str, int]:
    # Experts are reckoned whole on each device: the memory is then an upper bound.
    return {"data": mesh.data * mesh.expert, "fsdp": mesh.fsdp, "tensor": mesh.tensor}


def seconds(config: Improve, model: ModelConfig, work: Work, device: Device) -> Amount:
    """Seconds of a phase on as many of these devices as the mesh has; links are not counted."""
    mesh = axes(config.mesh)
    devices = mesh["data"] * mesh["fsdp"] * mesh["tensor"]
    products = device.flops * devices * TRAINING
    models = [model, *(read_config(path) for path in work.beside)]
    every, head = map(sum, zip(*map(token_flops, models), strict=True))
    total = Amount()
    if work.answers.most:
        t, width = mesh["tensor"], paper.WIDTH[config.model.dtype]
        # Half full on average.
        length = max(int(config.sampling.max_new_tokens / 2), 1)
        program = Program("decode", config.model.dtype, slots=work.slots, length=length)
        caches = sum(paper.decode_memory(each, program, mesh)["caches"] for each in models)
        read = (width * sum(map(paper.parameters, models)) / t + caches) / (device.hbm_rate * DECODING)
        step = max(read, 2 * (every + head) * work.slots / products)
        total += work.answers * (step / work.slots) + Amount(1.0, 1.0) * (2 * every * work.prompts / products)
    if work.examples.most:
        about, most = (
            step_flops(model, round(n), round(length), round(n * length / 2), frozen=config.sft.lora is not None)
            for n, length in ((work.examples.about, work.length.about), (work.examples.most, work.length.most))
        )
        total += Amount(about, most) * (1 / products)
    return total


def by_kind(pairs: Sequence[tuple[Phase, Amount]]) -> dict[str, Amount]:
    """The sum of what phases of each of three kinds have: sampling, training, evaluating."""
    names = {"sample": "sampling", "sft": "training", "policy": "training"}
    sums: dict[str, Amount] = {kind: Amount() for kind in ("sampling", "training", "evaluating")}
    for phase, amount in pairs:
        sums[names.get(phase.kind, "evaluating")] += amount
    return sums
