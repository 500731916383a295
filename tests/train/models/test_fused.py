"""Attention by tiles and kernels: the same as the plain one, forward and backward, chosen only where they can be.

There is no GPU or TPU where these tests run: splash attention is interpreted and lowered for TPUs, cuDNN's lowered
for GPUs with the check of the installed library left out; neither is executed.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from train.learn.settings import Sft, Step
from train.learn.step import compute_of
from train.log import UserError
from train.models.attention import KV, attend, visible, within
from train.models.decoder import init
from train.models.fused import Causal, choose
from train.models.open import random_config
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

CONFIG = random_config({
    "hidden_size": 32, "intermediate_size": 16, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 512,
})  # fmt: skip


def problem(T, packed, dtype=jnp.float32):
    random = np.random.default_rng(0)
    q, k, v = (jnp.asarray(random.standard_normal((2, n, T, 64)), dtype) for n in (4, 2, 2))
    segments = jnp.asarray(np.sort(random.integers(1, 4, (2, T)), axis=1), jnp.int32) if packed else None
    return q, k, v, segments


def both(seen, window, *, softcap=None, scale=0.11):
    """Output and gradients of an attention under `seen`, and under the mask that says the same."""

    def gradients(mask, q, k, v):
        def loss(q, k, v):
            out = attend(q, KV(k, v), within(mask, window), scale=scale, softcap=softcap)
            return jnp.sum(jnp.sin(out)), out

        return jax.grad(loss, (0, 1, 2), has_aux=True)(q, k, v)

    def run(q, k, v):
        positions = jnp.zeros((q.shape[0], q.shape[2]))
        return gradients(seen, q, k, v), gradients(visible(positions, seen.segments), q, k, v)

    return run


def close(found, wanted, tolerance):
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        a, b = np.asarray(a, np.float32), np.asarray(b, np.float32)
        np.testing.assert_allclose(a, b, atol=tolerance * np.abs(b).max())


@pytest.mark.parametrize(
    ("T", "window", "packed", "dtype", "tolerance"),
    [
        (200, None, False, "float32", 1e-5),  # tiles of 64 that do not divide the row
        (200, 70, True, "float32", 1e-5),
        (200, 3, False, "bfloat16", 2e-2),
        (33, None, True, "bfloat16", 2e-2),  # less than a tile
    ],
)
def test_tiles_are_the_plain_attention(T, window, packed, dtype, tolerance):
    q, k, v, segments = problem(T, packed, jnp.dtype(dtype))
    close(*jax.jit(both(Causal(segments, "tiled"), window))(q, k, v), tolerance)


def test_the_reference_sees_segments_and_windows():
    """What the comparison rests on: leaving either out changes the plain attention."""
    q, k, v, segments = problem(64, True)
    positions = jnp.zeros((2, 64))
    out = [
        attend(q, KV(k, v), within(mask, window))
        for mask, window in ((visible(positions), None), (visible(positions, segments), None), (visible(positions), 5))
    ]
    assert float(jnp.abs(out[0] - out[1]).max()) > 0.1
    assert float(jnp.abs(out[0] - out[2]).max()) > 0.1


@pytest.mark.parametrize(("window", "packed", "softcap"), [(None, False, None), (40, True, 2.0)])
def test_splash_interpreted_is_the_plain_attention(window, packed, softcap):
    """150 positions: filled up to 256."""
    q, k, v, segments = problem(150, packed)
    close(*jax.jit(both(Causal(segments, "splash", interpret=True), window, softcap=softcap))(q, k, v), 1e-4)


def test_splash_on_a_mesh_is_the_plain_attention():
    mesh = make_mesh(Mesh(data=2, tensor=2))
    q, k, v, segments = problem(128, True)
    seen = Causal(segments, "splash", mesh=mesh, interpret=True)
    close(*jax.jit(both(seen, None))(q, k, v), 1e-4)


def lowered(kernel, platform, window, packed, T=256):
    q, k, v, segments = problem(T, packed, jnp.bfloat16)
    seen = within(Causal(segments, kernel), window)
    gradient = jax.grad(lambda q, k, v: attend(q, KV(k, v), seen).sum(), (0, 1, 2))
    return jax.jit(gradient).trace(q, k, v).lower(lowering_platforms=(platform,)).as_text()


@pytest.mark.parametrize(("window", "packed"), [(None, False), (100, True)])
def test_splash_lowers_for_tpus(window, packed):
    assert lowered("splash", "tpu", window, packed).count("tpu_custom_call") == 3  # forward, dq, dk and dv


@pytest.mark.parametrize(("window", "packed", "T"), [(None, False, 256), (100, True, 256), (None, True, 255)])
def test_cudnn_lowers_for_gpus(window, packed, T, monkeypatch):
    """A packed row of 256 tokens has 255 positions, and with segments cuDNN's backward pass takes even lengths only."""
    from jax._src.cudnn import fused_attention_stablehlo as cudnn

    monkeypatch.setattr(cudnn, "check_cudnn_version", lambda: 91200)
    monkeypatch.setattr(cudnn, "check_compute_capability", lambda capability: True)
    monkeypatch.setattr(cudnn, "is_cuda_compute_capability_equal", lambda capability: False)
    text = lowered("cudnn", "cuda", window, packed, T)
    assert "__cudnn$fmha" in text
    assert "Backward" in text


