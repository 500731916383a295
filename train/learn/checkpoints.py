"""The resumable state of a fine-tuning run, and its snapshots."""

from __future__ import annotations

import shutil
from pathlib import Path

import jax
import orbax.checkpoint as ocp

from ..models.decoder import Params
from ..runtime.checkpoint import damage_named, failure_named, save_weights
from ..runtime.processes import on_first
from .beside import Blocks
from .progress import Checkpoints, Log
from .step import State


class SftCheckpoints(Checkpoints):
    """Keeps the newest state of a fine-tuning run below `folder`, its snapshots and blocks of them elsewhere."""

    def __init__(self, folder: Path, snapshots: Path | None = None, blocks: Path | None = None):
        self.folder, self.snapshots = folder.absolute(), snapshots
        self.blocks = None if blocks is None else Blocks(blocks)
        self._manager: ocp.CheckpointManager | None = None

    @property
    def manager(self) -> ocp.CheckpointManager:
        if self._manager is None:
            options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
            self._manager = ocp.CheckpointManager(self.folder, options=options)
        return self._manager

    def restore(self, like: State):
        if not self.folder.is_dir() or (step := self.manager.latest_step()) is None:
            return None, 0, []
        shapes = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding), like)
        items = ocp.args.Composite(state=ocp.args.StandardRestore(shapes), log=ocp.args.JsonRestore())
        with damage_named(self.folder / str(step)):
            found = self.manager.restore(step, args=items)
        return State(*found["state"]), step, list(found["log"]["steps"])

    def save(self, state: State, step: int, metrics: Log) -> None:
        items = ocp.args.Composite(state=ocp.args.StandardSave(state), log=ocp.args.JsonSave({"steps": metrics}))
        with failure_named(self.folder / str(step)):
            self.manager.save(step, args=items)
            self.manager.wait_until_finished()

    def snapshot(self, params: Params, index: int) -> None:
        if self.snapshots is not None:
            save_weights(self.snapshots / str(index), params)

    def remove(self) -> None:
        """Delete the resumable state: the phase is committed, its optimiser is not needed again."""
        if self._manager is not None:
            self._manager.close()
        on_first(shutil.rmtree, self.folder, ignore_errors=True)
