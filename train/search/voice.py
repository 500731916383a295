"""A model that answers: requests to tokens for its engine, completions to texts."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable, Mapping, Sequence

import numpy as np

from ..generate.engine import Decoding, Engine
from ..generate.rollout import without_eos
from ..generate.slots import Completion, Request
from ..generate.stops import Stops
from ..models.open import Model
from ..models.tokenizer import DATE
from ..tasks.wording import untemplated
from .ask import Ask, Reply
from .prompts import LENGTHS, Prompts
from .settings import Drawing


def key_of(seed: int, id: str, name: str) -> np.ndarray:
    """Key data [2] of a request: it depends on the seed, the question and the request's name, on no batch."""
    return np.frombuffer(hashlib.sha256(f"{seed}/{id}/{name}".encode()).digest()[:8], np.uint32)


class Voice:
    """One model with the roles it plays.

    Args:
      temperatures: of the roles that differ from the prompts' and from `drawing`'s.
      dtype: of the matmuls' operands.
      chain: by a question's id and the beginning of a chain of thought, the tokens that the chain goes on from, in
        place of the prompt file's.
      gather: as the engine's.
    """

    def __init__(
        self,
        model: Model,
        prompts: Prompts,
        drawing: Drawing,
        *,
        seed: int,
        dtype: str = "float32",
        temperatures: Mapping[str, float] | None = None,
        chain: Callable[[str, str], tuple[int, ...]] | None = None,
        gather: bool = False,
    ):
        self.model, self.prompts, self.drawing, self.seed = model, prompts, drawing, seed
        self.temperatures, self.chain = temperatures or {}, chain
        self.engine = Engine(
            model.config,
            model.params,
            slots=drawing.slots,
            how=Decoding(False, drawing.top_k, drawing.top_p, dtype),
            eos=model.tokenizer.eos_ids,
            temperature=drawing.temperature,
            shelf=drawing.kept * drawing.slots,
            gather=gather,
        )
        self.begins: dict[int, bool] = {}
        """Of the requests that are out: whether the reply begins a text to the tokenizer."""
        self.read_tokens = 0
        """Tokens of all prompts; a shared prefill counts for each prompt."""

    def request(self, number: int, id: str, ask: Ask) -> Request | None:
        """What the engine is given; None if the model has no room for it."""
        prompt = self.prompts[ask.prompt]
        begun = ask.values.get("begun", "")
        if ask.prompt == "chain" and self.chain is not None:
            tokens = self.chain(id, begun)
        else:
            messages, prefix = prompt.render(ask.values)
            tokens = self.tokens(messages, prefix + begun, plain=prompt.plain)
        most = getattr(self.drawing, LENGTHS.get(ask.prompt, ask.prompt))
        if len(tokens) + most > self.model.config.context:
            return None
        self.read_tokens += len(tokens)
        begins = self.begins[number] = self.model.tokenizer.begins_text(tokens)
        return Request(
            number,
            tokens,
            key_of(self.seed, id, ask.name),
            most,
            self.temperatures.get(ask.role, prompt.temperature),
            self.stops(prompt.stop + prompt.until, begins) if prompt.stop + prompt.until else None,
        )

    def tokens(self, messages: Sequence[Mapping[str, str]], prefix: str, *, plain: bool = False) -> tuple[int, ...]:
        """A chat with the beginning of its answer; to a model without a template, what is said, one below the other."""
        text, special = self.spelt(messages, prefix, plain=plain)
        return tuple(self.model.tokenizer.encode(text, special=special))

    def spelt(self, messages: Sequence[Mapping[str, str]], prefix: str, *, plain: bool = False) -> tuple[str, bool]:
        """What `tokens` are the tokens of, and whether they have those that the tokenizer puts around a text."""
        tokenizer = self.model.tokenizer
        if plain:
            return "".join(m["content"] for m in messages) + prefix, True
        if tokenizer.has_chat_template:
            return tokenizer.chat(messages, date_string=DATE) + prefix, False
        return untemplated([m["content"] for m in messages]) + prefix, True

    @functools.lru_cache(maxsize=64)  # noqa: B019  # a voice lives as long as its search
    def stops(self, strings: tuple[str, ...], begins: bool) -> Stops:
        return Stops(self.model.tokenizer, strings, begins=begins)

    def reply(self, ask: Ask, completion: Completion) -> Reply:
        """The text with the beginning that was written for it, ended where the prompt says."""
        prompt = self.prompts[ask.prompt]
        strings = (*prompt.stop, *prompt.until, *((prompt.after,) if prompt.after else ()))
        marks = self.stops(strings, self.begins.pop(completion.id))
        text = marks.read(without_eos(completion.tokens, self.model.tokenizer))
        for string in prompt.stop:
            text = text.partition(string)[0]
        for string in prompt.until:
            before, found, _ = text.partition(string)
            text = before + found
        if prompt.after:
            # Thought to no end, it has said nothing.
            said = text.rpartition(prompt.after)[2] if prompt.after in text else ""
            return Reply(marks.clean(said), completion.reason, len(completion.tokens))
        _, prefix = prompt.render(ask.values)
        return Reply(prefix + marks.clean(text), completion.reason, len(completion.tokens))
