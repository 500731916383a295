r"""All that is claimed of accelerators, in at most eight minutes: python benchmarks/accelerator.py [key=value …]

  size=auto        full on a GPU or TPU (a 1 B model), toy on a CPU (seconds a section: to see that it runs)
  seconds=480      in all, compiling included; what is not begun by then is left out
  sections=all     or some of device, sft, rollouts, peer, attention, tests, merge, improve, with commas between
  out=FILE.json    the figures, written after every section

  device     bandwidth of a copy and rate of a matrix product, against the data sheet
  sft        tokens a second and MFU of our step of fine-tuning, Llama-3.2-1B's shape
  rollouts   tokens a second of our engine, and a decode step against the memory's bandwidth
  peer       the same work by transformers on torch, where torch is installed and sees the device
  attention  plain, cuDNN's, splash and tiled attention, forward and backward, those that run here
  tests      the tests marked `gpu`
  merge      the library's rules on models of 1 B parameters on the device, against a copy
  improve    one round of IMM by phase

Weights are random and nothing is downloaded. Each section is a process of its own with a bounded time, one at a time,
because jax takes most of the device's memory when it starts; set XLA_PYTHON_CLIENT_MEM_FRACTION to leave others more.
A section that fails says why in a line, and the next one runs. One device is used, the first.

Exit code 0: every section gave figures or had a reason to be skipped; 1: one failed or was cut off.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

OPTIONS = {"size": "auto", "seconds": "480", "sections": "all", "out": ""}
LIMITS = {
    "device": 60, "sft": 130, "rollouts": 90, "peer": 75, "attention": 75, "tests": 95, "merge": 100, "improve": 90,
}  # fmt: skip
"""Seconds of a section at most, in the order in which they run; what one does not use is there for the later ones."""
MARK = "@figure "


# --- the process of a section ---


def be_section(name: str, size: str, platform: str) -> None:
    """Measure one section and print its figures, a line of JSON each."""
    from benchmarks.figures import Skip, first_line, size_of

    def tell(**what: Any) -> None:
        print(MARK + json.dumps(what), flush=True)

    try:
        if name == "about":
            tell(about=about())
            return
        from benchmarks.sections import SECTIONS

        for figure in SECTIONS[name](size_of(size, platform)):
            tell(**figure._asdict())
    except Skip as reason:
        tell(skipped=str(reason))
    except ModuleNotFoundError as error:
        tell(skipped=first_line(error))
    except Exception as error:  # told to the parent, which goes on with the next section
        import traceback

        traceback.print_exc()
        tell(failed=first_line(error))


def about() -> dict[str, Any]:
    """What the figures are of: device, its memory, versions, commit."""
    import jax

    from train.runtime.folder import PACKAGES, commit, versions

    device = jax.devices()[0]
    memory = (device.memory_stats() or {}).get("bytes_limit")
    return {
        "platform": device.platform,
        "kind": device.device_kind,
        "memory_bytes": memory,
        "python": sys.version.split()[0],
        "versions": versions([*PACKAGES, "torch"]),
        "commit": commit(),
    }


# --- the process that starts them ---


def lines_of(words: Sequence[str], limit: float, log: list[str]) -> Iterator[dict[str, Any]]:
    """What a section's process tells, as it comes; at its limit it is killed, with all that it started.

    Raises:
      TimeoutError: it was killed.
      ChildProcessError: it ended with another exit code than 0.
    """
    environment = {"XLA_PYTHON_CLIENT_MEM_FRACTION": "0.92", "TF_CPP_MIN_LOG_LEVEL": "2"} | dict(os.environ)
    command = [sys.executable, "-u", __file__, "section", *words]
    process = subprocess.Popen(
        command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, start_new_session=True
    )
    heard: queue.SimpleQueue[str | None] = queue.SimpleQueue()

    def listen() -> None:
        assert process.stdout is not None
        for line in process.stdout:
            heard.put(line)
        heard.put(None)

    listener = threading.Thread(target=listen, daemon=True)
    listener.start()
    end = time.monotonic() + limit
    try:
        while True:
            try:
                line = heard.get(timeout=max(0.0, end - time.monotonic()))
            except queue.Empty:
                raise TimeoutError(f"cut off after {limit:.0f} s") from None
            if line is None:
                break
            if line.startswith(MARK):
                yield json.loads(line.removeprefix(MARK))
            else:
                log.append(line.rstrip())
        if code := process.wait():
            raise ChildProcessError(f"ended with {code}: {next((x for x in reversed(log) if x.strip()), '')[:300]}")
    finally:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # what the section started too: pytest, workers of a sandbox
        process.wait()
        listener.join(10)
        assert process.stdout is not None
        process.stdout.close()


def run_section(name: str, size: str, platform: str, limit: float) -> tuple[list[dict[str, Any]], dict[str, Any]]:
    """The figures of a section, shown as they come, and how it ended: done, skipped, failed or cut off."""
    start, figures, log = time.monotonic(), [], []
    state, why = "done", ""
    try:
        for told in lines_of([name, size, platform], limit, log):
            if "skipped" in told or "failed" in told:
                ((state, why),) = told.items()
            else:
                figures.append({"section": name, **told})
                print(row_of(figures[-1]), flush=True)
    except TimeoutError as error:
        state, why = "cut off", str(error)
    except ChildProcessError as error:
        state, why = "failed", str(error)
    seconds = time.monotonic() - start
    if state != "done":
        print(f"{name:<10} {state}: {why}", flush=True)
        if state == "failed":
            print("\n".join(f"  {line}" for line in log[-5:]), flush=True)
    return figures, {"state": state, "why": why, "seconds": round(seconds, 1)}


def row_of(figure: dict[str, Any]) -> str:
    return f"{figure['section']:<10} {figure['name']:<48} {shown(figure):>18}  {figure['note']}"


def shown(figure: dict[str, Any]) -> str:
    """A value with three digits that count, and its unit."""
    value = figure["value"]
    if value is None:
        return "skipped"
    number = f"{value:,.0f}" if abs(value) >= 100 or value == int(value) else f"{value:.3g}"
    return f"{number} {figure['unit']}"


def table(result: dict[str, Any]) -> list[str]:
    """The figures as a Markdown table, ours against the peer's at its end."""
    lines = ["| section | figure | value | |", "|---|---|---|---|"]
    lines += [f"| {f['section']} | {f['name']} | {shown(f)} | {f['note']} |" for f in result["figures"]]
    speeds = {f["name"]: f["value"] for f in result["figures"] if f["section"] in ("rollouts", "peer")}
    if "engine" in speeds and "transformers" in speeds:
        lines.append(f"| rollouts | engine / transformers | {speeds['engine'] / speeds['transformers']:.2f} × | |")
    ended = result["sections"].items()
    return lines + [f"| {name} | {end['state']} | | {end['why']} |" for name, end in ended if end["state"] != "done"]


