"""reasoning-gym families in the `instruct` style: the generator's own question, asked of a chat model.

Three things are mended on the way. Generators that draw from Python sets differ from process to process
(`_FIXES`); scorers that evaluate the model's text get only text that is safe to evaluate (`_GUARDS`); and
scorers that accept near misses, or generators that give wrong gold answers, are tightened (`_EXACT`, `_SOUND`).
"""

from __future__ import annotations

import ast
import difflib
import math
import re
from collections.abc import Callable, Iterator, Mapping
from decimal import Decimal
from fractions import Fraction
from typing import Any

from ..log import UserError
from . import codeio, wording
from .task import Prompt, Question, Unjudged

ACCEPT = 0.999  # scorers pay part marks for substrings and near misses; only full marks are right

REFUSED = {
    "game_of_life_halting": "its scorer accepts any text that is not empty",
    "composite": "it mixes other families; list these one by one",
}


def family_names() -> list[str]:
    """List the families that can be asked for."""
    from reasoning_gym.factory import DATASETS

    return sorted(set(DATASETS) - set(REFUSED))


def open_generator(family: str, args: Mapping[str, Any], *, seed: int, size: int) -> Any:
    """Open a generator whose items depend on `args` and `seed` alone, the hash seed of the process included.

    Item i uses Random(seed + i): two seeds less than `size` apart share items.
    """
    if family in REFUSED:
        raise UserError(f"tasks: family {family} is refused: {REFUSED[family]}")
    import reasoning_gym
    from reasoning_gym.factory import DATASETS

    if family not in DATASETS:
        near = difflib.get_close_matches(family, family_names(), n=3, cutoff=0.4)
        hint = f"did you mean {' or '.join(near)}?" if near else "see reasoning-gym's gallery for the names."
        raise UserError(f"tasks: no family {family!r}; {hint}")
    fields = set(DATASETS[family][1].__dataclass_fields__) - {"seed", "size"}
    unknown = sorted(set(args) - fields)
    if unknown:
        near = difflib.get_close_matches(unknown[0], sorted(fields), n=1, cutoff=0.4)
        hint = f"did you mean {near[0]}? " if near else ""
        raise UserError(
            f"tasks: family {family} has no setting {unknown[0]!r}; {hint}Its settings: {', '.join(sorted(fields))}"
        )
    try:
        dataset = reasoning_gym.create_dataset(family, seed=seed, size=size, **args)
    except (AssertionError, ValueError, TypeError) as error:
        raise UserError(f"tasks: family {family} refuses {dict(args)}: {error}") from error
    if family in _FIXES:
        _FIXES[family](dataset)
    return dataset


class InstructTask:
    """One reasoning-gym family, asked in words."""

    def __init__(self, name: str):
        self.name = name
        self.unjudged = Unjudged()
        self._scorers: dict[str, Any] = {}

    def draw(self, args: Mapping[str, Any], seed: int, size: int) -> Iterator[tuple[str, str, str | None, dict]]:
        """Yield (text, answer, solution, entry); items with a wrong gold answer are left out."""
        dataset = open_generator(self.name, args, seed=seed, size=size)
        sound = _SOUND.get(self.name)
        for i in range(size):
            try:
                entry = dataset[i]
            except IndexError:
                return  # word_ladder: no pair of words is left that its ranges allow
            if sound is None or sound(entry):
                gold = "" if entry["answer"] is None else str(entry["answer"])
                yield entry["question"], gold, _solution(entry), {**entry, "args": dict(args)}

    def prompt(self, question: Question) -> Prompt:
        """Build the chat messages."""
        return wording.instruct(question.text)

    def verify(self, question: Question, text: str) -> float | None:
        """Judge a completion by the generator's scorer on the extracted answer.

        Returns:
          1.0 if the score is at least `ACCEPT`, 0.0 if it is less or no answer was found, None if the scorer
          raised (counted by exception class in `unjudged`) or gave no number.
        """
        try:
            answer = wording.extract_answer(text, question.answer)
            if answer is None or not _GUARDS.get(self.name, _anything)(answer):
                return 0.0
            score = float(self._scorer(question).score_answer(answer, dict(question.entry)))
            if math.isnan(score):
                raise ValueError("the scorer returned NaN")
            exact = _EXACT.get(self.name)
            return float(score >= ACCEPT and (exact is None or exact(answer, question.answer)))
        except Exception as error:  # whatever a scorer may raise on a model's text; recorded, never hidden
            self.unjudged.add(error, question)
            return None

    def _scorer(self, question: Question) -> Any:
        args = question.entry.get("args", {})
        key = repr(sorted(args.items()))
        if key not in self._scorers:
            self._scorers[key] = open_generator(self.name, args, seed=0, size=1)
        return self._scorers[key]


def _solution(entry: Mapping[str, Any]) -> str | None:
    """Take the worked solution a generator gives, or the sum written out where the metadata holds one."""
    metadata = entry.get("metadata", {})
    if "answer_cot" in metadata:
        return metadata["answer_cot"].split("\n####")[0]
    if "expression" in metadata and wording.is_number(str(entry["answer"])):
        return f"{metadata['expression']} = {entry['answer']}"
    return None


# --- generators that differ with PYTHONHASHSEED ------------------------------------------------------------


class _SortedSet(frozenset):
    """A set whose order does not depend on the hash seed."""

    def __iter__(self):
        return iter(sorted(super().__iter__()))

    def __sub__(self, other):
        return _SortedSet(super().__sub__(other))


