"""`jaxmerge analyse` on a real tiny run: its files, its page and the report, the same twice, every mistake named."""

import json
import re
import shutil
import xml.etree.ElementTree as ET

import pytest
import yaml
from helpers import ROOT

from train.cli.__main__ import main
from train.improve.run import improve
from train.improve.settings import Improve
from train.log import UserError
from train.report.analysis import content, write_page
from train.report.html import escape
from train.report.page import write_report
from train.resolve import build
from train.studies.analyse import analyse_run
from train.studies.measures import MEASURES
from train.studies.settings import AnalyseOptions

TINY = ROOT / "configs" / "tiny.yaml"
NASTY = '<script>alert("x")</script>'


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    config = yaml.safe_load(TINY.read_text())
    config["methods"] = {name: config["methods"][name] for name in ("plain", "imm", "expo")}
    config["sft"] |= {"epochs": 2}
    out = tmp_path_factory.mktemp("analyse") / "run"
    return improve(build(Improve, config), name="tiny", out=out)


@pytest.fixture(scope="module")
def analysed(run):
    words = ["samples=4", "questions=4", "limem=true", "faithfulness=true", "grid=3"]
    assert main(["analyse", str(run), *words]) == 0
    return json.loads((run / "analysis.json").read_text()), (run / "analysis.html").read_text()


def test_every_measure_has_numbers_and_a_time(run, analysed):
    found, _ = analysed
    assert set(found["seconds"]) == set(MEASURES)
    assert all(found[name] is not None for name in MEASURES)
    assert (found["method"], found["rounds"], found["layers"]) == ("imm", [1, 2], 2)
    assert [len(found["importance"][key]) for key in ("skip", "taylor")] == [2, 2]
    assert {(row["round"], row["model"]) for row in found["change"]} == {
        (1, "tuned"), (1, "merged"), (2, "tuned"), (2, "merged")
    }  # fmt: skip
    assert len(found["importance"]["correlation"]) == 4
    assert [p["k"] for p in found["diversity"][0]["pass"]] == [1, 2, 3, 4]
    assert {(row["domain"], row["round"]) for row in found["diversity"]} == {
        (domain, round) for domain in ("id", "ood") for round in (0, 1, 2)
    }
    rows = [row for row in found["faithfulness"] if row["chains"]]
    assert {row["domain"] for row in found["faithfulness"]} == {"id", "ood"}
    assert {row["model"] for row in found["faithfulness"]} == {"base", "tuned 2", "merged 2"}
    assert rows, "some completion has a step and an answer"
    for test in ("early", "mistakes"):
        for measured in (row[test] for row in rows if row[test]):
            assert 0 <= measured["area"][0] <= 1
            assert [x for x, _ in measured["curve"]] == [0.0, 0.25, 0.5, 0.75, 1.0]
            assert measured["curve"][-1][1] == 1.0
    # On the line λ = 0 is the base, whose loss over both texts importance has measured too.
    tokens = {domain: text["tokens"] for domain, text in found["texts"].items()}
    at_base = {domain: losses[0] for domain, losses in found["line"]["losses"].items()}
    mean = sum(at_base[d] * n for d, n in tokens.items()) / sum(tokens.values())
    assert mean == pytest.approx(found["importance"]["nll"], rel=1e-5)
    # A round's own record of its change, made by another function, agrees.
    lines = (run / "metrics.jsonl").read_text().splitlines()
    record = next(row for row in map(json.loads, lines) if row["phase"] == "round-2/imm/merge")
    assert found["change"][-1]["layers"] == pytest.approx(record["change"], rel=1e-5)


def test_same_numbers_twice_and_one_round_alone(run, analysed, tmp_path):
    found, _ = analysed
    analyse_run(
        run, AnalyseOptions(samples=4, questions=4, limem=True, faithfulness=True, grid=3, out=str(tmp_path / "other"))
    )
    again = json.loads((tmp_path / "other" / "analysis.json").read_text())
    assert {**again, "seconds": 0} == {**found, "seconds": 0}
    analyse_run(run, AnalyseOptions(rounds=(1,), method="plain", out=str(tmp_path / "one"), grid=3))
    one = json.loads((tmp_path / "one" / "analysis.json").read_text())
    assert (one["rounds"], one["agreement"], one["limem"], one["faithfulness"]) == ([1], None, None, None)
    assert any("no two task vectors" in note for note in one["notes"])
    assert one["diversity"][0]["of"] == "the run's samples of training questions"
    assert [p["k"] for p in one["diversity"][0]["pass"]] == [1, 2]
    # One round's models lie on a line; the middle of its fine-tuning does not.
    assert set(one["plane"]["places"]) == {"tuned 1", "extrapolated", "half-way"}


