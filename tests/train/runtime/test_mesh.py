"""The mesh: every parameter has its place, and eight devices compute what one computes."""

import re
from collections import Counter

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec as P

import jaxmerge
from train.generate.caches import empty_caches
from train.generate.engine import Decoding, decode
from train.generate.rollout import Prompt, rollout
from train.generate.settings import Settings
from train.learn.batches import Rows
from train.learn.settings import Sft, Step
from train.learn.sft import fine_tune
from train.learn.step import compute_of, init_state, make_step, state_shardings
from train.log import UserError
from train.models.decoder import shapes
from train.models.open import random_config, random_model
from train.runtime.checkpoint import digest
from train.runtime.mesh import batch_sharding, make_mesh, replicated, sharding_of, shardings, without_fsdp
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 128, "initializer_range": 0.3,
}  # fmt: skip
MESHES = {
    "1×1×1": Mesh(),
    "8×1×1": Mesh(data=8),
    "1×4×2": Mesh(fsdp=4, tensor=2),
    "2×2×2": Mesh(data=2, fsdp=2, tensor=2),
}
MANY = ["8×1×1", "1×4×2", "2×2×2"]
SFT = Sft(learning_rate=1e-3, epochs=1, batch=8, step=Step(weight_decay=0.01))


@pytest.fixture(scope="module")
def rows():
    r = np.random.default_rng(0)
    weights = (np.arange(33) < r.integers(8, 33, (16, 1))).astype(np.float32)
    return Rows(r.integers(2, 64, (16, 33)).astype(np.int32), weights)


@pytest.fixture(scope="module")
def on():
    """Models by mesh, with the same weights."""
    models = {}

    def get(name):
        if name not in models:
            mesh = make_mesh(MESHES[name])
            models[name] = (mesh, random_model(SIZES, mesh, seed=1))
        return models[name]

    return get


@pytest.fixture(scope="module")
def tuned(on, rows):
    """Tuned parameters and losses by mesh."""
    results = {}

    def get(name):
        if name not in results:
            mesh, model = on(name)
            results[name] = fine_tune(model.config, model.params, rows, SFT, mesh=mesh, seed=2)
        return results[name]

    return get


def specs(tree):
    return jax.tree.map(lambda x: x.sharding.spec, tree)


def assert_placed(tree, mesh):
    """Every leaf lies as the table says; an axis of size 1 may be spelled or not."""

    def check(leaf, wanted):
        assert leaf.sharding.is_equivalent_to(wanted, leaf.ndim), (leaf.sharding, wanted)

    jax.tree.map(check, tree, shardings(mesh, tree))


# --- the table ---


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("biased", [False, True])
def test_the_table_covers_every_parameter(tied, biased):
    config = random_config(
        SIZES | {"tie_word_embeddings": tied, "qkv_bias": biased, "o_bias": biased, "mlp_bias": biased}
    )  # fmt: skip
    tree = shapes(config)
    places = shardings(make_mesh(MESHES["2×2×2"]), tree)
    assert jax.tree.structure(places) == jax.tree.structure(tree)
    assert ("lm_head" in places) == (not tied)
    layer = places["model"]["layers"]["0"]
    assert layer["self_attn"]["q_proj"]["weight"].spec == P("tensor", "fsdp")
    assert layer["mlp"]["down_proj"]["weight"].spec == P("fsdp", "tensor")
    assert layer["input_layernorm"]["weight"].spec == P()
    if biased:
        assert layer["mlp"]["up_proj"]["bias"].spec == P()


def test_a_matrix_is_spread_and_not_copied(on):
    _, model = on("2×2×2")
    weight = model.params["model"]["layers"]["0"]["mlp"]["up_proj"]["weight"]
    assert {s.data.shape for s in weight.addressable_shards} == {(24, 16)}  # a quarter of [48, 32] on each device
    assert_placed(model.params, on("2×2×2")[0])


def test_an_uncovered_parameter_is_refused_by_name():
    with pytest.raises(UserError, match=r"model/layers/0/mlp/router/weight \(4, 32\): no sharding rule"):
        sharding_of(make_mesh(Mesh()), "model/layers/0/mlp/router/weight", (4, 32))


