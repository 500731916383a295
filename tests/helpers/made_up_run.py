"""A run folder as `jaxmerge improve` would have left it, with made-up numbers and hostile texts."""

import json
import math
import pathlib
import random

NASTY = '<script>alert("x")</script> & <b>bold</b> \x1b[31m \x00 ]]> \ud800 "quoted"'
METHODS = {  # method: (in domain, out of domain) after each round; the base is (33, 74)
    "plain": ((44, 66), (49, 62), (51, 60)),
    "imm": ((39, 74), (41, 73), (43, 73)),
    "plain_lowlr": ((40, 74), (45, 73), (47, 72)),
    "expo": ((50, 58), (52, 53), (53, 49)),
}
FAMILIES = {"id": ("gcd",), "harder": ("gcd_200",), "ood": ("chain_sum", "products", "sorting", "geometry")}
LINE = {0.25: (37, 74), 0.5: (41, 73), 0.75: (46, 69), 1.0: (51, 60), 1.25: (50, 48), 1.5: (44, 33)}


def _row(method, round_, domain, family, percent, n, **more):
    p = percent / 100
    z = 1.96 * math.sqrt(p * (1 - p) / n)
    return {
        "method": method, "round": round_, "domain": domain, "family": family, "split": "test", "accuracy": p,
        "low": max(p - z, 0.0), "high": min(p + z, 1.0), "n": n, "seconds": 3.25, **more,
    }  # fmt: skip


