"""EleutherAI's lm-evaluation-harness on our checkpoints, in process: no server, no copy of the weights in torch.

    from train.evaluate.harness import evaluate
    results = evaluate(open_model("runs/…"), ["gsm8k"], limit=100)

Its tasks and its metrics; our model, tokenizer and engine. Needs the package `lm-eval` (extra `harness`).
"""

from __future__ import annotations

import difflib
import functools
import importlib
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax

from jaxmerge import install

from ..generate.rollout import Prompt, rollout
from ..generate.score import encode_pair, score
from ..generate.settings import Settings
from ..log import UserError
from ..models.open import Model
from ..models.tokenizer import DATE

GENERATION = {"until", "max_gen_toks", "max_tokens", "temperature", "do_sample", "top_k", "top_p"}
MAX_GEN_TOKS = 256


def evaluate(
    model: Model,
    tasks: Sequence[str | Mapping[str, Any]],
    *,
    dtype: str = "float32",
    slots: int = 64,
    seed: int = 0,
    gather: bool = False,
    include_path: str | None = None,
    **given: Any,
) -> dict[str, Any]:
    """Evaluate a model on the harness's tasks.

    Args:
      tasks: names, or configurations of tasks as mappings.
      dtype: operands of every matmul.
      slots: sequences decoded side by side.
      seed: of sampled generations; the harness's own seeds stay at its defaults.
      gather: decode with weights whole over fsdp.
      include_path: folder with further tasks as YAML files.
      given: handed to `lm_eval.simple_evaluate`: num_fewshot, limit, apply_chat_template, …

    Returns:
      What `simple_evaluate` returns: results by task, configs, samples.
    """
    lm_eval = load("lm_eval")
    manager = load("lm_eval.tasks").TaskManager(include_path=include_path)
    known = set(manager.all_tasks)
    for name in tasks:
        if isinstance(name, str) and name not in known and not Path(name).exists():
            where = f" and those of {include_path}" if include_path else ""
            near = difflib.get_close_matches(name, known, 1, 0.6)
            hint = f"; did you mean {near[0]}?" if near else "; include_path= adds a folder with tasks"
            raise UserError(f"no task {name!r} among the harness's{where}{hint}")
    try:
        return lm_eval.simple_evaluate(
            model=adapt(model, dtype=dtype, slots=slots, seed=seed, gather=gather),
            tasks=list(tasks),
            task_manager=manager,
            **given,
        )
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(f"the data of a task could not be read: {' '.join(str(error).split())}") from error


def load(name: str) -> Any:
    """A module of the harness, which is an extra."""
    try:
        return importlib.import_module(name)
    except ImportError as error:
        raise UserError(
            f"evaluating with EleutherAI's harness needs lm-eval ({error}); {install.extra('harness')}"
        ) from error


def adapt(model: Model, *, dtype: str = "float32", slots: int = 64, seed: int = 0, gather: bool = False) -> Any:
    """An `lm_eval.api.model.LM` over a model, for callers with a harness of their own."""
    return _class()(Requests(model, dtype, slots, seed, gather))


@functools.cache
def _class() -> type:
    """The subclass is made when it is first wanted: importing this module does not import the harness."""
    LM = load("lm_eval.api.model").LM

    class JaxmergeLM(LM):
        """Hands the harness's requests on as plain values."""

        def __init__(self, requests: Requests):
            super().__init__()
            self.requests = requests

        def loglikelihood(self, requests, disable_tqdm: bool = False) -> list[tuple[float, bool]]:
            del disable_tqdm
            return self.requests.loglikelihood([r.args for r in requests])

        def loglikelihood_rolling(self, requests, disable_tqdm: bool = False) -> list[float]:
            del disable_tqdm
            return self.requests.rolling([r.args[0] for r in requests])

        def generate_until(self, requests, disable_tqdm: bool = False) -> list[str]:
            del disable_tqdm
            return self.requests.generate([r.args for r in requests])

        def apply_chat_template(self, chat_history, add_generation_prompt: bool = True) -> str:
            return self.requests.chat(chat_history, add_generation_prompt)

        def chat_template(self, chat_template: bool | str = False) -> str | None:
            del chat_template  # there is one, and it is used if chats are asked for
            return self.requests.model.tokenizer.chat_template

        @property
        def tokenizer_name(self) -> str:
            return "jaxmerge"

    return JaxmergeLM


