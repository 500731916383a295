"""Tokenizers: ids, chats and saved folders equal to transformers'."""

import os
import subprocess
import sys

import pytest
import tokenizers
from helpers.tiny_tokenizers import (
    CHATS,
    FULL,
    TEMPLATE,
    TEXTS,
    assert_equals_transformers,
    byte_level,
    gguf_metadata,
    write_folder,
)
from tokenizers import decoders, models, pre_tokenizers, processors

from train.log import UserError
from train.models.tokenizer import Tokenizer

OPEN = [
    [{"role": "user", "content": "2 + 2?"}, {"role": "assistant", "content": "It is"}],
    [{"role": "user", "content": "It is"}, {"role": "assistant", "content": " It is "}],
]


@pytest.mark.parametrize("strips", [False, True])
def test_a_turn_left_open_ends_where_transformers_ends_it(tmp_path, strips):
    from transformers import AutoTokenizer

    said = "m['content'] | trim" if strips else "m['content']"
    template = f"{{% for m in messages %}}<{{{{ m['role'] }}}}>{{{{ {said} }}}}</s>{{% endfor %}}"
    folder = write_folder(tmp_path, byte_level(), **{**FULL, "chat_template": template})
    ours, theirs = Tokenizer.from_folder(folder), AutoTokenizer.from_pretrained(folder)
    for chat in OPEN:
        wanted = theirs.apply_chat_template(chat, tokenize=False, continue_final_message=True)
        assert ours.chat_to_continue(chat) == wanted
    folder = write_folder(tmp_path, byte_level(), **{**FULL, "chat_template": "{{ messages[0]['role'] }}"})
    with pytest.raises(UserError, match="does not show the last message"):
        Tokenizer.from_folder(folder).chat_to_continue(OPEN[0])


@pytest.mark.parametrize("named", [True, False], ids=["a list of templates", "one template"])
def test_folder_equals_transformers_and_so_does_what_is_saved(named, tmp_path):
    backend = byte_level()
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 1)]
    )
    both = [{"name": "default", "template": TEMPLATE}, {"name": "tool_use", "template": "no"}]
    folder = write_folder(tmp_path, backend, **{**FULL, **({"chat_template": both} if named else {})})
    ours = Tokenizer.from_folder(folder)
    assert ours.encode("a", special=True) == [1, *ours.encode("a")]
    assert_equals_transformers(ours, folder)
    saved = tmp_path / "saved"
    saved.mkdir()
    ours.save(saved)
    names = ["chat_template.jinja", "special_tokens_map.json", "tokenizer.json", "tokenizer_config.json"]
    assert sorted(p.name for p in saved.iterdir()) == names
    assert_equals_transformers(ours, saved)
    again = Tokenizer.from_folder(saved)
    assert (again.special, again.chat_template) == (ours.special, ours.chat_template)


def test_gguf_metadata_rebuild_the_same_tokenizer(tmp_path):
    backend = byte_level()
    ours = Tokenizer.from_gguf(gguf_metadata(backend), source="a.gguf")
    for text in TEXTS:
        assert ours.encode(text) == backend.encode(text).ids
        assert ours.decode(ours.encode(text), special=True) == text
    assert ours.special == {"bos_token": "<|im_start|>", "eos_token": "<|im_end|>", "pad_token": "<|im_end|>"}
    ours.save(tmp_path)
    assert_equals_transformers(ours, tmp_path)


def test_characters_as_words(tmp_path):
    """The miniature's kind: a WordLevel vocabulary, every character a token, no chat template."""
    vocab = {symbol: i for i, symbol in enumerate(["<pad>", "<eos>", *"0123456789+=?# "])}
    backend = tokenizers.Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    backend.decoder = decoders.Fuse()
    backend.add_special_tokens(["<pad>", "<eos>"])
    folder = write_folder(tmp_path, backend, eos_token="<eos>", pad_token="<pad>")
    ours = Tokenizer.from_folder(folder)
    assert ours.encode("12+30=?") == [3, 4, 12, 5, 2, 13, 14]
    assert ours.decode([3, 4, 12, 5, 2, 13, 14, 1, 0]) == "12+30=?"
    assert (ours.eos_ids, ours.pad_id, ours.vocab_size) == ((1,), 0, 17)
    assert not ours.has_chat_template
    with pytest.raises(UserError, match="no chat template"):
        ours.chat(CHATS[0])
    (tmp_path / "saved").mkdir()
    ours.save(tmp_path / "saved")
    from transformers import AutoTokenizer

    theirs = AutoTokenizer.from_pretrained(tmp_path / "saved")
    assert theirs.encode("12+30=?") == ours.encode("12+30=?")
    assert theirs.decode([3, 4, 12]) == ours.decode([3, 4, 12]) == "12+"


def test_a_length_left_by_a_trainer_does_not_cut(tmp_path):
    backend = byte_level()
    backend.enable_truncation(3)
    backend.enable_padding(length=8)
    ours = Tokenizer.from_folder(write_folder(tmp_path, backend, **FULL))
    assert ours.decode(ours.encode(TEXTS[3])) == TEXTS[3]


def test_the_template_sees_only_its_sandbox(tmp_path):
    folder = write_folder(tmp_path, byte_level(), **FULL)
    with pytest.raises(UserError, match="refuses these messages: no tools here"):
        Tokenizer.from_folder(folder).chat([{"role": "tool", "content": ""}])
    for template, message in (
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe|not safely callable"),
        ("{% if %}", "not valid Jinja"),
    ):
        (tmp_path / "chat_template.jinja").write_text(template)
        with pytest.raises(UserError, match=message):
            Tokenizer.from_folder(folder).chat(CHATS[0])
    (tmp_path / "chat_template.jinja").write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert Tokenizer.from_folder(folder).chat([{"role": "user", "content": "x"}]) == "x"


