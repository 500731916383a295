"""What is watched while fine-tuning: operations, spikes and NaN, held-out examples, traces, sinks."""

import json
import math
import sys
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn import speed, watch
from train.learn.settings import Step, Watch
from train.log import UserError
from train.models.decoder import init
from train.models.loss import loss_sums
from train.models.open import random_config
from train.runtime import sinks

# --- operations ---


def test_step_flops_are_what_xla_counts():
    """Of a model whose matrix products are nearly all there is; XLA counts the softmax and norms, too."""
    config = random_config(
        {
            "vocab_size": 2048, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2,
            "num_attention_heads": 4, "num_key_value_heads": 4, "head_dim": 64, "max_position_embeddings": 64,
        }
    )  # fmt: skip
    batch = {"tokens": jnp.zeros((4, 33), jnp.int32), "weights": jnp.ones((4, 33))}
    gradient = jax.jit(jax.grad(lambda p: loss_sums(config, p, batch)[0]))
    params = jax.eval_shape(lambda: init(config, jax.random.key(0)))
    counted = gradient.lower(params).compile().cost_analysis()["flops"]
    assert speed.batch_flops(config, batch) == pytest.approx(counted, rel=0.1)


def test_the_flops_of_targets_alone_are_less():
    config = random_config({
        "vocab_size": 64, "hidden_size": 8, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 1,
        "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
    })  # fmt: skip
    every = {"tokens": np.zeros((2, 17), np.int32)}
    some = every | {"targets": np.zeros((2, 8), np.int32)}
    assert speed.batch_flops(config, every) - speed.batch_flops(config, some) == 6 * 64 * 8 * 2 * (16 - 8)


def test_tokens_of_a_batch_are_without_padding():
    weights = np.array([[0, 0, 1, 1, 0], [0, 0, 0, 0, 0], [0, 1, 1, 1, 1.0]])
    assert speed.tokens_of({"weights": weights}) == 3 + 0 + 4
    assert speed.tokens_of({"weights": weights, "segments": np.array([[1, 1, 2, 2, 0]])}) == 4


def test_the_peak_of_a_cpu_is_measured_and_of_accelerators_looked_up(monkeypatch):
    peak, source = speed.peak_flops("float32")
    assert 1e9 < peak < 1e14
    assert source.startswith("measured: float32")

    class Fake:
        platform = "gpu"
        device_kind = "NVIDIA H100 80GB HBM3"

    monkeypatch.setattr(jax, "devices", lambda: [Fake])
    assert speed.peak_flops("bfloat16", 8) == (8 * 989e12, "8 × NVIDIA H100 80GB HBM3, data sheet")
    Fake.device_kind = "NVIDIA Z9"
    peak, source = speed.peak_flops("bfloat16", 9)
    assert math.isnan(peak)
    assert source == "unknown: NVIDIA Z9 is not in train/learn/speed.py"


# --- spikes, NaN ---


def test_the_limit_is_a_multiple_of_the_last_median():
    log = [{"loss": loss} for loss in (99.0, *[1.0, 2.0, 3.0] * 11)]
    assert watch.spike_limit(4.0, log) == 8.0
    assert watch.spike_limit(0.0, log) == math.inf
    assert watch.spike_limit(4.0, log[:7]) == math.inf  # too few to say


@pytest.mark.parametrize(
    ("in_a_row", "loss", "step", "message"),
    [
        (2, 1.5, 5, r"the loss is 1.5 and .* 0.3 at step 5 of 9, above 3 × the median .*2 skipped .*sft.step.spike"),
        (2, math.nan, 5, r"the loss is nan .* at step 5 of 9 \(learning rate 0.1\), 2 skipped in a row; lower"),
        (1, math.nan, 9, r"the loss is nan .* at step 9 of 9"),  # nothing finite to end with
    ],
)  # fmt: skip
def test_too_many_skipped_stop_the_run(in_a_row, loss, step, message):
    told = {"norm": 0.3, "limit": 1.0, "rate": 0.1, "total": 9, "config": Step(spike=3, max_skipped=2)}
    with pytest.raises(UserError, match=message):
        watch.skipped(in_a_row, loss=loss, step=step, **told)


def test_a_few_skipped_are_told(capsys):
    told = {"norm": 0.3, "limit": 1.0, "rate": 0.1, "total": 9, "config": Step(spike=3, max_skipped=2)}
    watch.skipped(1, loss=1.5, step=9, **told)
    watch.skipped(1, loss=math.inf, step=3, **told)
    said = capsys.readouterr().out.splitlines()
    assert ["step 9 of 9" in said[0], "the loss is inf" in said[1]] == [True, True]


# --- held-out examples ---


def test_held_out_examples_are_drawn_by_the_seed():
    sources = [list(range(12)), [], list(range(100, 108))]
    learnt, held = watch.hold_out(sources, 5, seed=3)
    assert len(held) == 5
    for part, source in zip(learnt, sources, strict=True):
        assert sorted(part + [i for i in held if i in source]) == source
    assert all(part == sorted(part) for part in learnt)
    assert watch.hold_out(sources, 5, seed=3) == (learnt, held)
    assert watch.hold_out(sources, 5, seed=4) != (learnt, held)
    assert watch.hold_out(sources, 0, seed=3) == (sources, [])
    with pytest.raises(UserError, match=r"sft\.watch\.held_out is 20, but there are only 20 examples"):
        watch.hold_out(sources, 20, seed=3)
    # Of one example a question the draw is the same.
    assert watch.hold_out(sources, 5, seed=3, question=lambda i: f"q{i}") == (learnt, held)


