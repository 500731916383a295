"""`jaxmerge analyse`: what training did to the weights of a run, and what it did to its samples.

The measures are functions of measures.py; here a run's folder is read, they are called on its models, and
`analysis.json`, `analysis.html` and `analysis/*.svg` are written. Reports show what is found in the run's folder.
"""

from __future__ import annotations

import contextlib
import json
import math
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ..log import UserError, say
from ..report.analysis import write_page
from ..report.page import write_report
from ..runtime.disk import write_durably
from .measures import MEASURES
from .settings import AnalyseOptions
from .study import open_study


def analyse_run(folder: Path, options: AnalyseOptions) -> Path:
    """Measure a run; returns the page.

    Equal runs and options give equal numbers; only `seconds` differs.

    Raises:
      UserError: no such run, method or round, or nothing to measure on.
    """
    out = Path(options.out) if options.out else folder
    if out.exists() and not out.is_dir():
        raise UserError(f"out={out}: a file is there; wanted a folder to write to")
    study = open_study(folder, options)
    out.mkdir(parents=True, exist_ok=True)
    seconds: dict[str, float] = {}
    found: dict[str, Any] = study.about()
    for name, measure in MEASURES.items():
        with timed(name, seconds):
            found[name] = measure(study)
    found |= {"notes": study.notes, "seconds": seconds}
    write_durably(out / "analysis.json", json.dumps(finite(found), indent=1, allow_nan=False, ensure_ascii=False))
    page = write_page(out)
    if out.resolve() == folder.resolve():
        write_report(folder)
    return page


def layers_of_run(folder: Path, options: AnalyseOptions) -> dict[str, Any]:
    """Importance and change of the layers alone, as plain data: what a sweep keeps of a run."""
    study = open_study(folder, options)
    about = {key: value for key, value in study.about().items() if key in ("method", "rounds", "layers")}
    found = {name: MEASURES[name](study) for name in ("importance", "change")}
    return finite({**about, **found, "notes": study.notes})


@contextlib.contextmanager
def timed(name: str, seconds: dict[str, float]) -> Iterator[None]:
    start = time.perf_counter()
    yield
    seconds[name] = time.perf_counter() - start
    say(f"analyse {name}: {seconds[name]:.1f} s")


def finite(value: Any) -> Any:
    """Plain data with null in place of NaN and infinity, which JSON has no words for."""
    if isinstance(value, dict):
        return {str(key): finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value
