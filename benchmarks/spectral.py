r"""Rules of singular values against fusion-bench: python benchmarks/spectral.py peer=PATH/python3.11 [key=value …]

  peer=            a Python with fusion-bench 0.2.33; without it ours alone are timed
  shapes=576x576,1536x576,576x1536
  models=4         changes of each matrix, float32
  repeats=5        in turns, after one that compiles; medians are printed

Seconds of one merge of all the matrices, ours as a compiled call on arrays in memory and theirs as their functions are
called in a loop over a state dict. For WUDI theirs takes 300 steps of Adam, whose objective is printed beside ours.
"""

from __future__ import annotations

import pathlib
import statistics
import subprocess
import sys
import tempfile
import time

import numpy as np

ROOT = pathlib.Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))
RULES = ("tsvm", "iso_c", "iso_cts", "svc", "wudi")
THEIRS = """
import sys, time
import numpy as np, torch
from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
from fusion_bench.method.singular_value_calibration.utils import subspace_consistency_spectral_calibration as svc
from fusion_bench.method.task_singular_vector.utils import TSVM_utils
from fusion_bench.method.wudi.wudi import wudi_merging

data = np.load(sys.argv[1])
names = sorted({name.split("/")[0] for name in data.files})
base = {n: torch.tensor(data[n + "/base"]) for n in names}
vectors = [{n: torch.tensor(c) for n in names for c in [data[n + "/changes"][i]]} for i in range(int(sys.argv[2]))]

def calibrated():
    tuned = {n: [base[n] + v[n] for v in vectors] for n in names}
    return {n: svc(base[n], tuned[n], base[n] + sum(v[n] for v in vectors), 1.0) for n in names}

CALLS = {
    "tsvm": lambda: TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu"),
    "iso_c": lambda: iso_c(vectors, accelerator="cpu"),
    "iso_cts": lambda: iso_cts(vectors, 0.8, accelerator="cpu"),
    "svc": calibrated,
    "wudi": lambda: wudi_merging(vectors, accelerator="cpu", iter_num=300),
}
out, sys.stdout = sys.stdout, sys.stderr
print("ready", file=out, flush=True)
for line in sys.stdin:
    rule = line.strip()
    begin = time.perf_counter()
    found = CALLS[rule]()
    seconds = time.perf_counter() - begin
    if rule == "wudi":
        np.savez(sys.argv[3], **{n: found[n].detach().numpy() for n in names})
    print(seconds, file=out, flush=True)
"""


def interference(tau: np.ndarray, changes: np.ndarray) -> float:
    """WUDI's objective."""
    return float(sum(np.sum(((tau - d) @ d.T) ** 2) / np.sum(d * d) for d in changes.astype(np.float64)))


def main(words: list[str]) -> int:
    given = {"shapes": "576x576,1536x576,576x1536", "models": "4", "repeats": "5", "peer": ""}
    given |= dict(word.split("=", 1) for word in words)
    import jax

    import jaxmerge

    rng = np.random.default_rng(0)
    count, data = int(given["models"]), {}
    for i, shape in enumerate(given["shapes"].split(",")):
        rows, columns = map(int, shape.split("x"))
        data[f"m{i}/base"] = rng.standard_normal((rows, columns)).astype(np.float32)
        data[f"m{i}/changes"] = (0.02 * rng.standard_normal((count, rows, columns))).astype(np.float32)
    names = sorted({name.split("/")[0] for name in data})
    base = {name: jax.numpy.asarray(data[f"{name}/base"]) for name in names}
    models = [{name: base[name] + data[f"{name}/changes"][i] for name in names} for i in range(count)]

    def ours(rule: str) -> float:
        begin = time.perf_counter()
        jax.block_until_ready(jaxmerge.RULES[rule](models, base=base))
        return time.perf_counter() - begin

    with tempfile.TemporaryDirectory() as place:
        there = pathlib.Path(place)
        np.savez(there / "data.npz", **data)
        peer = None
        if given["peer"]:
            peer = subprocess.Popen(
                [given["peer"], "-c", THEIRS, there / "data.npz", str(count), there / "wudi.npz"],
                stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True,
            )  # fmt: skip
            assert peer.stdout is not None
            peer.stdout.readline()

        def theirs(rule: str) -> float:
            assert peer is not None
            assert peer.stdin is not None
            assert peer.stdout is not None
            print(rule, file=peer.stdin, flush=True)
            return float(peer.stdout.readline())

        print("| rule | ours, s | fusion-bench, s | times faster |\n|---|---|---|---|")
        for rule in RULES:
            repeats = 1 if rule == "wudi" else int(given["repeats"])
            ours(rule)
            pairs = [(ours(rule), theirs(rule) if peer else float("nan")) for _ in range(repeats)]
            mine, its = (statistics.median(side) for side in zip(*pairs, strict=True))
            print(f"| {rule} | {mine:.3f} | {its:.3f} | {its / mine:.2f} |", flush=True)
        if peer:
            merged = jaxmerge.wudi(models, base=base)
            adam = np.load(there / "wudi.npz")
            for name in names:
                changes = data[f"{name}/changes"]
                mine = interference(np.asarray(merged[name] - base[name], np.float64), changes)
                print(f"WUDI's objective of {name}: ours {mine:.4g}, theirs {interference(adam[name], changes):.4g}")
            peer.kill()
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
