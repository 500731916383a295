"""Many searches through few engines: what any of them asks enters a free slot, and each goes on when it is answered.

No step waits for all searches: one goes on as soon as its own replies are there, and new ones begin while there is
room. Since a search depends on its replies alone and a reply on the request alone, slots, order and the company of
other searches change no result.
"""

from __future__ import annotations

import dataclasses
import functools
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from typing import Any, Generic, TypeVar

from ..generate.slots import Request
from .ask import VERIFIER, Ask, Asking, Reply
from .replies import Replies
from .voice import Voice

T = TypeVar("T")
AHEAD = 2
"""Requests waiting or being decoded, for each slot, below which another search begins."""


@dataclasses.dataclass
class Open(Generic[T]):
    """A search that waits for replies."""

    id: str
    search: Asking[T]
    asks: list[Ask]
    replies: list[Reply | None]

    @property
    def ready(self) -> bool:
        return all(reply is not None for reply in self.replies)


class Driver(Generic[T]):
    """Runs searches to their ends.

    Args:
      voices: who plays each role; a model that plays several is one voice.
      verify: the verdict on a text, by the question's id and the request; or a future of it.
      log: what is known of earlier runs, and where replies are kept.
      on_end: called with the id and the result of each search that ended.
    """

    def __init__(
        self,
        voices: Mapping[str, Voice],
        verify: Callable[[str, Ask], float | Future | None],
        log: Replies,
        *,
        on_end: Callable[[str, T], None],
    ):
        self.voices, self.verify, self.log, self.on_end = voices, verify, log, on_end
        self.distinct = list(dict.fromkeys(voices.values()))
        self.pending: dict[Voice, list[Request]] = {voice: [] for voice in self.distinct}
        self.waiting: dict[int, tuple[Open[T], int]] = {}
        self.judging: dict[Future, tuple[Open[T], int]] = {}
        self.open = 0
        self.searches: Iterator[tuple[str, Asking[T]]] = iter(())
        self.made = 0
        self.counts: Counter[str] = Counter()
        """tokens (generated), replies, replayed (from the log) with their tokens, verdicts."""

    def run(self, searches: Iterable[tuple[str, Asking[T]]], *, between: Callable[[], None] = lambda: None) -> None:
        """Run (id, search) pairs to their ends; `between` is called once a chunk of each engine."""
        self.searches = iter(searches)
        serving = {v: v.engine.serve(functools.partial(self.more, v), between=between) for v in self.distinct}
        while serving:
            for voice, server in list(serving.items()):
                ended = next(server, None)
                if ended is None:
                    del serving[voice]
                    continue
                for completion in ended:
                    opened, i = self.waiting.pop(completion.id)
                    reply = voice.reply(opened.asks[i], completion)
                    self.counts.update(tokens=reply.tokens, replies=1)
                    self.note(opened, i, reply)
                    if opened.ready:
                        self.go_on(opened)
            self.harvest()
            self.log.flush()

    def harvest(self) -> None:
        """Take the verdicts that are there; wait for one where nothing else is under way."""
        if self.judging and not self.waiting:
            wait(self.judging, return_when=FIRST_COMPLETED)
        for future in [f for f in self.judging if f.done()]:
            opened, i = self.judging.pop(future)
            self.note(opened, i, Reply(verdict=future.result()))
            if opened.ready:
                self.go_on(opened)

    def more(self, voice: Voice) -> list[Request] | None:
        """What came up for a voice since it was asked last; searches begin while there is room."""
        room = AHEAD * sum(v.engine.slots for v in self.distinct)
        while len(self.waiting) < room and (following := next(self.searches, None)) is not None:
            self.open += 1
            self.go_on(Open(*following, [], []))
        new, self.pending[voice] = self.pending[voice], []
        return None if not self.open else new

    def go_on(self, opened: Open[T]) -> None:
        """Send a search its replies, until it asks for what is not known yet, or ends."""
        while opened.ready:
            try:
                replies = [reply for reply in opened.replies if reply is not None]
                opened.asks = opened.search.send(replies) if opened.asks else next(opened.search)
            except StopIteration as end:
                self.open -= 1
                self.on_end(opened.id, end.value)
                return
            opened.replies = [None] * len(opened.asks)
            for i in range(len(opened.asks)):
                self.put(opened, i)

    def put(self, opened: Open[T], i: int) -> None:
        """Answer a request at once (from the log, a verifier, or because there is no room), or send it to its voice."""
        ask = opened.asks[i]
        known = self.log.known.pop((opened.id, ask.name), None)
        if known is not None:
            self.counts.update(replayed=1, replayed_tokens=known.tokens)
            opened.replies[i] = known
        elif ask.role == VERIFIER:
            self.counts["verdicts"] += 1
            verdict = self.verify(opened.id, ask)
            if isinstance(verdict, Future):
                self.judging[verdict] = (opened, i)
            else:
                self.note(opened, i, Reply(verdict=verdict))
        else:
            voice = self.voices[ask.role]
            request = voice.request(self.made, opened.id, ask)
            if request is None:
                opened.replies[i] = Reply("", "context")
                return
            self.waiting[self.made] = (opened, i)
            self.pending[voice].append(request)
            self.made += 1

    def note(self, opened: Open[T], i: int, reply: Reply) -> None:
        opened.replies[i] = reply
        self.log.add(opened.id, opened.asks[i].name, reply)

    def speed(self) -> dict[str, Any]:
        """What this process did, for the record: useful tokens over slot-steps is the occupancy of the batch."""
        decoded = sum(voice.engine.decoded for voice in self.distinct)
        return {
            **{name: self.counts[name] for name in ("tokens", "replies", "replayed", "verdicts")},
            "prompt_tokens": sum(voice.read_tokens for voice in self.distinct),
            "prompt_tokens_computed": sum(voice.engine.computed for voice in self.distinct) or None,
            "slot_steps": decoded,
            "occupancy": self.counts["tokens"] / decoded if decoded else None,
        }
