"""The verb `statistics`: what merge rules that read data need of a model."""

from __future__ import annotations

from pathlib import Path

from ..runtime.start import start_jax
from ..studies.statistics_settings import StatisticsOptions
from .words import Words, options


def statistics(words: Words, assignments: Words, dry: bool) -> int:
    """Measure a model on examples, for the merge methods that read data: fisher and regmean.

    DATA is what `sft` learns from: a file of JSON lines, the folder of a TFDS version or a dataset of the hub. OUT is a
    folder that stands beside the model in a recipe: models: [{model: MODEL, statistics: OUT}].
    """
    del dry
    settings = options(assignments, StatisticsOptions)
    start_jax(settings)
    from ..studies.statistics import measure

    measure(words[0], words[1], Path(words[2]), settings)
    return 0