def test_an_axis_that_does_not_divide_is_refused_by_leaf_and_axis():
    mesh = make_mesh(Mesh(tensor=8))
    with pytest.raises(
        UserError, match=r"k_proj/weight: axis of 4 does not divide over mesh\.tensor=8; .*divisor of 4"
    ):
        sharding_of(mesh, "model/layers/0/self_attn/k_proj/weight", (4, 32))
    with pytest.raises(UserError, match=r"o_proj/weight: axis of 3 does not divide over mesh\.fsdp=2"):
        sharding_of(make_mesh(Mesh(fsdp=2)), "model/layers/0/self_attn/o_proj/weight", (3, 32))
    with pytest.raises(UserError, match=r"axis of 36 does not divide over mesh\.tensor=8"):
        shardings(mesh, shapes(random_config(SIZES | {"intermediate_size": 36})))


# --- the mesh ---


def test_too_few_devices_are_refused_with_a_way_out():
    with pytest.raises(
        UserError, match=r"data=4 × fsdp=3 × tensor=1 needs 12 devices, found 8 \(cpu\).*cpu_devices=12"
    ):
        make_mesh(Mesh(data=4, fsdp=3))
    with pytest.raises(UserError, match=r"mesh\.cpu_devices=16, but jax already started with 8"):
        make_mesh(Mesh(data=16, cpu_devices=16))


def test_a_mesh_takes_the_first_devices():
    mesh = make_mesh(Mesh(data=2, tensor=2, cpu_devices=8))
    assert mesh.shape == {"data": 2, "fsdp": 1, "expert": 1, "tensor": 2}
    assert list(mesh.devices.flat) == jax.devices()[:4]


def test_rows_are_spread_where_they_divide():
    mesh = make_mesh(MESHES["2×2×2"])
    assert batch_sharding(mesh, 8).spec == P(("data", "fsdp", "expert"))
    assert batch_sharding(mesh, 6) == replicated(mesh)


# --- eight devices compute what one computes ---


@pytest.mark.parametrize("name", MANY)
def test_fine_tuning_gives_the_same_losses(tuned, on, name):
    params, log = tuned(name)
    wanted, wanted_log = tuned("1×1×1")
    np.testing.assert_allclose([m["loss"] for m in log], [m["loss"] for m in wanted_log], atol=1e-4)
    assert [m["targets"] for m in log] == [m["targets"] for m in wanted_log]
    for a, b in zip(jax.tree.leaves(params), jax.tree.leaves(wanted), strict=True):
        assert float(np.abs(np.asarray(a) - np.asarray(b)).mean()) < 1e-5
    assert_placed(params, on(name)[0])


def test_accumulation_on_a_mesh_gives_the_same_losses(tuned, on, rows):
    mesh, model = on("2×2×2")
    config = Sft(learning_rate=1e-3, epochs=1, batch=8, step=Step(weight_decay=0.01), micro_batch=4)
    _, log = fine_tune(model.config, model.params, rows, config, mesh=mesh, seed=2)
    np.testing.assert_allclose([m["loss"] for m in log], [m["loss"] for m in tuned("1×1×1")[1]], atol=1e-4)


def test_the_moments_lie_where_their_parameters_lie(on, rows):
    """At the start and after a step: Adam's moments replicated would cost twice the model on every device."""
    mesh, model = on("2×2×2")
    state = init_state(SFT, model.params, mesh)
    step = make_step(model.config, Sft(learning_rate=0.0, epochs=1, batch=8, step=Step(weight_decay=0.01)), "float32")
    batch = {"tokens": rows.tokens[:8], "weights": rows.weights[:8]}
    after, _ = step(init_state(SFT, model.params, mesh), jax.device_put(batch, batch_sharding(mesh, 8)), jnp.float32(0))
    for s in (state, after):
        adam = next(m for m in jax.tree.leaves(s.optimizer, is_leaf=lambda x: hasattr(x, "mu")) if hasattr(m, "mu"))
        for moments in (adam.mu, adam.nu):
            assert jax.tree.structure(moments) == jax.tree.structure(s.params)
            assert_placed(moments, mesh)
        weight = adam.nu["model"]["embed_tokens"]["weight"]
        assert {x.data.shape for x in weight.addressable_shards} == {(32, 16)}


