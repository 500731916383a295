"""Searches through the driver and through the verb: slots and kills change nothing; what is written can be read."""

import dataclasses
import json
import os
import re
import subprocess
import sys
import threading
import zlib
from concurrent.futures import Future

import pytest
import yaml
from helpers import ROOT
from helpers.ports import free_port

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
from train.search import testing
from train.search.ask import Ask, Reply
from train.search.driver import AHEAD, Driver
from train.search.examples import distribution, select
from train.search.kinds import KINDS
from train.search.prompts import INSTALLED, PROMPTS, Prompt, load_prompts
from train.search.questions import Item, equal, read_questions
from train.search.replies import Replies
from train.search.settings import Drawing, Questions, Search, SearchRun
from train.search.subject import Subject
from train.search.testing import compiles
from train.search.voice import Voice, key_of
from train.tasks import build_suite

MODEL = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 1024, "initializer_range": 0.35,
}  # fmt: skip


# --- the driver, on a model that is a script with an engine's manners ---


class FakeVoice:
    """Answers as a script says, each after some chunks of its own, in as many slots as it has."""

    def __init__(self, slots, seed=0):
        self.engine, self.slots, self.seed = self, slots, seed
        self.decoded = self.read_tokens = self.computed = 0
        self.most = 0

    def request(self, number, id, ask):
        return None if len(ask.values["steps"]) > 4 else (number, id, ask)

    def serve(self, more, *, between):
        queue, active, others = [], {}, True
        while True:
            came = more() if others else None
            others = came is not None
            queue += came or []
            if not others and not queue and not active:
                return
            while queue and len(active) < self.slots:
                number, id, ask = queue.pop(0)
                active[number] = 1 + zlib.crc32(f"{self.seed}{id}{ask.name}".encode()) % 5
            self.most = max(self.most, len(active))
            active = {n: left - 1 for n, left in active.items()}
            between()
            ended = [n for n, left in active.items() if left == 0]
            active = {n: left for n, left in active.items() if left}
            yield [Completion(n, (1,), (0.0,), "eos") for n in ended]

    def reply(self, ask, completion):
        name = f"{ask.name} {len(ask.values['siblings'])} {ask.values['hint']}"
        words = {"score": f"Score: {zlib.crc32(repr(ask.values['steps']).encode()) % 12}", "hint": f"after {ask.name}"}
        return Reply(words.get(ask.prompt, f"Say {name}"), completion.reason, 3)


def drive(path, slots, *, kind="mcts", count=30, order=1, stop_after=None, **settings):
    voice = FakeVoice(slots, seed=slots)
    search = build(Search, {"iterations": 6, "leaves": 2, **settings})
    subjects = [Subject(f"q{i}", "?", search, seed=5, judged=True) for i in range(count)][::order]
    found, chunks = {}, 0

    def between():
        nonlocal chunks
        chunks += 1
        if stop_after is not None and chunks > stop_after:
            raise InterruptedError

    with Replies(path) as log:
        roles = dict.fromkeys(("policy", "critic", "reflector"), voice)
        driver = Driver(roles, lambda id, ask: 1.0, log, on_end=lambda id, f: found.update({id: f.row()}))
        driver.run(((c.id, KINDS[kind](c)) for c in subjects), between=between)
    return found, driver, voice


@pytest.mark.parametrize("kind", KINDS)
def test_slots_and_order_change_no_tree(tmp_path, kind):
    wanted, driver, _ = drive(tmp_path / "a", 1, kind=kind)
    assert len(wanted) == 30
    for slots, order in ((7, 1), (64, -1)):
        found, other, _ = drive(tmp_path / f"{slots}", slots, kind=kind, order=order)
        assert found == wanted
        assert other.counts == driver.counts


def test_searches_begin_as_there_is_room_and_slots_are_full(tmp_path):
    _, driver, voice = drive(tmp_path / "a", 8, count=40)
    assert voice.most == 8
    assert max(driver.waiting, default=0) == 0
    starts = [row["id"] for row in read_jsonl(tmp_path / "a") if row["name"].startswith("r/step0/0")]
    assert len(starts) == 40
    first = [row["id"] for row in read_jsonl(tmp_path / "a")][:60]
    assert len(set(first)) <= AHEAD * 8 + 8  # not all forty at once


