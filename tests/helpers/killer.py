"""Runs the command in a process that kills itself, with SIGKILL, at a named point: no hook in the product.

    python tests/helpers/killer.py POINT CALLS jaxmerge-arguments…

The process dies at call number CALLS (from 1) of the function that POINT names.
"""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path

from helpers import ROOT

sys.path.insert(0, str(ROOT))


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def killing(function, calls: int, *, after: bool = False, when=lambda *a: True):
    """`function`, which dies before (or after) its call number `calls` for which `when` holds."""
    count = 0

    def wrapped(*args, **kwargs):
        nonlocal count
        counts = when(*args)
        count += counts
        if counts and count == calls and not after:
            die()
        result = function(*args, **kwargs)
        if counts and count == calls and after:
            die()
        return result

    return wrapped


def arm(point: str, calls: int) -> None:
    from train.data import versions
    from train.evaluate import answer
    from train.improve import merge as combine
    from train.improve import phases
    from train.learn import on_policy, shares
    from train.runtime import checkpoint, journal

    if point == "sampling":  # between two sampling batches
        answer.write_jsonl = killing(answer.write_jsonl, calls, after=True, when=lambda p, r: "sample" in str(p))
    elif point == "evaluating":
        answer.write_jsonl = killing(answer.write_jsonl, calls, when=lambda p, r: "evaluate" in str(p))
    elif point == "writing data":  # the examples are on disk under a temporary name, not renamed yet
        os.rename = killing(os.rename, calls, when=lambda src, dst: "samples" in str(dst))
    elif point == "data written":  # the examples are there, the phase is not committed
        phases.write_version = killing(versions.write_version, calls, after=True)
    elif point == "training":  # in the middle of a fine-tuning run, between two checkpoints
        shares.batches = dying_batches(shares.batches, calls)
    elif point == "saving state":  # Orbax wrote the state of step `calls` partly
        checkpoint.ocp.CheckpointManager.save = dying_save(checkpoint.ocp.CheckpointManager.save, calls)
    elif point == "weights saved":  # tuned weights are on disk, the phase is not committed
        checkpoint.save_weights = killing(checkpoint.save_weights, calls, after=True)
    elif point == "merging":
        combine.merged = killing(combine.merged, calls)
    elif point == "drawing":  # in the middle of learning from fresh samples
        on_policy.rollout = killing(on_policy.rollout, calls)
    elif point == "learning":  # the updates of a step are made, and nothing of it is kept
        on_policy.learn = killing(on_policy.learn, calls, after=True)
    elif point == "searching":  # replies of the last chunk are not written yet
        from train.search import replies

        replies.Replies.flush = killing(replies.Replies.flush, calls)
    elif point == "committed":  # the folder is renamed, metrics.jsonl does not say so yet
        journal.append_jsonl = killing(journal.append_jsonl, calls)
    else:
        raise SystemExit(f"no point {point!r}")


def dying_batches(batches, calls: int):
    def wrapped(*args, **kwargs):
        for i, batch in enumerate(batches(*args, **kwargs), 1):
            if i == calls:
                die()
            yield batch

    return wrapped


def dying_save(save, calls: int):
    """Saves, then tears the newest step apart as a crash in the middle would, and dies."""
    count = 0

    def wrapped(self, step, *args, **kwargs):
        nonlocal count
        count += 1
        if count < calls:
            return save(self, step, *args, **kwargs)
        # What a crash leaves: a folder under Orbax's temporary name.
        torn = Path(self.directory) / f"{step}.orbax-checkpoint-tmp"
        torn.mkdir(parents=True)
        (torn / "state").write_bytes(b"half")
        return die()

    return wrapped


if __name__ == "__main__":
    arm(sys.argv[1], int(sys.argv[2]))
    from train.cli.__main__ import main

    sys.exit(main(sys.argv[3:]))
