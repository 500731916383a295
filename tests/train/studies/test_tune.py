"""`tune`: what a recipe's ranges are, the merge in memory beside the merge on disk, searches that go on, the test."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import yaml
from helpers import llamas

import jaxmerge.files
from jaxmerge.files.held import Held
from jaxmerge.files.ranges import filled, ranges
from train.cli import __main__ as cli
from train.evaluate.settings import QuestionOptions
from train.log import UserError
from train.models.hf import save_hf
from train.models.open import open_model, random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.studies import tune
from train.studies.tune_settings import TuneOptions

SIZES = {
    "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip


# --- ranges ---


def test_ranges_are_named_by_their_place_and_filled_there():
    document = {
        "merge_method": "ties", "base_model": "b",
        "models": [{"model": "a", "parameters": {"weight": {"search": [0, 2], "start": 0.25}, "density": 0.5}}],
        "parameters": {"lambda": [{"filter": "mlp", "value": {"search": [0, 1]}}, {"value": 1.0}]},
    }  # fmt: skip
    found = ranges(document)
    assert {name: (f.low, f.high, f.start) for name, f in found.items()} == {
        "models.0.parameters.weight": (0.0, 2.0, 0.25), "parameters.lambda.0.value": (0.0, 1.0, 0.5),
    }  # fmt: skip
    made = filled(document, {"models.0.parameters.weight": 1.5, "parameters.lambda.0.value": 0.75})
    assert made["models"][0]["parameters"] == {"weight": 1.5, "density": 0.5}
    assert made["parameters"]["lambda"][0] == {"filter": "mlp", "value": 0.75}
    assert document["models"][0]["parameters"]["weight"] == {"search": [0, 2], "start": 0.25}


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ({"search": [0]}, "wanted {search: .low, high.}"),
        ({"search": [1, 0]}, "the lower one first"),
        ({"search": [0, 1], "start": 2}, "start=2.0 is outside"),
        ({"search": [0, 1], "step": 2}, "wanted {search"),
        ({"search": [False, True]}, "wanted {search"),
    ],
)
def test_what_is_no_range_is_refused_by_its_name(value, message):
    with pytest.raises(ValueError, match=rf"^parameters.t\b.*{message}"):
        ranges({"parameters": {"t": value}})


def test_a_range_elsewhere_is_refused():
    with pytest.raises(ValueError, match="merge_method: a range stands among 'parameters' alone"):
        ranges({"merge_method": {"search": [0, 1]}})


# --- the merge in memory ---


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    root = tmp_path_factory.mktemp("models")
    for seed, name in enumerate(("base", "one", "two")):
        llamas.folder(root / name, llamas.tensors(seed, layers=1, dtype=jnp.bfloat16), layers=1)
    return root


def recipe_of(root, method, parameters, models=("one", "two"), **more):
    return {
        "merge_method": method, "base_model": str(root / "base"), **more,
        "models": [{"model": str(root / name), "parameters": dict(own)} for name, own in parameters[0].items()],
        "parameters": parameters[1],
    }  # fmt: skip


CASES = {
    "random masks, a gradient, a filter": ("dare_ties", ({
        "one": {"weight": [{"search": [0, 1]}, 0.5], "density": {"search": [0.2, 0.9]}},
        "two": {"weight": [{"filter": "mlp", "value": {"search": [0.1, 1]}}, {"value": 0.3}], "density": 0.5},
    }, {"lambda": {"search": [0.5, 1.5]}})),
    "whole tensors": ("slerp", ({"one": {}}, {"t": {"search": [0, 1]}})),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_the_merge_in_memory_is_that_on_disk(name, folders, tmp_path):
    document = recipe_of(folders, *CASES[name], seed=3)
    held = Held(document)
    for number, unit in enumerate((0.25, 0.9)):
        candidate = held.space.pack(held.space.from_unit([unit] * len(held.space.names)))
        jaxmerge.files.merge(filled(document, candidate), tmp_path / f"{number}")
        wanted = llamas.load(str(tmp_path / f"{number}"))
        found = held(candidate)
        assert set(found) == set(wanted)
        for tensor, array in found.items():
            assert np.array_equal(np.asarray(array).view(np.uint8), wanted[tensor].view(np.uint8)), (tensor, candidate)


def test_slopes_are_those_of_the_coefficients(folders):
    held = Held(recipe_of(folders, *CASES["random masks, a gradient, a filter"]))
    at = held.space.pack(held.space.from_unit([0.3] * 4))
    wanted, found = held.coefficients(at), held.coefficients(held.start)
    for name, by_tensor in held.slopes.items():
        for tensor, keys in by_tensor.items():
            for key, slope in keys.items():
                found[tensor][key] = found[tensor][key] + slope * (at[name] - held.start[name])
    for tensor, keys in wanted.items():
        for key, value in keys.items():
            np.testing.assert_allclose(found[tensor][key], value, rtol=1e-6)


@pytest.mark.parametrize(
    ("method", "parameters", "message"),
    [
        ("ties", ({"one": {"weight": 1.0}}, {}), "no range to search"),
        ("ties", ({"one": {"weight": [{"filter": "nowhere", "value": {"search": [0, 1]}}, {"value": 1.0}]}}, {}),
         "models.0.parameters.weight.0.value: no tensor's coefficients depend on this range"),
        ("karcher", ({"one": {}, "two": {}}, {"max_iter": {"search": [1, 9]}}), "max_iter"),
    ],
)  # fmt: skip
def test_ranges_that_cannot_be_searched_are_refused(folders, method, parameters, message):
    with pytest.raises(ValueError, match=message):
        Held(recipe_of(folders, method, parameters))


# --- the search ---


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Two models and the base between them: θ_b = θ_1 + 0.25 (θ_2 − θ_1), and texts that the base writes."""
    root = tmp_path_factory.mktemp("trained")
    mesh = make_mesh(Mesh())
    one, two = (random_model(SIZES, mesh, seed=seed) for seed in (0, 1))
    between = jax.tree.map(lambda a, b: 0.75 * a + 0.25 * b, one.params, two.params)
    for name, params in (("one", one.params), ("two", two.params), ("between", between)):
        save_hf(root / name, one.config, params, tokenizer_from=one.tokenizer)
    rng = np.random.default_rng(0)
    rows = []
    for _ in range(24):
        a, b = rng.integers(1, 99, 2)
        rows.append({"prompt": f"{a} + {b} =", "completion": f" {a + b}"})
    (root / "lines.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    problems = [{"problem": row["prompt"], "answer": row["completion"].strip()} for row in rows]
    (root / "problems.jsonl").write_text("".join(json.dumps(row) + "\n" for row in problems))
    recipe = {
        "merge_method": "slerp", "base_model": str(root / "one"), "models": [{"model": str(root / "two")}],
        "parameters": {"t": {"search": [0, 1], "start": 0.0}},
    }  # fmt: skip
    (root / "slerp.yaml").write_text(yaml.safe_dump(recipe))
    return root


def run(root, out, *more, recipe="slerp.yaml", questions="lines.jsonl"):
    words = ["tune", str(root / recipe), str(root / questions), str(out), *more]
    return cli.main([*words, "score=likelihood"] if questions == "lines.jsonl" else words)


def test_the_command_finds_what_a_grid_measures_by_hand(trained, tmp_path, capsys):
    assert run(trained, tmp_path / "out", "strategy=grid", "options={points: 3}") == 0
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert [t["coefficients"]["parameters.t"] for t in trials] == [0.0, 0.5, 1.0]  # the start is a point of the grid
    best = max(trials, key=lambda t: t["score"])
    assert (found["best"], found["validation"]) == (best["coefficients"], best["score"])
    # By hand: the merge on disk, each text of the search under it.
    document = yaml.safe_load((trained / "slerp.yaml").read_text())
    jaxmerge.files.merge(filled(document, trials[1]["coefficients"]), tmp_path / "half")
    model = open_model(str(tmp_path / "half"), make_mesh(Mesh()))
    options = TuneOptions(score="likelihood")
    judge = tune.Likelihood(trained / "lines.jsonl", model, tmp_path / "again", options, QuestionOptions())
    np.testing.assert_allclose(np.mean(judge.judge(model, False)), trials[1]["score"], rtol=1e-5)
    assert found["test"]["n"] == 12
    assert yaml.safe_load((tmp_path / "out" / "recipe.yaml").read_text())["parameters"] == {
        "t": found["best"]["parameters.t"]
    }
    assert "<svg" in (tmp_path / "out" / "search.svg").read_text()
    assert "jaxmerge merge" in capsys.readouterr().out


def test_a_search_that_was_stopped_goes_on_with_its_trials(trained, tmp_path):
    more = ("strategy=golden", "options={tolerance: 0.3}")
    assert run(trained, tmp_path / "whole", *more) == 0
    whole = [json.loads(line) for line in (tmp_path / "whole" / "trials.jsonl").read_text().splitlines()]
    assert run(trained, tmp_path / "out", *more) == 0
    log = tmp_path / "out" / "trials.jsonl"
    log.write_text("".join(log.read_text().splitlines(keepends=True)[:2]) + '{"number": 2, "ki')
    assert run(trained, tmp_path / "out", *more) == 0
    again = [json.loads(line) for line in log.read_text().splitlines()]
    assert [t | {"seconds": 0} for t in again] == [t | {"seconds": 0} for t in whole]
    assert json.loads(log.read_text().splitlines()[0])["seconds"] != 0


def test_other_inputs_are_refused(trained, tmp_path, capsys):
    more = ("strategy=grid", "options={points: 2}")
    assert run(trained, tmp_path / "out", *more) == 0
    assert run(trained, tmp_path / "out", *more, "test=0.25") == 2
    assert "holds a run of another config" in capsys.readouterr().err


def test_the_gradient_is_that_of_differences(trained, tmp_path):
    recipe = yaml.safe_load((trained / "slerp.yaml").read_text()) | {
        "merge_method": "task_arithmetic",
        "models": [{"model": str(trained / name), "parameters": {"weight": {"search": [-1, 1], "start": s}}}
                   for name, s in (("two", 0.2), ("between", 0.1))],
        "parameters": {"lambda": [{"search": [0, 2], "start": 1.0}, 0.5]},
    }  # fmt: skip
    held = Held(recipe)
    tune.on_first(held.plan.companions, tmp_path / "model")
    model = tune.empty_model(tmp_path / "model")
    options = TuneOptions(score="likelihood", strategy="gradient")
    judge = tune.Likelihood(trained / "lines.jsonl", model, tmp_path, options, QuestionOptions())
    value, slopes = tune.descending(held, model, judge)(held.start)
    np.testing.assert_allclose(
        value, np.mean(judge.judge(tune.with_tensors(model, held(held.start)), False)), rtol=1e-5
    )
    for name, slope in slopes.items():
        ends = [
            np.mean(judge.judge(tune.with_tensors(model, held(held.start | {name: held.start[name] + d})), False))
            for d in (-0.02, 0.02)
        ]
        np.testing.assert_allclose(slope, (ends[1] - ends[0]) / 0.04, rtol=0.02, atol=1e-4)


def test_frank_wolfe_mixes_the_models_of_a_recipe(trained, tmp_path):
    recipe = {
        "merge_method": "task_arithmetic", "base_model": str(trained / "one"),
        "models": [{"model": str(trained / name), "parameters": {"weight": {"search": [0, 1], "start": 1.0}}}
                   for name in ("two", "between")],
    }  # fmt: skip
    (tmp_path / "mix.yaml").write_text(yaml.safe_dump(recipe))
    assert (
        run(trained, tmp_path / "out", "strategy=frank_wolfe", "options={steps: 3}", recipe=tmp_path / "mix.yaml") == 0
    )
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    trials = [json.loads(line) for line in (tmp_path / "out" / "trials.jsonl").read_text().splitlines()]
    assert [trial["kind"] for trial in trials] == ["safe", *["frank_wolfe"] * (len(trials) - 1)]
    assert all(sum(trial["coefficients"].values()) <= 1 + 1e-6 for trial in trials[1:])
    # Of the first mix, the half of each, the better direction is taken.
    first, second = (list(trial["coefficients"].values()) for trial in trials[1:3])
    slopes = list(trials[1]["gradient"].values())
    assert first == [0.5, 0.5]
    assert second == [float(slope == max(slopes) > 0) for slope in slopes]
    assert any("no mix gains more than" in note for note in found["notes"])


def test_accuracy_is_of_the_questions_answers(trained, tmp_path, monkeypatch, capsys):
    """Greedy answers need a chat template: they are put in the model's place."""
    seen = []

    def ask(model, suite, questions, settings, key, **options):
        t = float(jnp.ravel(model.params["model"]["norm"]["weight"])[0])
        seen.append([q.id for q in questions])
        rows = [
            {"question_id": q.id, "score": float(i % 2 == 0), "tokens": [], "t": t} for i, q in enumerate(questions)
        ]
        return type("Answers", (), {"rows": rows})

    monkeypatch.setattr(tune, "ask", ask)
    more = ("strategy=grid", "options={points: 2}", "test=0.25")
    assert run(trained, tmp_path / "out", *more, questions="problems.jsonl") == 0
    assert [len(ids) for ids in seen] == [18, 18, 6, 6]  # the start is an end of the grid
    assert not {*seen[0]} & {*seen[-1]}
    found = json.loads((tmp_path / "out" / "result.json").read_text())
    assert (found["test"]["difference"], found["best"]) == (0.0, found["start"])
    assert any("gains nothing" in note for note in found["notes"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"strategy": "gradient"}, "needs score=likelihood"),
        ({"strategy": "frank_wolfe"}, "strategy=frank_wolfe needs score=likelihood"),
        ({"strategy": "golden", "options": {"points": 3}}, "golden has no such option; it has tolerance, rounds"),
        ({"test": 1.0}, "between 0 and 1"),
    ],
)
def test_options_that_do_not_fit_are_refused(given, message):
    with pytest.raises(UserError, match=message):
        TuneOptions(**given)
