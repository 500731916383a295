"""Which tokens of a conversation are learnt: the assistant's and the end after them, by marks and by prefixes alike."""

import dataclasses

import pytest
from helpers.tiny_tokenizers import CHATML, MARKED, byte_level, llama_like

from train.data.formats import read_row
from train.data.records import Record, turns
from train.learn import chat
from train.learn.chat import encode_spans, prefix_spans
from train.log import UserError
from train.models.tokenizer import Tokenizer

FORGETFUL = """{% for m in messages %}<|im_start|>{{ m['role'] }}
{% if m['role'] == 'assistant' and not loop.last %}{{ m['content'].split('</think>')[-1] }}{% else %}{{ m['content'] }}
{%- endif %}<|im_end|>
{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant
{% endif %}"""
CHAT = read_row(
    {
        "messages": [
            {"role": "system", "content": "Be brief."},
            {"role": "user", "content": "Hello world"},
            {"role": "assistant", "content": "Hi\n"},
            {"role": "user", "content": "What is 12 + 30?"},
            {"role": "assistant", "content": "It is 42."},
        ]
    }
)


def encode(tokenizer, record, **given):
    (encoded,) = chat.encode(tokenizer, record, **given)
    return encoded


@pytest.fixture(scope="module")
def tokenizer():
    special = {"bos_token": "<|endoftext|>", "eos_token": "<|im_end|>"}
    return Tokenizer(byte_level(), special, chat_template=CHATML)


def learnt(tokenizer, encoded):
    """The runs of learnt tokens, as text."""
    runs, previous = [], 0
    for token, flag in zip(encoded.tokens, encoded.learnt, strict=True):
        if flag and not previous:
            runs.append([])
        if flag:
            runs[-1].append(token)
        previous = flag
    return [tokenizer.decode(run, special=True) for run in runs]


def test_every_turn_of_the_assistant_and_its_end_are_learnt(tokenizer):
    encoded = encode(tokenizer, CHAT)
    assert learnt(tokenizer, encoded) == ["Hi\n<|im_end|>", "It is 42.<|im_end|>"]
    assert tokenizer.decode(encoded.tokens, special=True) == tokenizer.chat(CHAT.messages, False)
    assert learnt(tokenizer, encode(tokenizer, CHAT, learn="last")) == ["It is 42.<|im_end|>"]


def test_marks_and_prefixes_agree(tokenizer):
    marked = dataclasses.replace(tokenizer, chat_template=MARKED)
    assert marked.marks_generation
    assert not tokenizer.marks_generation
    assert encode(marked, CHAT) == encode(tokenizer, CHAT)
    assert marked.chat(CHAT.messages, False) == tokenizer.chat(CHAT.messages, False)


def test_what_stands_before_an_answer_is_what_the_model_is_given(tokenizer):
    """The tokens up to each answer are those of the prompt that ends with its opening."""
    encoded = encode(tokenizer, CHAT)
    for turn in (2, 4):
        prompt = tokenizer.encode(tokenizer.chat(CHAT.messages[:turn], True))
        assert encoded.tokens[: len(prompt)] == prompt
        assert encoded.learnt[len(prompt) - 1 : len(prompt) + 1] == [0, 1]


def test_a_template_that_rewrites_earlier_turns_is_refused(tokenizer):
    forgetful = dataclasses.replace(tokenizer, chat_template=FORGETFUL)
    thought = Record((*turns("a", "<think>x</think>b"), *turns("c", "<think>y</think>d")))
    with pytest.raises(UserError, match=r"not prefix-stable: .* turn 1 .* Set data\.learn=each"):
        encode(forgetful, thought)
    assert learnt(tokenizer, encode(forgetful, thought, learn="last")) == ["<think>y</think>d<|im_end|>"]
    each = chat.encode(forgetful, thought, learn="each")
    assert [learnt(tokenizer, e) for e in each] == [["<think>x</think>b<|im_end|>"], ["<think>y</think>d<|im_end|>"]]
    assert "x</think>" not in tokenizer.decode(each[1].tokens)
    assert learnt(tokenizer, encode(forgetful, CHAT)) == ["Hi\n<|im_end|>", "It is 42.<|im_end|>"]


