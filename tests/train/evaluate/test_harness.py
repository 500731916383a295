"""lm-evaluation-harness on our model: the same numbers as through transformers on torch, on tasks of local files."""

import dataclasses
import json

import numpy as np
import pytest
from helpers.tiny_tokenizers import llama_like

from train.cli.__main__ import main
from train.evaluate.harness import Requests, evaluate
from train.generate.score import Scored
from train.log import UserError
from train.models.hf import save_hf
from train.models.open import load_model, random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh

SIZES = {
    "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 16, "max_position_embeddings": 96, "initializer_range": 0.3,
}  # fmt: skip


@pytest.fixture(scope="module")
def model():
    return random_model(SIZES, make_mesh(Mesh()), seed=0)


@pytest.fixture(scope="module")
def requests(model):
    return Requests(model, slots=8)


# --- what we make of the harness's requests; needs no harness ---


def test_windows_score_every_token_once_with_all_the_context_that_fits(requests):
    n = requests.max_length
    for length in (1, n - 1, n, n + 1, 2 * n + 7):
        tokens = list(range(100, 100 + length))
        windows = list(requests.windows(tokens))
        assert [t for _, tail in windows for t in tail] == tokens
        assert windows[0][0] == [requests.prefix]
        for head, tail in windows[1:]:
            assert len(head) + len(tail) - 1 == n  # a full window is read
            at = tokens.index(tail[0])
            assert head == tokens[at - len(head) : at]


def test_a_text_without_context_follows_the_prefix(requests, model):
    ((logprob, _),) = requests.loglikelihood([("", "12+7")])
    assert logprob == pytest.approx(requests.rolling(["12+7"])[0], rel=1e-5)
    tokenizer = model.tokenizer
    assert requests.prefix == tokenizer.encode(tokenizer.special["bos_token"])[0]


def test_a_long_context_is_cut_from_the_left(requests):
    long = "1+2=3;" * 40
    (a, b) = requests.loglikelihood([(long, "7"), (long[-96:], "7")])
    assert a[0] == pytest.approx(b[0], rel=1e-5)


def test_generation_stops_where_it_is_told_and_groups_settings(requests):
    (free,) = requests.generate([("12+7?", {"max_gen_toks": 12})])
    stop = free[3]
    texts = requests.generate(
        [
            ("12+7?", {"max_gen_toks": 12, "until": [stop]}),
            ("12+7?", {"max_gen_toks": 2}),
            ("12+7?", {"max_gen_toks": 12}),
        ]
    )
    assert texts == [free.partition(stop)[0], free[:2], free]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"num_beams": 2}, "num_beams is not known here"), ({"max_gen_toks": 96}, "the model ends at 96; lower it")],
)
def test_generation_settings_that_are_not_ours_are_refused(requests, arguments, message):
    with pytest.raises(UserError, match=message):
        requests.generate([("1", arguments)])


def test_settings_follow_transformers(requests):
    assert requests.settings({"temperature": 0.7}).temperature == 0.0
    sampled = requests.settings({"do_sample": True, "temperature": 0.7, "top_k": 5, "top_p": 0.9, "until": "\n"})
    assert (sampled.temperature, sampled.top_k, sampled.top_p, sampled.stop) == (0.7, 5, 0.9, ("\n",))
    assert requests.settings({"do_sample": False, "top_k": 5}).top_k == 0


def test_chats_are_rendered_by_the_template_or_refused(requests):
    with pytest.raises(UserError, match="no chat template"):
        requests.chat([{"role": "user", "content": "x"}], True)
    each = "{% for m in messages %}<{{ m.role }}>{{ m.content }}</>{% endfor %}"
    template = each + "{% if add_generation_prompt %}<a>{% endif %}"
    tokenizer = dataclasses.replace(requests.model.tokenizer, chat_template=template)
    chatty = Requests(dataclasses.replace(requests.model, tokenizer=tokenizer))
    asked = [{"role": "user", "content": "x"}]
    assert chatty.chat(asked, True) == "<user>x</><a>"
    # A task with gen_prefix begins the answer.
    assert chatty.chat([*asked, {"role": "a", "content": "It is"}], False) == "<user>x</><a>It is"


# --- the same numbers as through transformers ---


