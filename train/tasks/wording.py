"""The exact words put to a model, and how its answer is found in what it writes. All wording lives here."""

from __future__ import annotations

import re
from collections.abc import Sequence

from . import numbers
from .task import Prompt, Question

# One solved turn shows the form; asked for it in words, SmolLM2-135M-Instruct never gave it (0 of 48 answers)
# and counted worse. `docs/log.md` has the accuracies of the wordings tried.
DEMONSTRATIONS = (("What is 3 + 4?", "3 + 4 = 7\nAnswer: 7"),)

SHOT = "Question: {text}\nSolution: {solution}\nAnswer: {answer}\n\n"
SHOT_OPEN = "Question: {text}\nSolution:"
STOP_STRINGS = ("\nQuestion:",)  # where a base model that was given shots goes on to the next question


def instruct(text: str) -> list[dict[str, str]]:
    """Build the chat messages for one question: the demonstrations as earlier turns, then the question."""
    messages = []
    for asked, answered in DEMONSTRATIONS:
        messages += [{"role": "user", "content": asked}, {"role": "assistant", "content": answered}]
    return [*messages, {"role": "user", "content": text.strip()}]


def shots(question: Question, examples: Sequence[Question]) -> str:
    """Build the few-shot text for a base model: solved examples, then the question left open."""
    solved = "".join(
        SHOT.format(text=e.text.strip(), solution=(e.solution or "").strip(), answer=e.answer) for e in examples
    )
    return solved + SHOT_OPEN.format(text=question.text.strip())


DEMONSTRATED = (
    "{question}\n\nThis is an example for a response to the question:\n{demonstration}\n\n"
    "Now answer with a response of your own, including the thinking process."
)
"""The words of Shenfeld et al. (https://arxiv.org/abs/2601.19897) before a teacher that is shown a demonstration."""


def demonstrated(prompt: Prompt, demonstration: str) -> Prompt:
    """A prompt that shows an answer to its own question: chats say so in words, texts are solved and asked again.

    Example:
      >>> demonstrated([{"role": "user", "content": "1 + 1?"}], "2")[0]["content"].split("\\n")[3]
      '2'
      >>> demonstrated("\\n1+1?", "#2")
      '\\n1+1?#2\\n1+1?'
    """
    if isinstance(prompt, str):
        gap = "" if prompt.startswith("\n") else "\n\n"
        return f"{prompt}{demonstration.rstrip()}{gap}{prompt}"
    *before, last = prompt
    return [*before, {**last, "content": DEMONSTRATED.format(question=last["content"], demonstration=demonstration)}]


def lettered(question: str, choices: Sequence[str]) -> str:
    """Put the choices under a question, each behind its letter.

    Example:
      >>> print(lettered("Which is a metal?", ["iron", "wood"]))
      Which is a metal?
      A. iron
      B. wood
    """
    lines = [f"{chr(ord('A') + i)}. {choice.strip()}" for i, choice in enumerate(choices)]
    return "\n".join([question.strip(), *lines])


def untemplated(texts: Sequence[str]) -> str:
    """A prompt for a model without a chat template: what system and user say, an empty line after each."""
    return "".join(f"{text.strip()}\n\n" for text in texts)


GSM8K = "{text}\nSolve it step by step and end with a line `#### ` and the number."
CHOICE = "{text}\nAnswer with the letter of the right choice alone."
COMPLETE = (
    "Complete this Python function. Answer with the whole function in one ```python block.\n\n```python\n{stub}\n```"
)
PROGRAM = "{text}\nYour code should pass these tests:\n\n{tests}\n\nAnswer with the code in one ```python block."
FUNCTION = "Write a Python function f({argument}) that {text}. Answer with the function in one ```python block."
ANSWER_CUE, STRICT_CUE = "\nAnswer:", "\n####"  # behind a chain of thought, so that the answer follows at once
PROBLEM = "{text}\nPut the final answer in \\boxed{{}}."

