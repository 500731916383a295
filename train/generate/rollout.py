"""From prompts to texts: keys for every (prompt, sample), stop strings, decoding of what came out."""

from __future__ import annotations

import dataclasses
import functools
import zlib
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
import numpy as np

from ..log import UserError
from ..models.config import ModelConfig
from ..models.decoder import Params
from ..models.tokenizer import Tokenizer
from .engine import Decoding, Engine
from .settings import Settings
from .slots import Request
from .stops import Stops


@dataclasses.dataclass(frozen=True)
class Prompt:
    """What is put to the model. `id` names it for the random keys: same id, same draws, in any company."""

    id: str
    tokens: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Sample:
    """One generated solution; `tokens` are those of the completion, the stop token included."""

    prompt_id: str
    index: int
    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[float, ...]
    reason: str


def rollout(
    config: ModelConfig,
    params: Params,
    tokenizer: Tokenizer,
    prompts: Sequence[Prompt],
    settings: Settings,
    key: jax.Array,
    *,
    on_sample: Callable[[int], None] = lambda tokens: None,
    between: Callable[[], None] = lambda: None,
) -> list[Sample]:
    """Generate `settings.samples` completions of each prompt; ordered by prompt, then sample.

    Args:
      key: PRNG key; sample s of prompt p draws from fold_in(fold_in(key, crc32(p.id)), s).
      on_sample: called with the length of each completion as it ends.
      between: called between decode chunks; what it raises ends the rollout.
    """
    check_lengths(config, prompts, settings)
    S = settings.samples
    keys = sample_keys(key, [p.id for p in prompts], S)
    stops = {begins: Stops(tokenizer, settings.stop, begins=begins) for begins in (False, True)}
    begins = [tokenizer.begins_text(p.tokens) for p in prompts]
    requests = [
        Request(
            i * S + s, p.tokens, keys[i, s], settings.max_new_tokens, stop=stops[begins[i]] if settings.stop else None
        )
        for i, p in enumerate(prompts)
        for s in range(S)
    ]
    engine = Engine(
        config,
        params,
        slots=settings.slots,
        how=Decoding(settings.greedy, settings.top_k, settings.top_p, settings.dtype),
        eos=tokenizer.eos_ids,
        temperature=settings.temperature or 1.0,
        gather=settings.gather,
    )
    done: dict[int, Sample] = {}
    for completion in engine.run(requests, between=between):
        prompt, index = prompts[completion.id // S], completion.id % S
        text = stops[begins[completion.id // S]].cut(without_eos(completion.tokens, tokenizer))
        done[completion.id] = Sample(prompt.id, index, text, completion.tokens, completion.logprobs, completion.reason)
        on_sample(len(completion.tokens))
    return [done[i] for i in range(len(requests))]


def without_eos(tokens: Sequence[int], tokenizer: Tokenizer) -> Sequence[int]:
    return tokens[:-1] if tokens and tokens[-1] in tokenizer.eos_ids else tokens


def check_lengths(config: ModelConfig, prompts: Sequence[Prompt], settings: Settings) -> None:
    for prompt in prompts:
        wanted = len(prompt.tokens) + settings.max_new_tokens
        if not prompt.tokens:
            raise UserError(f"prompt {prompt.id!r:.100} is empty; a prompt has at least one token")
        if wanted > config.context:
            raise UserError(
                f"prompt {prompt.id!r:.100} has {len(prompt.tokens)} tokens; with"
                f" max_new_tokens={settings.max_new_tokens} that is {wanted}, and the model ends at {config.context};"
                " lower max_new_tokens or shorten the prompt"
            )


def sample_keys(key: jax.Array, ids: Sequence[str], samples: int) -> np.ndarray:
    """uint32 [prompts, samples, 2]: key data of fold_in(fold_in(key, crc32(id)), sample)."""
    salts = np.array([zlib.crc32(id.encode()) for id in ids], np.uint32)
    # of a few sizes: every other number of prompts or samples would be compiled anew
    padded = np.pad(salts, (0, (1 << max(0, len(salts) - 1).bit_length()) - len(salts)))
    numbers = np.arange(1 << max(0, samples - 1).bit_length(), dtype=np.uint32)
    return np.asarray(fold_all(jax.random.key_data(key), padded, numbers))[: len(salts), :samples]


@jax.jit
def fold_all(key: Any, salts: Any, samples: Any) -> jax.Array:
    fold = functools.partial(jax.random.fold_in, jax.random.wrap_key_data(key))
    return jax.vmap(lambda salt: jax.vmap(lambda s: jax.random.key_data(jax.random.fold_in(fold(salt), s)))(samples))(
        salts
    )


def batched(prompts: Sequence[Any], size: int) -> Iterator[Sequence[Any]]:
    """Consecutive groups of `size`; their bounds depend on nothing but the list, so a resumed run repeats them."""
    for start in range(0, len(prompts), size):
        yield prompts[start : start + size]