@pytest.mark.parametrize(("name", "gather"), [*((name, False) for name in MANY), ("2×2×2", True)])
@pytest.mark.parametrize("temperature", [0.0, 1.0])
def test_sampling_gives_the_same_tokens(on, name, gather, temperature):
    """No draw of these is a near-tie: on every mesh the same token."""
    prompts = [Prompt(str(i), tuple(range(2, 5 + i))) for i in range(10)]

    def drawn(which):
        _, model = on(which)
        settings = Settings(max_new_tokens=12, slots=8, temperature=temperature, gather=gather)
        return rollout(model.config, model.params, model.tokenizer, prompts, settings, jax.random.key(0))

    for a, b in zip(drawn(name), drawn("1×1×1"), strict=True):
        assert a.tokens == b.tokens
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-4)


@pytest.mark.parametrize("name", MANY)
def test_a_merge_stays_on_the_mesh(tuned, on, name):
    mesh, model = on(name)
    params, _ = tuned(name)
    merged = jaxmerge.imm([params], base=model.params, alpha=0.5)
    assert specs(merged) == specs(params)
    assert_placed(merged, mesh)
    one = jaxmerge.imm([tuned("1×1×1")[0]], base=on("1×1×1")[1].params, alpha=0.5)
    for a, b in zip(jax.tree.leaves(merged), jax.tree.leaves(one), strict=True):
        np.testing.assert_allclose(a, b, atol=1e-4)


# --- what it costs: memory of one device, and what travels between them ---

LARGE = random_config(SIZES | {
    "vocab_size": 512, "hidden_size": 128, "intermediate_size": 256, "num_hidden_layers": 1, "num_attention_heads": 8,
    "num_key_value_heads": 4, "head_dim": 16,
})  # fmt: skip
ROWS, LENGTH = 16, 96
COLLECTIVE = re.compile(
    r"= (.*?) (all-gather|all-reduce|reduce-scatter|all-to-all|collective-permute|collective-broadcast)(?:-start)?\("
)


def compiled_step(mesh_config: Mesh):
    """The fine-tuning step of LARGE on a mesh, from shapes alone."""
    mesh, config = make_mesh(mesh_config), Sft(batch=ROWS)
    where = state_shardings(config, shapes(LARGE), mesh)
    state = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=place),
        jax.eval_shape(lambda: init_state(config, shapes_as_zeros(), mesh)),
        where,
    )
    rows = batch_sharding(mesh, ROWS)
    batch = {
        name: jax.ShapeDtypeStruct((ROWS, LENGTH + 1), kind, sharding=rows)
        for name, kind in (("tokens", jnp.int32), ("weights", jnp.float32))
    }
    step = make_step(LARGE, config, compute_of(config, LARGE, state.params, mesh, "float32"))
    return step.lower(state, batch, np.float32(0), np.float32(0), np.float32(1)).compile()


def shapes_as_zeros():
    return jax.tree.map(lambda x: jnp.zeros(x.shape), shapes(LARGE))


def collectives(compiled) -> list[tuple[str, list[tuple[int, ...]]]]:
    """Kind and shapes of every collective of a compiled program."""
    found = []
    for line in compiled.as_text().splitlines():
        if match := COLLECTIVE.search(line):
            sizes = re.findall(r"[a-z]+\d+\[([\d,]*)\]", match[1])
            found.append((match[2], [tuple(int(n) for n in size.split(",") if n) for size in sizes]))
    return found


def test_the_memory_of_a_device_falls_as_the_mesh_grows(capsys):
    used = {}
    for devices in (1, 2, 8):
        memory = compiled_step(Mesh(fsdp=devices)).memory_analysis()
        used[devices] = (memory.argument_size_in_bytes, memory.temp_size_in_bytes)
    with capsys.disabled():
        each = ", ".join(f"{n}: {a / 1e6:.2f} + {t / 1e6:.1f} MB" for n, (a, t) in used.items())
        print(f"\nstate + temporaries of one device by fsdp: {each}")
    for devices in (2, 8):
        state, temporaries = used[devices]
        assert state < 1.02 * used[1][0] / devices + 20_000  # norms and scalars are everywhere
        assert temporaries < used[1 if devices == 2 else 2][1]