class Requests:
    """The harness's three questions, answered by our scorer and engine."""

    def __init__(self, model: Model, dtype: str = "float32", slots: int = 64, seed: int = 0, gather: bool = False):
        self.model, self.dtype, self.slots, self.seed, self.gather = model, dtype, slots, seed, gather

    @property
    def max_length(self) -> int:
        return self.model.config.max_position_embeddings

    @property
    def prefix(self) -> int:
        """What stands before a text without a context: BOS, or EOS where there is none."""
        tokenizer = self.model.tokenizer
        name = "bos_token" if "bos_token" in tokenizer.special else "eos_token"
        if name not in tokenizer.special:
            return tokenizer.eos_ids[0]
        return tokenizer.id_of(name)

    def loglikelihood(self, pairs: Sequence[tuple[str, str]]) -> list[tuple[float, bool]]:
        """(log p(continuation | context), whether greedy decoding writes it) of each pair of texts."""
        tokenizer = self.model.tokenizer
        encoded = []
        for context, continuation in pairs:
            if context:
                head, tail = encode_pair(tokenizer, context, continuation)
            else:
                head, tail = [self.prefix], tokenizer.encode(continuation)
                if tail[:1] == head:  # the text brings the prefix along
                    tail = tail[1:]
            encoded.append(self.fit(head, tail))
        return [(s.logprob, s.greedy) for s in self.score(encoded)]

    def rolling(self, texts: Sequence[str]) -> list[float]:
        """log p of whole texts, in windows of the model's length; every token is scored once."""
        # As in lm-eval, a window's prefix stands before the BOS that the tokenizer puts: that BOS is scored too.
        windows = [list(self.windows(self.encode(text))) for text in texts]
        scored = iter(self.score([pair for text in windows for pair in text]))
        return [sum(next(scored).logprob for _ in text) for text in windows]

    def generate(self, requests: Sequence[tuple[str, Mapping[str, Any]]]) -> list[str]:
        """Text written after each context, up to the first of its stop strings."""
        groups: dict[str, list[int]] = {}
        settings: dict[str, Settings] = {}
        for i, (_, arguments) in enumerate(requests):
            one = self.settings(arguments)
            settings[repr(one)] = one
            groups.setdefault(repr(one), []).append(i)
        texts = [""] * len(requests)
        for key, members in groups.items():
            room = self.max_length - settings[key].max_new_tokens
            if room < 1:
                raise UserError(
                    f"max_gen_toks={settings[key].max_new_tokens}, and the model ends at {self.max_length}; lower it"
                )
            prompts = [Prompt(str(i), tuple(self.encode(requests[i][0])[-room:])) for i in members]
            samples = rollout(
                self.model.config,
                self.model.params,
                self.model.tokenizer,
                prompts,
                settings[key],
                jax.random.key(self.seed),
            )
            for i, sample in zip(members, samples, strict=True):
                texts[i] = sample.text
        return texts

    def settings(self, arguments: Mapping[str, Any]) -> Settings:
        """Our settings for the harness's; one we do not have is refused by name."""
        unknown = sorted(set(arguments) - GENERATION)
        if unknown:
            raise UserError(
                f"generation_kwargs: {unknown[0]} is not known here; known: {', '.join(sorted(GENERATION))}"
            )
        until = arguments.get("until") or []
        # As transformers has it: a temperature alone does not make it sample.
        temperature = float(arguments.get("temperature", 1.0)) if arguments.get("do_sample") else 0.0
        return Settings(
            temperature=temperature,
            top_k=int(arguments.get("top_k", 0)) if temperature else 0,
            top_p=float(arguments.get("top_p", 1.0)) if temperature else 1.0,
            max_new_tokens=int(arguments.get("max_gen_toks", arguments.get("max_tokens", MAX_GEN_TOKS))),
            stop=tuple(u for u in ([until] if isinstance(until, str) else until) if u),
            slots=self.slots,
            dtype=self.dtype,
            gather=self.gather,
        )

    def chat(self, messages: Sequence[Mapping[str, str]], add_generation_prompt: bool) -> str:
        """Render a conversation up to the opening of an answer, or (a task with gen_prefix) up to where one goes on."""
        tokenizer = self.model.tokenizer
        return (tokenizer.chat if add_generation_prompt else tokenizer.chat_to_continue)(messages, date_string=DATE)

    # --- tokens ---

    def encode(self, text: str) -> list[int]:
        return self.model.tokenizer.encode(text, special=True)

    def score(self, pairs):
        return score(self.model.config, self.model.params, pairs, dtype=self.dtype)

    def fit(self, head: list[int], tail: list[int]) -> tuple[list[int], list[int]]:
        """Cut a context from the left so that it and its continuation fit; the last token is never read."""
        if not tail:
            raise UserError("a continuation without tokens; a task's choices must not be empty")
        room = self.max_length + 1 - len(tail)
        if room < 1:
            raise UserError(f"a continuation has {len(tail)} tokens, and the model ends at {self.max_length}")
        return head[-room:], tail

    def windows(self, tokens: Sequence[int]) -> Iterator[tuple[list[int], list[int]]]:
        """(context, continuation) pairs that score every token once, each with all the context that fits.

        The first window begins with the prefix; the last is a full one, its context reaching back.
        """
        n = self.max_length
        yield [self.prefix], list(tokens[:n])
        for start in range(n, len(tokens), n):
            stop = min(start + n, len(tokens))
            # The window reads n tokens, the last of them at stop − 2, and scores those from start on.
            yield list(tokens[stop - n - 1 : start]), list(tokens[start:stop])
