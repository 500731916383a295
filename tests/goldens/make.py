"""Make logits.npz anew: transformers on torch, float32. `python tests/goldens/make.py` (extra `torch`)."""

import pathlib

import numpy as np
from cases import CASES, tensor, tokens


def logits(attributes):
    import torch
    from transformers import LlamaConfig, LlamaForCausalLM

    model = LlamaForCausalLM(LlamaConfig.from_dict(dict(attributes))).eval()
    state = {name: torch.tensor(tensor(name, tuple(leaf.shape))) for name, leaf in model.named_parameters()}
    model.load_state_dict(state, strict=not attributes.get("tie_word_embeddings"))
    with torch.no_grad():
        return model(torch.tensor(tokens(attributes["vocab_size"]))).logits.numpy()


if __name__ == "__main__":
    path = pathlib.Path(__file__).parent / "logits.npz"
    np.savez_compressed(path, **{name: logits(attributes) for name, attributes in CASES.items()})
    print(f"{path}: {len(CASES)} cases, {path.stat().st_size:,} bytes")