def _rows(method, round_, percents, **more):
    inside, outside = percents
    rows = []
    for domain, value, n in (("id", inside, 400), ("harder", inside * 0.7, 400), ("ood", outside, 750)):
        rows.append(_row(method, round_, domain, "all", value, n, **more))
        names = FAMILIES[domain]
        for i, family in enumerate(names):
            shift = (i - (len(names) - 1) / 2) * 7
            rows.append(_row(method, round_, domain, family, value + shift, n // len(names), **more))
    return rows


QUESTIONS = (  # question, expected answer, family, domain
    ("What is the greatest common divisor of 48 and 36?", "12", "gcd", "id"),
    (f"gcd of 91 and 35 {NASTY}", f"7 {NASTY}", "gcd", "id"),
    ("What is 17 + 25?", "42", "chain_sum", "ood"),
    ("What is 6 times 7?", "42", "products", "ood"),
)


def _answers(method):
    """The first right, the second hostile, the third long, the fourth not judged."""
    long = "seventeen and " * 60 + f"end by {method} #40"
    said = (f"48 = 36 + 12, says {method}. #12", f"91 - 35 = 56 {NASTY}", long, "")
    return [
        {
            "question_id": f"{family}-{i}", "family": family, "domain": domain, "question": question, "answer": answer,
            "text": text, "score": score,
        }
        for i, ((question, answer, family, domain), text, score) in enumerate(
            zip(QUESTIONS, said, (1.0, 0.0, 0.0, None), strict=True)
        )
    ]  # fmt: skip


CONFIG = """model:
  path: runs/miniature  # <the checkpoint>
  random: null
  dtype: float32
tasks:
  families:
  - {family: gcd, domain: id, train: 1000, validation: 100, test: 400}
  - {family: gcd_200, domain: harder, test: 400}
  - {family: chain_sum, domain: ood, test: 187}
  - {family: products, domain: ood, test: 187}
methods: {plain: {}, imm: {}, plain_lowlr: {}, expo: {}, line: {probe: {of: plain, kind: line}}}
rounds: 3
merge:
  alpha: 0.5
"""


def _change(scale, layers=12):
    change = {"model/embed_tokens": 0.2 * scale}
    change |= {f"model/layers/{i}": scale * (0.5 + math.sin(3 * i / layers) ** 2) for i in range(layers)}
    return change | {"model/norm": 0.05 * scale}


def write_run(folder: pathlib.Path, *, finished: bool = True) -> pathlib.Path:
    """Write a run as `jaxmerge improve` would have left it, with made-up numbers."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = random.Random(0)
    phases = [{"phase": "load", "kind": "load", "seconds": 1.5, "parameters": 12_345_678}]
    evaluations = [("base", 0, (33, 74))]
    rows = _rows("base", 0, (33, 74))
    phases.append(
        {
            "phase": "base/evaluate",
            "kind": "evaluate",
            "round": 0,
            "method": "base",
            "seconds": 9.0,
            "rows": rows,
            "examples": _answers("base"),
        }
    )
    for r in range(3):
        for method, track in METHODS.items():
            common = {"round": r + 1, "method": method}
            if method != "expo" and not (r == 0 and method == "imm"):
                shared = {"shared_by": ["imm"]} if r == 0 and method == "plain" else {}
                kept, correct = 900 + 80 * r, 1400 + 60 * r
                phases += [
                    {"phase": f"round-{r + 1}/{method}/sample", "kind": "sample", **common, "seconds": 21.0,
                     "questions": 1000, "samples": 4000, "tokens": 91234, "tokens_per_second": 4344.5, **shared},
                    {"phase": f"round-{r + 1}/{method}/select", "kind": "select", **common, "seconds": 1.0,
                     "sampled": 4000, "correct": correct, "unjudged": 37, "duplicates": correct - kept, "kept": kept,
                     "questions_solved": 612, "families": {"gcd": {"sampled": 4000, "correct": correct}},
                     "examples": [
                         {"question": "What is the greatest common divisor of 48 and 36?", "answer": "12",
                          "text": "48 = 1·36 + 12; 36 = 3·12 + 0\n#12", "score": 1.0, "accepted": True, "reason": ""},
                         {"question": f"gcd of 91 and 35 {NASTY}", "answer": "7", "text": f"91-35=56 {NASTY}",
                          "score": 0.01, "accepted": False, "reason": "wrong answer"},
                     ], **shared},
                    {"phase": f"round-{r + 1}/{method}/sft", "kind": "sft", **common, "seconds": 30.0, "steps": 120,
                     "epochs": 2, "examples": kept, "tokens": 50000, "learning_rate": 7e-4,
                     "loss": [[s, 0.2 + math.exp(-s / 30) / (1 + r) + 0.04 * rng.random()]
                              for s in range(0, 121, 4)],
                     "loss_first": 1.3, "loss_last": 0.21, "change": _change(0.02 * (r + 1)), **shared},
                ]  # fmt: skip
            if method in ("imm", "expo"):
                scale = 0.01 * (r + 1) * (1 if method == "imm" else 2.6)
                phases.append(
                    {"phase": f"round-{r + 1}/{method}/merge", "kind": "merge", **common, "seconds": 0.4,
                     "rule": method, "coefficients": {"alpha": 0.5}, "change": _change(scale), "notes": []}
                )  # fmt: skip
            new = _rows(method, r + 1, track[r])
            evaluations.append((method, r + 1, track[r]))
            phases.append(
                {
                    "phase": f"round-{r + 1}/{method}/evaluate",
                    "kind": "evaluate",
                    **common,
                    "seconds": 9.0,
                    "rows": new,
                    "examples": _answers(method),
                }
            )
            rows = rows + new
    for coefficient, percents in LINE.items():
        rows = rows + [r for r in _rows("line", 3, percents, coefficient=coefficient) if r["family"] == "all"]
    (folder / "config.yaml").write_text(CONFIG)
    planned = [p["phase"] for p in phases]
    if not finished:
        phases = phases[:9]
    text = "".join(json.dumps(p) + "\n" for p in phases)
    (folder / "metrics.jsonl").write_text(text + ("" if finished else '{"phase": "torn'))
    paired = [
        {"a": m, "b": "base", "round": 3, "domain": d, "split": "test", "difference": (METHODS[m][2][i] - b) / 100,
         "low": (METHODS[m][2][i] - b) / 100 - 0.04, "high": (METHODS[m][2][i] - b) / 100 + 0.04, "n": n}
        for m in METHODS for i, (d, b, n) in enumerate((("id", 33, 400), ("ood", 74, 750)))
    ]  # fmt: skip
    if not finished:
        rows, paired = [row for p in phases for row in p.get("rows", ())], []
    summary = {
        "name": "miniature", "finished": finished, "rows": rows, "paired": paired, "seconds": 402.0,
        "planned": planned, "left": planned[len(phases):],
        "phase_seconds": {"load": 1.5, "sample": 168.0, "select": 8.0, "sft": 240.0, "merge": 2.4, "evaluate": 117.0},
        "versions": {"python": "3.12.4", "jax": "0.12.0", "flax": "0.12.12"}, "device": "cpu x1",
        "command": "jaxmerge improve configs/miniature.yaml rounds=3", "commit": "abc1234def567",
    }  # fmt: skip
    (folder / "summary.json").write_text(json.dumps(summary))
    return folder
