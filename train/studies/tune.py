r"""`jaxmerge tune`: coefficients of a merge recipe searched on questions, every candidate merged where the models lie.

    held = Held(recipe)                       # the models are read once
    for candidate in search: score(held(candidate))
    the best and the recipe's start answer the questions of the test, once each

A trial is a line of OUT/trials.jsonl; a search that was killed takes them as measured and goes on.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import time
import zlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Protocol

import jax
import jax.numpy as jnp
import numpy as np
import yaml

from jaxmerge.files.held import Held
from jaxmerge.files.journal import stamp
from jaxmerge.files.ranges import filled
from jaxmerge.strategies import CLIMBING, STRATEGIES, Candidate, Trial
from jaxmerge.tune import Result, Search

from ..evaluate.accuracy import paired_interval
from ..evaluate.answer import ask, is_right
from ..evaluate.importance import loss_of
from ..evaluate.run import open_suite, settings_of
from ..evaluate.settings import QuestionOptions
from ..evaluate.texts import Text, batches, mean_loss_and_gradient
from ..generate.score import score
from ..learn.settings import Data
from ..log import UserError, mistakes, say
from ..models.hf import config_of_folder, tree_of
from ..models.open import Model
from ..models.tokenizer import DATE, Tokenizer
from ..report.plots import Line, lines
from ..resolve import read_yaml
from ..runtime.disk import write_durably
from ..runtime.folder import check_same_config, write_config
from ..runtime.jsonl import append_jsonl, read_jsonl
from ..runtime.mesh import make_mesh, put, sharding_of
from ..runtime.processes import on_first
from ..runtime.stop import check
from .stats import mean_interval
from .tune_settings import TuneOptions


@dataclasses.dataclass(frozen=True)
class Tuning:
    """All that decides the trials of a search."""

    recipe: dict[str, Any]
    questions: str
    inputs: str
    """The files of the models with their sizes and times, and the ids of the questions."""
    tune: TuneOptions
    ask: QuestionOptions


class Judge(Protocol):
    """Questions, some for the search and the others for the test."""

    unit: str
    ids: Sequence[Any]
    """What tells the questions from others."""

    def judge(self, model: Model, test: bool) -> list[float]:
        """A number for each question, higher is better."""
        ...

    def difference(self, ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
        """The mean difference on the same questions, and its 95 % interval."""
        ...


def tune(recipe: Path, source: Path, out: Path, options: TuneOptions, questions: QuestionOptions) -> dict[str, Any]:
    """Search, test, and write OUT/recipe.yaml with the numbers found; the result."""
    document = read_yaml(recipe)
    mesh = make_mesh(questions.mesh)
    with mistakes():
        held = Held(
            document, seed=options.seed, compat=options.compat, allow=options.allow,
            put=lambda path, array: put(array, sharding_of(mesh, path, array.shape)),
        )  # fmt: skip
    on_first(held.plan.companions, out / "model")
    model = empty_model(out / "model")
    judge = JUDGES[options.score](source, model, out, options, questions)
    stamps = [stamp(file) for file in held.files]
    config = Tuning(document, str(source), json.dumps([stamps, judge.ids]), options, questions)
    on_first(check_same_config, out, config)
    on_first(write_config, out, config)
    for note in held.plan.notes:
        say(f"note: {note}")
    result = search(held, model, judge, options, out)
    for note in result.notes:
        say(note)
    found = {
        "best": result.best, "start": held.start, "score": options.score, "validation": result.score,
        "trials": len(result.trials), "seconds": result.seconds, "notes": result.notes,
        "test": tested(held, model, judge, result.best),
    }  # fmt: skip
    header = f"# The numbers were found by jaxmerge tune on {source} (see result.json).\n"
    best = yaml.safe_dump(filled(document, result.best), sort_keys=False, allow_unicode=True)
    on_first(write_durably, out / "recipe.yaml", header + best)
    on_first(write_durably, out / "result.json", json.dumps(found, indent=1))
    on_first(write_durably, out / "search.svg", picture(result, options.score))
    return found


def empty_model(folder: Path) -> Model:
    """The config and tokenizer of the result, without weights."""
    config = config_of_folder(folder)
    tokenizer = Tokenizer.from_folder(folder)
    return Model(config, {}, tokenizer.fitted(vocab_size=config.vocab_size, eos_ids=config.eos_token_id, source=folder))


def with_tensors(model: Model, tensors: dict[str, jax.Array]) -> Model:
    """The model with merged tensors as its weights, in float32."""
    wide = {name: tensor.astype(jnp.float32) for name, tensor in tensors.items()}
    return dataclasses.replace(model, params=tree_of(model.config, wide, source="the recipe's result"))


def search(held: Held, model: Model, judge: Judge, options: TuneOptions, out: Path) -> Result:
    """Measure candidates until the strategy has no more; the recipe's start is measured first, and is safe."""
    log = out / "trials.jsonl"
    strategy = functools.partial(STRATEGIES[options.strategy], **options.options)
    with mistakes():
        searching = Search(held.space, strategy, safe=[held.start], trials=on_first(read_jsonl, log, torn="mend"))
    if searching.trials:
        say(f"{len(searching.trials)} trials are there; going on")
    measured = descending(held, model, judge) if options.strategy in CLIMBING else None
    while candidates := searching.candidates:
        check()
        begin = time.perf_counter()
        value, gradient = (measured or functools.partial(by_judge, held, model, judge))(candidates[0])
        trial = searching.tell(value, time.perf_counter() - begin, gradient=gradient)
        on_first(append_jsonl, log, trial)
        say(told(trial))
    return searching.result()