@pytest.mark.parametrize("chunks", [0, 3, 20, 60])
def test_a_search_that_was_stopped_goes_on_from_its_replies(tmp_path, chunks):
    wanted, undisturbed, _ = drive(tmp_path / "whole", 8)
    with pytest.raises(InterruptedError):
        drive(tmp_path / "cut", 8, stop_after=chunks)
    with (tmp_path / "cut").open("ab") as file:
        file.write(b'{"id": "q0", "na')  # a torn line, as a kill leaves it
    known = len(read_known(tmp_path / "cut"))
    found, driver, _ = drive(tmp_path / "cut", 3)
    assert found == wanted
    assert driver.counts["replayed"] == known
    asked = undisturbed.counts["replies"] + undisturbed.counts["verdicts"]
    assert driver.counts["replies"] + driver.counts["verdicts"] == asked - known
    assert sorted(map(str, read_jsonl(tmp_path / "cut"))) == sorted(map(str, read_jsonl(tmp_path / "whole")))


def read_known(path):
    return [line for line in path.read_text().split("\n")[:-1] if line.startswith('{"id"')]


def test_a_log_that_is_none_is_named(tmp_path):
    (tmp_path / "log").write_text('{"x": 1}\n')
    with pytest.raises(UserError, match=r"log: a line is no reply.*remove"):
        Replies(tmp_path / "log")


def test_keys_depend_on_seed_question_and_name():
    keys = {tuple(key_of(*about)) for about in ((0, "q", "r"), (1, "q", "r"), (0, "p", "r"), (0, "q", "s"))}
    assert len(keys) == 4
    assert key_of(0, "q", "r").shape == (2,)


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


def start_verb(config, folder, *words, kill=None):
    """Start the command in a process of its own, killed at its `kill`-th flush."""
    program = [str(ROOT / "tests" / "killer.py"), "searching", str(kill)] if kill else ["-m", "train.cli"]
    environment = os.environ | {"JAX_PLATFORMS": "cpu", "PYTHONPATH": str(ROOT)}
    environment["JAX_COMPILATION_CACHE_DIR"] = str(ROOT / ".cache" / "jax-tests")
    return subprocess.Popen(
        [sys.executable, *program, "search", str(config), f"out={folder}", *words],
        cwd=folder.parent, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True,
    )  # fmt: skip


def run_verb(config, folder, *words, kill=None):
    """Run it; its exit code and what it said."""
    process = start_verb(config, folder, *words, kill=kill)
    said, _ = process.communicate()
    return process.returncode, said


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
        said = [process.communicate(timeout=240)[0] for process in both]
    finally:
        for process in both:
            process.kill()
    assert [process.returncode for process in both] == [0, 0], said[0][-3000:] + said[1][-3000:]
    assert read_jsonl(tmp_path / "two" / "trees.jsonl") == read_jsonl(done / "trees.jsonl")


# --- questions, prompts, filters ---


def test_questions_of_a_file(tmp_path):
    path = tmp_path / "riddles.jsonl"
    path.write_text('{"question": "1+1?", "answer": 2}\n{"problem": "Say why.", "id": "why"}\n{"prompt": "1+1?"}\n')
    items = read_questions(Questions(path=str(path)))
    assert [item.text for item in items] == ["1+1?", "Say why."]  # one question, one tree
    assert items[0].verify("so 1+1 = 2") == 1.0
    assert items[1].verify is None
    assert items[1].id == "why"
    path.write_text('{"words": "?"}\n')
    with pytest.raises(UserError, match=r"riddles.jsonl:1: found the keys words; wanted a text under question"):
        read_questions(Questions(path=str(path)))
    with pytest.raises(UserError, match=r"either questions\.path or questions\.families"):
        Questions()
    assert equal("red", "Answer: **Red**") == 1.0


