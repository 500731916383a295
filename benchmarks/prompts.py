r"""An update whose rows share their prompts beside one whose do not: python benchmarks/prompts.py [key=value …]

  model=smollm2                its sizes with random weights, or what `jaxmerge sample` takes
  questions=4 samples=8        an update learns samples answers to each question
  prompt=77 longest=32         tokens of a prompt, and of the longest answer; lengths are uniform from 1 on
  updates=3                    in turns, medians of; one more on each side compiles and is left out
  micro=0                      sft.micro_batch in answers; 0 is the whole update
  equal=0                      so many questions have answers of equal rewards; a third side then leaves them out
  layers=unrolled              or stacked, which compiles in a fraction of the time
  seed=0

Rows are made, put on the device and learnt from as in a run. Processor seconds say more than seconds beside other work.
The losses of both are printed too: they are of the same weights and answers.
"""

from __future__ import annotations

import os
import pathlib
import statistics
import sys
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

OPTIONS = {
    "model": "smollm2", "questions": "4", "samples": "8", "prompt": "77", "longest": "32", "updates": "3", "micro": "0",
    "equal": "0", "layers": "unrolled", "seed": "0",
}  # fmt: skip
SIDES = ("apart", "shared", "skipped")
SMOLLM2 = {
    "vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30,
    "num_attention_heads": 9, "num_key_value_heads": 3, "head_dim": 64, "max_position_embeddings": 8192,
    "tie_word_embeddings": True,
}  # fmt: skip


def main() -> None:
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"known: {', '.join(OPTIONS)}; not {unknown}")
    options = OPTIONS | given
    questions, samples, prompt, longest, updates, micro, equal, seed = (
        int(options[k]) for k in ("questions", "samples", "prompt", "longest", "updates", "micro", "equal", "seed")
    )
    model, params = model_of(options["model"], seed)
    draw = np.random.default_rng(seed)
    groups = [group(draw, model.vocab_size, samples, prompt, longest, number) for number in range(questions)]
    groups = [g._replace(rewards=np.ones(samples)) if i < equal else g for i, g in enumerate(groups)]
    run = {
        side: update_of(model, params, questions * samples, longest, micro, options["layers"], side)
        for side in SIDES[: 3 if equal else 2]
    }
    found: dict[str, list[tuple[float, float, float]]] = {side: [] for side in run}
    for _ in range(updates + 1):
        for side, update in run.items():
            busy, clock = time.process_time(), time.perf_counter()
            loss = update(groups)
            found[side].append((time.process_time() - busy, time.perf_counter() - clock, loss))
    for name, told in found.items():
        busy, seconds, _ = (", ".join(f"{x:.2f}" for x in values) for values in zip(*told[1:], strict=True))
        print(f"  {name:<7} processor seconds an update {busy}; seconds {seconds}; first loss {told[0][2]:.7f}")
    for column, clock in ((0, "processor seconds"), (1, "seconds")):
        apart, *others = ((side, statistics.median(t[column] for t in told[1:])) for side, told in found.items())
        for side, took in others:
            print(f"  {clock}: {apart[1]:.2f} apart, {took:.2f} {side}, {apart[1] / took:.2f} times as fast")


def model_of(name: str, seed: int) -> tuple[Any, Any]:
    from train.models.decoder import init
    from train.models.open import load_model, random_config

    if name != "smollm2":
        model = load_model(name)
        return model.config, model.params
    config = random_config(SMOLLM2)
    return config, jax.jit(init, static_argnums=0)(config, jax.random.key(seed))


def group(draw: np.random.Generator, vocabulary: int, samples: int, prompt: int, longest: int, number: int) -> Any:
    """A question and answers to it, all of random tokens."""
    from train.generate.rollout import Sample
    from train.learn.rollouts import Group

    def answer(index: int) -> Sample:
        tokens = draw.integers(3, vocabulary, draw.integers(1, longest, endpoint=True)).tolist()
        return Sample(str(number), index, "", tuple(tokens), (-1.0,) * len(tokens), "eos")

    question = tuple(draw.integers(3, vocabulary, prompt).tolist())
    return Group(number, question, [answer(i) for i in range(samples)], draw.random(samples))


def update_of(model: Any, params: Any, size: int, longest: int, micro: int, layers: Any, side: str) -> Any:
    """An update as a function of groups: its loss, once all of it is done."""
    from train.generate.settings import Settings
    from train.learn.on_policy import learn, log_probabilities, sharing_of
    from train.learn.policy import Policy
    from train.learn.rollouts import Course
    from train.learn.settings import Sft, Step
    from train.learn.sft import prepared
    from train.learn.shares import Shares
    from train.runtime.mesh import make_mesh
    from train.runtime.settings import Mesh

    drawing = Settings(samples=2, temperature=1.0, max_new_tokens=longest, slots=2)
    policy = Policy(questions=1, share_prompts=side != "apart", skip_equal=side == "skipped")
    objective: Any = policy.objective(drawing)
    config = Sft(
        learning_rate=1e-6, batch=size, micro_batch=micro or None, objective=objective, step=Step(layers=layers)
    )
    mesh = make_mesh(Mesh())
    trainee = prepared(model, params, config, mesh=mesh, seed=0, dtype="float32", anchor=None)
    shares = Shares(mesh, config)
    course = Course(
        [], ["all"] * size, [None] * size, [], drawing, 0, {}, {}, dict, False,
        lambda *given: log_probabilities(model, trainee.how, shares, *given),
        sharing_of(model, policy, drawing, trainee.how, shares),
    )  # fmt: skip
    step = 0

    def update(groups: Any) -> float:
        nonlocal trainee, step
        step += 1
        lesson = policy.lesson(groups, course)
        assert lesson.batch is not None, "there are groups"
        if step == 1:
            print("  rows:", {k: v.shape for k, v in lesson.batch.items() if k in ("tokens", "targets", "sources")})
        trainee, told = learn(trainee, shares, lesson, policy, rate=1e-6, step=step, total=1000)
        jax.block_until_ready(trainee.state)
        return told["loss"]

    return update


if __name__ == "__main__":
    main()