@pytest.mark.parametrize("mesh", [Mesh(fsdp=8), Mesh(fsdp=4, tensor=2), Mesh(data=2, fsdp=2, tensor=2)])
def test_the_step_gathers_weights_and_never_activations(mesh):
    """A weight is gathered over fsdp once, and used forward and backward; rows never leave their device."""
    found = collectives(compiled_step(mesh))
    allowed: Counter[tuple[int, ...]] = Counter()
    for path, leaf in jax.tree_util.tree_leaves_with_path(shapes(LARGE)):
        if len(leaf.shape) == 2:
            name = "/".join(str(p.key) for p in path)
            spec = sharding_of(make_mesh(mesh), name, leaf.shape).spec
            part = [n // (mesh.tensor if axis == "tensor" else 1) for n, axis in zip(leaf.shape, spec, strict=True)]
            for shape in {tuple(part), tuple(part[::-1])}:
                allowed[shape] += 2 if "embed_tokens" in name else 1  # looked up, and the head
    gathered = Counter(shape for kind, sizes in found if kind == "all-gather" for shape in sizes)
    assert gathered, "fsdp must gather weights"
    assert not gathered.keys() - allowed.keys()
    assert sum(gathered.values()) <= 7 + 2
    assert {kind for kind, _ in found} <= {"all-gather", "all-reduce", "reduce-scatter"}
    # Activations are summed over tensor where a product contracts it, a device's own rows alone.
    own = ROWS * LENGTH // (mesh.data * mesh.fsdp)
    most = 0 if mesh.tensor == 1 else own * LARGE.hidden_size
    weights = max(int(np.prod(shape)) for shape in allowed)
    assert all(np.prod(shape) <= max(most, weights) for kind, sizes in found if kind == "all-reduce" for shape in sizes)


@pytest.mark.parametrize("gather", [False, True])
@pytest.mark.parametrize("mesh", [Mesh(fsdp=8), Mesh(data=2, fsdp=2, tensor=2)])
def test_decoding_leaves_the_caches_where_they_are(mesh, gather):
    """And gathers weights for every token, or, whole over fsdp from the start, none."""
    where = make_mesh(mesh)
    places = shardings(where, shapes(LARGE))
    params = jax.tree.map(
        lambda x, place: jax.ShapeDtypeStruct(x.shape, jnp.float32, sharding=without_fsdp(place) if gather else place),
        shapes(LARGE),
        places,
    )
    caches = empty_caches(LARGE, 16, 64, "float32", where)
    numbers = np.zeros(16, np.int32)
    compiled = decode.lower(
        LARGE, params, caches, numbers, numbers, numbers, np.zeros((16, 2), np.uint32), np.float32(1),
        how=Decoding(False), mesh=where,
    ).compile()  # fmt: skip
    found = collectives(compiled)
    for kind, sizes in found:
        assert not any(len(shape) == 4 for shape in sizes), (kind, sizes)
    weights = {x.shape[0] * x.shape[1] // mesh.tensor for x in jax.tree.leaves(shapes(LARGE)) if len(x.shape) == 2}
    gathered = [s for kind, sizes in found for s in sizes if kind == "all-gather" and int(np.prod(s)) in weights]
    assert bool(gathered) != gather, gathered
    kept = compiled.output_shardings[0][0].k
    assert kept.is_equivalent_to(caches[0].k.sharding, 4)


def test_a_digest_is_of_bits_and_places_and_not_of_the_mesh(on):
    assert len({digest(on(name)[1].params) for name in MESHES}) == 1
    one = np.zeros((3, 4), np.float32)
    moved, other = one.copy(), one.copy()
    one[1, 2], moved[2, 1], other[1, 2] = 1e-30, 1e-30, -1e-30
    swapped = {"a": jnp.asarray(moved), "b": jnp.asarray(one)}
    trees = [{"a": jnp.asarray(x)} for x in (one, moved, other, one.reshape(4, 3), one.T, one.astype(jnp.bfloat16))]
    trees += [{"b": jnp.asarray(one)}, {"a": jnp.asarray(one), "b": jnp.asarray(moved)}, swapped]
    assert len({digest(tree) for tree in trees}) == len(trees)
    assert digest(trees[0]) == digest({"a": jnp.asarray(one.copy())})