def _sort_letters(dataset: Any) -> None:
    dataset.letters = _SortedSet(dataset.letters)


def _sort_monomials(dataset: Any) -> None:
    draw = dataset._get_monomials
    dataset._get_monomials = lambda rng: sorted(draw(rng), key=str)


def _sort_neighbours(dataset: Any) -> None:
    find = dataset._get_neighbors
    dataset._get_neighbors = lambda word, word_set: sorted(find(word, word_set))


_FIXES: dict[str, Callable[[Any], None]] = {
    "codeio": codeio.mend,
    "isomorphic_strings": _sort_letters,
    "ransom_note": _sort_letters,
    "polynomial_multiplication": _sort_monomials,
    "word_ladder": _sort_neighbours,
}


# --- scorers that evaluate the model's text ----------------------------------------------------------------


def _anything(answer: str) -> bool:
    del answer
    return True


def _is_literal(answer: str) -> bool:
    """Whether `answer` is data (numbers, strings, lists), so that evaluating it runs nothing."""
    try:
        ast.literal_eval(answer)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        # Rows of plain words and numbers: evaluated, they can neither call nor multiply anything.
        return re.fullmatch(r"[\w ,\n-]*", answer) is not None
    return True


_CALLS = {"sin", "cos", "tan", "asin", "acos", "atan", "sinh", "cosh", "tanh", "exp", "log", "ln", "sqrt", "Abs"}


def _is_expression(answer: str) -> bool:
    """Whether `answer` is a formula: numbers, names, + − * / **, well-known functions, small exponents."""
    if len(answer) > 500:
        return False
    try:
        tree = ast.parse(answer.strip(), mode="eval")
    except (SyntaxError, ValueError, MemoryError, RecursionError):
        return False
    for node in ast.walk(tree):
        if isinstance(node, ast.Call):
            if not (isinstance(node.func, ast.Name) and node.func.id in _CALLS and not node.keywords):
                return False
        elif isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow):
            # `9**9**9` would not come back within anyone's patience
            below = [*ast.walk(node.left), *ast.walk(node.right)]
            sums = any(isinstance(n, ast.Add | ast.Mult) for n in ast.walk(node.right))
            numbers = [n.value for n in ast.walk(node.right) if isinstance(n, ast.Constant)]
            small = all(isinstance(n, int | float) and abs(n) <= 64 for n in numbers)
            if sums or not small or any(isinstance(n, ast.Pow) for n in below):
                return False
        elif isinstance(node, ast.Constant):
            if not isinstance(node.value, int | float) or abs(node.value) > 1e15:
                return False
        elif not isinstance(
            node, ast.Expression | ast.BinOp | ast.UnaryOp | ast.Name | ast.Load | ast.operator | ast.unaryop
        ):
            return False
    return True


_GUARDS: dict[str, Callable[[str], bool]] = {
    "binary_matrix": _is_literal,
    "countdown": _is_expression,
    "intermediate_integration": _is_expression,
    "n_queens": _is_literal,
    "polynomial_multiplication": _is_expression,
    "puzzle24": _is_expression,
    "simple_integration": _is_expression,
    "spiral_matrix": _is_literal,
    "string_insertion": _is_literal,
}


# --- scorers that accept near misses, generators whose gold answer is wrong --------------------------------


def _same_number(answer: str, gold: str) -> bool:
    return Decimal(answer) == Decimal(gold)


def _same_numbers(answer: str, gold: str) -> bool:
    return [Decimal(str(x)) for x in ast.literal_eval(answer)] == [Decimal(str(x)) for x in ast.literal_eval(gold)]


_EXACT: dict[str, Callable[[str, str], bool]] = {
    "codeio": codeio.same_json,
    "gsm_symbolic": _same_number,  # its scorer drops a minus sign
    "number_sorting": _same_numbers,  # its scorer lets each number be off by one
}


def exact_value(expression: str) -> Fraction:
    """Compute an arithmetic expression of + − * / and brackets in exact fractions.

    Example:
      >>> exact_value("2 + 3 * 4 / 6")
      Fraction(4, 1)
    """

    def value(node: ast.AST) -> Fraction:
        match node:
            case ast.Expression(body=body):
                return value(body)
            case ast.Constant(value=int(number)):
                return Fraction(number)
            case ast.UnaryOp(op=ast.USub(), operand=operand):
                return -value(operand)
            case ast.BinOp(left=left, op=ast.Add(), right=right):
                return value(left) + value(right)
            case ast.BinOp(left=left, op=ast.Sub(), right=right):
                return value(left) - value(right)
            case ast.BinOp(left=left, op=ast.Mult(), right=right):
                return value(left) * value(right)
            case ast.BinOp(left=left, op=ast.Div(), right=right):
                return value(left) / value(right)
            case _:
                raise ValueError(f"{ast.dump(node)} is no arithmetic")

    return value(ast.parse(expression.strip(), mode="eval"))


def _arithmetic_is_sound(entry: Mapping[str, Any]) -> bool:
    """Without brackets the generator works from left to right and prints another divisor than it uses."""
    try:
        return exact_value(entry["metadata"]["expression"]) == Fraction(entry["answer"])
    except ZeroDivisionError:
        return False


_SOUND: dict[str, Callable[[Mapping[str, Any]], bool]] = {
    "basic_arithmetic": _arithmetic_is_sound,
    "codeio": codeio.is_sound,
}