def test_an_answer_whose_first_token_would_join_the_prompts_last(tokenizer):
    """Where one token lies across the beginning of an answer, the pieces are tokenised apart, as sampling does."""
    text = "Hello world, the naïve café"
    whole = tokenizer.encode(text)
    cut = next(k for k in range(1, len(text)) if tokenizer.encode(text[:k]) != whole[: len(tokenizer.encode(text[:k]))])
    encoded, ended = encode_spans(tokenizer, text, [(cut, len(text))])
    assert not ended
    assert encoded.tokens == [*tokenizer.encode(text[:cut]), *tokenizer.encode(text[cut:]), tokenizer.eos_ids[0]]
    assert encoded.tokens[:-1] != whole
    assert learnt(tokenizer, encoded) == [text[cut:] + "<|im_end|>"]


def test_an_answer_without_an_end_gets_one(tokenizer):
    bare = dataclasses.replace(
        tokenizer,
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    encoded = encode(bare, Record(turns("Hi", "Hello")))
    assert learnt(tokenizer, encoded) == ["Hello\n<|im_end|>"]


def test_a_template_that_always_opens_another_answer(tokenizer):
    """Where a turn ends in an EOS, that is the end of what is learnt; where it does not, nothing says where it is."""
    eager = dataclasses.replace(
        tokenizer, chat_template=CHATML.replace("{% if add_generation_prompt %}", "{% if true %}")
    )
    assert learnt(tokenizer, encode(eager, Record(turns("Hi", "Hello")))) == ["Hello<|im_end|>"]
    endless = dataclasses.replace(eager, special={"eos_token": "<|endoftext|>"}, eos_ids=(0,))
    with pytest.raises(UserError, match="opens another answer after the last one"):
        encode(endless, Record(turns("Hi", "Hello")))


def test_plain_texts_and_models_without_a_template(tokenizer):
    base = dataclasses.replace(tokenizer, chat_template=None)
    plain = read_row({"prompt": "1+1=", "completion": "2"})
    assert learnt(tokenizer, encode(tokenizer, plain)) == ["2<|im_end|>"]
    assert encode(base, plain) == encode(tokenizer, plain)
    single = encode(base, Record(turns("Hi", "Hello", system="Be brief.")))
    assert tokenizer.decode(single.tokens, special=True) == "Be brief.\n\nHi\n\nHello<|im_end|>"
    with pytest.raises(UserError, match=r"several turns; give one with data\.chat_template"):
        encode(base, CHAT)


def test_choices_stand_under_their_question(tokenizer):
    record = read_row({"question": "Metal?", "choices": ["wood", "iron"], "answer": "B"})
    text = tokenizer.decode(encode(tokenizer, record).tokens, special=True)
    assert "Metal?\nA. wood\nB. iron<|im_end|>" in text
    assert learnt(tokenizer, encode(tokenizer, record)) == ["B<|im_end|>"]


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        (turns("Hi"), "no assistant's turn"),
        ((*turns("Hi", "Hello"), *turns("More")), "the last turn is the user's"),
        (turns("Hi", "odd \uf8fe"), "private character"),
    ],
)
def test_conversations_that_cannot_be_learnt(tokenizer, messages, message):
    marked = dataclasses.replace(tokenizer, chat_template=MARKED)
    with pytest.raises(UserError, match=message):
        encode(marked, Record(messages))


def test_a_template_whose_marks_are_missing_a_turn_is_refused(tokenizer):
    half = CHATML.replace(
        "{{ m['content'] + '<|im_end|>' }}{% else %}",
        "{% if loop.last %}{% generation %}{{ m['content'] }}{% endgeneration %}{{ '<|im_end|>' }}{% else %}"
        "{{ m['content'] + '<|im_end|>' }}{% endif %}{% else %}",
    )
    with pytest.raises(UserError, match="marks 1 generations in 2 turns"):
        encode(dataclasses.replace(tokenizer, chat_template=half), CHAT)


