"""What every loop of training does around its steps: go on where a run stopped, tell, keep, stop."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable

from ..log import UserError, say
from ..models.decoder import Params
from ..runtime.stop import Stopped
from .beside import Blocks
from .settings import Sft
from .step import State

Log = list[dict[str, float]]
"""The metrics of every step."""


class Checkpoints:
    """Where a fine-tuning run saves its state; this one saves nothing and starts from the beginning."""

    blocks: Blocks | None = None
    """Where the blocks of `sft.beside` are kept."""

    def restore(self, like: State) -> tuple[State | None, int, Log]:
        """The newest state (None: start over), the step it stands at, the metrics so far."""
        del like
        return None, 0, []

    def save(self, state: State, step: int, metrics: Log) -> None:
        """Keep the state that stands before update number `step`."""

    def snapshot(self, params: Params, index: int) -> None:
        """Keep the weights as snapshot `index` of the run."""


@dataclasses.dataclass
class Progress:
    """A run of `total` steps: what was told of those that are made, and what is kept between them."""

    config: Sft
    total: int
    checkpoints: Checkpoints
    on_step: Callable[[dict[str, float]], None]
    """It is called with the metrics of every step, those of steps made before the run stopped too."""
    asked_to_stop: Callable[[], bool]
    log: Log = dataclasses.field(default_factory=list)

    def __post_init__(self):
        self._snapshots = snapshots_of(self.config, self.total)

    def resume(self, state: State) -> tuple[State, int]:
        """The state that is kept, or else the one given, and the step it stands at."""
        restored, start, self.log = self.checkpoints.restore(state)
        if start:
            say(f"{start} of {self.total} steps are there; going on")
        for metrics in self.log:
            self.on_step(metrics)
        return state if restored is None else restored, start

    def tell(self, metrics: dict[str, float]) -> None:
        """Note the metrics of a step."""
        self.log.append(metrics)
        self.on_step(metrics)

    def keep(self, number: int, state: State, whole: Callable[[], Params]) -> None:
        """Keep what is wanted of step `number`, unless it is the last, whose result the caller returns.

        Args:
          state: after the step. whole: gives the model that the run would return now.

        Raises:
          Stopped: the run was asked to stop, and its state is saved.
        """
        if number == self.total:
            return
        if number in self._snapshots:
            self.checkpoints.snapshot(whole(), self._snapshots[number])
        stopping = self.asked_to_stop()
        if stopping or number % self.config.checkpoint_every == 0:
            self.checkpoints.save(state, number, self.log)
        if stopping:
            say(f"stopped after step {number} of {self.total}; saved")
            raise Stopped


def snapshots_of(config: Sft, total: int) -> dict[int, int]:
    """Number of an update → the snapshot that is taken after it, equally spaced over `total` updates."""
    if config.snapshots > total:
        raise UserError(f"sft.snapshots is {config.snapshots}, but there are only {total} steps; lower it")
    return {round(total * (i + 1) / config.snapshots): i for i in range(config.snapshots)}
