r"""Which settings find most right solutions a generated token: python benchmarks/search_defaults.py [key=value …]

  model=configs/miniature-judge
  family=gcd                   gcd of numbers 1–130, or chain_sum of 3–4 numbers
  questions=300 seeds=2        drawn for this alone; each setting searches all with every seed
  exploration=0.05,0.2,0.5     c of the upper bound
  bonus=0.8,0.3,0.0            of children without visits
  iterations=4,12 children=3   nodes expanded, steps proposed at each
  gate=0.88                    a value that ends a search
  diverse=false                siblings one after another, each other than those before, or side by side
  slots=128 temperature=0.7

A line a setting: share of the questions of which a solution is right (95 % interval over questions, mean of the seeds),
tokens generated a question, right solutions a thousand tokens, mean steps. One and four plain samples stand below.
"""

from __future__ import annotations

import itertools
import os
import pathlib
import sys
import tempfile

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

from train.evaluate.answer import verify
from train.evaluate.diversity import interval
from train.improve.phases import drawing_of
from train.improve.settings import Improve, Sampling
from train.models.open import load_source
from train.resolve import build
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.search.settings import Search
from train.search.source import search_solutions
from train.tasks import build_suite

OPTIONS = {
    "model": "configs/miniature-judge", "family": "gcd", "questions": "300", "seeds": "2",
    "exploration": "0.05,0.2,0.5", "bonus": "0.8,0.3,0.0", "iterations": "4,12", "children": "3", "gate": "0.88",
    "diverse": "false", "slots": "128", "temperature": "0.7",
}  # fmt: skip
ARGS = {
    "gcd": {"min_value": 1, "max_value": 130},
    "chain_sum": {"min_terms": 3, "max_terms": 4, "min_digits": 1, "max_digits": 2},
}


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"unknown {', '.join(unknown)}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    family = {"family": options["family"], "args": ARGS[options["family"]], "train": int(options["questions"])}
    tasks = {"style": "compact", "seed": 77, "families": [{"domain": "id", **family}]}
    config = build(Improve, {"model": {"path": options["model"]}, "tasks": tasks, "methods": {"plain": {}}})
    model = load_source(config.model, make_mesh(Mesh()), seed=0)
    suite = build_suite(config.tasks.families, seed=config.tasks.seed, style="compact")
    questions = suite.questions("train")

    def tried(label: str, source: str, search: dict) -> None:
        drawn = {"max_new_tokens": 80, "slots": int(options["slots"]), "temperature": float(options["temperature"])}
        sampling = build(Sampling, {**drawn, "source": source, "search": search})
        right: dict[str, float] = dict.fromkeys((q.id for q in questions), 0.0)
        tokens, found, steps = 0, 0, []
        for seed in range(int(options["seeds"])):
            with tempfile.TemporaryDirectory() as folder:
                rows, generated, _, _ = search_solutions(
                    model, suite, questions, build(Search, {**search, "kind": source}), drawing_of(sampling),
                    shots=0, settings=sampling.settings(dtype="float32", gather=False),
                    folder=pathlib.Path(folder), seed=seed, title=label,
                )  # fmt: skip
            tokens += generated
            judged = verify(suite, {q.id: q for q in questions}, rows)
            found += sum(row["score"] == 1.0 for row in judged)
            steps += [row["text"].count(",") + 1 for row in judged]
            for id in {row["question_id"] for row in judged if row["score"] == 1.0}:
                right[id] += 1 / int(options["seeds"])
        count = len(questions) * int(options["seeds"])
        mean, low, high = (100 * x for x in interval(list(right.values())))
        print(
            f"{label:<58} {mean:5.1f} % [{low:.1f}, {high:.1f}]  {tokens / count:6.0f} tokens  "
            f"{1000 * found / tokens:5.2f} right / 1000  {sum(steps) / max(1, len(steps)):.1f} steps",
            flush=True,
        )

    values = [options[name].split(",") for name in ("exploration", "bonus", "iterations", "children", "gate")]
    for c, bonus, iterations, children, gate in itertools.product(*values):
        search = {
            "exploration": float(c), "bonus": float(bonus), "iterations": int(iterations), "children": int(children),
            "gate": float(gate), "reflect": False, "diverse": options["diverse"] == "true",
        }  # fmt: skip
        label = f"c {c} bonus {bonus} iterations {iterations} children {children} gate {gate}"
        tried(label, "mcts", search)
    for samples in (1, 4):
        dart = {"dart": {"mode": "uniform", "right": samples, "samples": samples, "most": samples}}
        tried(f"{samples} plain samples", "dart", dart)


if __name__ == "__main__":
    main()
