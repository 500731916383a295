"""Where metrics go, of steps and of rounds, one protocol for all: JSON lines, TensorBoard and W&B on request."""

from __future__ import annotations

import contextlib
import importlib.util
import json
import os
import pathlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, Protocol

from jaxmerge import install

from ..log import UserError, is_first_process, progress


class Sink(Protocol):
    """Takes metrics in order, each with its `step`, and the value of its axis where that is not the step.

    A run that is gone on with gives those before its checkpoint once more; no point may be there twice for that.
    """

    def write(self, metrics: Mapping[str, float]) -> None: ...

    def close(self) -> None: ...


class JsonLines:
    """A file with a line a step, begun anew: what an interrupted process wrote comes again."""

    def __init__(self, path: pathlib.Path):
        self.file = open(path, "w", encoding="utf-8", buffering=1)  # noqa: SIM115  # closed by `close`

    def write(self, metrics: Mapping[str, float]) -> None:
        self.file.write(json.dumps(dict(metrics), allow_nan=False) + "\n")

    def close(self) -> None:
        self.file.flush()
        os.fsync(self.file.fileno())
        self.file.close()


class TensorBoard:
    """Scalars under `tensorboard/`, and the config as hyper-parameters; `tensorboard --logdir RUN` shows them."""

    def __init__(self, folder: pathlib.Path, *, name: str, config: Mapping[str, Any], axis: str = "step"):
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]  # optional

        # purge_step: of an interrupted process's events those from there on are not shown; they come again.
        first = 1 if axis == "step" else 0
        self.writer = SummaryWriter(str(folder / "tensorboard" / name), purge_step=first)
        self.config, self.axis, self.seen = flat(config), axis, dict[str, None]()

    def write(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if key not in ("step", self.axis):
                self.writer.add_scalar(key, value, int(metrics[self.axis]))
                self.seen[key] = None

    def close(self) -> None:
        from tensorboardX.summary import hparams  # type: ignore[import-not-found]  # optional

        # Here and not by `add_hparams`, which begins a run of its own, apart from the curves.
        experiment, session, _ = hparams(self.config, self.seen)
        events = self.writer.file_writer
        assert events is not None, "only closing takes it away"
        for summary in (experiment, session):
            events.add_summary(summary)
        self.writer.close()


class WandB:
    """A Weights & Biases run below the run's folder; WANDB_MODE=offline keeps it there, for `wandb sync --append`."""

    def __init__(self, folder: pathlib.Path, *, name: str, config: Mapping[str, Any], axis: str = "step"):
        import wandb  # type: ignore[import-not-found]  # optional

        group = folder.resolve().name
        # The same id whenever the run goes on; steps already sent are not sent again.
        identity = f"{group}-{name}".replace("/", "-")
        self.run = wandb.init(
            project=os.environ.get("WANDB_PROJECT", "jaxmerge"),
            name=name,
            id=identity,
            group=group,
            resume="allow",
            # The metrics of rounds are open beside those of a phase's steps.
            reinit="create_new",
            dir=str(folder),
            config=dict(config),
            settings=wandb.Settings(console="off"),
        )
        if axis != "step":
            self.run.define_metric(axis)
            self.run.define_metric("*", step_metric=axis)
        # Offline nobody says which steps are there: a file beside them does.
        self.sent = folder / "wandb" / f"{identity}.sent" if self.run.offline else None
        self.next = int(self.sent.read_text()) if self.sent is not None and self.sent.exists() else self.run.step

    def write(self, metrics: Mapping[str, float]) -> None:
        step = int(metrics["step"])
        if step < self.next:
            return
        self.run.log({k: v for k, v in metrics.items() if k != "step"}, step=step)
        self.next = step + 1
        if self.sent is not None:
            self.sent.write_text(str(self.next))

    def close(self) -> None:
        self.run.finish()


def flat(config: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """A config as hyper-parameters, which are numbers and words: `sft.learning_rate`; lists are written out.

    Example:
      >>> flat({"sft": {"epochs": 2, "targets": ["a", "b"]}, "keep": None})
      {'sft.epochs': 2, 'sft.targets': "['a', 'b']"}
    """
    found: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            found |= flat(value, f"{prefix}{key}.")
        elif value is not None:
            found[prefix + key] = value if isinstance(value, bool | int | float | str) else str(value)
    return found


SINKS: dict[str, Callable[..., Sink]] = {"tensorboard": TensorBoard, "wandb": WandB}

PACKAGES = {"tensorboard": "tensorboardX", "wandb": "wandb"}


def check_sinks(names: Sequence[str]) -> None:
    """Raise a UserError, before any compute, if a sink is unknown or its package is not installed."""
    for sink in names:
        if sink not in SINKS:
            raise UserError(f"sft.watch.sinks: {sink!r} is not known; known: {', '.join(SINKS)}")
        if importlib.util.find_spec(PACKAGES[sink]) is None:
            raise UserError(
                f"sft.watch.sinks: {sink} needs {PACKAGES[sink]}, which is not installed; {install.extra(sink)}"
            )


@contextlib.contextmanager
def open_sinks(
    steps: pathlib.Path | None,
    names: Sequence[str],
    *,
    folder: pathlib.Path,
    name: str,
    config: Mapping[str, Any],
    axis: str = "step",
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield the function that writes a step's metrics everywhere; only the first process writes.

    Args:
      steps: the file of JSON lines, written first; None where the metrics are in another file already.
      names: of SINKS.
      folder: of the run. name: of the phase, which tells those of one run apart.
      config: plain data, kept with the run where the sink can.
      axis: the metric that the others are drawn over.
    """
    check_sinks(names)
    if not is_first_process():
        yield lambda metrics: None
        return
    with contextlib.ExitStack() as stack:
        sinks: list[Sink] = [] if steps is None else [JsonLines(steps)]
        for sink in sinks:
            stack.callback(sink.close)
        for sink in names:
            sinks.append(SINKS[sink](folder, name=name, config=config, axis=axis))
            stack.callback(sinks[-1].close)

        def write(metrics: Mapping[str, float]) -> None:
            for sink in sinks:
                sink.write(metrics)

        yield write


@contextlib.contextmanager
def follow(
    steps: pathlib.Path, names: Sequence[str], *, folder: pathlib.Path, name: str, config: Mapping[str, Any], total: int
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield what a fine-tuning run of `total` steps calls after each: it moves a bar and writes to the sinks."""
    with (
        open_sinks(steps, names, folder=folder, name=name, config=config) as write,
        progress(name, total=total, unit="steps") as bar,
    ):

        def on_step(metrics: Mapping[str, float]) -> None:
            bar.advance(1, note=f"loss {metrics['loss']:.3f}")
            write(metrics)

        yield on_step
