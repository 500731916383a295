"""Where the metrics of a run's steps go, one protocol for all: JSON lines always, TensorBoard and W&B on request."""

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
    """Takes the metrics of every step, in order. A resumed run gives those before its checkpoint once more."""

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
    """Scalars under `tensorboard/`; `tensorboard --logdir RUN` shows them."""

    def __init__(self, folder: pathlib.Path, *, name: str, config: Mapping[str, Any]):
        del config
        from tensorboardX import SummaryWriter  # type: ignore[import-not-found]  # optional

        # purge_step: of an interrupted process's events those from step 1 on are not shown.
        self.writer = SummaryWriter(str(folder / "tensorboard" / name), purge_step=1)

    def write(self, metrics: Mapping[str, float]) -> None:
        for key, value in metrics.items():
            if key != "step":
                self.writer.add_scalar(key, value, int(metrics["step"]))

    def close(self) -> None:
        self.writer.close()


class WandB:
    """A Weights & Biases run below the run's folder; WANDB_MODE=offline keeps it there."""

    def __init__(self, folder: pathlib.Path, *, name: str, config: Mapping[str, Any]):
        import wandb  # type: ignore[import-not-found]  # optional

        # The same id whenever the run goes on; steps already sent are not sent again.
        identity = f"{folder.resolve().name}-{name}".replace("/", "-")
        project = os.environ.get("WANDB_PROJECT", "jaxmerge")
        self.run = wandb.init(
            project=project, name=name, id=identity, resume="allow", dir=str(folder), config=dict(config)
        )

    def write(self, metrics: Mapping[str, float]) -> None:
        if metrics["step"] >= self.run.step:
            self.run.log({k: v for k, v in metrics.items() if k != "step"}, step=int(metrics["step"]))

    def close(self) -> None:
        self.run.finish()


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
    steps: pathlib.Path, names: Sequence[str], *, folder: pathlib.Path, name: str, config: Mapping[str, Any]
) -> Iterator[Callable[[Mapping[str, float]], None]]:
    """Yield the function that writes a step's metrics everywhere; only the first process writes.

    Args:
      steps: the file of JSON lines, written first.
      names: of SINKS.
      folder: of the run. name: of the phase, which tells those of one run apart.
      config: plain data, kept with the run where the sink can.
    """
    check_sinks(names)
    if not is_first_process():
        yield lambda metrics: None
        return
    with contextlib.ExitStack() as stack:
        sinks: list[Sink] = [JsonLines(steps)]
        stack.callback(sinks[0].close)
        for sink in names:
            sinks.append(SINKS[sink](folder, name=name, config=config))
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
