"""Searches through the driver and through the verb: slots and kills change nothing; what is written can be read."""

import dataclasses
import os
import re

import pytest
import yaml
from helpers import ROOT, forks
from helpers.ports import free_port
from helpers.tiny_tokenizers import llama_like

from train.data.versions import read_version
from train.evaluate.answer import verify
from train.generate.slots import Completion
from train.improve.phases import drawing_of
from train.improve.run import improve
from train.improve.select import select as select_examples
from train.improve.settings import Improve, Sampling, Selection
from train.learn.settings import Data
from train.log import UserError
from train.models.open import random_model
from train.resolve import build, load
from train.runtime.jsonl import read_jsonl
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.search import run as searching
from train.search import source as source_of
from train.search.ask import Ask
from train.search.prompts import INSTALLED, Prompt, load_prompts
from train.search.settings import Drawing, Search, SearchRun
from train.search.voice import Voice
from train.tasks import build_suite

MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "initializer_range": 0.35,
}  # fmt: skip


# --- the verb, on a tiny model: its critic's scores are in the prompts ---


@pytest.fixture(scope="module")
def prompts_file(tmp_path_factory):
    domains = yaml.safe_load(INSTALLED.read_text())
    for prompts in domains.values():
        prompts["score"] |= {"prefix": "Score: {{ (steps | join | length) % 9 }}\n", "stop": []}
        for name in ("step", "write", "chain"):
            prompts[name] |= {"stop": [], "until": list("0123456")}
    path = tmp_path_factory.mktemp("prompts") / "prompts.yaml"
    path.write_text(yaml.safe_dump(domains))
    return path


def config_of(prompts_file, **changes):
    values = {
        "model": {"random": MODEL},
        "questions": {
            "families": [{"family": "chain_sum", "domain": "id", "train": 5, "args": {"max_terms": 2, "max_digits": 1}}]
        },
        "search": {"iterations": 5, "children": 2, "samples": 2},
        "sampling": {"step": 24, "hint": 4, "score": 2, "write": 24, "chain": 24, "slots": 8},
        "filters": {"tests": False},
        "prompts": str(prompts_file),
        "seed": 3,
    }
    for key, value in changes.items():
        values[key] = {**values[key], **value} if isinstance(values.get(key), dict) else value
    return values


@pytest.fixture(scope="module")
def done(tmp_path_factory, prompts_file):
    folder = tmp_path_factory.mktemp("runs") / "run"
    return searching.search(build(SearchRun, config_of(prompts_file)), name="run", out=folder, command="jaxmerge …")


def test_the_trees_are_written_with_scores_visits_and_reflections(done):
    rows = read_jsonl(done / "trees.jsonl")
    assert len(rows) == 5
    for row in rows:
        assert sum(node["expanded"] for node in row["nodes"]) == 5
        assert row["nodes"][0]["visits"] == 5
        assert any(node["reflection"] for node in row["nodes"])
        assert max(node["depth"] for node in row["nodes"]) >= 2
        assert len(row["solutions"]) == 2
        assert row["chosen"] is not None
    phases = {p["phase"]: p for p in read_jsonl(done / "metrics.jsonl")}
    assert list(phases) == ["load", "search", "examples"]
    found = phases["search"]
    assert sum(found["plan_steps"].values()) == 10
    assert sum(found["scores"].values()) == found["nodes"] == sum(found["depths"].values())
    assert 0 < found["occupancy"] <= 1
    made = phases["examples"]
    assert made["kept"] + sum(made["removed"].values()) == made["solutions"] == 10


def test_the_examples_are_ready_for_sft(done):
    examples, provenance = read_version(done / "samples", "search", "1.0.0")
    assert examples
    assert provenance["search"]["iterations"] == 5
    assert provenance["counts"]["kept"] == len(examples)
    for row in examples:
        assert row["completion"].split("\n")[-1].startswith("Answer:")
        assert 0 < row["prompt_length"] < len(row["tokens"])
        assert 0 <= row["score"] <= 1
    data = build(Data, {"path": str(done / "samples" / "search" / "1.0.0")})
    assert data.path


def test_the_page_has_the_trees_and_asks_the_network_for_nothing(done):
    page = (done / "report.html").read_text()
    assert page.count("<details") > 20
    assert "Reflection:" in page
    assert "Steps of the plans" in page
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "●" in page


def test_other_slots_and_a_second_start_give_the_same(done, prompts_file, tmp_path, capsys):
    config = build(SearchRun, config_of(prompts_file, sampling={"slots": 24}))
    other = searching.search(config, name="run", out=tmp_path / "other")
    assert (other / "trees.jsonl").read_bytes() == (done / "trees.jsonl").read_bytes()
    before = (done / "metrics.jsonl").read_bytes()
    searching.search(build(SearchRun, config_of(prompts_file)), name="run", out=done)
    assert (done / "metrics.jsonl").read_bytes() == before
    with pytest.raises(UserError, match=r"another config.*search.iterations: 5 → 6"):
        searching.search(build(SearchRun, config_of(prompts_file, search={"iterations": 6})), name="run", out=done)


