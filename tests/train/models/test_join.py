"""Texts that follow each other as tokens: exact at the seam, with one BOS and one EOS, in tokenizers of every kind."""

import datetime
import json

import pytest
from helpers.tiny_tokenizers import CHATML, byte_level, llama_like, metaspace, write_folder

from train.log import UserError
from train.models.open import Model, with_date
from train.models.tokenizer import Tokenizer

PAIRS = [
    ("The capital of France is", " Paris"),
    ("Q: 1+1=", "2"),
    ("def f(x):\n", "    return x\n"),
    ("A: ", "yes"),
    ("A:", "\n2 apples"),
    ("", "Paris"),
    ("A:", ""),
    ("a", "▁b"),
    ("x = ", "日本 👩‍👩‍👧\n"),
]
KINDS = ["prepend", "first", "bytes"]


@pytest.fixture(scope="module", params=KINDS)
def tokenizer(request):
    if request.param == "bytes":
        return Tokenizer(byte_level(), {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}, chat_template=CHATML)
    return llama_like(request.param)


@pytest.mark.parametrize(("prompt", "completion"), PAIRS)
def test_prompt_and_completion_read_as_one_text(tokenizer, prompt, completion):
    """What is learnt follows exactly the tokens that the prompt alone has, which is what a model is given."""
    head, tail = tokenizer.join(prompt, completion, special=True)
    assert head == tokenizer.encode(prompt, special=True)
    whole = tokenizer.encode(prompt + completion, special=True)
    # A literal ▁ reads as a space, in any of these tokenizers and however it is tokenised.
    assert tokenizer.decode(head + tail) == tokenizer.decode(whole)
    if "▁" not in completion:
        assert tokenizer.decode(head + tail) == prompt + completion
        decode = tokenizer.decode if tokenizer.begins_text(head) else tokenizer.decode_after
        assert decode(tail) == completion
    if whole[: len(head)] == head:
        assert head + tail == whole


def test_many_pieces_are_joined_at_every_seam(tokenizer):
    pieces = ["Q: 1+1=", "2", "\nQ: 2+2=", "4", ". "]
    parts = tokenizer.join(*pieces, special=True)
    assert len(parts) == 5
    assert tokenizer.decode([id for part in parts for id in part]) == "".join(pieces)


def test_apart_these_tokenizers_put_a_space_between():
    """What makes `join` needed: it is no law of the tokenizers made here that pieces can be put side by side."""
    ours = llama_like()
    assert ours.decode(ours.encode("Q: 1+1=") + ours.encode("2")) == "Q: 1+1= 2"


@pytest.mark.parametrize(("kind", "anew"), [("prepend", True), ("first", False)])
def test_a_text_that_follows_keeps_its_space(kind, anew):
    ours = llama_like(kind)
    head, tail = ours.join("The capital of France is", " Paris", special=True)
    assert ours.decode(tail) == "Paris"
    assert ours.decode_after(tail) == " Paris"
    assert not ours.begins_text(head)
    # Behind special tokens a space may be the tokenizer's own again: what is read is what gives these tokens.
    assert ours.begins_text([1])
    head, tail = ours.join("a</s>", "Paris", special=True)
    assert ours.begins_text(head) is anew
    assert (ours.decode(tail) if anew else ours.decode_after(tail)) == "Paris"


@pytest.mark.parametrize("kind", ["prepend", "first"])
def test_a_bos_stands_once_and_no_eos_ends_what_goes_on(kind):
    for ours in (llama_like(kind), llama_like(kind, add_eos=True)):
        assert ours.opening == (1,)
        for text in ("1+1=", "<s>1+1=", "<s> 1+1="):
            ids = ours.encode(text, special=True)
            assert (ids[0], ids.count(1), ids.count(2)) == (1, 1, 0), text
        head, tail = ours.join("<s>[INST] 1+1? [/INST]", " 2</s>", special=True)
        assert (head + tail).count(1) == 1
        assert ours.close(tail) == tail