def read_options(words: Sequence[str]) -> tuple[dict[str, str], list[str]]:
    """The options, and the sections that are asked for, in the order in which they run."""
    given = {word.partition("=")[0]: word.partition("=")[2] for word in words}
    if unknown := given.keys() - OPTIONS.keys():
        raise SystemExit(f"unknown {', '.join(sorted(unknown))}; known: {', '.join(OPTIONS)}")
    options = OPTIONS | given
    if options["size"] not in ("auto", "full", "toy"):
        raise SystemExit(f"size={options['size']}: known are auto, full, toy")
    wanted = list(LIMITS) if options["sections"] == "all" else options["sections"].split(",")
    if strange := [name for name in wanted if name not in LIMITS]:
        raise SystemExit(f"sections={strange[0]}: known are {', '.join(LIMITS)}")
    return options, [name for name in LIMITS if name in wanted]


def main(words: Sequence[str]) -> int:
    options, wanted = read_options(words)
    start, log = time.monotonic(), []
    try:
        (told,) = lines_of(["about", "toy", ""], 120, log)
    except (TimeoutError, ChildProcessError) as error:
        raise SystemExit(f"no device: {error}") from None
    if "failed" in told:
        raise SystemExit(f"no device: {told['failed']}")
    found = told["about"]
    size = options["size"] if options["size"] != "auto" else "toy" if found["platform"] == "cpu" else "full"
    memory = f"{found['memory_bytes'] / 2**30:.0f} GiB for jax, " if found["memory_bytes"] else ""
    versions = ", ".join(f"{name} {version}" for name, version in found["versions"].items())
    print(f"{found['kind']} ({found['platform']}), {memory}size {size}; {versions}", flush=True)
    result: dict[str, Any] = {"about": found, "size": size, "figures": [], "sections": {}}
    for name in wanted:
        left = float(options["seconds"]) - (time.monotonic() - start)
        if left < 5:
            result["sections"][name] = {"state": "cut off", "why": "no time was left to begin it", "seconds": 0.0}
            continue
        figures, ended = run_section(name, size, found["platform"], min(LIMITS[name], left))
        result["figures"] += figures
        result["sections"][name] = ended
        result["seconds"] = round(time.monotonic() - start, 1)
        if options["out"]:
            Path(options["out"]).write_text(json.dumps(result, indent=1) + "\n")
    print("", *table(result), sep="\n")
    print(f"\n{result.get('seconds', 0):.0f} s in all" + (f"; {options['out']}" if options["out"] else ""))
    return int(any(end["state"] in ("failed", "cut off") for end in result["sections"].values()))


if __name__ == "__main__":
    if sys.argv[1:2] == ["section"]:
        be_section(*sys.argv[2:])
    else:
        raise SystemExit(main(sys.argv[1:]))
