"""A page that is watched: how far the run is, loaded anew only while there is more to come, and cheap to write."""

import json
import re

import pytest
from helpers.made_up_run import METHODS, NASTY, write_run

from jaxmerge.files.inspect import canvas
from train.log import UserError
from train.report import kept
from train.report.about import format_count
from train.report.html import escape
from train.report.page import write_report
from train.report.plots import dots, short

REFRESH = '<meta http-equiv="refresh" content="15">'


@pytest.fixture
def drawn(monkeypatch):
    """How many pictures were drawn, with none kept from before."""
    monkeypatch.setattr(kept, "_drawn", type(kept._drawn)())
    made = []
    svg = canvas.Canvas.svg
    monkeypatch.setattr(
        canvas.Canvas, "svg", lambda self, **options: made.append(options["name"]) or svg(self, **options)
    )
    return made


def cut_after(folder, count):
    """Make a finished run one of which `count` phases are done."""
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    phases = [json.loads(line) for line in lines][:count]
    (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in phases))
    summary = json.loads((folder / "summary.json").read_text())
    rows = [row for p in phases for row in p.get("rows", ())]
    left = summary["planned"][count:]
    (folder / "summary.json").write_text(
        json.dumps({**summary, "finished": False, "rows": rows, "paired": [], "left": left})
    )


def test_only_an_unfinished_run_is_loaded_again(tmp_path):
    folder = write_run(tmp_path / "run")
    page = write_report(folder).read_text()
    assert "http-equiv" not in page
    assert "44 of 44 phases are done." in page
    cut_after(folder, 11)
    page = write_report(folder).read_text()
    assert page.count(REFRESH) == 1
    assert page.index(REFRESH) < page.index("</head>")
    assert "11 of 44 phases are done; next is round-1/plain_lowlr/evaluate." in page
    (width,) = re.findall(r'class="whole">\s*<span class="bar"[^>]*><i style="width:([\d.]+)%', page)
    assert float(width) == pytest.approx(25)


def test_a_run_of_an_older_version_has_no_bar(tmp_path):
    folder = write_run(tmp_path / "run")
    summary = json.loads((folder / "summary.json").read_text())
    (folder / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k not in ("planned", "left")}))
    assert "phases are done" not in write_report(folder).read_text()
    (folder / "summary.json").unlink()
    page = write_report(folder).read_text()
    assert "Unfinished run" in page
    assert "http-equiv" not in page, "nobody will write this page again"


def test_every_prefix_of_a_run_has_a_page_and_no_method_changes_its_colour(tmp_path):
    """Also where nothing, or only the base, is evaluated; hostile names of phases are text."""
    colours = {name: f"var(--s{i})" for i, name in enumerate(METHODS)}
    folder = write_run(tmp_path / "run")
    for count in (*range(0, 13), 20, 30, 43):
        write_run(folder)
        cut_after(folder, count)
        page = write_report(folder).read_text()
        assert f"{count} of 44 phases are done" in page
        for name, css in re.findall(r'--c:([^"]*)"><h3>(\w+) after', page):
            assert colours[css] == name
    cut_after(folder, 0)
    assert "Nothing has been evaluated yet." in write_report(folder).read_text()
    text = (folder / "summary.json").read_text()
    (folder / "summary.json").write_text(text.replace('"left": ["load"', f'"left": [{json.dumps(NASTY)}'))
    page = write_report(folder).read_text()
    assert f"next is {escape(NASTY)}" in page
    assert "<script" not in page


def test_a_page_written_again_draws_only_what_changed(tmp_path, drawn):
    folder = write_run(tmp_path / "run")
    first = write_report(folder).read_bytes()
    count = len(drawn)
    assert count > 20
    assert write_report(folder).read_bytes() == first
    assert len(drawn) == count, "nothing changed, so nothing is drawn"
    phases = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    tuned = next(p for p in phases if p["phase"] == "round-3/imm/sft")
    tuned["loss"][-1][1] -= 0.001
    (folder / "metrics.jsonl").write_text("".join(json.dumps(p) + "\n" for p in phases))
    changed = write_report(folder).read_bytes()
    assert len(drawn) == count + 1, "one panel of the losses"
    kept._drawn.clear()
    assert write_report(folder).read_bytes() == changed, "kept or drawn, the page is the same"


def test_pictures_are_kept_apart_by_all_that_is_in_them(drawn):
    rows = [("a", 0.5, None)]
    same = {"name": "x", "title": "t"}
    first = dots(rows, **same, form=short)
    assert dots(list(rows), **same, form=short) == first
    assert len(drawn) == 1
    assert dots([("a", 0.25, None)], **same, form=short) != first
    assert dots(rows, **same, form=short, width=512.0) != first
    assert "one" in dots(rows, **same, form=lambda v: "one")
    assert "two" in dots(rows, **same, form=lambda v: "two"), "functions without a lasting name are asked each time"
    for i in range(kept.MOST + 5):
        dots(rows, **same | {"title": f"t{i}"})
    assert len(kept._drawn) == kept.MOST


def test_the_head_names_model_and_task(tmp_path):
    folder = write_run(tmp_path / "run")
    page = write_report(folder).read_text()
    head = page[: page.index("<nav")]
    for term, words in (
        ("Model", "runs/miniature · 12.3 M parameters · float32"), ("Learns from", "gcd (1,000 questions)"),
        ("Tested on", "in domain: gcd (400); harder: gcd_200 (400); out of domain: chain_sum (187), products (187)"),
        ("Methods", "plain, imm, plain_lowlr, expo, line · 3 rounds"),
        ("Run", "6 min 42 s on cpu x1 · commit abc1234def56"),
    ):  # fmt: skip
        assert f"<dt>{term}</dt><dd>{words}</dd>" in head
    (folder / "config.yaml").write_text(f"model: {{path: {json.dumps(NASTY[:40])}}}\ntasks: [1]\nmethods: 3\n")
    page = write_report(folder).read_text()
    assert f"<dt>Model</dt><dd>{escape(NASTY[:40])}" in page
    assert "Learns from" not in page
    (folder / "config.yaml").write_text("model: {path: ''\n  random: {num_hidden_layers: 2, hidden_size: 32}}")
    with pytest.raises(UserError, match=r"config\.yaml"):
        write_report(folder)
    (folder / "config.yaml").write_text("model: {path: '', random: {num_hidden_layers: 2, hidden_size: 32}}")
    assert "random weights (2 layers, hidden size 32)" in write_report(folder).read_text()


def test_numbers_of_parameters():
    assert [format_count(n) for n in (999_999, 10**6, 999_949_999, 10**9)] == ["999,999", "1.0 M", "999.9 M", "1.00 B"]