_THOUGHT = re.compile(r"<think>.*?(?:</think>|\Z)", re.DOTALL)
_MARK = re.compile(r"answer\s*(?:is)?\s*(?:\*\*|__)?\s*[:=]\s*(?:\*\*|__)?[ \t]*([^\n]+)", re.IGNORECASE)
_MARK_LINES = re.compile(r"answer\s*:[ \t]*\n?", re.IGNORECASE)
_TAG = re.compile(r"<answer>\s*(.*?)\s*</answer>", re.IGNORECASE | re.DOTALL)
_BOXED = re.compile(r"\\boxed\s*\{((?:[^{}]|\{[^{}]*\})*)\}")
_LIST = re.compile(r"\[[^\[\]]*\]")
# A sign counts only where no number or bracket stands before it: in `10-5` the 5 is positive.
_NUMBER = re.compile(r"(?:(?<![\w.)\]])[-+])?(?<![\w.])(?:(?:\d{1,3}(?:,\d{3})+(?!\d)|\d+)(?:\.\d+)?|\.\d+)")
_BEFORE = re.compile(r"####|\\boxed|\banswer\s*(?:is\s*)?[:=]", re.IGNORECASE)
_PLAIN_NUMBER = re.compile(r"[-+]?\d+(?:\.\d+)?")


def is_number(answer: str) -> bool:
    """Whether a gold answer is one plain number."""
    return _PLAIN_NUMBER.fullmatch(answer.strip()) is not None


def spoken(text: str) -> str:
    """What a completion says after it thought: never what stands inside `<think>…</think>`.

    The opening may have been part of the prompt; what is thought to no end says nothing.

    Example:
      >>> spoken("<think>12?</think>It is 13."), spoken("so 12</think>It is 13."), spoken("13<think>or 12")
      ('It is 13.', 'It is 13.', '13')
    """
    return _THOUGHT.sub("", text).rpartition("</think>")[2]


def last_number(text: str) -> str | None:
    """Find the last number of `text`, without thousands commas; None if there is none.

    Example:
      >>> last_number("35 - 40 = -5."), last_number("in all 1,400 apples"), last_number("10-5")
      ('-5', '1400', '5')
    """
    found = [m.group(0) for m in _NUMBER.finditer(numbers.plain(text))]
    return found[-1].replace(",", "").lstrip("+") if found else None


def marks_answer(text: str) -> bool:
    r"""Whether a text already says which part of it is the answer.

    Example:
      >>> marks_answer("So \\boxed{12}."), marks_answer("Here is my work.")
      (True, False)
    """
    return _BEFORE.search(text) is not None


def extract_answer(text: str, gold: str) -> str | None:
    r"""Find the answer in a completion, in the form the gold answer has.

    Looked for in this order, the last occurrence each: `Answer: …` to the end of its line; `\boxed{…}`;
    `<answer>…</answer>`; then, as a fall-back, the last number of the whole text where `gold` is a number, or
    its last `[…]` where `gold` is a list. Where `gold` has several lines, all that follows the last `Answer:`
    counts; where it is a number, the last number of what was found.

    Returns:
      The answer as the scorer wants it, or None if the text holds none.

    Example:
      >>> extract_answer("12 + 7 = 19\nAnswer: 19.", "19"), extract_answer("It is 19", "19")
      ('19', '19')
    """
    gold, text = gold.strip(), spoken(text)
    if "\n" in gold:
        marks = list(_MARK_LINES.finditer(text))
        if marks:
            return text[marks[-1].end() :].strip()
    for pattern in (_MARK, _BOXED, _TAG):
        found = pattern.findall(text)
        if found:
            return _shape(found[-1], gold)
    if is_number(gold) or gold.startswith("["):
        return _shape(text, gold)
    return None


def _shape(found: str, gold: str) -> str | None:
    if is_number(gold):
        return last_number(found)
    if gold.startswith("["):
        lists = _LIST.findall(found)
        if lists and not gold.startswith("[["):
            return lists[-1]
    found = found.strip().strip("*`$ ").strip()
    # A full stop that ends the sentence is no part of the answer, unless the gold answer ends in one.
    return found if gold.endswith(".") else found.removesuffix(".").strip()
