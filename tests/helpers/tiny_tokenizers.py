"""Tokenizers small enough to read, as folders and as GGUF metadata."""

from __future__ import annotations

import json

import tokenizers
from tokenizers import decoders, models, normalizers, pre_tokenizers, processors, trainers

from jaxmerge.files.checkpoints.gguf_tokenizer import CONTROL
from train.models.tokenizer import Tokenizer

CHATS = [
    [{"role": "user", "content": "What is 2 + 2?"}],
    [{"role": "system", "content": "Be brief. "}, {"role": "user", "content": " Hi \n"}],
    [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}, {"role": "user", "content": "ç <b>&"}],
]
TEMPLATE = """{{ bos_token }}{% for m in messages %}
    {% if m['role'] == 'tool' %}{{ raise_exception('no tools here') }}{% endif %}
    {%- if loop.index > 8 %}{% break %}{% endif %}
<{{ m['role'] }}>{{ m['content'] | tojson }}{{ eos_token }}
{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"""

CHATML = """{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}
{%- if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}{% else %}{{ m['content'] }}<|im_end|>{% endif %}
{{- '\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


MARKED = CHATML.replace(
    "{{ m['content'] + '<|im_end|>' }}{% else %}",
    "{% generation %}{{ m['content'] + '<|im_end|>' }}{% endgeneration %}{% else %}",
)


TEXTS = [
    "",
    " ",
    "Hello world",
    "  two spaces, a tab\tand a newline\n\n  then more   ",
    "1234567890 and 3.14159, -42, 1,000,000 or ٣٤٥ and Ⅻ",
    "naïve café, Straße, 日本語のテキスト, Привет, مرحبا, 👩‍👩‍👧 😀",
    "<|im_start|>user\nWhat is 12 + 30?<|im_end|>\n<|im_start|>assistant\n",
    "don't we'll I'm CAN'T 'twas",
    "def f(x):\n    return x ** 2  # squared\r\n",
    "<|endoftext|><|im_end|> <|im_end| >",
    "\u0000\u200b\ufeff\u00a0odd\u2028characters\x7f",
]


def byte_level(*, special=("<|endoftext|>", "<|im_start|>", "<|im_end|>")) -> tokenizers.Tokenizer:
    """A small byte-level BPE, as GPT-2's, trained here."""
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(special),
        show_progress=False,
        initial_alphabet=sorted(pre_tokenizers.ByteLevel.alphabet()),
    )
    backend.train_from_iterator(TEXTS * 3, trainer)
    return backend


def write_folder(folder, backend, **config):
    backend.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    return folder


def gguf_metadata(backend: tokenizers.Tokenizer, **changes) -> dict:
    state = json.loads(backend.to_str())
    tokens = [token for token, _ in sorted(backend.get_vocab().items(), key=lambda pair: pair[1])]
    control = {added["content"] for added in state["added_tokens"]}
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "smollm",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": [CONTROL if token in control else 1 for token in tokens],
        "tokenizer.ggml.merges": [" ".join(pair) for pair in state["model"]["merges"]],
        "tokenizer.ggml.bos_token_id": 1,
        "tokenizer.ggml.eos_token_id": 2,
        "tokenizer.ggml.padding_token_id": 2,
        "tokenizer.chat_template": TEMPLATE,
        **changes,
    }


FULL = {
    "tokenizer_class": "PreTrainedTokenizerFast",
    "bos_token": "<|im_start|>",
    "eos_token": {"content": "<|im_end|>", "lstrip": False, "__type": "AddedToken"},
    "pad_token": "<|endoftext|>",
    "chat_template": TEMPLATE,
    "clean_up_tokenization_spaces": False,
}


def assert_equals_transformers(ours: Tokenizer, folder) -> None:
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(folder)
    for text in TEXTS:
        ids = ours.encode(text)
        assert ids == theirs.encode(text, add_special_tokens=False), text
        # A BOS that a text begins with is not put before it a second time.
        wanted = theirs.encode(text, add_special_tokens=not text.startswith(ours.special["bos_token"]))
        assert ours.encode(text, special=True) == wanted, text
        assert ours.decode(ids) == theirs.decode(ids, skip_special_tokens=True), text
        assert ours.decode(ids, special=True) == theirs.decode(ids), text
    assert ours.eos_ids == (theirs.eos_token_id,)
    assert ours.pad_id == theirs.pad_token_id
    assert ours.vocab_size == len(theirs)
    for chat in CHATS if ours.has_chat_template else ():
        for prompt in (True, False):
            wanted = theirs.apply_chat_template(chat, tokenize=False, add_generation_prompt=prompt)
            assert ours.chat(chat, add_generation_prompt=prompt) == wanted


LLAMA = (
    "{{ bos_token }}{% for m in messages %}{% if m['role'] == 'user' %}{{ '[INST] ' + m['content'] + ' [/INST]' }}"
    "{% else %}{{ ' ' + m['content'] + eos_token }}{% endif %}{% endfor %}"
)


def metaspace(kind: str = "prepend", *, add_eos: bool = False) -> tokenizers.Tokenizer:
    """A small BPE that writes spaces as ▁ and puts one before a text, as Llama 2's; with bytes to fall back on.

    Args:
      kind: `prepend`: by a normaliser, as Llama 2's file has it; `first`: by a pre-tokeniser, as Mistral's.
      add_eos: an EOS behind every text, as some tokenizers are set.
    """
    trained = tokenizers.Tokenizer(models.BPE(unk_token="<unk>"))
    words = [text.replace(" ", "▁") for text in [*TEXTS[2:], *("is Paris", "= 2", "A: yes", "    return x")] * 3]
    trainer = trainers.BpeTrainer(vocab_size=260, special_tokens=["<unk>"], show_progress=False)
    trained.train_from_iterator(words, trainer)
    state = json.loads(trained.to_str())["model"]
    names = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "▁"]
    names = list(dict.fromkeys([*names, *(t for t in state["vocab"] if t not in "\n\r\t")]))
    known = {name: i for i, name in enumerate(names)}
    merges = [tuple(m) for m in state["merges"] if all(part in known for part in (*m, "".join(m)))]
    backend = tokenizers.Tokenizer(models.BPE(known, merges, unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    if kind == "prepend":
        backend.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    else:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    backend.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    backend.post_processor = processors.TemplateProcessing(
        single="<s> $A </s>" if add_eos else "<s> $A", special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return backend


def pieces(*, prefix: bool = True) -> tokenizers.Tokenizer:
    """SentencePiece's BPE as tokenizer.json has it: tokens by rank, and every pair that a token can be merged of."""
    state = json.loads(metaspace().to_str())
    known = {token: i for token, i in state["model"]["vocab"].items() if i > 258}
    pairs = {token: [(token[:n], token[n:]) for n in range(1, len(token))] for token in known}
    merges = [pair for token in known for pair in pairs[token] if pair[0] in known and pair[1] in known]
    state["model"]["merges"] = [list(pair) for pair in merges]
    backend = tokenizers.Tokenizer.from_str(json.dumps(state))
    if not prefix:  # as Gemma's
        backend.normalizer = normalizers.Replace(" ", "▁")
        backend.decoder = decoders.Sequence([decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse()])
    return backend


def llama_like(kind: str = "prepend", **given) -> Tokenizer:
    """`metaspace` with its names and a chat template."""
    names = {"bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return Tokenizer(metaspace(kind, **given), names, chat_template=LLAMA)
