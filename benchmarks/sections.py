"""The sections of `benchmarks/accelerator.py`: each measures one thing on the device at hand and yields its figures.

A section runs in a process of its own, so that a crash or a lack of memory in one leaves the others. It yields a
figure as soon as it is known, so that a section that is cut off has told what it found until then.
"""

from __future__ import annotations

import gc
import importlib.util
import math
import os
import re
import subprocess
import sys
import time
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks import memory
from benchmarks.figures import (
    Figure,
    Size,
    Skip,
    compiled_of,
    copy_bandwidth,
    random_params,
    share,
    timed,
    tried,
)
from benchmarks.round import improvement
from train.generate.caches import empty_caches
from train.generate.engine import Decoding, Engine, decode
from train.generate.rollout import sample_keys
from train.generate.slots import CHUNK, Request
from train.improve.devices import BANDWIDTHS
from train.learn.settings import Sft, Step
from train.learn.speed import PEAKS, peak_flops, step_flops
from train.learn.step import compute_of, init_state, make_step
from train.models.attention import KV, attend, visible
from train.models.fused import OBSTACLES, Causal, obstacle
from train.models.stacked import stack_layers
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

ROOT = Path(__file__).resolve().parents[1]


def device(size: Size) -> Iterator[Figure]:
    """What the device does at its best, in this process: copying its memory, multiplying matrices."""
    bandwidth = copy_bandwidth(size)
    yield Figure("copy", bandwidth / 1e9, "GB/s", "read and written; " + share(bandwidth, BANDWIDTHS, "the"))
    a, b = (jax.random.normal(jax.random.key(i), (size.product, size.product)).astype(size.dtype) for i in range(2))
    product = jax.jit(lambda a, b: jnp.matmul(a, b, preferred_element_type=jnp.float32))
    rate = 2 * size.product**3 / timed(lambda: product(a, b), size.repeats, 10)
    note = f"{size.dtype}, {size.product} × {size.product}, random numbers; "
    yield Figure("product", rate / 1e12, "TFLOP/s", note + share(rate, PEAKS, "the"))


def merge(size: Size) -> Iterator[Figure]:
    """The library's rules on three models and their base that lie on the device, against a copy."""
    bandwidth = copy_bandwidth(size)
    base = stack_layers(random_params(size.model, "bfloat16"))
    move = jax.jit(lambda tree, n: jax.tree.map(lambda x: x + jnp.roll(x, n) / 8, tree), static_argnums=1)
    models = [move(base, n) for n in (1, 2, 3)]
    count = sum(leaf.size for leaf in jax.tree.leaves(base))

    def measure(name: str) -> list[Figure]:
        case = memory.prepare(name, models, base, stacked=("model/layers/stacked",))
        rate = case.moved / timed(case.run, size.repeats)
        beside = case.temporary / sum(leaf.nbytes for leaf in jax.tree.leaves(base))
        note = f"{rate / bandwidth:.0%} of a copy ({bandwidth / 1e9:,.0f} GB/s); {count / 1e6:,.0f} M parameters, "
        note += f"temporaries of {beside:.1f} models, compiled in {case.compiled_in:.1f} s"
        return [Figure(name, rate / 1e9, "GB/s", note)]

    for name in size.rules:
        yield from tried(name, lambda name=name: measure(name))


def attention(size: Size) -> Iterator[Figure]:
    """Every path of train/models/fused.py that runs here, forward and backward, against the plain one."""
    for kernel in OBSTACLES:
        if reason := obstacle(kernel, size.model, size.platform, size.dtype, False, None):
            yield Figure(kernel, None, note=reason)
    for rows, length in size.attention:
        for packed in (False, True):
            yield from attention_paths(size, rows, length, packed)


