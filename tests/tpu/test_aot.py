"""Ahead-of-time compilation for TPUs: what a CPU can check without the compiler, and (marked) the compiler itself."""

import dataclasses
import importlib.util
import json
import math
import os
import subprocess
import sys

import pytest
from helpers.ready import SLICES, to_compile

from tpu import hlo, layout, topologies
from tpu.aot import main, plan_of
from tpu.compile import Compiled, examine, out_of_memory
from tpu.layout import Axes, Plan, advice, needed, settle
from tpu.presets import PRESETS, model_of
from tpu.programs import PROGRAMS
from tpu.table import HEAD, ROWS, line_of
from tpu.topologies import CHIPS, GIB, read
from train.improve import paper
from train.log import UserError
from train.models.open import random_config
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

TINY = random_config({
    "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 3, "num_attention_heads": 2,
    "num_key_value_heads": 2, "head_dim": 64, "max_position_embeddings": 256, "vocab_size": 64,
})  # fmt: skip
EIGHT = Mesh(data=2, fsdp=2, tensor=2)


def plan(**given) -> Plan:
    return Plan(**{"topology": "v5e:2x4", "model": "llama-3.1-8b", **given})


def tiny_plan(step: str) -> Plan:
    axes = Axes(data=EIGHT.data, fsdp=EIGHT.fsdp, tensor=EIGHT.tensor)
    return plan(model="tiny", step=step, mesh=axes, batch=8, micro_batch=4, length=33, slots=8)


# --- the real functions lower for tpu, sharded, from shapes alone ---


@pytest.mark.parametrize("step", ["sft", "decode", "merge"])
def test_the_programs_lower_for_tpu_on_eight_devices(step):
    program = PROGRAMS[step](TINY, tiny_plan(step), make_mesh(EIGHT))
    text = program.lower(lowering_platforms=("tpu",)).as_text()
    assert "mhlo.num_partitions = 8" in text
    assert '"data"=2, "fsdp"=2, "expert"=1, "tensor"=2' in text
    # One layer, whatever their number: the stack is scanned, and computed again in the backward pass.
    assert ("stablehlo.while" in text) == (step != "merge")
    weight = {"sft": "tensor<3x128x64xf32>", "decode": "tensor<128x64xbf16>", "merge": "tensor<128x64xf32>"}[step]
    assert weight in text


