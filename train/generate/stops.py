"""Strings at which a completion ends, special tokens among them."""

from __future__ import annotations

from collections.abc import Sequence

from ..models.tokenizer import Tokenizer


class Stops:
    """Finds strings in completions. Special tokens that a string names are looked for; others are no text.

    Args:
      strings: a completion ends with the first of them to be complete; may be none.
      begins: the completions begin a text to the tokenizer (`Tokenizer.begins_text`).
    """

    def __init__(self, tokenizer: Tokenizer, strings: Sequence[str], *, begins: bool = False):
        self.strings = tuple(strings)
        self.decode = tokenizer.decode if begins else tokenizer.decode_after
        self.named = tuple(t for t in tokenizer.special_tokens if any(t in s for s in self.strings))
        self.left_out = {id for t, id in tokenizer.special_tokens.items() if t not in self.named}
        # A string of n characters has at most n bytes × 4 tokens.
        self.window = 4 * max(map(len, self.strings), default=0) + 4

    def __call__(self, tokens: Sequence[int]) -> int | None:
        """How many tokens to keep where the newest completed a string; None where it did not."""
        tail = self.read(tokens[-self.window :])
        return len(tokens) if any(s in tail for s in self.strings) else None

    def read(self, tokens: Sequence[int]) -> str:
        """Text of a completion with the special tokens that strings name."""
        if not self.named:
            return self.decode(tokens)
        return self.decode([t for t in tokens if t not in self.left_out], special=True)

    def cut(self, tokens: Sequence[int]) -> str:
        """Text of a completion before the first of the strings."""
        text = self.read(tokens)
        for string in self.strings:
            text = text.partition(string)[0]
        return self.clean(text)

    def clean(self, text: str) -> str:
        """A text that was read, without special tokens."""
        for token in self.named:
            text = text.replace(token, "")
        return text