def test_questions_are_held_out_whole():
    examples = [(f"q{i // 3}", i) for i in range(30)]
    for seed in range(5):
        (learnt,), held = watch.hold_out([examples], 4, seed=seed, question=lambda e: e[0])
        assert len(held) == 6
        assert not {q for q, _ in learnt} & {q for q, _ in held}
        assert sorted(learnt + held, key=lambda e: e[1]) == examples
    with pytest.raises(UserError, match=r"held_out is 2, and the 4 examples are of 1 questions.*none would be left"):
        watch.hold_out([[("q", i) for i in range(4)]], 2, seed=0, question=lambda e: e[0])


# --- traces ---


def test_the_steps_asked_for_are_traced(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setattr(jax.profiler, "start_trace", lambda folder: calls.append(("start", folder)))
    monkeypatch.setattr(jax.profiler, "stop_trace", lambda: calls.append("stop"))

    def steps(settings, folder, last=6):
        calls.clear()
        with watch.tracing(settings, folder) as before:
            for step in range(1, last + 1):
                before(step)
                calls.append(step)
        return list(calls)

    two = Watch(trace_from=3, trace_steps=2)
    assert steps(two, tmp_path) == [1, 2, ("start", tmp_path), 3, 4, "stop", 5, 6]
    assert steps(two, tmp_path, last=3) == [1, 2, ("start", tmp_path), 3, "stop"]
    assert steps(Watch(), tmp_path) == [1, 2, 3, 4, 5, 6]
    assert steps(two, None) == [1, 2, 3, 4, 5, 6]


# --- sinks ---

METRICS = [{"step": 1, "loss": 2.5, "skipped": 0}, {"step": 2, "loss": 1.5, "skipped": 1, "held_out_loss": 2.0}]


def write_all(names, folder):
    with sinks.open_sinks(folder / "s.jsonl", names, folder=folder, name="plain/sft", config={"a": 1}) as write:
        for metrics in METRICS:
            write(metrics)


def test_json_lines_begin_anew(tmp_path):
    for _ in range(2):
        write_all([], tmp_path)
    lines = (tmp_path / "s.jsonl").read_text().splitlines()
    assert [json.loads(line) for line in lines] == METRICS


def test_tensorboard_and_wandb_get_the_same_metrics(tmp_path, monkeypatch):
    calls = []

    class SummaryWriter:
        def __init__(self, folder, purge_step):
            calls.append(("open", folder, purge_step))

        def add_scalar(self, key, value, step):
            calls.append((key, value, step))

        file_writer = types.SimpleNamespace(add_summary=lambda summary: calls.append(summary))

        def close(self):
            calls.append("close")

    class Run:
        step = 2  # what an interrupted process had sent
        offline = False

        def log(self, metrics, step):
            calls.append(("log", metrics, step))

        def finish(self):
            calls.append("finish")

    def init(**settings):
        calls.append(("init", settings["id"], settings["config"], settings["resume"]))
        return Run()

    def hparams(config, metrics):
        return ("config", config), ("metrics", list(metrics)), None

    fakes = {
        "tensorboardX": {"SummaryWriter": SummaryWriter},
        "tensorboardX.summary": {"hparams": hparams},
        "wandb": {"init": init, "Settings": lambda **given: given},
    }
    for module, content in fakes.items():
        fake = types.SimpleNamespace(**content, __spec__=object())  # what is not installed here, but for one test
        monkeypatch.setitem(sys.modules, module, fake)
    write_all(["tensorboard", "wandb"], tmp_path)
    assert calls == [
        ("open", str(tmp_path / "tensorboard" / "plain/sft"), 1),
        ("init", f"{tmp_path.name}-plain-sft", {"a": 1}, "allow"),
        ("loss", 2.5, 1), ("skipped", 0, 1),
        ("loss", 1.5, 2), ("skipped", 1, 2), ("held_out_loss", 2.0, 2),
        ("log", {"loss": 1.5, "skipped": 1, "held_out_loss": 2.0}, 2),
        "finish", ("config", {"a": 1}), ("metrics", ["loss", "skipped", "held_out_loss"]), "close",
    ]  # fmt: skip


@pytest.mark.parametrize(("sink", "module"), [("tensorboard", "tensorboardX"), ("wandb", "wandb")])
def test_a_missing_package_names_its_extra(tmp_path, monkeypatch, sink, module):
    monkeypatch.setattr(sinks.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(UserError, match=rf"{sink} needs {module}, .*pip install .*'jaxmerge\[{sink}\]'"):
        write_all([sink], tmp_path)


def test_an_unknown_sink_is_refused(tmp_path):
    with pytest.raises(UserError, match="'paper' is not known; known: tensorboard, wandb"):
        write_all(["paper"], tmp_path)