@pytest.mark.parametrize("kind", ["tot", "cot", "dart"])
def test_the_other_kinds_go_the_same_way(prompts_file, tmp_path, kind):
    changes = {
        "search": {"kind": kind, "depth": 2, "dart": {"samples": 2, "most": 4}},
        "filters": {"tests": kind == "dart"},
    }
    folder = searching.search(build(SearchRun, config_of(prompts_file, **changes)), name="run", out=tmp_path / kind)
    rows = read_jsonl(folder / "trees.jsonl")
    assert {row["kind"] for row in rows} == {kind}
    assert {row["end"] for row in rows} <= {"depth", "samples", "most", "right"}
    assert (folder / "report.html").is_file()


def test_a_role_may_have_a_model_and_a_temperature_of_its_own(prompts_file, tmp_path):
    other = {"critic": {"model": {"random": {**MODEL, "hidden_size": 16}}}, "reflector": {"temperature": 0.01}}
    folder = searching.search(build(SearchRun, config_of(prompts_file, roles=other)), name="run", out=tmp_path / "run")
    loaded = read_jsonl(folder / "metrics.jsonl")[0]
    assert set(loaded["digests"]) == {"policy", "critic"}
    assert len(set(loaded["digests"].values())) == 2
    with pytest.raises(UserError, match="no such role; there are policy, critic, reflector"):
        build(SearchRun, config_of(prompts_file, roles={"judge": {}}))


def test_a_prompt_may_have_a_temperature_that_a_role_overrides():
    model = random_model(MODEL, make_mesh(Mesh()), seed=0)
    plan = {"question": "g48,18?", "steps": ["48%18=12"]}
    for own, wanted in (({}, 0.01), ({"critic": 0.5}, 0.5)):
        voice = Voice(model, load_prompts("compact"), Drawing(slots=2), seed=0, temperatures=own)
        judged = voice.request(0, "q", Ask("r/score0", "score", "critic", plan))
        proposed = voice.request(1, "q", Ask("r/step0", "step", "policy", plan))
        assert (judged.temperature, proposed.temperature) == (wanted, None)
    with pytest.raises(UserError, match="temperature"):
        Prompt(messages=({"role": "user", "content": "x"},), temperature=0)


def test_prompts_and_replies_are_read_by_any_tokenizer():
    """One BOS before a plain prompt, a special token as stop string, the space that a reply begins with."""
    model = random_model(MODEL, make_mesh(Mesh()), seed=0)
    ours = llama_like()
    said = Prompt(messages=({"role": "user", "content": "<s>1+1="},), stop=(" </s>x", "<unk>"), plain=True)
    prompts = dataclasses.replace(load_prompts("compact"), step=said)
    voice = Voice(dataclasses.replace(model, tokenizer=ours), prompts, Drawing(slots=2), seed=0)
    ask = Ask("r/step0", "step", "policy", {"question": "q", "steps": []})
    request = voice.request(0, "q", ask)
    assert (request.prompt[0], request.prompt.count(1)) == (1, 1)
    tokens = [*ours.join("1+1=", " 2", special=True)[1], 0]
    assert request.stop(tokens) == len(tokens)
    assert voice.reply(ask, Completion(0, tuple(tokens), (), "stop")).text == " 2"
    bare = dataclasses.replace(said, messages=({"role": "user", "content": "1+1="},))
    assert voice.tokens(*bare.render({}), plain=True) == request.prompt


ENVIRONMENT = os.environ | {
    "JAX_PLATFORMS": "cpu",
    "JAX_COMPILATION_CACHE_DIR": str(ROOT / ".cache" / "jax-tests-runs"),
}


def start_verb(config, folder, *words, kill=None):
    """Start the command in a process of its own, killed at its `kill`-th flush."""
    log, die = folder.with_name(f"{folder.name}.{free_port()}.log"), ("searching", kill) if kill else None
    log.write_text("")
    return forks.Fork(["search", config, f"out={folder}", *words], ENVIRONMENT, folder.parent, (log, log), die), log


def run_verb(config, folder, *words, kill=None):
    """Run it; its exit code and what it said."""
    process, log = start_verb(config, folder, *words, kill=kill)
    return process.wait(240), log.read_text()