def by_judge(held: Held, model: Model, judge: Judge, candidate: Candidate) -> tuple[float | None, None]:
    """The mean score of a candidate; None where the recipe refuses its numbers."""
    try:
        tensors = held(candidate)
    except ValueError as error:
        say(f"not a merge: {error}")
        return None, None
    return float(np.mean(judge.judge(with_tensors(model, tensors), test=False))), None


def told(trial: Trial) -> str:
    """A trial in a line."""
    value = "not judged" if trial["score"] is None else f"{trial['score']:.4f}"
    numbers = ", ".join(f"{name} {number:.4g}" for name, number in trial["coefficients"].items())
    return f"trial {trial['number']} ({trial['kind']}, {trial['seconds']:.1f} s): {value}   {numbers}"


def tested(held: Held, model: Model, judge: Judge, best: Candidate) -> dict[str, Any]:
    """What the best candidate and the start score in the test, and by how much they differ."""
    ours, theirs = (judge.judge(with_tensors(model, held(c)), test=True) for c in (best, held.start))
    difference, low, high = judge.difference(ours, theirs)
    found = {"best": float(np.mean(ours)), "start": float(np.mean(theirs)), "n": len(ours)}
    say(
        f"test, n = {len(ours)}: {judge.unit} {found['best']:.4f}, the recipe's start {found['start']:.4f}, difference "
        f"{difference:+.4f} [{low:.4f}, {high:.4f}]"
    )
    return found | {"difference": difference, "low": low, "high": high}


def picture(result: Result, name: str) -> str:
    """The score of every trial, and of the best so far."""
    scored = [(t["number"], t["score"]) for t in result.trials if t["score"] is not None]
    best = np.maximum.accumulate([value for _, value in scored])
    drawn = [
        Line("trial", scored, faint=True),
        Line("best so far", [(number, float(value)) for (number, _), value in zip(scored, best, strict=True)]),
    ]
    return lines(
        drawn, name="search", title="Search of coefficients", x_title="trial", y_title=name, zero=False, width=680.0,
        standalone=True,
    )  # fmt: skip


# --- what is asked ---


def divided(count: int, share: float, seed: int) -> tuple[list[int], list[int]]:
    """Numbers of the questions for the search and for the test; both have some."""
    if count < 2:
        raise UserError(f"tune: there is {count} question; wanted some for the search and others for the test")
    order = np.random.Generator(np.random.Philox(key=[seed, 0x7E57])).permutation(count)
    kept = min(max(round(share * count), 1), count - 1)
    return sorted(order[kept:].tolist()), sorted(order[:kept].tolist())