def test_prompts_are_checked_before_anything_is_computed(tmp_path):
    for domain in ("code", "mathematics"):
        prompts = load_prompts(domain)
        for name in PROMPTS:
            messages, _ = prompts[name].render({"question": "Q{{x}}", "steps": [], "hint": "", "siblings": []})
            assert "Q{{x}}" in messages[-1]["content"]  # a question is no template
    path = tmp_path / "p.yaml"
    domains = yaml.safe_load(INSTALLED.read_text())
    for change, words in (
        ({"step": {"messages": [{"role": "user", "content": "{{ quest }}"}]}}, "code.step: 'quest' is undefined"),
        ({"step": {"messages": [{"role": "user", "content": "{% if %}"}]}}, "code.step:"),
        ({"sorce": {}}, "sorce: no such key; did you mean score"),
        ({"hint": {"messages": []}}, "one or more"),
    ):
        path.write_text(yaml.safe_dump({"code": {**domains["code"], **change}}))
        with pytest.raises(UserError, match=re.escape(words)):
            load_prompts("code", path)
    with pytest.raises(UserError, match="no prompts for mathematics; it has code"):
        load_prompts("mathematics", path)


def test_programs_compile_or_not():
    assert compiles("print('a')")
    assert not compiles("print('a'")
    assert not compiles("x = '\0'")


class Plain:
    """A tokenizer of characters."""

    has_chat_template = False
    eos_ids = (0,)

    def encode(self, text, *, special=False):
        return [ord(c) for c in text]


def solution(text="```python\nx = 1\n```", steps=("one two three four",) * 5, **changes):
    row = {
        "name": "write0",
        "node": 1,
        "steps": list(steps),
        "text": text,
        "reason": "stop",
        "value": 0.7,
        "verdict": 1.0,
    }
    return row | changes


@pytest.mark.parametrize(
    ("given", "why"),
    [
        ({"reason": "context", "text": ""}, "no room"),
        ({"value": 0.2}, "low value"),
        ({"steps": ["too short"]}, "short plan"),
        ({"text": "```python\nx = ", "reason": "length"}, "open fence"),
        ({"text": "no code"}, "no program"),
        ({"text": "```python\nx = = 1\n```"}, "does not compile"),
        ({"verdict": 0.0}, "wrong"),
        ({"verdict": None}, "unjudged"),
        ({}, "duplicate"),
        ({"text": "```python\nx = 2\n```"}, "over per_question"),
    ],
)
def test_each_filter_counts_what_it_removes(given, why):
    item = Item("q", "f", "?", "?", verify=lambda text: 1.0)
    rows = {"q": {"solutions": [solution(), solution(**given)]}}
    settings = {"code": True, "words": 20, "value": 0.5, "tests": True, "per_question": 1}
    if why == "duplicate":
        settings["per_question"] = None
    examples, counts = select([item], rows, Plain(), load_prompts("code"), **settings)
    assert len(examples) == 1
    assert {k: v for k, v in counts["removed"].items() if v} == {why: 1}
    assert examples[0]["completion"].startswith("Step 1: one two three four\n")
    assert examples[0]["completion"].endswith("```python\nx = 1\n```")


def test_filters_of_mathematics_look_for_no_code():
    items = [Item("q", "f", "?", "?"), Item("p", "f", "?", "?")]
    rows = {"q": {"solutions": [solution(text="Answer: 4", verdict=None)]}, "p": {"solutions": []}}
    settings = {"code": False, "words": 0, "value": 0.0, "tests": True, "per_question": None}
    examples, counts = select(items, rows, Plain(), load_prompts("mathematics"), **settings)
    assert [row["question_id"] for row in examples] == ["q"]
    assert counts["removed"]["no solution"] == 1
    assert distribution([0.05, 0.1, 1.0], [0.0, 0.1, 1.0]) == [1, 2]


