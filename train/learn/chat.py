"""From a record to tokens and which of them are learnt: the assistant's turns and the end after each, nothing else.

Where a chat template marks what an assistant writes ({% generation %}), that is learnt. Elsewhere a turn is what the
template adds when the turn is there: the text with it, less the text before it and the opening of an answer. That is
exact only if the template renders what came before as it did before, which is verified for every conversation;
templates that rewrite earlier turns (dropping their reasoning, say) are refused, not guessed at.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence
from typing import Any, Literal

from ..data.records import Message, Record
from ..log import UserError
from ..models.tokenizer import Tokenizer
from ..tasks import wording

Learn = Literal["assistant", "last", "each"]
Span = tuple[int, int]


@dataclasses.dataclass(frozen=True)
class Encoded:
    """Tokens of an example and, for each, 1 where it is learnt."""

    tokens: list[int]
    learnt: list[int]


def encode(tokenizer: Tokenizer, record: Record, *, learn: Learn = "assistant", **variables: Any) -> list[Encoded]:
    """Tokens of a record and which are learnt: one example, or with `each` one for every turn of the assistant.

    Args:
      learn: `assistant` learns every turn of the assistant, `last` the last one alone, `each` every turn in an
        example of its own, which ends with it: so a template may render earlier turns as it likes.
      variables: further names the chat template reads.

    Raises:
      UserError: nothing in the record can be learnt, or the template is not prefix-stable for it.
    """
    messages = shown(record)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant" and m["content"]]
    if not turns:
        raise UserError("no assistant's turn to learn from")
    if learn == "each":
        return [_encode(tokenizer, record, messages[: i + 1], "last", **variables) for i in turns]
    return [_encode(tokenizer, record, messages, learn, **variables)]


def _encode(tokenizer: Tokenizer, record: Record, messages: list[Message], learn: Learn, **variables: Any) -> Encoded:
    if record.plain or not tokenizer.has_chat_template:
        return encode_plain(tokenizer, messages, plain=record.plain)
    if messages[-1]["role"] != "assistant":
        raise UserError(f"the last turn is the {messages[-1]['role']}'s; a conversation must end with the assistant's")
    if learn == "assistant" and tokenizer.marks_generation:
        text, spans = tokenizer.chat_spans(messages, **variables)
        wanted = sum(m["role"] == "assistant" for m in messages)
        if len(spans) != wanted:
            raise UserError(f"the chat template marks {len(spans)} generations in {wanted} turns of the assistant")
    else:
        text, spans = prefix_spans(tokenizer, messages, learn=learn, **variables)
    encoded, ended = encode_spans(tokenizer, text, spans)
    # A template may open another answer whether it is asked to or not; then its end must not be taken for ours.
    if not ended and tokenizer.chat(messages, True, **variables) == text:
        raise UserError(
            "the chat template opens another answer after the last one, and ends no turn with one of the model's"
            f" end-of-sequence tokens ({', '.join(map(str, tokenizer.eos_ids))}); set data.chat_template to one that"
            " heeds add_generation_prompt"
        )
    return encoded


def shown(record: Record) -> list[Message]:
    """The messages as the model sees them: a multiple-choice question with its lettered choices."""
    if not record.choices:
        return list(record.messages)
    asked = wording.lettered(record.question, record.choices)
    return [{"role": "user", "content": asked} if m["role"] == "user" else m for m in record.messages]


def encode_plain(tokenizer: Tokenizer, messages: Sequence[Message], *, plain: bool) -> Encoded:
    """A prompt and what follows it, then the end: for bare texts, and for models without a chat template."""
    *context, last = messages
    if last["role"] != "assistant" or any(m["role"] == "assistant" for m in context):
        raise UserError(
            "this model has no chat template, and the example has several turns; give one with"
            " data.chat_template=FILE.jinja, or take examples with a single answer"
        )
    prompt = "".join(m["content"] for m in context) if plain else wording.untemplated([m["content"] for m in context])
    head, tail = tokenizer.join(prompt, last["content"], special=True)
    tail = tokenizer.close(tail)
    return Encoded(head + tail, [0] * len(head) + [1] * len(tail))


def prefix_spans(
    tokenizer: Tokenizer, messages: Sequence[Message], *, learn: Learn = "assistant", **variables: Any
) -> tuple[str, list[Span]]:
    """Render a conversation and find the assistant's turns in it by exact prefix differences.

    Returns:
      (text, [(start, end), …] in characters), each from the opening of an answer to where the next turn begins.
    """
    text = tokenizer.chat(messages, False, **variables)
    turns = [i for i, m in enumerate(messages) if m["role"] == "assistant"]
    spans = []
    for i in turns[-1:] if learn == "last" else turns:
        before = tokenizer.chat(messages[:i], True, **variables)
        after = text if i + 1 == len(messages) else up_to(text, tokenizer, messages[: i + 1], **variables)
        if not (text.startswith(after) and after.startswith(before)):
            at = next((k for k, (a, b) in enumerate(zip(text, before, strict=False)) if a != b), len(before))
            raise UserError(
                f"the chat template is not prefix-stable: with later turns it renders turn {i} otherwise than without"
                f" them (first at {text[max(0, at - 20) : at + 20]!r}), so what the assistant wrote cannot be told"
                " exactly. Set data.learn=each, or data.chat_template to one with {% generation %} marks"
            )
        spans.append((len(before), len(after)))
    return text, spans


def up_to(text: str, tokenizer: Tokenizer, messages: Sequence[Message], **variables: Any) -> str:
    """Render the first messages of a conversation as they stand in `text`, which holds more.

    A special token that a template writes behind the last message alone (Phi-3's) is left out.
    """
    alone = tokenizer.chat(messages, False, **variables)
    last = next((token for token in tokenizer.special_tokens if alone.endswith(token)), "")
    return alone if text.startswith(alone) else alone.removesuffix(last)


def encode_spans(tokenizer: Tokenizer, text: str, spans: Sequence[Span]) -> tuple[Encoded, bool]:
    """Tokens of a text and which lie in its spans, so that what stands before a span is what a model would be given.

    The pieces between the ends of the spans are joined as everywhere (`Tokenizer.join`). What a span holds after its
    last end-of-sequence token (a template's newline) is not learnt; an answer at the end of the text
    that has no such token gets one.

    Returns:
      (tokens, whether the last answer had its end).
    """
    edges = [edge for span in spans for edge in span]
    pieces = [text[start:end] for start, end in itertools.pairwise((0, *edges, len(text)))]
    parts = tokenizer.join(*pieces)
    whole, bounds = [*itertools.chain(*parts)], list(itertools.accumulate(map(len, parts)))[:-1]
    if tokenizer.decode(whole, special=True) != tokenizer.decode(tokenizer.encode(text), special=True):
        raise UserError(
            "a token of this conversation lies across the beginning of an answer, and the tokenizer gives other"
            f" text for its pieces (near {text[max(0, edges[0] - 20) : edges[0] + 20]!r}); change the chat template so"
            " that an answer begins on a token of its own"
        )
    learnt, ended = [0] * len(whole), True
    for start, end in zip(bounds[::2], bounds[1::2], strict=True):
        ends = [i for i in range(start, end) if whole[i] in tokenizer.eos_ids]
        stop = ends[-1] + 1 if ends else end
        learnt[start:stop] = [1] * (stop - start)
        if not ends and end == len(whole):
            whole, learnt, ended = [*whole, tokenizer.eos_ids[0]], [*learnt, 1], False
    return Encoded(whole, learnt), ended