@pytest.mark.gpu
@pytest.mark.parametrize(
    ("T", "window", "packed"), [(256, None, False), (255, None, True), (255, 100, False), (512, 100, True)]
)
def test_cudnn_is_the_plain_attention(T, window, packed):
    """Executed, where `test_cudnn_lowers_for_gpus` only lowers."""
    if jax.default_backend() != "gpu":
        pytest.skip(f"needs a GPU, this is {jax.default_backend()}")
    q, k, v, segments = problem(T, packed, jnp.bfloat16)
    close(*jax.jit(both(Causal(segments, "cudnn"), window))(q, k, v), 2e-2)


# --- the choice ---

pick = functools.partial(choose, "auto", mesh=None)


def test_auto_takes_what_the_device_and_the_model_allow():
    assert pick(CONFIG, platform="cpu", dtype="float32") == "tiled"
    assert pick(CONFIG, platform="gpu", dtype="bfloat16") == "cudnn"
    assert pick(CONFIG, platform="tpu", dtype="float32") == "splash"
    assert pick(CONFIG, platform="gpu", dtype="float32") == "xla"  # cuDNN's multiplies 16 bits only
    odd = dataclasses.replace(CONFIG, head_dim=36)
    assert [pick(odd, platform=p, dtype="bfloat16") for p in ("gpu", "tpu")] == ["xla", "xla"]
    capped = dataclasses.replace(CONFIG, attn_logit_softcapping=30.0)
    assert [pick(capped, platform=p, dtype="bfloat16") for p in ("cpu", "gpu", "tpu")] == ["xla", "xla", "splash"]


def test_what_is_asked_for_and_cannot_be_is_refused_with_the_reason():
    mesh = make_mesh(Mesh(tensor=8))
    few = dataclasses.replace(CONFIG, num_attention_heads=3, num_key_value_heads=3)
    for wanted, platform, config, on, message in (
        ("cudnn", "cpu", CONFIG, None, "attention=cudnn cannot be used: cuDNN runs on NVIDIA GPUs, this is cpu"),
        ("splash", "gpu", CONFIG, None, "runs on TPUs, this is gpu"),
        ("tiled", "tpu", CONFIG, None, "tiles pay on CPUs, this is tpu"),
        ("splash", "tpu", few, mesh, "3 key/value heads do not divide over mesh.tensor=8"),
        ("flash", "cpu", CONFIG, None, "'flash' is not known; known: auto, xla, tiled, cudnn, splash"),
    ):
        with pytest.raises(ValueError, match=message):
            choose(wanted, config, platform=platform, dtype="bfloat16", mesh=on)


def test_stacked_layers_of_several_kinds_are_plain():
    mixed = dataclasses.replace(CONFIG, sliding_window=8, layer_types=("sliding_attention", "full_attention"))
    assert len(set(mixed.layers)) == 2
    assert pick(mixed, platform="tpu", dtype="bfloat16") == "splash"
    assert pick(mixed, platform="tpu", dtype="bfloat16", stacked=True) == "xla"


def test_a_run_asks_for_it():
    mesh, params = make_mesh(Mesh()), jax.eval_shape(lambda: init(CONFIG, jax.random.key(0)))
    found = {
        wanted: compute_of(Sft(step=Step(attention=wanted)), CONFIG, params, mesh, "float32").attention
        for wanted in ("auto", "xla", "tiled")
    }
    assert found == {"auto": "tiled", "xla": "xla", "tiled": "tiled"}
    with pytest.raises(UserError, match=r"sft\.step\.attention=cudnn cannot be used: .*this is cpu; take auto or xla"):
        compute_of(Sft(step=Step(attention="cudnn")), CONFIG, params, mesh, "float32")