def test_prefix_spans_are_where_the_turns_are(tokenizer):
    text, spans = prefix_spans(tokenizer, CHAT.messages)
    assert [text[a:b] for a, b in spans] == ["Hi\n<|im_end|>\n", "It is 42.<|im_end|>\n"]


# --- tokenizers that put a space before a text; texts that bring their own beginning and end ---


@pytest.mark.parametrize("kind", ["prepend", "first"])
@pytest.mark.parametrize(
    ("prompt", "completion"), [("Q: 1+1=", "2"), ("def f(x):\n", "    return x"), ("A: ", "yes"), ("A:", " yes")]
)
def test_a_bare_prompt_and_completion_are_learnt_as_the_file_says(kind, prompt, completion):
    ours = llama_like(kind)
    encoded = encode(ours, read_row({"prompt": prompt, "completion": completion}))
    assert ours.decode(encoded.tokens) == prompt + completion
    assert encoded.tokens[: encoded.learnt.index(1)] == ours.encode(prompt, special=True)
    rendered = encode(ours, read_row({"prompt": f"<s>{prompt}", "completion": f"{completion}</s>"}))
    assert (rendered.tokens.count(1), rendered.tokens.count(2), rendered.tokens[-1]) == (1, 1, 2)


def test_the_end_of_a_rendered_completion_is_learnt_once(tokenizer):
    """As ChatML is written: its line break after the end is no part of the answer."""
    for end in ("<|im_end|>", "<|im_end|>\n", ""):
        row = {"prompt": "<|endoftext|>1+1=", "completion": f"2{end}"}
        assert learnt(tokenizer, encode(tokenizer, read_row(row))) == ["2<|im_end|>"]


def test_an_answer_written_with_its_end_is_learnt_with_one(tokenizer):
    for ours in (tokenizer, dataclasses.replace(tokenizer, chat_template=MARKED)):
        wanted = encode(ours, Record(turns("Hi", "Hello")))
        assert encode(ours, Record(turns("Hi", "Hello<|im_end|>"))) == wanted


def test_an_answer_across_a_token_is_joined_in_a_conversation_too():
    """The template opens an answer with a space; a tokenizer of this kind gives one of its own to the next word."""
    ours = dataclasses.replace(
        llama_like(),
        chat_template="{% for m in messages %}{{ m['role'] + ': ' + m['content'] + '\n' }}{% endfor %}"
        "{% if add_generation_prompt %}assistant: {% endif %}",
    )
    encoded = encode(ours, Record(turns("Hi", "yes")))
    assert ours.decode(encoded.tokens) == "user: Hi\nassistant: yes\n"
    prompt = ours.encode("user: Hi\nassistant: ")
    assert encoded.tokens[: len(prompt)] == prompt
    assert encoded.learnt[: len(prompt) + 1] == [0] * len(prompt) + [1]


PHI = """{% for m in messages %}{% if m['role'] == 'assistant' %}{{ '<|assistant|>\n' + m['content'] + '<|end|>\n' }}
{%- else %}{{ '<|user|>\n' + m['content'] + '<|end|>\n' }}{% endif %}{% endfor %}
{%- if add_generation_prompt %}{{ '<|assistant|>\n' }}{% else %}{{ eos_token }}{% endif %}"""


def test_a_template_that_ends_every_text_with_an_eos_is_learnt_in_several_turns():
    """Phi-3's: what it puts behind the last message alone is no part of an earlier turn."""
    names = ("<|endoftext|>", "<|user|>", "<|assistant|>", "<|end|>")
    ours = Tokenizer(byte_level(special=names), {"eos_token": "<|endoftext|>"}, chat_template=PHI, eos_ids=(0, 3))
    encoded = encode(ours, CHAT)
    assert learnt(ours, encoded) == ["Hi\n<|end|>", "It is 42.<|end|>\n<|endoftext|>"]
    assert ours.decode(encoded.tokens, special=True) == ours.chat(CHAT.messages, False)
