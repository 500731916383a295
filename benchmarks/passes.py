r"""Seconds of each pass of a merge on disk: python benchmarks/passes.py recipe.yaml

A pass is a loop of a compiled rule, named after the functions of this library that wrote it (the innermost first) and
its instruction; these are seconds by the clock, of as many cores as the loop has. Stations of the engine and what NumPy
computes are there in seconds of their threads, added up. The recipe is merged twice in a temporary folder, the second
time under jax's profiler. The last line is all of it as JSON.
"""

from __future__ import annotations

import collections
import gzip
import json
import os
import pathlib
import re
import sys
import tempfile
import time
from typing import Any

ROOT = pathlib.Path(__file__).resolve().parent.parent


def passes(recipe: str, place: pathlib.Path) -> list[tuple[str, float]]:
    """Merge twice, the second time under the profiler, and return the seconds of each pass, the longest first."""
    import jax

    from jaxmerge import host
    from jaxmerge.files import engine, merge
    from jaxmerge.files.checkpoints import safetensors

    spent: collections.defaultdict[str, float] = collections.defaultdict(float)

    def clocked(of: Any, name: str, what: str) -> None:
        function = getattr(of, name)

        def run(*args: Any, **keywords: Any) -> Any:
            start = time.thread_time()
            try:
                return function(*args, **keywords)
            finally:
                spent[what] += time.thread_time() - start

        setattr(of, name, run)

    clocked(engine, "_fill", "reading, on threads")
    clocked(safetensors.Writer, "write", "writing, on a thread")
    clocked(host, "_rank_block", "host.py _rank_block, on threads")
    merge(recipe, place / "first")
    spent.clear()
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(place / "trace"), create_perfetto_trace=True, profiler_options=options):
        merge(recipe, place / "second")
    (found,) = (place / "trace").rglob("perfetto_trace.json.gz")
    written = writers(place / "dump")
    for event in json.loads(gzip.decompress(found.read_bytes()))["traceEvents"]:
        about = event.get("args", {})
        if event.get("ph") == "X" and "hlo_op" in about and event["name"] == about["hlo_op"]:
            module = about["hlo_module"]
            spent[written.get((module, about["hlo_op"]), f"{module} {about['hlo_op']}")] += event["dur"] / 1e6
    return sorted(spent.items(), key=lambda item: -item[1])


def writers(dump: pathlib.Path) -> dict[tuple[str, str], str]:
    """(module, instruction) → the functions of this library that wrote it, the outer first, as XLA's dumps tell."""
    found = {}
    for path in sorted(dump.glob("*after_optimizations.txt")):
        text = path.read_text()
        tables = {
            name: dict(re.findall(r"^(\d+) (.*)$", body, re.MULTILINE))
            for name, body in re.findall(r"^(File\w+|FunctionNames|StackFrames)\n((?:\d+ .*\n)+)", text, re.MULTILINE)
        }
        module = re.search(r"HloModule ([\w.-]+)", text)
        assert module is not None
        for name, frame in re.findall(r"%([\w.-]+) = [^\n]*stack_frame_id=(\d+)", text):
            names: list[str] = []
            while frame is not None:
                at, parent = re.findall(r"=(\d+)", tables["StackFrames"][frame])
                file, function = re.findall(r"_id=(\d+)", tables["FileLocations"][at])
                if "/jaxmerge/" in tables["FileNames"][file]:
                    short = tables["FileNames"][file].strip('"').rpartition("/")[2]
                    names.append(f"{short} {tables['FunctionNames'][function].strip(chr(34))}")
                frame = None if parent == frame else parent
            if names:
                found.setdefault((module[1], name), f"{' < '.join(dict.fromkeys(names[:3]))} ({name})")
    return found


def main(words: list[str]) -> None:
    if len(words) != 1:
        raise SystemExit(f"give one recipe; see the top of {__file__}")
    sys.path.insert(0, str(ROOT))
    with tempfile.TemporaryDirectory(dir=".") as place:
        # XLA reads its flags once, when jax starts; what comes from the cache is not dumped.
        flags = f"{os.environ.get('XLA_FLAGS', '')} --xla_dump_to={pathlib.Path(place).resolve()}/dump"
        os.environ |= {"XLA_FLAGS": f"{flags} --xla_dump_hlo_as_text", "JAX_ENABLE_COMPILATION_CACHE": "false"}
        os.environ.setdefault("JAX_PLATFORMS", "cpu")
        found = passes(words[0], pathlib.Path(place))
    for what, seconds in found[:12]:
        print(f"{seconds:9.3f} s  {what}")
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
