"""Experiments: which runs there are, which are done, which candidate is chosen, what the page says of them."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
import yaml
from helpers import ROOT

from train.improve.settings import Improve
from train.log import UserError
from train.resolve import build
from train.runtime.disk import Busy
from train.runtime.jsonl import read_jsonl
from train.studies import page, tables
from train.studies import sweep as sweeps
from train.studies.cells import groups, judge_cells, laid_over, points, score, tune_cells, unique
from train.studies.read import Finished, Score, originals
from train.studies.stats import mean_interval
from train.studies.sweep import Experiment
from train.tasks import build_suite

TINY = yaml.safe_load((ROOT / "configs" / "tiny.yaml").read_text())


def values(**sweep: Any) -> dict[str, Any]:
    base = {key: TINY[key] for key in ("model", "tasks", "sampling", "sft", "evaluation", "selection") if key in TINY}
    base["sft"] = {**base["sft"], "epochs": 1, "snapshots": 1}
    methods = {"plain": {}, "half": {"probe": {"of": "plain", "kind": "line", "coefficients": [0.5]}}}
    return {**base, "rounds": 1, "methods": methods, "sweep": sweep}


TUNE = {
    "axes": {"seed": [7, 8]},
    "set": {"evaluation": {"splits": ["validation"]}},
    "candidates": {
        "rate": [{"sft": {"learning_rate": 0.01}}, {"sft": {"learning_rate": 0.02}}],
        "imm": [{"merge": {"rule": "imm", "alpha": 0.3}}, {"merge": {"rule": "imm", "alpha": 0.6}}],
    },
}


@pytest.fixture
def experiment(tmp_path) -> Experiment:
    return Experiment.of(
        "trial",
        values(
            axes={"seed": [1, 2, 3]}, tune=TUNE, control="rate", rows=str(tmp_path / "trial.jsonl"), claim="It is so."
        ),
    )


def pretend(monkeypatch, accuracy) -> list[str]:
    """Runs that take no time: `accuracy(method, config, domain, split)` is what they would have measured."""
    made = []

    def improve(config, *, name, out, command, quiet):
        del name, command, quiet
        out.mkdir(parents=True)
        made.append(out.name)
        methods = [m for m in config.methods if config.methods[m].probe is None] or ["base"]
        rows = [
            {
                "method": m, "round": 0 if m == "base" else 1, "split": split, "domain": domain, "family": "all",
                "accuracy": accuracy(m, config, domain, split), "n": 1000,
            }
            for m in methods for split in config.evaluation.splits for domain in ("id", "ood")
        ]  # fmt: skip
        versions = {"python": "3", "jax": "1", "jaxlib": "1"}
        about = {"seconds": 2.0, "commit": "abc", "device": "cpu", "versions": versions}
        (out / "summary.json").write_text(json.dumps({"rows": rows, **about}))
        (out / "metrics.jsonl").write_text("")

    monkeypatch.setattr(sweeps, "improve", improve)
    return made


def better_with_high_rate(method, config, domain, split):
    del split
    block = config.methods[method] if method != "base" else None
    if block is None:
        return 0.5
    up = block.sft.get("learning_rate", 0.01) * 5 + block.merge.get("alpha", 0.0) / 10
    return 0.5 + up if domain == "id" else 0.5 - up / 2


# --- cells ---


def test_points_are_all_combinations_in_order():
    axes = {"pressure": {"low": {"rounds": 2}, "high": {"sft": {"epochs": 9}}}, "seed": [1, 2]}
    found = points(axes)
    assert [labels for labels, _ in found] == [{"pressure": p, "seed": s} for p in ("low", "high") for s in ("1", "2")]
    assert found[3][1] == {"sft": {"epochs": 9}, "seed": 2}


def test_overrides_go_into_maps_and_replace_lists():
    before = {"sft": {"epochs": 1, "batch": 2}, "stop": [1, 2]}
    assert laid_over(before, {"sft": {"epochs": 3}, "stop": [3]}) == {"sft": {"epochs": 3, "batch": 2}, "stop": [3]}
    assert before == {"sft": {"epochs": 1, "batch": 2}, "stop": [1, 2]}


def test_probes_run_with_their_method():
    found = groups({"a": {}, "b": None, "c": {"probe": {"of": "a"}}})
    assert found == {"a": {"a": {}, "c": {"probe": {"of": "a"}}}, "b": {"b": None}}
    with pytest.raises(UserError, match=r"methods\.c\.probe\.of is 'd'"):
        groups({"a": {}, "c": {"probe": {"of": "d"}}})


def test_a_cell_is_known_by_what_it_says(experiment):
    """Adding a method, an axis label or a word about the experiment runs nothing again."""
    before = {c.id for c in judge_cells(experiment.values, experiment.sweep, {"rate": 0, "imm": 1})}
    more = values(axes={"seed": [1, 2, 3, 4]}, tune=TUNE, title="Other words")
    more["methods"]["new"] = {"sft": {"epochs": 2}}
    after = Experiment.of("trial", more)
    assert before < {c.id for c in judge_cells(after.values, after.sweep, {"rate": 0, "imm": 1})}
    changed = values(axes={"seed": [1, 2, 3]}, tune=TUNE)
    changed["sampling"] = {**changed["sampling"], "temperature": 0.123}
    other = Experiment.of("trial", changed)
    fresh = [c for c in judge_cells(other.values, other.sweep, {}) if c.stage != "base"]
    assert not before & {c.id for c in fresh}


def test_the_original_model_is_run_once_for_all_seeds(experiment):
    cells = judge_cells(experiment.values, experiment.sweep, {"rate": 0, "imm": 0})
    assert sum(c.stage == "base" for c in cells) == 3
    assert sum(c.stage == "base" for c in unique(cells)) == 1
    assert len(unique(cells)) == 1 + 3 * 3


def test_seeds_of_tuning_and_of_judging_are_apart(experiment):
    tuned = {c.axes["seed"] for c in tune_cells(experiment.values, experiment.sweep)}
    judged = {c.axes["seed"] for c in judge_cells(experiment.values, experiment.sweep, {})}
    assert not tuned & judged


def test_the_score_is_the_mean_of_the_domains_in_the_last_round():
    rows = [
        [1, "validation", "id", "all", 9, 10], [2, "validation", "id", "all", 5, 10],
        [2, "validation", "ood", "all", 3, 4], [2, "validation", "ood", "sums", 0, 4], [2, "test", "id", "all", 0, 10],
    ]  # fmt: skip
    assert score(rows, "validation") == (0.5 + 0.75) / 2
    with pytest.raises(UserError, match="no validation scores"):
        score(rows[-1:], "validation")


# --- running ---


def test_a_sweep_tunes_chooses_and_judges(experiment, monkeypatch, tmp_path):
    made = pretend(monkeypatch, better_with_high_rate)
    rows = sweeps.run(experiment, command="it", out=tmp_path / "runs")
    done = read_jsonl(rows, torn="drop")
    assert [row["stage"] for row in done] == ["tune"] * 8 + ["base"] + ["judge"] * 9
    assert experiment.chosen(experiment.done()) == {"rate": 1, "imm": 1}
    assert {row["candidate"] for row in done if row["stage"] == "judge" and row["method"] == "rate"} == {1}
    sweeps.run(experiment, command="it", out=tmp_path / "runs")
    assert len(made) == 18, "finished cells are not run again"


def test_a_fresh_clone_goes_on_from_the_rows(experiment, monkeypatch, tmp_path):
    made = pretend(monkeypatch, better_with_high_rate)
    sweeps.run(experiment, command="it", out=tmp_path / "runs")
    lines = experiment.rows.read_text().splitlines(keepends=True)
    experiment.rows.write_text("".join(lines[:5]) + lines[5][:40])  # the sixth line is torn
    made.clear()
    sweeps.run(experiment, command="it", out=tmp_path / "elsewhere")
    assert len(made) == 13
    assert sorted(r["cell"] for r in read_jsonl(experiment.rows, torn="drop")) == sorted(
        json.loads(x)["cell"] for x in lines
    )


def test_a_cell_another_process_is_at_is_left_to_it(experiment, monkeypatch, tmp_path):
    made = pretend(monkeypatch, better_with_high_rate)
    improve, others = sweeps.improve, [True, True]

    def busy_twice(config, **how):
        if others:
            others.pop()
            raise Busy("another process")
        improve(config, **how)

    monkeypatch.setattr(sweeps, "improve", busy_twice)
    monkeypatch.setattr(sweeps, "WAIT", 0.0)
    sweeps.run(experiment, command="it", out=tmp_path / "runs")
    assert len(made) == len(set(made)) == 18


def test_a_cell_is_taken_until_its_row_is_written(experiment, monkeypatch, tmp_path):
    """A finished run whose layers another process still looks into is not taken, or its weights would go."""
    pretend(monkeypatch, better_with_high_rate)
    cell = tune_cells(experiment.values, experiment.sweep)[0]
    out = tmp_path / "runs"
    out.mkdir()
    with sweeps.locked(out / f"{cell.id}.lock", wait=False), pytest.raises(Busy, match="another process is at"):
        sweeps.run_cell(experiment, cell, out, "it")
    assert not experiment.done()
    sweeps.run_cell(experiment, cell, out, "it")
    sweeps.run_cell(experiment, cell, out, "it")
    assert len(read_jsonl(experiment.rows, torn="drop")) == 1


def test_a_real_sweep_of_two_runs(tmp_path):
    """Nothing pretended: a trained method with a probe, and the original model, in one run each."""
    sweep = {"axes": {"seed": [3]}, "control": "plain", "judge": "layers", "analyse": {"texts": 2}}
    experiment = Experiment.of("real", values(**sweep, rows=str(tmp_path / "real.jsonl")))
    sweeps.run(experiment, command="it", out=tmp_path / "runs")
    base, judged = read_jsonl(experiment.rows, torn="drop")
    assert set(base["results"]) == {"base"}
    assert set(judged["results"]) == {"plain", "half"}
    assert {row[0] for row in judged["results"]["plain"]} == {1}
    assert judged["results"]["half"][0][-1] == 0.5
    assert not (tmp_path / "runs" / judged["cell"] / "checkpoints").exists()
    assert (tmp_path / "runs" / judged["cell"] / "report.html").exists()
    assert "analysis" not in base
    looked = judged["analysis"]
    assert len(looked["importance"]["skip"]) == len(looked["importance"]["taylor"]) == looked["layers"] > 1
    assert looked["change"][0]["layers"]["model/layers/0"] > 0
    assert f"\n| {looked['layers'] - 1} |" in page.section(experiment, tmp_path)
    assert (tmp_path / "real.svg").exists()


@pytest.mark.parametrize(
    ("sweep", "said"),
    [
        ({"tune": {"candidates": {"a": [{}], "b": [{}, {}]}}}, r"as many trials each, found \{'a': 1, 'b': 2\}"),
        ({"tune": {"candidates": {"plain": [{}]}}}, r"methods\.plain is also in sweep\.tune\.candidates"),
        ({"axes": {"seed": 3}}, r"sweep\.axes\.seed is 3; a list"),
        ({"axes": {"seed": [1]}, "analyse": {"text": 8}}, r"sweep\.analyse\.text: no such key; did you mean texts"),
        ({"axes": {"seed": [1]}, "judge": "jury"}, r"judge is 'jury'; known: frontier"),
        ({"axes": {"size": {"big": {"sft": {"batches": 3}}}}}, r"sft\.batches: no such key"),
    ],
)
def test_mistakes_are_named_before_anything_runs(sweep, said):
    with pytest.raises(UserError, match=said):
        Experiment.of("trial", values(**sweep))


# --- the page ---


def test_candidates_are_shown_key_by_key_and_a_changing_alpha_whole():
    steady = {"sft": {"learning_rate": 1e-3, "schedule": "constant"}}
    assert page.flat(steady) == "sft.learning_rate=0.001 sft.schedule=constant"
    annealed = {"merge": {"alpha": {"schedule": "linear", "start": 0.9, "end": 0.1}}}
    assert page.flat(annealed) == "merge.alpha={'schedule': 'linear', 'start': 0.9, 'end': 0.1}"


def test_the_page_says_what_the_rows_say(experiment, monkeypatch, tmp_path):
    pretend(monkeypatch, better_with_high_rate)
    configs = tmp_path / "configs"
    configs.mkdir()
    sweep = {
        "axes": {"seed": [1, 2, 3]},
        "tune": TUNE,
        "control": "rate",
        "rows": str(experiment.rows),
        "claim": "It is so.",
    }
    (configs / "trial.yaml").write_text(yaml.safe_dump(values(**sweep), sort_keys=False))
    before = page.write(tmp_path / "results", configs).read_text()
    assert "Not all candidates have run yet" in before
    sweeps.run(experiment, command="it", out=tmp_path / "runs")
    text = page.write(tmp_path / "results", configs).read_text()
    assert "**The claim.** It is so." in text
    assert "18 runs" in text
    assert "| **rate** (control) | 3 | 60.0 [60.0, 60.0] | 45.0 [45.0, 45.0] |" in text
    assert "| imm | 3 | 61.0 [61.0, 61.0] | 44.5 [44.5, 44.5] |" in text
    assert re.search(r"\*\*52\.\d `merge\.rule=imm merge\.alpha=0\.6`\*\*", text)
    picture = (tmp_path / "results" / "trial.svg").read_text()
    assert picture.startswith("<svg")
    assert "href" not in picture


def pretended(method: str, seed: str, pressure: str, *, rounds: tuple[tuple[float, float], ...], base=0.5) -> Finished:
    """A run with these accuracies in and out of domain after its rounds."""

    def at(number: int, domain: str, accuracy: float) -> Score:
        return Score(number, domain, "all", accuracy, 100, {"4": accuracy + 0.1}, None)

    found = [at(i, d, a) for i, pair in enumerate(rounds, 1) for d, a in zip(("id", "ood"), pair, strict=True)]
    return Finished(method, {"pressure": pressure, "seed": seed}, found, [at(0, d, base) for d in ("id", "ood")], {})


def test_differences_take_the_seed_as_the_unit():
    """Two seeds, two pressures: the pressures of a seed are averaged, and the interval is of two numbers, not four."""
    of = {
        "rate": [pretended("rate", s, p, rounds=((0.5, 0.5),)) for s in "12" for p in ("low", "high")],
        "imm": [
            pretended("imm", "1", "low", rounds=((0.52, 0.5),)), pretended("imm", "1", "high", rounds=((0.54, 0.5),)),
            pretended("imm", "2", "low", rounds=((0.55, 0.5),)), pretended("imm", "2", "high", rounds=((0.55, 0.5),)),
        ],
    }  # fmt: skip
    text = "\n".join(tables.differences(tables.against(of, "rate"), "Less rate", 4))
    mean, low, high = mean_interval([3.0, 5.0])
    shown = f"{mean:+.1f} [{low:+.1f}, {high:+.1f}]"
    half = f"{mean / 2:+.1f} [{low / 2:+.1f}, {high / 2:+.1f}]"
    flat = "+0.0 [+0.0, +0.0]"
    assert f"| imm | 2 | {shown} | {flat} | {half} | {shown} | {flat} |" in text
    assert "| rate |" not in text
    assert tables.differences(tables.against({"imm": of["imm"]}, "rate"), "", 4) == []


def test_a_curve_is_compared_with_its_first_point():
    found = [
        pretended("plain", seed, pressure, rounds=((accuracy, 0.4),))
        for seed in "12"
        for pressure, accuracy in (("low", 0.5), ("high", 0.6))
    ]
    pairs = tables.against_first(found, "pressure")
    assert {name: [(a.axes["seed"], b.axes["seed"]) for a, b in own] for name, own in pairs.items()} == {
        "plain high": [("1", "1"), ("2", "2")]
    }
    assert "| plain high | 2 | +10.0 [+10.0, +10.0] | +0.0 [+0.0, +0.0] |" in "\n".join(tables.differences(pairs, ""))


def test_one_more_round_is_one_more_chance_and_not_compared():
    once, twice = (pretended("a", "1", "low", rounds=((0.6, 0.6),) * n) for n in (1, 2))
    assert page.alike_in_rounds([(once, once), (twice, twice)])
    assert not page.alike_in_rounds([(once, twice)])


def test_two_seeds_have_no_p_value():
    runs = {m: [pretended(m, s, "low", rounds=((a, 0.5),)) for s in "123"] for m, a in (("rate", 0.5), ("imm", 0.6))}
    pairs = tables.against(runs, "rate")
    assert page.p_values(pairs, tables.balance) == {"imm": 0.0}
    assert page.p_values({"imm": pairs["imm"][:2]}, tables.balance) == {}


def test_rounds_are_shown_one_by_one():
    of = {"plain": [pretended("plain", "1", "low", rounds=((0.6, 0.4), (0.7, 0.3)))]}
    assert "| plain | 60.0 | 40.0 | 70.0 | 30.0 |" in tables.by_round(of)
    assert tables.by_round({"once": [pretended("once", "1", "low", rounds=((0.6, 0.4),))]}) == []


def test_an_original_model_counts_once():
    found = [pretended("a", s, "low", rounds=((0.6, 0.6),), base=0.4 if s == "4" else 0.5) for s in "1234"]
    assert tables.base_row(found, ["id", "ood"], 4)[1] == "2"
    assert [run.before("id") for run in originals(found)] == [0.5, 0.4]


def test_the_committed_experiments_are_sound():
    """Every config in configs/experiments builds, cell by cell, and has its claim."""
    for path in sorted((ROOT / "configs" / "experiments").glob("*.yaml")):
        experiment = Experiment.of(path.stem, yaml.safe_load(path.read_text()))
        assert experiment.sweep.claim
        assert experiment.sweep.title
        known = {
            c.method
            for c in judge_cells(
                experiment.values, experiment.sweep, dict.fromkeys(experiment.sweep.tune.candidates, 0)
            )
        }
        assert experiment.sweep.control in known


def test_pretraining_left_out_what_the_miniature_is_asked():
    """Its base models were not trained on configs/miniature.yaml's questions: experiments ask no others."""

    def ids(values):
        config = build(Improve, values)
        suite = build_suite(config.tasks.families, seed=config.tasks.seed, style=config.tasks.style)
        return {question.id for question in suite.all}

    excluded = ids(yaml.safe_load((ROOT / "configs" / "miniature.yaml").read_text()))
    for path in sorted((ROOT / "configs" / "experiments").glob("*.yaml")):
        experiment = Experiment.of(path.stem, yaml.safe_load(path.read_text()))
        if "miniature" in experiment.checked.model.path:
            cells = (
                judge_cells(experiment.values, experiment.sweep, {})
                + tune_cells(experiment.values, experiment.sweep)[:1]
            )
            asked = {str(cell.values["tasks"]): cell.values for cell in cells}
            assert set().union(*(ids({**values, "methods": {}}) for values in asked.values())) <= excluded, path.name