def test_the_page_asks_for_nothing_and_has_a_table_for_every_figure(run, analysed):
    found, page = analysed
    assert not re.search(r"url\(|@import|<link|<script|<iframe|https?:|(?:src|href)=[\"'](?!#)", page)
    pictures = re.findall(r"<svg.*?</svg>", page, flags=re.S)
    assert len(pictures) > 18
    ids = [i for picture in pictures for i in re.findall(r' id="([^"]+)"', picture)]
    assert len(ids) == len(set(ids))
    for picture in pictures:
        root = ET.fromstring(picture)
        assert root.find("title").text
        assert root.find("desc").text
        assert "nan" not in picture.split("</desc>")[1]
        width = float(root.get("viewBox").split()[2])
        assert width <= 350, "fits a screen of 390 pixels with its margins"
        for text in root.iter("text"):
            assert -1 <= float(text.get("x")) <= width + 1
    sections = page.split("<h3>")[1:]
    assert len(sections) == 11
    assert all("<svg" in section and "<table" in section for section in sections)
    alone = list((run / "analysis").glob("*.svg"))
    assert len(alone) == len(pictures)
    assert all(ET.parse(path).getroot().tag == "{http://www.w3.org/2000/svg}svg" for path in alone)
    # Every layer's importance and every λ is in a table.
    for value in found["importance"]["taylor"]:
        assert f">{value:.3g}</td>" in page
    assert page.count("<caption>") >= 10


def test_the_report_shows_it(run, analysed, tmp_path):
    report = (run / "report.html").read_text()
    assert '<section id="analysis"' in report
    assert content(analysed[0]) in report
    assert "prefers-color-scheme:dark" in analysed[1]
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints", "phases"))
    (copy / "analysis.json").unlink()
    assert "Analysis</a>" not in write_report(copy).read_text()
    (copy / "analysis.json").write_text("{")
    with pytest.raises(UserError, match=r"analysis\.json: not JSON"):
        write_report(copy)
    (copy / "analysis.json").write_text('{"run": "x"}')
    with pytest.raises(UserError, match=r"analysis\.json: it lacks method, rounds, .*; write it again"):
        write_report(copy)


def test_words_of_a_file_stay_words(analysed, tmp_path):
    found = {**analysed[0], "run": NASTY, "method": NASTY, "notes": [NASTY]}
    (tmp_path / "analysis.json").write_text(json.dumps(found))
    page = write_page(tmp_path).read_text()
    assert "<script" not in page
    assert escape(NASTY) in page


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["rounds=[3]"], r"rounds=\[3\]: round 3 is not there; wanted some of \[1, 2\]"),
        (["method=expo"], "method=expo: a probe trains nothing, so there is nothing to analyse; wanted plain, imm"),
        (["method=im"], "method=im: the run has no such method; did you mean imm"),
        (["samples=-1"], "samples=-1; it must be at least 0"),
        (["sample=4"], "sample: no such key; did you mean samples"),
        (["limem=3"], "limem is 3; bool is wanted"),
        (["rounds=2"], "rounds is 2; a list is wanted"),
        ([f"out={TINY}"], r"out=.*tiny\.yaml: a file is there; wanted a folder"),
    ],
)
def test_mistakes_are_named(run, capsys, words, message):
    assert main(["analyse", str(run), *words]) == 2
    error = capsys.readouterr().err
    assert re.search(message, error), error
    assert error.count("\n") == 1


def test_folders_that_cannot_be_analysed(run, capsys, tmp_path):
    assert main(["analyse", str(tmp_path)]) == 2
    assert "not the folder of a run (no config.yaml)" in capsys.readouterr().err
    copy = tmp_path / "copy"
    shutil.copytree(run, copy, ignore=shutil.ignore_patterns("checkpoints"))
    assert main(["analyse", str(copy)]) == 2
    assert "the weights of round 1, 2 were deleted (keep)" in capsys.readouterr().err
    shutil.rmtree(copy / "phases")
    (copy / "phases").mkdir()
    assert main(["analyse", str(copy)]) == 2
    assert "no round to analyse, none is done" in capsys.readouterr().err