def test_what_a_program_is_given_is_spread():
    whole = paper.parameters(TINY)
    for step, bytes_each, copies in (("sft", 4, 3), ("merge", 4, 2), ("decode", 2, 1)):
        program = PROGRAMS[step](TINY, tiny_plan(step), make_mesh(EIGHT))
        rest = {"sft": 4 * 33 * 8 // 4 * 2, "merge": 0, "decode": 2 * 3 * 2 * 8 * 2 * 33 * 64 // 8}[step]
        expected = whole * bytes_each * copies / 4 + rest
        assert program.argument_bytes == pytest.approx(expected, rel=0.08), step  # norms and scalars are everywhere


# --- collectives ---


def test_collectives_of_a_real_program():
    """The step of eight virtual devices: every weight is gathered, in a loop over the layers."""
    compiled = PROGRAMS["sft"](TINY, dataclasses.replace(tiny_plan("sft"), micro_batch=None), make_mesh(EIGHT))
    found = hlo.collectives(compiled.lower().compile().as_text() or "", 8)
    in_the_loop = [c for c in found if c.kind == "all-gather" and c.times == TINY.num_hidden_layers]
    assert in_the_loop
    stacked = {f"{kind}[3,128,64]" for kind in ("f32", "bf16")}
    assert not any(stacked & set(c.shapes) for c in found), "all layers' weights at once"


# --- topologies, presets ---


def test_topologies_are_read_by_either_name():
    assert (read("v5e:4x4").chips, read("v5p:2x2x4").chips) == (16, 16)
    assert read("v5litepod-256").name == "v5e:16x16"
    assert read("v5p-128").name == "v5p:4x4x4"
    assert (read("v6e:8x8").larger, read("v6e:16x16").larger) == ("v6e:8x16", None)
    for chip in CHIPS.values():
        sizes = [math.prod(map(int, shape.split("x"))) for shape in chip.slices]
        assert sizes == sorted(sizes)


@pytest.mark.parametrize(
    ("name", "match"),
    [
        ("v5x:4x4", r"topology is 'v5x:4x4'; no such generation; did you mean v5"),
        ("v5e:3x3", r"slices of v5e: 1x1, 2x2, 2x4, 4x4"),
        ("v5p:4x4", r"slices of v5p: 2x2x1"),
        ("v6e-12", r"'v6e-12', 12 chips; no slice of that size"),
    ],
)
def test_other_topologies_are_refused(name, match):
    with pytest.raises(UserError, match=match):
        read(name)


def test_presets_have_the_published_numbers_of_parameters():
    published = {
        "smollm2-135m": 134_515_008, "llama-3.2-1b": 1_235_814_400, "llama-3.1-8b": 8_030_261_248,
        "llama-3.1-70b": 70_553_706_496, "qwen3-8b": 8_190_735_360, "qwen2.5-0.5b": 494_032_768,
        "qwen2.5-1.5b": 1_543_714_304, "qwen2.5-7b": 7_615_616_512, "gemma-2-2b": 2_614_341_888,
    }  # fmt: skip
    assert {name: paper.parameters(model_of(name)) for name in PRESETS} == published
    with pytest.raises(UserError, match=r"model is 'llama-8b': no such file or folder, nor a preset; did you mean"):
        model_of("llama-8b")


# --- the mesh that is chosen ---


def settled(**given) -> Plan:
    wanted = plan(**given)
    return settle(wanted, model_of(wanted.model), read(wanted.topology))[0]


def test_the_mesh_is_fsdp_as_long_as_that_fits():
    # Not over all of a large slice: the gradients would be summed whole.
    assert settled(topology="v5e:8x8").shape == {"data": 2, "fsdp": 32, "tensor": 1}
    assert settled(topology="v6e:4x4").shape == {"data": 1, "fsdp": 16, "tensor": 1}
    assert settled(topology="v5e:8x8").batch == 64
    # The head and its gradient lie over tensor alone: a larger model needs it on a chip of 16 GiB.
    large = settled(topology="v5e:16x16", model="llama-3.1-70b")
    assert large.shape["tensor"] > 1
    assert math.prod(large.shape.values()) == 256
    # 576 is not a multiple of 256.
    assert settled(topology="v5e:16x16", model="smollm2-135m").shape == {"data": 4, "fsdp": 64, "tensor": 1}
    # Fewer rows than chips: they lie over data and fsdp, so that the rest must be tensor.
    assert settled(topology="v5p:4x4x4", batch=16).shape == {"data": 1, "fsdp": 16, "tensor": 4}


def test_a_chosen_mesh_can_be_laid_along_the_slice():
    """jax lays each axis of a mesh along whole axes of a 3-D torus."""
    assert settled(topology="v5p:4x4x4").shape == {"data": 4, "fsdp": 16, "tensor": 1}
    assert settled(topology="v6e:8x8").shape == {"data": 8, "fsdp": 8, "tensor": 1}
    assert topologies.is_along(read("v5p:2x4x4"), (2, 4, 4))
    assert not topologies.is_along(read("v5p:2x4x4"), (2, 2, 8))


def test_the_decoder_reads_weights_from_its_own_memory_where_they_fit():
    assert settled(topology="v5e:4x4", step="decode").shape["fsdp"] == 1


def test_a_mesh_that_is_given_is_kept_and_the_rest_of_it_chosen():
    assert settled(topology="v5e:4x4", mesh=Axes(tensor=4)).shape == {"data": 1, "fsdp": 4, "tensor": 4}
    given = Axes(data=2, fsdp=4, tensor=2)
    assert settle(plan(topology="v5e:4x4", mesh=given), model_of("llama-3.1-8b"), read("v5e:4x4"))[1] == "given"


@pytest.mark.parametrize(
    ("given", "match"),
    [
        ({"mesh": Axes(fsdp=3)}, r"v5e:2x4 has 8 chips, and mesh\.fsdp=3 cannot cover them"),
        ({"mesh": Axes(data=2, fsdp=2, tensor=1)}, r"8 chips, and mesh\.data=2, mesh\.fsdp=2, mesh\.tensor=1 cannot"),
        ({"topology": "v5e:4x4", "mesh": Axes(tensor=16)}, r"tensor 8 key/value heads"),
        ({"topology": "v5e:4x4", "batch": 1}, r"data × fsdp the 1 rows at a time"),
    ],
)
def test_meshes_that_cannot_be_are_refused(given, match):
    with pytest.raises(UserError, match=match):
        settled(**given)


def test_more_devices_need_less_each():
    model = model_of("llama-3.1-8b")
    sizes = [needed(model, settled(topology=f"v5p:{shape}")) for shape in ("2x2x1", "2x2x4", "4x4x4")]
    assert sizes == sorted(sizes, reverse=True)
    for more in ({"remat": "none"}, {"batch": 32}, {"beside": 2}):
        axes = Axes(data=1, fsdp=16, tensor=1)
        small, large = settled(topology="v5e:4x4", mesh=axes), settled(topology="v5e:4x4", mesh=axes, **more)
        assert needed(model, large) > needed(model, small), more


# --- what is said ---


def stub(memory: dict[str, float], available: float | None = None):
    sums = None if available else {"all-gather": {"count": 64, "bytes": 10**9}}
    return lambda *_: Compiled(memory, available, sums, ("all-gather bf16[4,4] × 64: 1.00 GB",), 12.3)


WORDS = ["topology=v5e:4x4", "model=llama-3.1-8b", "step=sft"]


def test_the_last_line_is_json(capsys):
    assert main(WORDS, compile=stub({"arguments": 6 * GIB, "temporaries": 5 * GIB})) == 0
    *lines, last = capsys.readouterr().out.splitlines()
    found = json.loads(last)
    assert (found["topology"], found["model"], found["step"], found["chips"]) == ("v5e:4x4", "llama-3.1-8b", "sft", 16)
    beside = 4 * 8_030_261_248 / 16  # what the round started from
    assert found["bytes_per_device"] == pytest.approx(11 * GIB + beside)
    assert found["memory"]["beside"] == pytest.approx(beside, abs=1)
    assert (found["fits"], found["hbm_bytes"]) == (True, round(15.75 * GIB))
    assert found["collectives"] == {"all-gather": {"count": 64, "bytes": 10**9}}
    assert found["flops"] == pytest.approx(6 * 7.5e9 * found["batch"] * 2048, rel=0.1)
    assert found["flops_per_device"] == found["flops"] / 16
    assert found["compile_seconds"] == 12.3
    assert any("chosen" in line or "least tensor" in line for line in lines)


def test_what_does_not_fit_says_by_how_much_and_what_to_change(capsys):
    """Whether the compiler refuses it or the models beside it are too much: exit code 1, and JSON all the same."""
    for compile in (stub({"arguments": 6 * GIB, "temporaries": 12 * GIB}, 15.75 * GIB), stub({"arguments": 18 * GIB})):
        assert main([*WORDS, "beside=0", "mesh.tensor=1"], compile=compile) == 1
        said = capsys.readouterr()
        assert json.loads(said.out.splitlines()[-1])["fits"] is False
        assert "18.00 GiB are wanted on a chip that has 15.75, 2.25 GiB too much; enough on paper: " in said.err
        assert "topology=v5e:4x8 (−" in said.err
        assert "mesh.fsdp=8 mesh.tensor=2 (−" in said.err
        assert "masters=bfloat16 (−0.9 GiB)" in said.err


def test_advice_names_what_is_not_done_yet():
    model = model_of("llama-3.1-8b")
    wasteful = settled(topology="v5e:4x4", mesh=Axes(data=2, fsdp=8, tensor=1), batch=64, remat="none")
    said = advice(wasteful, model, read("v5e:4x4"), 100 * GIB)
    assert said.startswith("no single change is enough on paper; helps: remat=full (−")
    assert "micro_batch=16 (−" in said
    assert "mesh.data=1 mesh.fsdp=16 (−" in said


def test_the_compilers_own_words_are_understood():
    both = [
        "RESOURCE_EXHAUSTED: E1000: CompileTimeHbmOom: Ran out of memory on HBM, the total memory required for HLO "
        "temporaries (16.55G) exceeds available HBM (15.75G). HLO module: jit_step.",
        "RESOURCE_EXHAUSTED: Ran out of memory in memory space hbm. Used 20.55G of 15.75G hbm. Exceeded hbm capacity "
        "by 4.80G.",
    ]
    for message in both:
        memory, available = out_of_memory(message, 4 * GIB)
        assert available == 15.75 * GIB
        assert memory["temporaries"] == pytest.approx(16.55 * GIB)
    with pytest.raises(UserError, match="the compiler refused the program: INTERNAL: of something else"):
        out_of_memory("INTERNAL: of something\nelse", 0)


@pytest.mark.parametrize(
    ("words", "match"),
    [
        (["topology=v5e:4x4"], "model is missing"),
        (["topology=v5e:4x4", "modle=x"], "did you mean model"),
        ([*WORDS[:2], "step=train"], "step is 'train'; it must be one of sft, decode, merge"),
        ([*WORDS, "remat"], "'remat': keys are written key=value"),
        ([*WORDS, "length=1"], "aot.length is 1; it must be at least 2"),
        ([*WORDS, "mesh.fsdp=0"], "mesh.fsdp is 0; it must be at least 1"),
        (["table", "slice=v5e"], "table: slice: no such key"),
        (["table", "topology=v5e:2x2"], "no row has topology=v5e:2x2"),
    ],
)
def test_mistakes_are_named(words, match, capsys):
    assert main(words, compile=stub({})) == 2
    assert match in capsys.readouterr().err


def test_every_key_is_read():
    """A key that changes nothing would lie: each changes the plan, its memory on paper or the program."""
    assert plan_of([*WORDS, "mesh.tensor=2", "masters=bfloat16"]).masters == "bfloat16"
    base = layout.filled(tiny_plan("sft"), TINY, dict(vars(tiny_plan("sft").mesh)))
    assert base is not None
    mesh = make_mesh(EIGHT)

    def lowered(**given):
        return (
            PROGRAMS["sft"](TINY, dataclasses.replace(base, **given), mesh).lower(lowering_platforms=("tpu",)).as_text()
        )

    plain = lowered()
    others = {
        "masters": "bfloat16", "remat": "none", "layers": "unrolled", "dtype": "float32", "logits_at_once": 4,
        "length": 17, "batch": 4, "micro_batch": 8,
    }  # fmt: skip
    for name, value in others.items():
        assert lowered(**{name: value}) != plain, name


def test_a_missing_compiler_is_named_with_what_to_install(monkeypatch, capsys):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    assert main(WORDS) == 2
    assert "the package libtpu" in capsys.readouterr().err


def test_the_table_has_a_row_for_every_program():
    report = examine(ROWS[0], model_of(ROWS[0].model), compile=stub({"arguments": GIB}))
    assert line_of(report).startswith("| llama-3.1-8b | v5e:4x4 | sft | 1×8×2 | 8 | ")
    too_large = examine(ROWS[0], model_of(ROWS[0].model), compile=stub({"arguments": 40 * GIB}, 15.75 * GIB))
    assert "GiB too much" in line_of(too_large)
    assert {row.step for row in ROWS} == {"sft", "decode", "merge"}
    assert {line.count("|") for line in (*HEAD, line_of(report), line_of(too_large))} == {13}


# --- the compiler itself ---

COMPILER = [
    pytest.mark.tpu_aot,
    pytest.mark.skipif(importlib.util.find_spec("libtpu") is None, reason="needs libtpu"),
]


def command(*words: str) -> tuple[int, dict, str]:
    env = {**os.environ, "JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, "-m", "tpu.aot", *words], capture_output=True, text=True, env=env)
    return done.returncode, json.loads(done.stdout.splitlines()[-1]), done.stderr


class TestCompiler:
    pytestmark = COMPILER

    @pytest.mark.parametrize("step", ["sft", "decode", "merge"])
    def test_a_small_model_fits_a_small_slice(self, step):
        code, found, error = command("topology=v5e:2x2", "model=smollm2-135m", f"step={step}", "length=512")
        assert code == 0, error
        assert found["fits"]
        assert 0 < found["bytes_per_device"] < found["hbm_bytes"]
        assert bool(found["collectives"]) == (step != "merge")
        assert found["bytes_per_device"] == pytest.approx(found["paper_bytes_per_device"], rel=1.0)

    @pytest.mark.parametrize(("name", "where"), [(n, where) for n, slices in SLICES.items() for where in slices])
    def test_the_step_of_a_ready_config_fits_its_slice(self, name, where):
        code, found, error = command("step=sft", *to_compile(name, where))
        assert code == 0, error
        assert found["fits"]

    def test_what_is_too_large_says_so(self):
        code, found, error = command("topology=v5e:2x2", "model=llama-3.1-8b")
        assert (code, found["fits"]) == (1, False)
        assert "GiB too much" in error

    def test_every_generation_is_known_to_the_compiler(self):
        for generation, chip in CHIPS.items():
            for shape in chip.slices[1:]:
                topology = read(f"{generation}:{shape}")
                assert len(topologies.devices(topology)) == topology.chips
