"""Which examples are learnt: the greedy choice is the brute force's, and what is measured is the model."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import pytest

from train.data.builders import JsonLines, prepare, read_folder
from train.generate.embed import embed
from train.learn.measure import ModelMeasure
from train.learn.picks import PICKS, All, Deita, Select2Reason, keep_apart, ranks
from train.learn.settings import Data
from train.log import UserError
from train.models.decoder import bind
from train.resolve import build


def vectors(n, d, seed):
    found = np.random.default_rng(seed).standard_normal((n, d))
    return found / np.linalg.norm(found, axis=1, keepdims=True)


class Measured:
    """Losses and vectors that are given."""

    def __init__(self, losses=None, embeddings=None):
        self.given = losses, embeddings

    def losses(self) -> np.ndarray:
        assert self.given[0] is not None, "not to be measured"
        return np.array(self.given[0])

    def embeddings(self, kind) -> np.ndarray:
        assert self.given[1] is not None, "not to be measured"
        return self.given[1]


def example(tokens, **more) -> dict[str, Any]:
    return {"tokens": list(range(1, tokens + 1)), "prompt_length": 1, **more}


def test_the_registry_is_what_a_config_may_name():
    for name, kind in PICKS.items():
        assert type(build(Data, {"path": "x", "pick": {"name": name}}).pick) is kind
        assert kind is All or ("$" in str(kind.__doc__) and "https://arxiv.org/abs/" in str(kind.__doc__))
    for wrong in (
        {"name": "deita", "threshold": 2},
        {"name": "deita", "count": 0},
        {"name": "select2reason", "share": 0},
    ):
        with pytest.raises(UserError, match=r"pick"):
            build(Data, {"path": "x", "pick": wrong})


# --- DEITA ---


@pytest.mark.parametrize("threshold", [0.0, 0.3, 0.7, 1.0])
def test_those_kept_are_the_greedy_ones_and_no_two_are_alike(threshold):
    scores, points = np.random.default_rng(5).integers(0, 9, 40).astype(float), vectors(40, 3, 6)
    kept: list[int] = []
    for i in sorted(range(40), key=lambda i: (-scores[i], i)):  # brute force
        if all(float(points[i] @ points[k]) <= threshold for k in kept):
            kept.append(i)
    found = keep_apart(scores, points, threshold=threshold)
    assert found == sorted(kept)
    cosines = (points @ points.T)[np.ix_(found, found)] - 2 * np.eye(len(found))
    assert cosines.max() <= threshold
    assert keep_apart(scores, points, threshold=threshold, count=3) == sorted(kept[:3])
    assert len(found) == 40 or threshold < 1


def test_deita_multiplies_the_scores_that_are_given_and_measures_those_that_are_not():
    apart = np.eye(3)
    both = [example(4, complexity=c, quality=q) for c, q in ((1, 6), (5, 1), (3, 3))]
    assert Deita(count=1).choose(both, Measured(None, apart)) == [2]
    quality = [example(4, quality=q) for q in (1, 1, 2)]
    assert Deita(count=1).choose(quality, Measured([1.0, 3.0, 1.0], apart)) == [1]
    assert Deita(count=1).choose([example(4)] * 3, Measured([1.0, 0.5, 2.0], apart)) == [2]
    with pytest.raises(UserError, match="2 of 3 examples have the key complexity"):
        Deita().choose([*both[:2], example(4)], Measured(None, apart))


# --- Select2Reason ---


def test_ranks_share_their_mean():
    assert ranks(np.array([3.0, 3.0, 1.0])).tolist() == [0.75, 0.75, 0.0]
    assert ranks(np.array([2.0])).tolist() == [0.0]


def test_the_hardest_and_longest_are_picked_by_their_joint_rank():
    #          ranks of difficulty 0, 1/3, 2/3, 1; of length 1, 2/3, 1/3, 0
    examples = [example(9 - i, difficulty=i / 10) for i in range(4)]
    for weight, wanted in ((1.0, [3]), (0.0, [0]), (0.75, [3]), (0.25, [0])):
        assert Select2Reason(share=0.25, weight=weight).choose(examples, Measured()) == wanted
    assert Select2Reason(share=0.5, weight=1.0).choose(examples, Measured()) == [2, 3]
    assert Select2Reason(share=0.1, weight=1.0).choose(examples, Measured()) == [3], "one at least"
    measured = [example(5) for _ in range(4)]
    assert Select2Reason(share=0.25).choose(measured, Measured([1.0, 4.0, 2.0, 3.0])) == [1]
    learnt = [{"tokens": [1] * 8, "learnt": [0, 1, 1, 0, 0, 0, 0, 0]}, {"tokens": [1] * 5, "learnt": [0, 1, 1, 1, 0]}]
    assert Select2Reason(share=0.5, weight=0.0).choose(learnt, Measured([0.0, 0.0])) == [1], "what is learnt counts"


# --- measures ---


def test_losses_and_vectors_are_the_model_s(model, examples):
    some = examples[:5]
    measure = ModelMeasure(lambda: model, some)
    net = bind(model.config, model.params)
    for e, loss, mean, last in zip(
        some, measure.losses(), measure.embeddings("mean"), measure.embeddings("last"), strict=True
    ):
        tokens, T, at = np.array([e["tokens"]]), len(e["tokens"]), e["prompt_length"]
        hidden, _ = net(tokens, np.arange(T)[None], np.tril(np.ones((1, T, T), bool)))
        logits = np.asarray(net.head(hidden, np.dtype("float32")), np.float64)[0]
        logp = logits - np.log(np.exp(logits).sum(-1, keepdims=True))
        np.testing.assert_allclose(loss, -logp[np.arange(at - 1, T - 1), tokens[0, at:]].mean(), rtol=1e-4)
        for found, wanted in ((mean, np.asarray(hidden[0]).mean(0)), (last, np.asarray(hidden[0, -1]))):
            np.testing.assert_allclose(found, wanted / np.linalg.norm(wanted), atol=1e-5)


def test_a_vector_depends_on_its_own_text_alone(model):
    texts = [[5, 6, 7], [9, 8, 7, 6, 5, 4, 3, 2, 1], [5, 6, 7]]
    together = embed(model.config, model.params, texts)
    np.testing.assert_array_equal(together[0], together[2])
    np.testing.assert_allclose(embed(model.config, model.params, texts[:1])[0], together[0], atol=1e-6)


# --- the lines of a file ---


def test_a_line_may_have_scores_and_keeps_them(tmp_path):
    line = {"prompt": "1+1=", "completion": "2", "complexity": 3, "quality": 0.5, "difficulty": 0.1}
    (tmp_path / "data.jsonl").write_text(json.dumps(line) + "\n")
    (record,) = read_folder(prepare(JsonLines(path=tmp_path / "data.jsonl", data_dir=tmp_path / "set")))
    assert dict(record.scores) == {"complexity": 3.0, "quality": 0.5, "difficulty": 0.1}
    (tmp_path / "bad.jsonl").write_text(json.dumps(line | {"quality": "high"}) + "\n")
    with pytest.raises(UserError, match="quality is 'high'; a finite number is wanted"):
        prepare(JsonLines(path=tmp_path / "bad.jsonl", data_dir=tmp_path / "set"))
