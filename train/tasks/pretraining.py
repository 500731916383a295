"""The text the miniature is pretrained on: rendered examples of several families, packed in rows.

The miniature is to know some families well and one a little, so that self-improvement has something to improve
and something to lose: it sees `gcd` of small numbers only, and is asked for larger ones in domain.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from random import Random
from typing import TYPE_CHECKING

from ..log import UserError
from ..models.characters import EOS, EOS_ID, PAD_ID, encode
from .settings import Ingredient
from .suite import Suite, draw_seed, task_of

if TYPE_CHECKING:
    import numpy as np

ROW = 96  # tokens of a packed row; the longest example has ROW - 1 with its end


MINIATURE: tuple[Ingredient, ...] = (
    Ingredient("chain_sum", 0.30, {"min_terms": 2, "max_terms": 4, "min_digits": 1, "max_digits": 2}),
    Ingredient("products", 0.25, {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2}),
    Ingredient(
        "number_sorting",
        0.20,
        {"min_numbers": 3, "max_numbers": 5, "max_decimals": 0, "min_value": 0, "max_value": 99},
    ),
    Ingredient("simple_geometry", 0.15, {"min_sides": 3, "max_sides": 4, "min_angle": 10, "max_angle": 120}),
    Ingredient("gcd", 0.10, {"min_value": 1, "max_value": 40}),
)


def held_out(suite: Suite) -> frozenset[str]:
    """Collect the prompts of every question of a suite: none of them may be in the pretraining text."""
    return frozenset(q.text for q in suite.all)


def pretraining_examples(
    ingredients: Sequence[Ingredient], *, seed: int, excluded: Collection[str] = frozenset(), row: int = ROW
) -> Iterator[str]:
    """Yield rendered examples `prompt?work#answer` without end, each with its `EOS`."""
    for text, _ in _examples(ingredients, seed=seed, excluded=excluded, row=row):
        yield text


def _examples(
    ingredients: Sequence[Ingredient], *, seed: int, excluded: Collection[str], row: int
) -> Iterator[tuple[str, int]]:
    """Yield (example, where in it learning begins) without end.

    Families alternate at random in proportion to their shares. A question in `excluded`, worked or judged, and an
    example longer than `row` - 1 symbols, is passed over. The same arguments give the same stream in every process.
    """
    if not ingredients:
        raise UserError("pretraining: no ingredients; list at least one family with its share")
    streams = [_stream(x, seed=draw_seed(seed, "pretraining", i, x.family)) for i, x in enumerate(ingredients)]
    choose = Random(draw_seed(seed, "pretraining", "order"))
    shares = [x.share for x in ingredients]
    passed_over = 0
    while True:
        (i,) = choose.choices(range(len(streams)), shares)
        prompt, solution = next(streams[i])
        text = prompt + solution + EOS
        if prompt.partition("?")[0] + "?" in excluded or len(text) > row - 1:
            passed_over += 1
            if passed_over > 10_000:
                raise UserError(
                    "pretraining: 10000 examples in a row are held out or longer than a row of"
                    f" {row} symbols; widen the ranges of {ingredients[i].family} or make the rows longer"
                )
            continue
        passed_over = 0
        yield text, len(prompt) if ingredients[i].learn == "solution" else 0


def pretraining_rows(
    ingredients: Sequence[Ingredient],
    tokens: int,
    *,
    seed: int,
    excluded: Collection[str] = frozenset(),
    row: int = ROW,
) -> tuple[np.ndarray, np.ndarray]:
    """Pack rendered examples into rows of token ids until `tokens` symbols are used, padding not counted.

    Every row starts with `EOS`, so that each example follows one, as it does when the model is asked; an example
    is never cut. Of 64 waiting examples the longest that still fits goes next, which leaves some 5 % padding.

    Returns:
      tokens, a uint8 array [R, row] padded with `PAD_ID`, and which of them are learnt, a bool array of that shape.
    """
    import numpy as np

    def encoded() -> tuple[list[int], list[bool]]:
        text, start = next(examples)
        return encode(text), [i >= start for i in range(len(text))]

    examples = _examples(ingredients, seed=seed, excluded=excluded, row=row)
    waiting = [encoded() for _ in range(64)]
    rows, masks = [], []
    used = 0
    while used < tokens:
        line, learnt = [EOS_ID], [True]
        # The first is whichever waited longest, so that none waits for ever.
        pick = 0
        while pick is not None:
            example, mask = waiting.pop(pick)
            line, learnt = line + example, learnt + mask
            waiting.append(encoded())
            room = row - len(line)
            fitting = [(len(example), -i) for i, (example, _) in enumerate(waiting) if len(example) <= room]
            pick = -max(fitting)[1] if fitting else None
        used += len(line)
        rows.append(np.array(line + [PAD_ID] * (row - len(line)), np.uint8))
        masks.append(np.array(learnt + [False] * (row - len(line))))
    return np.stack(rows), np.stack(masks)


def _stream(ingredient: Ingredient, *, seed: int) -> Iterator[tuple[str, str]]:
    """Draw (prompt, work and answer) without end, in blocks whose seeds are far apart."""
    task, size = task_of(ingredient.family, "compact"), 100_000
    block = 0
    while True:
        for prompt, _, solution, _ in task.draw(ingredient.args, draw_seed(seed, block), size):
            yield prompt, solution or ""
        block += 1
