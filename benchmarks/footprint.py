"""GPU memory that a run of `jaxmerge improve` needs, by model, on paper: python benchmarks/footprint.py [key=value …]

  models=smollm2-135m,qwen2.5-0.5b,llama-3.2-1b,qwen2.5-7b   presets of tpu/presets.py, or folders with config.json
  rows=8 length=1024      of a step of fine-tuning: sft.micro_batch (or sft.batch) and sft.max_length
  slots=64                of sampling, each with a cache of `length` tokens
  devices=1               GPUs that the run is spread over: mesh.fsdp

GB of one GPU; nothing is loaded, downloaded or compiled. `state` is what `--dry-run` prints for fine-tuning: the model
that the round started from, the weights, their gradients and Adam's two moments, all float32. The columns after it add
activations and the head by the arithmetic of tpu/paper.py, with `model.dtype=bfloat16 sft.step.layers=stacked`; the
last one says which GPUs have the memory for sampling and for fine-tuning with remat=full.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tpu.layout import FULL, Axes, Plan, needed
from tpu.paper import masters, parameters
from tpu.presets import model_of

OPTIONS = {
    "models": "smollm2-135m,qwen2.5-0.5b,llama-3.2-1b,qwen2.5-7b",
    "rows": "8",
    "length": "1024",
    "slots": "64",
    "devices": "1",
}
GPUS = (16, 24, 40, 80, 141)
"""GB of GPUs that can be rented: T4, L4, A100, A100 and H100, H200."""
HEAD = (
    "| model | parameters | state | fine-tuning, remat=none | remat=full | remat=full, masters=bfloat16 | sampling "
    "| smallest GPU |",
    "|---|---|---|---|---|---|---|---|",
)


def row(name: str, rows: int, length: int, slots: int, devices: int) -> str:
    """The line of one model."""
    model, mesh = model_of(name), Axes(data=1, fsdp=devices, tensor=1)

    def gigabytes(step: str, **how: str) -> float:
        plan = Plan(
            topology="", model=name, step=step, mesh=mesh, batch=rows, slots=slots, length=length, **how  # type: ignore[arg-type]
        )  # fmt: skip
        return needed(model, plan) / 1e9

    full = gigabytes("sft", remat="full")
    columns = (
        5 * masters(model, {"fsdp": devices, "tensor": 1}) / 1e9,
        gigabytes("sft", remat="none"),
        full,
        gigabytes("sft", remat="full", masters="bfloat16"),
        gigabytes("decode"),
    )
    most = max(full, columns[-1])
    fitting = next((f"{size} GB" for size in GPUS if most <= FULL * size), "none")
    cells = " | ".join(f"{value:.1f}" for value in columns)
    return f"| {name} | {parameters(model) / 1e6:,.0f} M | {cells} | {fitting} |"


def main(words: list[str]) -> None:
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    sizes = {name: int(options[name]) for name in ("rows", "length", "slots", "devices")}
    if sizes["rows"] % sizes["devices"] or sizes["slots"] % sizes["devices"]:
        raise SystemExit(f"rows and slots are divided over devices={sizes['devices']}; give multiples of it")
    for line in (*HEAD, *(row(name, **sizes) for name in options["models"].split(","))):
        print(line)


if __name__ == "__main__":
    main(sys.argv[1:])