class Accuracy:
    """Greedy answers, right or wrong."""

    unit = "accuracy"

    def __init__(self, source: Path, model: Model, out: Path, options: TuneOptions, questions: QuestionOptions):
        del model, out
        self.suite = open_suite(source, questions)
        asked = list(self.suite.all)
        parts = divided(len(asked), options.test, options.split_seed)
        self.parts = [[asked[i] for i in part] for part in parts]
        self.ids = [q.id for q in asked]
        self.settings = settings_of(questions, self.suite.specs[0].family)
        self.key = jax.random.key(questions.seed)

    def judge(self, model: Model, test: bool) -> list[float]:
        questions = self.parts[test]
        right = is_right(ask(model, self.suite, questions, self.settings, self.key, title="ask").rows)
        return [right[q.id] for q in questions]

    def difference(self, ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
        return paired_interval(ours, theirs)


class Likelihood:
    """The mean log-probability a token of each answer."""

    unit = "mean log-probability a token"

    def __init__(self, source: Path, model: Model, out: Path, options: TuneOptions, questions: QuestionOptions):
        from ..learn.sources import load_sources  # TFDS takes seconds

        (examples,), _ = load_sources(
            Data(path=str(source)), model.tokenizer, home=out / "data", seed=0, date_string=DATE
        )
        texts = [text_of(example) for example in examples[: questions.limit]]
        longest = max(len(t.prompt) + len(t.completion) for t in texts)
        if longest > model.config.max_position_embeddings:
            raise UserError(
                f"{source}: an example has {longest} tokens, and the model ends at "
                f"{model.config.max_position_embeddings}; leave it out"
            )
        parts = divided(len(texts), options.test, options.split_seed)
        self.parts = [[texts[i] for i in part] for part in parts]
        self.ids = [hash_of(text) for text in texts]
        self.dtype, self.pad = questions.dtype, model.tokenizer.pad_id or 0

    def judge(self, model: Model, test: bool) -> list[float]:
        texts = self.parts[test]
        found = score(model.config, model.params, [(t.prompt, t.completion) for t in texts], dtype=self.dtype)
        return [one.logprob / len(t.completion) for one, t in zip(found, texts, strict=True)]

    def difference(self, ours: Sequence[float], theirs: Sequence[float]) -> tuple[float, float, float]:
        return mean_interval([a - b for a, b in zip(ours, theirs, strict=True)])

    def weighed(self) -> list[dict[str, Any]]:
        """Batches of the search's texts in which every text weighs 1."""
        texts = self.parts[False]
        made = batches(texts, self.pad)
        for batch in made:
            batch["weights"] = batch["weights"] / np.maximum(batch["weights"].sum(axis=1, keepdims=True), 1)
        return made


def text_of(example: dict[str, Any]) -> Text:
    """The prompt of an example and the answer that follows it, up to the last token that is learnt."""
    tokens = tuple(example["tokens"])
    if "learnt" not in example:
        return Text(tokens[: example["prompt_length"]], tokens[example["prompt_length"] :])
    learnt = np.flatnonzero(example["learnt"])
    if len(learnt) != learnt[-1] - learnt[0] + 1:
        raise UserError("tune: an example has several answers; score=likelihood takes examples of one")
    return Text(tokens[: learnt[0]], tokens[learnt[0] : learnt[-1] + 1])


def hash_of(text: Text) -> int:
    return zlib.crc32(np.array([*text.prompt, -1, *text.completion], np.int64).tobytes())


JUDGES: dict[str, Callable[..., Any]] = {"accuracy": Accuracy, "likelihood": Likelihood}
"""The judge of each `score`."""


# --- the gradient ---


def descending(held: Held, model: Model, judge: Any) -> Callable[[Candidate], tuple[float, Candidate]]:
    r"""Score and gradient of a candidate: $\sum_k \partial S/\partial k \cdot \partial k/\partial c$.

    k are the coefficients of all tensors, which are linear in the numbers c of the recipe.
    """
    given, loss = judge.weighed(), loss_of(model.config, judge.dtype)

    def merged(coefficients):
        return with_tensors(model, held.traced(coefficients)).params

    def measured(candidate: Candidate) -> tuple[float, Candidate]:
        params, pull_back = jax.vjp(merged, held.coefficients(candidate))
        value, by_params = mean_loss_and_gradient(loss, params, given)
        (gradient,) = jax.device_get(pull_back(by_params))
        slopes = {
            name: -sum(
                float(np.sum(gradient[tensor][key] * change))
                for tensor, keys in by_tensor.items()
                for key, change in keys.items()
            )
            for name, by_tensor in held.slopes.items()
        }  # fmt: skip
        return -value, slopes

    return measured
