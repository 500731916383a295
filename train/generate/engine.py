"""Slots that decode side by side and are refilled as sequences end.

A prompt is prefilled once and copied into a slot for each of its samples. A slot's first decode step runs
the last prompt token again, so prefill needs no logits and every token is chosen in one place. Prompts are
padded on the right: a cache index is a position, and a sequence does not depend on its neighbours.
"""

from __future__ import annotations

import dataclasses
import functools
import itertools
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..models.attention import KV, visible
from ..models.config import ModelConfig
from ..models.decoder import Params, count_up
from ..runtime.mesh import activations_on, everywhere, mesh_of, row_ways, spread
from .caches import OnMesh, empty_caches, fill, grow, kept
from .sample import choose
from .shelf import Shelf
from .slots import CHUNK, Completion, Request, Slot, Slots
from .together import bind, change_each, parts_of
from .weights import to_decode

Ready = dict[tuple[int, ...], tuple[tuple[KV, ...], int]]
"""Prompt → the caches of the batch it was prefilled in, and its row there."""
MOST_SLOTS = 1 << 20
"""More slots than this are so many: no result depends on it, and their numbers are of 32 bits."""
PREFILL = 8
"""Prompts prefilled at once."""
GROWTH = 128
"""Positions by which caches grow for a request longer than all before it."""
FEWEST = 8
"""Slots are not halved below this number."""
PLACED = 8
"""Rows copied into slots at once, at least; the next sizes are its doubles."""
LULL = 8
"""Chunks with half of the slots idle after which they are halved, where more requests may come up."""


@dataclasses.dataclass(frozen=True)
class Decoding:
    """What is compiled into the decode step; the temperature is traced."""

    greedy: bool
    top_k: int = 0
    top_p: float = 1.0
    dtype: str = "float32"


