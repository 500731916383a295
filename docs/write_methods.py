"""Write docs/methods.md, the map of methods, from the rows of docs/methods/*.yaml: `python docs/write_methods.py`."""

from __future__ import annotations

import pathlib
from typing import Any

import yaml

HERE = pathlib.Path(__file__).resolve().parent
KINDS = {
    "rule": ("Merging models", "Recipes of `jaxmerge merge` have these lines; [merge.md](merge.md) says the rest."),
    "extrapolation": ("Extrapolation", "They go beyond the tuned weights, or along the line to them."),
    "weights": ("Weight space", "They change weights by what was measured, or train in branches."),
    "improvement": ("Self-improvement", "Keys of a run, or of one of its `methods`."),
    "objective": (
        "What fine-tuning minimises",
        "$p$ is the model's probability, $y_w$ and $y_l$ are the better and the worse answer, $\\Delta$ is "
        "$\\log p_\\theta - \\log p_0$ of an answer, and $s$ its mean log-probability.",
    ),
    "policy": (
        "Reinforcement learning",
        "$A$ is the advantage of a sample, and $\\rho$ the ratio of its probabilities under the trained model and "
        "under the one that drew it.",
    ),
    "distillation": ("Distillation", "$p_T$ is the teacher's distribution."),
    "beside": ("Merging beside the trainer", "Snapshots are summed while a model is trained."),
    "mask": ("Which parameters are trained", "All others keep their bits."),
    "stay": ("Staying near the original, and other ways to update", "They are the controls of merging."),
    "data": ("Data", "Samples or examples go in, and what is learnt comes out."),
    "decoding": ("Decoding", "Several models decide on every token."),
    "analysis": ("Analysis", "They measure what a model does."),
    "inspection": ("Looking at what training changed", "They measure what training did to a model."),
}
"""Files of rows, in the order of the page: heading, and the sentence under it."""
FIELDS = ("name", "paper", "url", "formula", "file", "verb", "keys", "law", "oracle", "measured", "test")
HEAD = """# The method map

On this page you find, for a method that you know from a paper, its formula here, the keys that switch it on, the file
that computes it, the tests that hold it, and what we measured.

`python docs/write_methods.py` writes this page from the rows in `docs/methods/`. `tests/repository/test_methods.py`
holds that every row's keys are keys of its verb, that its tests exist, and that every rule merges.

Keys are added to the command of the verb: `jaxmerge sft CONFIG KEYS`. They may also stand in a config. Words in
capitals stand for your own files. A *law* is a test of an identity, a limit or a formula in NumPy. A *peer* is a test
against another library's numbers. Where the last column is empty we have not measured what the method does.
"""


def rows_of(kind: str, folder: pathlib.Path = HERE / "methods") -> list[dict[str, Any]]:
    """The rows of a kind of methods."""
    path = folder / f"{kind}.yaml"
    return yaml.safe_load(path.read_text(encoding="utf-8")) if path.exists() else []


def cell(text: str) -> str:
    """Text in a table: a bar would end the cell."""
    return text.replace("|", "\\|").strip()


def formula(text: str) -> str:
    """Mathematics in a table."""
    return text.replace("\\|", "\\Vert ").replace("|", "\\vert ")


def code(text: str) -> str:
    return f"`{cell(text)}`"


def test_link(name: str, word: str) -> str:
    """A word that leads to the file of a test."""
    return f"[{word}](../{name.partition('::')[0]})" if name else ""


def section(kind: str) -> str:
    """The heading of a kind and its table."""
    title, about = KINDS[kind]
    lines = [f"## {title}", "", about, "", "| method | formula | verb and keys | file | tests | measured |",
             "|---|---|---|---|---|---|"]  # fmt: skip
    for row in rows_of(kind):
        paper = f"[{row['paper'] or 'source'}]({row['url']})" if row["url"] else row["paper"]
        name = f"{row['name']} ({paper})" if paper else row["name"]
        keys = " ".join([row["verb"] + ":", *(code(key) for key in row["keys"])])
        tests = ", ".join(filter(None, (test_link(row["law"], "law"), test_link(row["oracle"], "peer"))))
        place = f"[{pathlib.PurePath(row['file']).name}](../{row['file']})"
        verb = keys if row["keys"] else row["verb"]
        cells = (cell(name), formula(row["formula"]), verb, place, tests, cell(row["measured"]))
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


def page() -> str:
    """The whole page."""
    parts = [HEAD.rstrip(), *(section(kind) for kind in KINDS if rows_of(kind))]
    return "\n\n".join([*parts, (HERE / "methods" / "others.md").read_text(encoding="utf-8").rstrip()]) + "\n"


if __name__ == "__main__":
    (HERE / "methods.md").write_text(page(), encoding="utf-8")