@pytest.mark.torch
def test_the_harness_says_of_our_model_what_it_says_of_transformers(tmp_path, model):
    """One task of each kind on local files: multiple choice, perplexity, generation; a model with real differences."""
    import lm_eval
    from lm_eval.models.huggingface import HFLM
    from lm_eval.tasks import TaskManager

    folder = tmp_path / "model"
    save_hf(folder, model.config, model.params, tokenizer_from=model.tokenizer)
    add_bos(folder)
    model = load_model(folder)
    assert model.tokenizer.encode("1", special=True) != model.tokenizer.encode("1")
    tasks = write_tasks(tmp_path)
    options = {"bootstrap_iters": 0, "log_samples": True}
    ours = evaluate(model, tasks, slots=8, include_path=str(tmp_path), **options)
    lm = HFLM(pretrained=str(folder), device="cpu", dtype="float32", batch_size=4, max_length=96)
    manager = TaskManager(include_path=str(tmp_path))
    theirs = lm_eval.simple_evaluate(lm, tasks=tasks, task_manager=manager, **options)
    words = ["harness", str(folder), ",".join(tasks), f"include={tmp_path}", f"out={tmp_path / 'mesh.json'}", "slots=8"]
    assert main([*words, "mesh.data=2", "mesh.fsdp=2", "mesh.gather_to_decode=true"]) == 0
    spread = json.loads((tmp_path / "mesh.json").read_text())["results"]
    for task in tasks:
        for metric, value in ours["results"][task].items():
            if isinstance(value, float) and "stderr" not in metric:
                assert spread[task][metric] == pytest.approx(value, rel=1e-4), (task, metric)
    with pytest.raises(UserError, match=r"no task 'local_choices' among .*; did you mean local_choice\?"):
        evaluate(model, ["local_choices"], include_path=str(tmp_path))
    (tmp_path / "sums.jsonl").rename(tmp_path / "gone.jsonl")
    with pytest.raises(UserError, match="the data of a task could not be read"):
        evaluate(model, ["local_generate"], include_path=str(tmp_path))
    assert set(ours["results"]) == set(tasks)
    for task in tasks:
        numbers = {k: v for k, v in ours["results"][task].items() if isinstance(v, float)}
        assert numbers
        for metric, value in numbers.items():
            assert value == pytest.approx(theirs["results"][task][metric], rel=1e-4), (task, metric)
        for a, b in zip(ours["samples"][task], theirs["samples"][task], strict=True):
            for x, y in zip(a["resps"], b["resps"], strict=True):
                if task == "local_generate":
                    assert x == y
                else:
                    np.testing.assert_allclose(logprobs(x), logprobs(y), rtol=1e-4, atol=1e-4)
    choice = ours["results"]["local_choice"]
    assert 0 < choice["acc,none"] < 1
    assert choice["acc,none"] != choice["acc_norm,none"]


def add_bos(folder):
    """Make the tokenizer begin every text with a BOS, as Llama's does; the harness has rules for that."""
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    (bos,) = [t for t in values["added_tokens"] if t["content"] == "\n"]
    piece = {"SpecialToken": {"id": "\n", "type_id": 0}}
    values["post_processor"] = {
        "type": "TemplateProcessing",
        "single": [piece, {"Sequence": {"id": "A", "type_id": 0}}],
        "pair": [piece, {"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 0}}],
        "special_tokens": {"\n": {"id": "\n", "ids": [bos["id"]], "tokens": ["\n"]}},
    }
    path.write_text(json.dumps(values))


def logprobs(responses):
    return [float(r[0] if isinstance(r, (list, tuple)) else r) for r in responses]


def write_tasks(folder):
    """Task files over JSON lines, and their names."""
    r = np.random.default_rng(1)
    sums = [tuple(int(x) for x in r.integers(1, 90, 2)) for _ in range(24)]
    choices = [
        {
            "question": f"{a}+{b}?",
            "choices": [str(a + b), f"{a}+{b}={a + b}#{a + b}", str(a * b), "abcdefghijklmnopqrstuvwxyz"[i]],
            "gold": 3 if i % 3 else 1,
        }
        for i, (a, b) in enumerate(sums)
    ]
    texts = [{"text": f"{a}+{b}?{a}+{b}={a + b}#{a + b};" * (1 + i % 9)} for i, (a, b) in enumerate(sums[:12])]
    for name, rows in (
        ("choices", choices),
        ("texts", texts),
        ("sums", [{"q": f"{a}+{b}?", "a": str(a + b)} for a, b in sums[:8]]),
    ):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    head = "dataset_path: json\ntest_split: train\nmetadata: {{version: 1}}\ndataset_kwargs: {{data_files: {file}}}\n"
    kinds = {
        "local_choice": (
            "choices",
            "output_type: multiple_choice\ndoc_to_text: '{{question}}'\ndoc_to_choice: choices\ndoc_to_target: gold\n"
            "target_delimiter: ''\nmetric_list: [{metric: acc}, {metric: acc_norm}]\n",
        ),
        "local_perplexity": (
            "texts",
            "output_type: loglikelihood_rolling\ndoc_to_text: ''\ndoc_to_target: '{{text}}'\n"
            "metric_list: [{metric: word_perplexity}, {metric: byte_perplexity}, {metric: bits_per_byte}]\n",
        ),
        "local_generate": (
            "sums",
            "output_type: generate_until\ndoc_to_text: '{{q}}'\ndoc_to_target: '{{a}}'\n"
            "generation_kwargs: {until: ['#'], max_gen_toks: 24, do_sample: false}\n"
            "metric_list: [{metric: exact_match, aggregation: mean, higher_is_better: true}]\n",
        ),
    }
    for task, (file, body) in kinds.items():
        text = f"task: {task}\n" + head.format(file=folder / f"{file}.jsonl") + body
        (folder / f"{task}.yaml").write_text(text)
    return list(kinds)


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_texts_have_one_bos_and_pairs_read_as_one_text(model, monkeypatch, kind):
    ours = llama_like(kind)
    requests = Requests(dataclasses.replace(model, tokenizer=ours))
    scored = []
    monkeypatch.setattr(requests, "score", lambda pairs: scored.extend(pairs) or [Scored(0.0, True)] * len(pairs))
    requests.loglikelihood([("1+1=", "2"), ("<s>1+1=", "2"), ("", "2")])
    assert [[*head, *tail].count(1) for head, tail in scored] == [1] * 3
    assert [ours.decode([*head, *tail]) for head, tail in scored[:2]] == ["1+1=2"] * 2
    assert requests.encode("<s>1+1=").count(1) == 1