def test_a_tokenizer_fits_its_model_or_is_refused(tmp_path):
    ours = Tokenizer.from_folder(write_folder(tmp_path, byte_level(), **FULL))
    size = ours.vocab_size
    assert ours.fitted(vocab_size=size).eos_ids == (2,)
    assert ours.fitted(vocab_size=size + 9, eos_ids=(1, 2)).eos_ids == (1, 2)
    with pytest.raises(UserError, match=f"{size} tokens, the model's vocab_size is {size - 1}"):
        ours.fitted(vocab_size=size - 1)
    with pytest.raises(UserError, match=f"EOS id {size + 3} .*vocab_size is {size}"):
        ours.fitted(vocab_size=size, eos_ids=(size + 3,))
    bare = Tokenizer(ours.backend, {})
    with pytest.raises(UserError, match=rf"vocab_size {size}.*{size} tokens.*end-of-sequence"):
        bare.fitted(vocab_size=size)
    assert bare.fitted(vocab_size=size, eos_ids=(0,)).eos_ids == (0,)


def test_damaged_tokenizers_are_refused(tmp_path):
    with pytest.raises(UserError, match=r"tokenizer\.json: no such file"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": ')
    with pytest.raises(UserError, match=r"tokenizer\.json: not a tokenizer"):
        Tokenizer.from_folder(tmp_path)
    write_folder(tmp_path, byte_level(), eos_token="</s>")
    with pytest.raises(UserError, match=r"eos_token '</s>' not in its vocabulary of \d+ tokens"):
        Tokenizer.from_folder(tmp_path)
    named = [{"name": "tool_use", "template": ""}]
    with pytest.raises(UserError, match="none called 'default'"):
        Tokenizer.from_folder(write_folder(tmp_path, byte_level(), chat_template=named))
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(UserError, match=r"tokenizer_config\.json is no JSON"):
        Tokenizer.from_folder(tmp_path)
    (tmp_path / "tokenizer.json").unlink()
    os.mkfifo(tmp_path / "tokenizer.json")
    with pytest.raises(UserError, match=r"tokenizer\.json is no plain file but a folder, a pipe or a device"):
        Tokenizer.from_folder(tmp_path)


@pytest.mark.parametrize("id", [-1, 400, 2**63, 1.5, "2", None, [2]])
def test_a_role_in_a_gguf_is_of_a_token_that_is_there(id):
    metadata = gguf_metadata(byte_level(), **{"tokenizer.ggml.eos_token_id": id})
    with pytest.raises(UserError, match=r"a\.gguf: .*eos_token_id is .*; expected the id of one of its 400 tokens"):
        Tokenizer.from_gguf(metadata, source="a.gguf")


@pytest.mark.parametrize(("key", "value"), [("ggml.pre", "viking"), ("ggml.model", "bert")])
def test_unknown_gguf_tokenizers_are_refused(key, value):
    metadata = gguf_metadata(byte_level(), **{f"tokenizer.{key}": value})
    with pytest.raises(UserError, match=rf"a\.gguf: tokenizer\.{key} '{value}' is not known; known: \w+"):
        Tokenizer.from_gguf(metadata, source="a.gguf")


def test_transformers_is_not_imported(tmp_path):
    write_folder(tmp_path, byte_level(), **FULL)
    code = (
        "import sys; from train.models.tokenizer import Tokenizer;"
        f"t = Tokenizer.from_folder({str(tmp_path)!r});"
        "t.chat([{'role': 'user', 'content': t.decode(t.encode('a'))}]);"
        "assert not {'transformers', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


@pytest.mark.parametrize(
    ("template", "words"),
    [
        ("{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}", "it takes longer than"),
        ("{{ 'x' * 10 ** 10 }}", "it makes more than 10,000,000 characters"),
        ("{{ messages[0].content / 0 }}", "unsupported operand"),
        ("{{ 1 / 0 }}", "division by zero"),
        ("{{ messages[0]['content'].nothing.more }}", "has no attribute 'nothing'"),
        ("{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", "recursion"),
        ("{{ raise_exception('line one\n' * 99) }}", "line one line one"),
        ("{{ " + "(" * 2000 + "1" + ")" * 2000 + " }}", "not valid Jinja|recursion|nested"),
    ],
)
def test_whatever_a_template_does_is_one_line(tmp_path, template, words, monkeypatch):
    monkeypatch.setattr("train.models.bounded.SECONDS", 0.2)
    folder = write_folder(tmp_path, byte_level(), **FULL)
    (tmp_path / "chat_template.jinja").write_text(template)
    with pytest.raises(UserError, match=words) as caught:
        Tokenizer.from_folder(folder).chat([{"role": "user", "content": "x"}])
    assert "\n" not in str(caught.value)
    assert len(str(caught.value)) < 400


@pytest.mark.parametrize(
    ("said", "message"),
    [
        ({"eos_token": 3}, "eos_token is 3; expected a token"),
        ({"eos_token": {"name": "x"}}, r"eos_token is \{.*; expected a token"),
        ({"chat_template": 5}, "the chat template is 5; expected text"),
        ({"chat_template": [{"name": "default"}, 3]}, None),
        ({"chat_template": [3]}, "none called 'default'"),
        ({"eos_token": "y" * 5000}, "eos_token 'yyy"),
    ],
)
def test_settings_of_another_kind_are_refused_in_one_short_line(tmp_path, said, message):
    write_folder(tmp_path, byte_level(), **said)
    if message is None:
        assert Tokenizer.from_folder(tmp_path).chat_template is None
        return
    with pytest.raises(UserError, match=message) as error:
        Tokenizer.from_folder(tmp_path)
    assert len(str(error.value)) < 500