def bucket(n: int, step: int = 32) -> int:
    """Round a length up to a multiple of `step`: few shapes, few compilations."""
    return -(-n // step) * step


@functools.partial(jax.jit, static_argnames=("config", "dtype", "mesh"))
def prefill(
    config: ModelConfig, params: Params, tokens: jax.Array, lengths: jax.Array, *, dtype: str, mesh: OnMesh = None
):
    """Caches of right-padded prompts [P, T], `lengths` [P] tokens long: one KV of [P, K, T, H] a layer."""
    positions = count_up(tokens.shape, lengths)
    with activations_on(mesh):
        _, caches = bind(config, params)(tokens, positions, visible(positions), dtype=jnp.dtype(dtype))
        return jax.tree.map(lambda cache: spread(cache, tensor=1), caches)


@functools.partial(jax.jit, static_argnames=("config", "how", "mesh"), donate_argnames=("caches",))
def decode(
    config: ModelConfig,
    params: Params,
    caches,
    last,
    at,
    steps,
    keys,
    temperature,
    *,
    how: Decoding,
    mesh: OnMesh = None,
):
    """CHUNK steps for every slot.

    Args:
      caches: one KV of [N, K, S, H] a layer, donated.
      last: [N] the newest token of each slot; at: [N] its position; steps: [N] tokens generated so far.
      keys: [N, 2] uint32.

    Returns:
      (caches, tokens [CHUNK, N], log-probabilities [CHUNK, N]).
    """
    N, S = last.shape[0], caches[0].k.shape[2]
    decoder = bind(config, params)
    wrapped = jax.random.wrap_key_data(keys)
    dtype = jnp.dtype(how.dtype)

    def step(i, carry):
        caches, last, tokens, logprobs = carry
        position = at + i
        mask = (jnp.arange(S) <= position[:, None])[:, None]
        caches = jax.tree.map(lambda cache: spread(cache, tensor=1), caches)
        hidden, caches = decoder(last[:, None], position[:, None], mask, caches, position, dtype=dtype)
        logits = decoder.head(jax.tree.map(lambda state: state[:, 0], hidden), dtype)
        last, logprob = choose(
            logits, wrapped, steps + i, temperature, greedy=how.greedy, top_k=how.top_k, top_p=how.top_p
        )
        return caches, last, tokens.at[i].set(last), logprobs.at[i].set(logprob)

    empty = (jnp.zeros((CHUNK, N), jnp.int32), jnp.zeros((CHUNK, N), jnp.float32))
    with activations_on(mesh):
        caches, _, tokens, logprobs = lax.fori_loop(0, CHUNK, step, (caches, last, *empty))
        return caches, everywhere(tokens), everywhere(logprobs)


class Engine:
    """Generates completions for requests with a fixed set of shapes.

    Args:
      config, params: the model, or several together (together.py); params stay where they are (sharded or not).
      slots: sequences decoded side by side, N; halves of it where there are fewer.
      how: greedy or sampled, cut-offs, operand dtype.
      eos: tokens that end a sequence.
      stop: called with the tokens so far; returns how many to keep once a stop string is complete, else None.
      shelf: prompts whose caches are kept for later ones that begin alike (shelf.py): twice the slots or more; 0: none.
      gather: decode with a copy of the weights that is whole over fsdp, which else gathers them for every token.
    """

    def __init__(
        self,
        config: ModelConfig,
        params: Params,
        *,
        slots: int,
        how: Decoding,
        eos: Sequence[int],
        temperature: float = 1.0,
        stop: Callable[[Sequence[int]], int | None] | None = None,
        shelf: int = 0,
        gather: bool = False,
    ):
        self.config, self.how = config, how
        self.mesh = mesh_of(params)
        self.slots = bucket(min(slots, MOST_SLOTS), row_ways(self.mesh))
        self.prefills = bucket(PREFILL, row_ways(self.mesh))
        self.params = change_each(config, params, functools.partial(to_decode, dtype=how.dtype, gather=gather))
        self.eos = frozenset(eos)
        self.temperature = jnp.float32(temperature)
        self.stop = stop
        self.turns = turns_of(config)
        # LongRoPE turns all keys once a sequence is long: rows of the short kind would not do.
        self.shelved = 0 if self.turns or not shelf else bucket(max(shelf, 2 * self.slots), self.prefills)
        self.computed = 0
        """Prompt tokens computed by way of the shelf."""
        self.decoded = 0
        """Slot-steps run, useful or not: occupancy = useful tokens / decoded."""

    def run(self, requests: Iterable[Request], *, between: Callable[[], None] = lambda: None) -> Iterator[Completion]:
        """Completions in the order in which they end.

        Requests of one prompt should stand together: they then share one prefill. `between` is called once a chunk.
        Once nothing will come, the slots are halved whenever half of them are idle: a step costs what its slots cost.
        """
        given = list(requests)
        if not given:
            return
        longest = max(len(r.prompt) for r in given)
        most = max(len(r.prompt) + r.max_new_tokens for r in given)
        longest = max([longest, *(turn for turn in self.turns if turn < most)])
        feed, count = iter([given]), self.slots
        while len(given) <= count // 2 and self.halves(count):
            count //= 2  # not as many slots as requests: every other number would be a program of its own
        for done in self.serve(lambda: next(feed, None), width=bucket(longest, 16), count=count, between=between):
            yield from done

    def serve(
        self,
        more: Callable[[], Iterable[Request] | None],
        *,
        width: int | None = None,
        count: int | None = None,
        between: Callable[[], None] = lambda: None,
    ) -> Iterator[list[Completion]]:
        """Completions a chunk at a time, of requests that come up while others are decoded.

        Args:
          more: asked before each chunk for the requests that came up since; None: there will be no others. While it
            has none and nothing is decoded, nothing is yielded again and again.
          width: that all prompts are padded to; None: each batch of prompts to its own longest, in steps of 64.
          count: slots to begin with; None: all.
        """
        slots, queue = Slots(count or self.slots, float(self.temperature)), deque[Slot]()
        caches: tuple[KV, ...] = ()
        shelf: Shelf | None = None
        ready: Ready = {}
        others, lull, length = True, 0, 0
        while True:
            came = more() if others else ()
            others = came is not None and others
            new = [Slot(r, [], []) for r in came or ()]
            queue.extend(new)
            caches, shelf, length = self.lengthen(caches, shelf, length, new, len(slots))
            if not queue and not slots.busy:
                if not others:
                    return
                yield []
                continue
            lull = lull + 1 if not queue and 2 * slots.busy <= len(slots) else 0
            order = self.arrange(slots, len(queue), halve=not others or lull > LULL)
            if len(order) != len(slots):
                caches, lull = kept(caches, np.array(order, np.int32), mesh=self.mesh), 0
                slots.rearrange(order)
            if slots.free and queue:
                caches, ready = self.admit(caches, shelf, slots, queue, ready, width, length)
            caches, tokens, logprobs = decode(
                self.config, self.params, caches, slots.last, slots.at, slots.steps, slots.keys, slots.temperatures,
                how=self.how, mesh=self.mesh,
            )  # fmt: skip
            between()
            self.decoded += CHUNK * len(slots)
            yield self.collect(slots, queue, np.asarray(tokens), np.asarray(logprobs))

    def lengthen(self, caches, shelf: Shelf | None, length: int, new: Sequence[Slot], count: int):
        """Make the caches, or make them longer, so that the requests that came have room."""
        need = CHUNK + max((len(s.request.prompt) + s.request.max_new_tokens for s in new), default=0)
        if not new or need <= length:
            return caches, shelf, length
        if not length:
            length = bucket(need)
            caches = empty_caches(self.config, count, length, self.how.dtype, self.mesh)
            if self.shelved:
                rows = empty_caches(self.config, self.shelved, length, self.how.dtype, self.mesh)
                shelf = Shelf(self.config, self.params, rows, self.prefills, self.how.dtype, self.mesh)
            return caches, shelf, length
        length = bucket(need, GROWTH)
        caches = grow(caches, length, mesh=self.mesh)
        if shelf is not None:
            shelf.lengthen(grow(shelf.rows, length, mesh=self.mesh))
        return caches, shelf, length

    def arrange(self, slots: Slots, waiting: int, *, halve: bool) -> list[int]:
        """The slots to go on with: the busy half where the others are idle, all of them twice where more wait."""
        order, busy = list(range(len(slots))), slots.busy
        while 2 * busy <= len(order) and not waiting and halve and self.halves(len(order)):
            order = sorted(order, key=lambda n: slots.active[n] is None)[: len(order) // 2]
        while busy + waiting > len(order) and len(order) < self.slots:
            order = order * 2  # what a copied slot holds is overwritten before it is read
        return order

    def admit(self, caches, shelf: Shelf | None, slots: Slots, queue: deque[Slot], ready: Ready, width, length: int):
        """Put waiting requests into free slots, their prompts' caches beside them."""
        free = slots.free
        waiting = [queue.popleft() for _ in range(min(len(free), len(queue)))]
        if shelf is None:
            ready = self.prefilled(waiting, queue, ready, width, length)
            caches = self.place(caches, waiting, free, ready)
        else:
            ahead = [s.so_far for s in itertools.islice(queue, self.slots)]
            rows = shelf.prepare([s.so_far for s in waiting], ahead)
            caches = self.put(caches, shelf.rows, free, rows)
            self.computed = shelf.computed
        for n, slot in zip(free, waiting, strict=False):
            slots.put(n, slot)
        return caches, ready

    def collect(self, slots: Slots, queue: deque[Slot], tokens: np.ndarray, logprobs: np.ndarray) -> list[Completion]:
        """Append a chunk to every slot; what ended. A sequence at its turn goes back to the front of the queue."""
        slots.advance(tokens)
        ended = []
        for n, slot in enumerate(slots.active):
            if slot is None:
                continue
            done = self.extend(slot, tokens[:, n], logprobs[:, n])
            if done is not None:
                slots.active[n] = None
                ended.append(done)
            elif slot.length in self.turns:
                slots.active[n] = None
                queue.appendleft(slot)
        return ended

    def halves(self, slots: int) -> bool:
        """Whether half as many slots are enough to be worth a program, and divide over the mesh."""
        return slots // 2 >= FEWEST and slots // 2 % row_ways(self.mesh) == 0

    def extend(self, slot: Slot, tokens: np.ndarray, logprobs: np.ndarray) -> Completion | None:
        """Append a chunk to a slot, up to its turn; a Completion once it ended."""
        request = slot.request
        stop = request.stop or self.stop
        for token, logprob in zip(tokens.tolist(), logprobs.tolist(), strict=True):
            slot.tokens.append(token)
            slot.logprobs.append(logprob)
            reason = None
            if token in self.eos:
                reason = "eos"
            elif stop is not None and (keep := stop(slot.tokens)) is not None:
                del slot.tokens[keep:], slot.logprobs[keep:]
                reason = "stop"
            elif len(slot.tokens) >= request.max_new_tokens:
                reason = "length"
            if reason:
                return Completion(request.id, tuple(slot.tokens), tuple(slot.logprobs), reason)
            if slot.length in self.turns:
                return None
        return None

    def prefilled(self, waiting, queue, ready, width, length):
        """Caches of the prompts about to be placed: {prompt: (caches of its batch, row)}.

        Computed PREFILL at a time, the batch filled up with the next prompts of the queue; a prompt some of
        whose samples still wait keeps its cache, the others are dropped.
        """
        wanted = list(dict.fromkeys(s.so_far for s in waiting))
        missing = [p for p in wanted if p not in ready]
        if not missing:
            return ready
        ready = {p: ready[p] for p in wanted if p in ready}
        ahead = dict.fromkeys(s.so_far for s in itertools.islice(queue, 4 * self.slots))
        spare = [p for p in ahead if p not in ready and p not in missing]
        count = bucket(len(missing), self.prefills)
        missing += spare[: count - len(missing)]
        P = self.prefills if width is not None or len(missing) > 1 else bucket(1, row_ways(self.mesh))
        for start in range(0, len(missing), P):
            batch = missing[start : start + P]
            columns = min(bucket(max(map(len, batch)), 64) if width is None else width, length)
            tokens, lengths = np.zeros((P, columns), np.int32), np.ones(P, np.int32)
            for row, prompt in enumerate(batch):
                tokens[row, : len(prompt)], lengths[row] = prompt, len(prompt)
            caches = prefill(self.config, self.params, tokens, lengths, dtype=self.how.dtype, mesh=self.mesh)
            ready |= {prompt: (caches, row) for row, prompt in enumerate(batch)}
        return ready

    def place(self, caches, waiting, free, ready):
        """Copy each waiting request's prompt cache into its slot, one call a prefill batch."""
        batches: dict[int, tuple[tuple[KV, ...], list[int], list[int]]] = {}
        for n, slot in zip(free, waiting, strict=False):
            prompts, row = ready[slot.so_far]
            _, slots, rows = batches.setdefault(id(prompts), (prompts, [], []))
            slots.append(n)
            rows.append(row)
        for prompts, slots, rows in batches.values():
            caches = self.put(caches, prompts, slots, rows)
        return caches

    def put(self, caches, prompts, slots: Sequence[int], rows: Sequence[int]):
        """Copy rows of prompt caches into slots."""
        # Few sizes, few programs; copying all slots' worth each time took a twentieth of a run.
        size = max(PLACED, 1 << (len(rows) - 1).bit_length())
        padding = size - len(rows)
        into = np.array([*slots[: len(rows)], *[self.slots] * padding], np.int32)  # out of range: skipped
        return fill(caches, prompts, into, np.array([*rows, *[0] * padding], np.int32), mesh=self.mesh)


def turns_of(config: ModelConfig) -> frozenset[int]:
    """Lengths at which LongRoPE turns all keys by other frequencies: the sequence is then prefilled again."""
    scalings = [part.rope_scaling for part in parts_of(config)]
    return frozenset(s.original_max_position_embeddings + 1 for s in scalings if s is not None and s.kind == "longrope")