def test_a_killed_search_goes_on_and_ends_the_same(done, prompts_file, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(config_of(prompts_file)))
    folder = tmp_path / "run"
    for calls in (3, 12):
        assert run_verb(config, folder, kill=calls)[0] == -9
    assert (folder / "phases" / "search.partial" / "replies.jsonl").stat().st_size
    code, said = run_verb(config, folder)
    assert code == 0, said
    assert (folder / "trees.jsonl").read_bytes() == (done / "trees.jsonl").read_bytes()
    assert read_version(folder / "samples", "search", "1.0.0") == read_version(done / "samples", "search", "1.0.0")
    replayed = read_jsonl(folder / "metrics.jsonl")[1]["replayed"]
    assert replayed > 0


def test_two_processes_on_a_mesh_grow_the_same_trees(done, prompts_file, tmp_path):
    """Weights in halves over fsdp, sequences spread over all devices."""
    config = tmp_path / "run.yaml"
    config.write_text(yaml.safe_dump(config_of(prompts_file)))
    mesh = ("mesh.cpu_devices=2", "mesh.data=2", "mesh.fsdp=2")
    placed = (f"distributed.coordinator=localhost:{free_port()}", "distributed.processes=2")
    both = [start_verb(config, tmp_path / "two", *mesh, *placed, f"distributed.process_id={i}") for i in range(2)]
    try:
        codes = [process.wait(240) for process, _ in both]
    finally:
        for process, _ in both:
            process.kill()
    said = [log.read_text()[-3000:] for _, log in both]
    assert codes == [0, 0], said[0] + said[1]
    assert read_jsonl(tmp_path / "two" / "trees.jsonl") == read_jsonl(done / "trees.jsonl")


# --- as the source of an improve run's samples ---


@pytest.mark.parametrize("source", ["dart", "tot", "mcts"])
def test_improve_samples_by_a_search(tmp_path, source):
    tiny = load(Improve, ROOT / "configs" / "tiny.yaml")
    small = {"dart": {"samples": 3, "most": 6}, "iterations": 2, "depth": 2, "retries": 0, "reflect": False}
    sampling = build(Sampling, {"source": source, "search": small, "max_new_tokens": 8, "slots": 8, "temperature": 1.0})
    suite = build_suite(tiny.tasks.families, seed=0, style="compact")
    model = random_model({**MODEL, "max_position_embeddings": 512}, make_mesh(tiny.mesh), seed=0)
    questions = suite.questions("train", domain="id")[:4]

    def once(folder):
        folder.mkdir()
        return source_of.search_solutions(
            model, suite, questions, build(Search, {**sampling.search, "kind": source}), drawing_of(sampling),
            shots=0, settings=sampling.settings(dtype="float32", gather=False), folder=folder, seed=1, title="sample",
        )[0]  # fmt: skip

    rows = once(tmp_path / "a")
    assert rows == once(tmp_path / "b") == read_jsonl(tmp_path / "a" / "batch-0000.jsonl")
    if source == "dart":
        assert [row["question_id"] for row in rows[::6]] == [q.id for q in questions]  # random weights: none is right
    scored = verify(suite, {q.id: q for q in questions}, rows)
    _, counts = select_examples(suite, model.tokenizer, questions, scored, Selection(), seed=0)
    assert counts["sampled"] == len(rows)


def test_a_model_learns_from_what_its_own_searches_found(tmp_path):
    """Experiment 6 in small: one model is policy and critic, and each source's solutions train it."""
    values = yaml.safe_load((ROOT / "configs" / "experiments" / "sources.yaml").read_text())
    del values["sweep"]
    families = [{**values["tasks"]["families"][0], "train": 24, "test": 8}]
    values |= {"rounds": 1, "model": {"path": str(ROOT / "configs" / "miniature-judge")}}
    values["tasks"] |= {"families": families}
    values["sft"] |= {"epochs": 1, "batch": 8}
    values["evaluation"] |= {"samples": 0}
    folder = improve(build(Improve, values), name="sources", out=tmp_path / "run", quiet=True)
    rows = {row["phase"]: row for row in read_jsonl(folder / "metrics.jsonl")}
    for method in ("plain", "dart", "tot", "mcts"):
        assert rows[f"round-1/{method}/sample"]["generated"] > 1000, method
        assert rows[f"round-1/{method}/select"]["kept"] > 4, method
    digests = [rows[f"round-1/{method}/sft"]["digest"] for method in ("plain", "dart", "tot", "mcts")]
    assert len(set(digests)) == 4


def test_a_search_is_set_where_it_is_read():
    with pytest.raises(UserError, match=r"sampling\.search is read with a sampling\.source other than plain"):
        build(Sampling, {"search": {"iterations": 3}})
    with pytest.raises(UserError, match=r"sampling\.search\.iteratoins: no such key; did you mean iterations"):
        build(Sampling, {"source": "mcts", "search": {"iteratoins": 3}})