def test_an_end_is_put_once(tokenizer):
    end = tokenizer.eos_ids[0]
    name = tokenizer.special["eos_token"]
    for text in ("2", f"2{name}", f"2{name}\n", f"2{name} \n"):
        _, tail = tokenizer.join("1+1=", text, special=True)
        closed = tokenizer.close(tail)
        assert closed.count(end) == 1
        assert closed[-1] == end
        assert tokenizer.decode_after(closed) == "2"
    assert tokenizer.close([]) == [end]
    assert tokenizer.close([end, *tokenizer.encode("x")])[-1] == end


def test_a_special_token_that_the_template_writes_too_stands_once(tokenizer):
    end = tokenizer.special["eos_token"]
    chat = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "content": "2"}]
    plain = tokenizer.chat(chat, False)
    for said in (f"2{end}", f"2{end}\n"):
        assert tokenizer.chat([chat[0], {"role": "assistant", "content": said}], False) == plain
    # One that the template does not write is the message's own.
    other = tokenizer.special["bos_token"]
    assert f"2{other}" in tokenizer.chat([chat[0], {"role": "assistant", "content": f"2{other}"}], False)


def test_an_empty_turn_left_open_is_the_opening_of_an_answer(tokenizer):
    chat = [{"role": "user", "content": "1+1?"}]
    assert tokenizer.chat_to_continue([*chat, {"role": "assistant", "content": ""}]) == tokenizer.chat(chat, True)


# --- special tokens in a text ---


@pytest.mark.parametrize("splits", [True, False])
def test_special_tokens_are_split_where_the_tokenizer_says_so_and_is_saved_so(tmp_path, splits):
    from transformers import AutoTokenizer

    settings = {"bos_token": "<s>", "eos_token": "</s>", "tokenizer_class": "PreTrainedTokenizerFast"}
    folder = write_folder(tmp_path, metaspace(), **settings, split_special_tokens=splits)
    (tmp_path / "saved").mkdir()
    Tokenizer.from_folder(folder).save(tmp_path / "saved")
    for place in (folder, tmp_path / "saved"):
        ours, theirs = Tokenizer.from_folder(place), AutoTokenizer.from_pretrained(place)
        ids = ours.encode("a</s>b")
        assert (2 in ids) is not splits
        assert ids == theirs.encode("a</s>b", add_special_tokens=False)
    assert json.loads((tmp_path / "saved" / "tokenizer_config.json").read_text())["split_special_tokens"] is splits


# --- the date ---

DATED = "Today is {{ strftime_now('%d %b %Y') }}.{{ messages[0]['content'] }}"


def test_a_run_tells_a_template_one_date(tmp_path):
    ours = Tokenizer(byte_level(), {"eos_token": "<|im_end|>"}, chat_template=DATED)
    model = Model(None, None, ours)  # pyright: ignore  # neither is read
    assert ours.asks_date
    begun = with_date(model, tmp_path).tokenizer
    assert begun.date.isoformat() == (tmp_path / "date.txt").read_text().strip()
    assert abs((begun.date - datetime.date.today()).days) <= 1  # midnight may pass
    (tmp_path / "date.txt").write_text("2025-03-09\n")  # as if it was begun then
    again = with_date(model, tmp_path).tokenizer
    assert again.chat([{"role": "user", "content": "x"}]) == "Today is 09 Mar 2025.x"
    (tmp_path / "date.txt").write_text("soon")
    with pytest.raises(UserError, match=r"date\.txt is 'soon'; a date is wanted"):
        with_date(model, tmp_path)


def test_where_no_date_is_asked_for_none_is_kept(tmp_path):
    model = Model(None, None, llama_like())  # pyright: ignore  # neither is read
    assert with_date(model, tmp_path) is model
    assert list(tmp_path.iterdir()) == []
