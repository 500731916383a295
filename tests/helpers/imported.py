# ruff: noqa: F401
"""What the verbs of the tests import, no more than once: the server of `helpers.forks` begins with it."""

import warnings

import flax.nnx
import orbax.checkpoint
import transformers

import helpers.dying_merge
import helpers.forks
import helpers.killer
import train.cli.__main__
import train.cli.verbs
import train.improve.phases
import train.improve.run
import train.learn.run
import train.report.page
import train.runtime.processes
import train.search.run

transformers.PreTrainedTokenizerFast  # noqa: B018 # imported when first asked for
warnings.filterwarnings("ignore", message=".*fork")  # no backend has begun here, and no thread
