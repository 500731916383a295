"""The flags of mergekit's command, and what does the same in `jaxmerge merge`.

A command that is copied from a model card is answered with the key to write instead. docs/merge.md has the table.
"""

from __future__ import annotations

NO_NEED = "leave it out: "
MERGEKIT = {
    "--allow-crimes": NO_NEED + "any architecture is taken; for tensors that do not match, allow=missing,unused,shapes",
    "--async-write": NO_NEED + "reading, merging and writing always go on at once",
    "--clone-tensors": NO_NEED + "a layer may stand twice in the result",
    "--copy-tokenizer": NO_NEED + "the tokenizer is always copied; another one by tokenizer: in the recipe",
    "--cuda": "device=gpu",
    "--device": "device=gpu or device=cpu",
    "--gpu-rich": "device=gpu",
    "--i-understand-this-is-not-useful-without-training": NO_NEED + "experts that are all alike are noted, not refused",
    "--lazy-unpickle": NO_NEED + "pickled weights are not read; convert them to safetensors",
    "--load-in-4bit": NO_NEED + "the base of a recipe of experts is held in the dtype in which it is stored",
    "--load-in-8bit": NO_NEED + "the base of a recipe of experts is held in the dtype in which it is stored",
    "--lora-merge-cache": NO_NEED + "an adapter is applied while its model is read",
    "--lora-merge-dtype": NO_NEED + "an adapter is applied in float32 and rounded once to the model's dtype",
    "--low-cpu-memory": NO_NEED + "memory is bounded by the largest tensor",
    "--multi-gpu": "device=gpu, which uses one",
    "--num-threads": NO_NEED + "the processor's cores are used as they are free",
    "-j": NO_NEED + "the processor's cores are used as they are free",
    "--out-shard-size": "max_shard_bytes=5000000000, in bytes where mergekit counts parameters",
    "--quiet": "JAXMERGE_QUIET=1 before the command",
    "--random-seed": "seed=0",
    "--read-to-gpu": "device=gpu",
    "--safe-serialization": NO_NEED + "safetensors are always written",
    "--transformers-cache": "HF_HUB_CACHE=FOLDER before the command",
    "--trust-remote-code": NO_NEED + "no code of a model is run; it is copied beside the weights",
    "--unsafe-truncate-embeddings": "compat=mergekit allow=shapes",
    "--verbosity": NO_NEED + "notes are always printed, and all of it is in merge.json",
    "-v": NO_NEED + "notes are always printed, and all of it is in merge.json",
    "--write-model-card": NO_NEED + "README.md is always written",
    "--write-threads": NO_NEED + "reading, merging and writing always go on at once",
}


def answer(word: str, flags: dict[str, str]) -> str | None:
    """Return what to write instead of a flag of mergekit's, or None if it is none.

    Example:
      >>> answer("--random-seed=3", MERGEKIT)
      '--random-seed is a flag of mergekit; here it is seed=0'
    """
    flag = word.partition("=")[0].replace("_", "-")
    found = flags.get(flag) or flags.get(flag.replace("--no-", "--", 1))
    if found is None and flag[:2] in flags and not flag.startswith("--"):  # -vv, -j8
        found = flags[flag[:2]]
    if found is None:
        return None
    return f"{flag} is a flag of mergekit; here {'' if found.startswith(NO_NEED) else 'it is '}{found}"