def attention_paths(size: Size, rows: int, length: int, packed: bool) -> Iterator[Figure]:
    """Seconds of the plain path and of each kernel for one shape, and how far a kernel's results are from its."""
    c = size.model
    shape = {"q": c.num_attention_heads, "k": c.num_key_value_heads, "v": c.num_key_value_heads}
    q, k, v = (
        jax.random.normal(jax.random.key(i), (rows, heads, length, c.head_dim)).astype(size.dtype)
        for i, heads in enumerate(shape.values())
    )
    segments = jnp.broadcast_to(jnp.arange(length) * 4 // length, (rows, length)) if packed else None
    plain: list[Any] = []

    def measure(kernel: str) -> list[Figure]:
        def loss(q, k, v, segments):
            seen = visible(jnp.zeros((rows, length)), segments) if kernel == "xla" else Causal(segments, kernel)
            out = attend(q, KV(k, v), seen)
            return jnp.sum(jnp.sin(out)), out

        run, compiled_in = compiled_of(jax.jit(jax.grad(loss, (0, 1, 2), has_aux=True)), q, k, v, segments)
        seconds = timed(lambda: run(q, k, v, segments), size.repeats, 3)
        found = jax.tree.leaves(run(q, k, v, segments))
        if kernel == "xla":
            plain[:] = [seconds, found]
        rate = 12 * rows * c.num_attention_heads * length**2 * c.head_dim / seconds
        note = f"{rate / 1e12:.1f} TFLOP/s of the whole square; "
        if kernel != "xla" and plain:
            note += f"{plain[0] / seconds:.2f} × the plain one, farthest from it {farthest(found, plain[1]):.1e}; "
        return [Figure(name(kernel), seconds * 1e3, "ms", note + f"compiled in {compiled_in:.1f} s")]

    def name(kernel: str) -> str:
        return f"{'plain' if kernel == 'xla' else kernel} {rows} × {length}{' packed' if packed else ''}"

    able = [kernel for kernel in OBSTACLES if not obstacle(kernel, c, size.platform, size.dtype, False, None)]
    for kernel in ("xla", *able):
        yield from tried(name(kernel), lambda kernel=kernel: measure(kernel))


def farthest(found: list[jax.Array], wanted: list[jax.Array]) -> float:
    """The largest difference of outputs and gradients, relative to the largest number of each."""
    pairs = [(a.astype(jnp.float32), b.astype(jnp.float32)) for a, b in zip(found, wanted, strict=True)]
    return max(float(jnp.abs(a - b).max() / jnp.abs(b).max()) for a, b in pairs)


def sft(size: Size) -> Iterator[Figure]:
    """A step of fine-tuning (train/learn/step.py): tokens a second, and the share of the device's products."""
    for layers, remat, kernel in size.steps:
        name = f"{layers}, remat {remat}, attention {kernel}"
        how = Step(attention=kernel, layers=layers, remat=remat)
        yield from tried(name, lambda name=name, how=how: steps_that_fit(size, name, how))


def steps_that_fit(size: Size, name: str, how: Step) -> list[Figure]:
    """The figures of the largest batch of `size.rows` that the device has memory for."""
    *larger, least = size.rows
    for rows in larger:
        try:
            return steps(size, name, how, rows)
        except jax.errors.JaxRuntimeError as error:
            if "RESOURCE_EXHAUSTED" not in str(error):
                raise
        gc.collect()
    return steps(size, name, how, least)


def steps(size: Size, name: str, how: Step, rows: int) -> list[Figure]:
    mesh, config = make_mesh(Mesh()), Sft(batch=rows, max_length=size.length, step=how)
    params = random_params(size.model)
    if how.layers == "stacked":
        params = stack_layers(params)
    compute = compute_of(config, size.model, params, mesh, size.dtype)
    state = init_state(config, params, mesh)
    del params
    # One more than positions: the last token is a target only, and kernels like even lengths.
    tokens = np.random.default_rng(0).integers(0, size.model.vocab_size, (rows, size.length + 1), np.int32)
    batch = {"tokens": jnp.asarray(tokens), "weights": jnp.ones(tokens.shape, jnp.float32)}
    step, compiled_in = compiled_of(make_step(size.model, config, compute), state, batch, jnp.float32(1e-5))
    analysis = step.memory_analysis()
    held = (analysis.temp_size_in_bytes + analysis.argument_size_in_bytes) / 1e9

    def once() -> Any:
        nonlocal state
        state, sums = step(state, batch, jnp.float32(1e-5))
        return sums

    seconds = timed(once, size.repeats, 2)
    sums = once()
    loss = float(sums["loss"] / sums["weight"])
    if not math.isfinite(loss):
        raise ValueError(f"the loss is {loss}")
    note = f"{rows} × {size.length} tokens, attention {compute.attention}, {held:.1f} GB, loss {loss:.2f}, "
    note += f"compiled in {compiled_in:.1f} s"
    found = [Figure(f"{name}: tokens", rows * size.length / seconds, "tokens/s", note)]
    peak, source = peak_flops(size.dtype)
    share = step_flops(size.model, rows, size.length, rows * size.length) / seconds / peak
    if math.isnan(share):
        return [found[0]._replace(note=f"{note}; no MFU, for the peak is {source}")]
    return [*found, Figure(f"{name}: MFU", 100 * share, "%", f"of {peak / 1e12:,.3g} TFLOP/s ({source})")]


def work(size: Size) -> tuple[np.ndarray, list[int]]:
    """Prompts [sequences, prompt] and how many tokens each sequence gets: the same for us and for the peer."""
    random = np.random.default_rng(0)
    lengths = random.integers(size.new[0], size.new[1], size.sequences, endpoint=True).tolist()
    return random.integers(1, size.model.vocab_size, (size.sequences, size.prompt)), lengths


def rollouts(size: Size) -> Iterator[Figure]:
    """Sequences of unequal lengths through the engine, and one decode step against the memory's bandwidth."""
    c, bandwidth = size.model, copy_bandwidth(size)
    params = random_params(c, size.dtype)
    prompts, lengths = work(size)
    keys = sample_keys(jax.random.key(0), [str(i) for i in range(size.sequences)], 1)[:, 0]
    how = Decoding(False, dtype=size.dtype)
    engine = Engine(c, params, slots=size.slots, how=how, eos=())

    def once() -> float:
        rows = zip(prompts.tolist(), keys, lengths, strict=True)
        requests = [Request(i, tuple(prompt), key, most) for i, (prompt, key, most) in enumerate(rows)]
        start = time.perf_counter()
        made = sum(len(completion.tokens) for completion in engine.run(requests))
        assert made == sum(lengths), f"{made} tokens, and {sum(lengths)} were asked for"
        return time.perf_counter() - start

    first, before = once(), engine.decoded
    seconds = once()
    note = (
        f"{size.sequences} sequences of {size.new[0]} to {size.new[1]} tokens after {size.prompt}, {size.slots} slots, "
    )
    note += f"{sum(lengths) / (engine.decoded - before):.0%} of them busy; {first:.1f} s the first time, with compiling"
    yield Figure("engine", sum(lengths) / seconds, "tokens/s", note)
    yield decode_step(size, params, how, bandwidth)


def decode_step(size: Size, params: Any, how: Decoding, bandwidth: float) -> Figure:
    """Milliseconds of one token for every slot, against reading the weights and the caches once."""
    length, N = size.prompt + size.new[1], size.slots
    caches = empty_caches(size.model, N, length, size.dtype)
    read = sum(leaf.nbytes for leaf in jax.tree.leaves((params, caches)))
    rest = (
        jnp.zeros(N, jnp.int32), jnp.full(N, length // 2, jnp.int32), jnp.zeros(N, jnp.int32),
        jnp.zeros((N, 2), jnp.uint32), jnp.ones((N, 1), jnp.float32),
    )  # fmt: skip
    step, _ = compiled_of(decode, size.model, params, caches, *rest, how=how, mesh=None)

    def once() -> Any:
        nonlocal caches
        caches, tokens, _ = step(params, caches, *rest)
        return tokens

    seconds = timed(once, size.repeats, 4) / CHUNK
    floor = read / bandwidth
    note = f"{N} slots, caches of {length}; {floor / seconds:.0%} of a copy's bandwidth, reading {read / 1e9:.2f} GB"
    return Figure("decode step", seconds * 1e3, "ms", note)


def peer(size: Size) -> Iterator[Figure]:
    """The same work by transformers' `generate` on torch: a batch ends with its longest sequence."""
    if importlib.util.find_spec("torch") is None:
        raise Skip("torch is not installed")
    import torch  # pyright: ignore[reportMissingImports]  (a peer, never needed)

    platform = size.platform
    if platform == "tpu" or (platform == "gpu" and not torch.cuda.is_available()):
        raise Skip(f"torch {torch.__version__} sees no device of the kind jax runs on ({platform})")
    import transformers
    from transformers import LlamaConfig, LlamaForCausalLM

    c, where = size.model, "cuda" if platform == "gpu" else "cpu"
    names = (
        "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads",
        "num_key_value_heads", "head_dim", "max_position_embeddings", "tie_word_embeddings",
    )  # fmt: skip
    torch.set_default_dtype(getattr(torch, size.dtype))
    with torch.device(where):
        theirs: Any = LlamaForCausalLM(LlamaConfig(**{name: getattr(c, name) for name in names})).eval()
    theirs.generation_config.eos_token_id = None
    prompts, lengths = work(size)

    def once(start: int) -> None:
        tokens = torch.tensor(prompts[start : start + size.slots], device=where)
        most = max(lengths[start : start + size.slots])
        with torch.inference_mode():
            theirs.generate(
                tokens, attention_mask=torch.ones_like(tokens), max_new_tokens=most, do_sample=True, top_k=0,
                pad_token_id=0,
            ).cpu()  # fmt: skip

    once(0)
    start = time.perf_counter()
    for i in range(0, size.sequences, size.slots):
        once(i)
    seconds = time.perf_counter() - start
    note = (
        f"torch {torch.__version__}, transformers {transformers.__version__}, batches of {size.slots}, random weights"
    )
    yield Figure("transformers", sum(lengths) / seconds, "tokens/s", note)


def tests(size: Size) -> Iterator[Figure]:
    """The tests marked `gpu`, in a process that has the device to itself."""
    files = [path for path in (ROOT / "tests").rglob("test_*.py") if "@pytest.mark.gpu" in path.read_text()]
    words = [sys.executable, "-m", "pytest", "-v", "-m", "gpu", "-p", "no:cacheprovider"]
    words += ["-o", "filterwarnings=default"]  # a warning of a plugin for the device is no failure of ours
    # conftest.py would else set these for the CPU.
    platforms = {"gpu": "cuda,cpu"}.get(size.platform, size.platform)
    environment = os.environ | {"JAX_PLATFORMS": platforms, "XLA_FLAGS": os.environ.get("XLA_FLAGS", "")}
    words += map(str, sorted(files))
    note = ""
    try:
        done = subprocess.run(
            words, cwd=ROOT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, check=False, timeout=80
        )
        said = done.stdout.decode()
    except subprocess.TimeoutExpired as error:
        said, note = (error.stdout or b"").decode(), f"cut off after {error.timeout:.0f} s"
    verdicts = Counter(re.findall(r" (PASSED|SKIPPED|FAILED|ERROR)(?: .*)?\[ *\d+%\]", said))
    if not verdicts:
        last = next((line for line in reversed(said.splitlines()) if line.strip()), "")
        raise RuntimeError(f"no test ended; {note or last[:300]}")
    failures = "; ".join(line for line in said.splitlines() if line.startswith(("FAILED", "ERROR")))[:600]
    for verdict, count in verdicts.items():
        yield Figure(verdict.lower(), count, "tests", failures if verdict in ("FAILED", "ERROR") else note)


SECTIONS: dict[str, Callable[[Size], Iterator[Figure]]] = {
    "device": device,
    "sft": sft,
    "rollouts": rollouts,
    "peer": peer,
    "attention": attention,
    "tests": tests,
    "merge": merge,
    "improve": improvement,
}
"""In the order in which they run: what matters most comes first, for the time may end."""