def test_every_key_of_the_config_has_a_reader():
    """A field that nobody reads lies."""
    source = "".join(p.read_text() for p in (ROOT / "train" / "search").glob("*.py"))
    for cls in (Search, SearchRun, Questions):
        for field in dataclasses.fields(cls):
            if field.name not in ("distributed",):  # read where the verb starts
                assert re.search(rf"\.{field.name}\b", source), field.name
    json.dumps(dataclasses.asdict(Search()))


# --- programs and their tests ---


def test_tests_are_found_in_the_lines_people_write(tmp_path):
    read = testing.read_problem
    problem = read({"tests": ["assert f(1) == g(2)", "assert len(f(3)) == 1"]}, "?", "x:1")
    assert problem.calls == ("f", "g")
    stub = "def inc(x):\n    # One more.\n"
    problem = read({"test": "def check(c):\n    assert c(1) == 2\n", "entry_point": "inc"}, stub, "x:1")
    assert problem.calls == ("inc",)
    assert problem.stub == stub
    assert problem.tests.endswith("check(inc)\n")
    problem = read({"test_list": ["assert f(sqrt(4)) == 2"], "test_setup_code": "from math import sqrt"}, "?", "x:1")
    assert problem.calls == ("f",)
    assert read({"question": "?"}, "?", "x:1") is None
    for line, words in (
        ({"tests": "assert f("}, "x:1: tests is no Python"),
        ({"tests": "assert True"}, "calls no function of the program; name it in entry_point"),
        ({"tests": 3}, "a text or a list"),
    ):
        with pytest.raises(UserError, match=words):
            read(line, "?", "x:1")
    path = tmp_path / "code.jsonl"
    path.write_text('{"text": "Double x.", "test_list": ["assert double(2) == 4"], "task_id": 7}\n')
    (item,) = read_questions(Questions(path=str(path), domain="code"))
    assert item.id == "7"
    assert "assert double(2) == 4" in item.text  # which names the function
    assert item.judged
    family = {"family": "mbpp", "domain": "id", "train": 1, "args": {"path": str(path)}}
    (item,) = read_questions(build(Questions, {"families": [family], "domain": "code"}))
    assert item.tests.entry_point == "double"


def test_programs_are_run_in_the_sandbox_and_what_has_none_fails():
    problem = testing.read_problem({"tests": "assert double(4) == 8"}, "?", "x:1")
    problem = dataclasses.replace(problem, timeout=1.0)
    texts = [
        "```python\ndef double(x):\n    return 2 * x\n```",
        "```python\ndef double(x):\n    return x\n```",
        "```python\ndef double(x)\n```",
        "no program",
        "```python\ndef double(x):\n    while True: pass\n```",
    ]
    try:
        examiner = testing.Examiner()
    except UserError as error:
        pytest.skip(str(error))
    with examiner:
        futures = [examiner.submit(problem, text) for text in texts * 2]
        assert [f.result(timeout=60) for f in futures] == [1.0, 0.0, 0.0, 0.0, 0.0] * 2


def test_verdicts_may_come_later(tmp_path):
    """A future that is done only when nothing else is under way stops nobody."""
    made = []

    def verify(id, ask):
        made.append(Future())
        threading.Timer(0.01, made[-1].set_result, [1.0]).start()
        return made[-1]

    voice, found = FakeVoice(4), {}
    subjects = [Subject(f"q{i}", "?", Search(iterations=2), judged=True) for i in range(6)]
    with Replies(tmp_path / "log") as log:
        roles = dict.fromkeys(("policy", "critic", "reflector"), voice)
        driver = Driver(roles, verify, log, on_end=lambda id, f: found.update({id: f}))
        driver.run((c.id, KINDS["mcts"](c)) for c in subjects)
    assert len(found) == len(made) == 6
    assert all(f.solutions[0].verdict == 1.0 for f in found.values())


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
    with pytest.raises(UserError, match=r"sampling\.search is read with sampling\.source"):
        build(Sampling, {"search": {"iterations": 3}})
    with pytest.raises(UserError, match=r"sampling\.search\.iteratoins: no such key; did you mean iterations"):
        build(Sampling, {"source": "mcts", "search": {"iteratoins": 3}})
