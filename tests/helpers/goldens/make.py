"""Make logits.npz, families.npz and experts.npz anew: transformers on torch, float32.

`PYTHONPATH=tests:. python -m helpers.goldens.make` (extra `torch`).
"""

import copy
import pathlib

import numpy as np

from helpers.goldens.cases import CASES, tensor, tokens
from helpers.goldens.family_cases import FAMILY_CASES, KEPT, family_tokens


def reference(attributes):
    """The model that transformers makes of a config.json, with the weights of `tensor`, attention written out."""
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    config = AutoConfig.for_model(**copy.deepcopy(attributes))  # transformers writes into what it is given
    model = AutoModelForCausalLM.from_config(config, attn_implementation="eager", dtype=torch.float32).eval()
    with torch.no_grad():
        for name, leaf in model.named_parameters():
            leaf.copy_(torch.tensor(tensor(name, tuple(leaf.shape))))
    return model


def logits(attributes, ids):
    import torch

    with torch.no_grad():
        return reference(attributes)(torch.tensor(ids)).logits.numpy()


def write(name, arrays):
    path = pathlib.Path(__file__).parent / name
    np.savez_compressed(path, **arrays)
    print(f"{path}: {len(arrays)} cases, {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    write("logits.npz", {n: logits(a, tokens(a["vocab_size"])) for n, a in CASES.items()})
    made = {n: logits(a, family_tokens(61))[:, KEPT] for n, a in FAMILY_CASES.items()}
    write("families.npz", {n: made[n] for n, a in FAMILY_CASES.items() if "num_experts_per_tok" not in a})
    write("experts.npz", {n: made[n] for n, a in FAMILY_CASES.items() if "num_experts_per_tok" in a})
