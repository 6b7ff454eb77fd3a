"""One model's generation: prompts are read, and their continuations are written in one batch.

A step reads a part of the prompts that wait to be read, and writes one token of every continuation. Between two steps
continuations join and leave the batch. A continuation's last token is always unread, as in `TextState`.

What goes wrong with one continuation ends that one. If the model fails on a batch, nobody knows whose fault it is, and
some layers may be a token ahead of others. So every text of the batch is read again from its start, alone, and only
those that fail alone end.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any, cast

import mlx.core as mx
from mlx_lm.tokenizer_utils import TokenizerWrapper

from ..errors import TTTError
from ..network.cache import TTTCache
from ..network.model import Model
from ..network.rewind import RewindableTTTCache
from ..text.state import CONTEXT_TOKENS, PREFILL_STEP_SIZE, TextState
from ..text.visible import VisibleText
from ..text.vocabulary import Vocabulary
from .jobs import Done, Failed, Job, Read, Saved, Written
from .metrics import Metrics
from .prompt_store import PromptStore
from .sampling import Likely, changed, choose, log_probabilities, most_likely, token_seed
from .states import States

log = logging.getLogger("mlx_ttt.serve")

CLEAR_EVERY = 256  # steps, after which MLX gives back memory that it keeps for arrays of sizes that may not come again
BROKEN = "the model failed on this request; the server's log says why"


@dataclass(frozen=True)
class Room:
    """How much is done at a time.

    Attributes:
        writing: continuations in the batch.
        reading: prompts that are read at a time.
        queue: prompts that may wait for that.
        stored_texts, stored_bytes: states kept for prompts that begin like earlier ones.
    """

    writing: int = 32
    reading: int = 8
    queue: int = 256
    stored_texts: int = 32
    stored_bytes: int = 1 << 30


@dataclass(eq=False)
class Writer:
    """A continuation that is being written.

    Attributes:
        start: what the prompt follows.
        context: tokens before the first one written: the prompt, behind the last few tokens of a saved state.
        learning: the learning scale of all that is read and written.
        written: tokens so far.
    """

    job: Job
    sample: int
    start: TextState
    context: list[int]
    learning: float
    text: VisibleText
    written: list[int] = field(default_factory=list)
    over: bool = False

    @property
    def last(self) -> int:
        """The token that is still unread."""
        return self.written[-1] if self.written else self.context[-1]

    @property
    def seed(self) -> int:
        """Each sample has a seed of its own."""
        seed = self.job.ask.sampling.seed
        return token_seed(seed, -1 - self.sample) if self.sample else seed

    @property
    def is_over(self) -> bool:
        return self.over or self.job.is_over

    def fail(self, message: str = BROKEN, status: int = 500) -> None:
        self.over = True
        self.job.tell(Failed(status, message))


@dataclass(eq=False)
class Reader:
    """A text that is being read, all but its last token.

    Attributes:
        tokens: what is to be read.
        cache: the state after `done` of them.
        writers: who goes on from there.
        again: the text was in a batch that failed, and is read again.
        logprobs: of the prompt's tokens so far.
    """

    job: Job
    tokens: list[int]
    cache: list[TTTCache]
    writers: list[Writer]
    done: int = 0
    cached: int = 0
    again: bool = False
    logprobs: list[Likely] = field(default_factory=list)

    @property
    def left(self) -> int:
        return len(self.tokens) - self.done

    @property
    def learning(self) -> float:
        return self.writers[0].learning


class Engine:
    """See the module. All of it runs in one thread, but for `submit` and the counts."""

    def __init__(
        self,
        model: Model,
        tokenizer: TokenizerWrapper,
        *,
        room: Room | None = None,
        states: States | None = None,
        metrics: Metrics | None = None,
    ):
        self.model, self.tokenizer, self.room = model, tokenizer, room or Room()
        self.vocabulary = Vocabulary(tokenizer)
        self.states, self.metrics = states, metrics or Metrics()
        self._waiting: deque[Job] = deque()
        self._queue = threading.Lock()  # for those who wait
        self.beat = time.monotonic()  # when the model was last called with success
        self._steps = 0
        self._empty()

    def _empty(self) -> None:
        self._readers: list[Reader] = []
        self._suspects: deque[Reader] = deque()
        self._writers: list[Writer] = []
        self._cache: list[TTTCache] = []  # of the writers
        self._store = PromptStore(self.room.stored_texts, self.room.stored_bytes)

    # Called from other threads

    def submit(self, jobs: Sequence[Job]) -> bool:
        """Queue jobs, all of them or none: then the queue is full."""
        with self._queue:
            if len(self._waiting) + len(jobs) > self.room.queue:
                return False
            self._waiting.extend(jobs)
        return True

    @property
    def waiting(self) -> int:
        return len(self._waiting)

    @property
    def running(self) -> int:
        """Continuations that are written or whose prompt is being read."""
        return len(self._writers) + sum(len(reader.writers) for reader in self._all_readers())

    # The loop

    def step(self) -> bool:
        """Do a little of everything; says whether there was anything to do."""
        self._drop()
        self._admit()
        if not (self._readers or self._suspects or self._writers):
            return False
        self._read()
        self._write()
        self._read_alone()
        self._steps += 1
        if self._steps % CLEAR_EVERY == 0:
            mx.clear_cache()
        return True

    def fail_all(self, status: int, message: str) -> None:
        """End every job, and start afresh."""
        jobs = [*(reader.job for reader in self._all_readers()), *(w.job for w in self._writers)]
        with self._queue:
            jobs += self._waiting
            self._waiting.clear()
        self._empty()
        for job in jobs:
            job.tell(Failed(status, message))

    def _all_readers(self) -> list[Reader]:
        return [*self._readers, *self._suspects]

    # Joining and leaving

    def _drop(self) -> None:
        """Let those leave who are done, whose client has left, or who have no time left."""
        now = time.monotonic()
        with self._queue:
            waiting = list(self._waiting)
        for job in {*(r.job for r in self._all_readers()), *(w.job for w in self._writers), *waiting}:
            if now > job.deadline:
                job.tell(Failed(504, "the request took longer than the server allows", "timeout"))
        if any(job.is_over for job in waiting):
            with self._queue:
                self._waiting = deque(job for job in self._waiting if not job.is_over)
        self._suspects = deque(reader for reader in self._suspects if not reader.job.is_over)
        self._readers = [reader for reader in self._readers if not reader.job.is_over]
        self._keep([i for i, writer in enumerate(self._writers) if not writer.is_over])

    def _keep(self, indices: list[int]) -> None:
        """Go on with these writers only."""
        if len(indices) == len(self._writers):
            return
        self._writers = [self._writers[i] for i in indices]
        for c in self._cache if indices else ():
            c.filter(indices)
        if not indices:
            self._cache = []

    def _admit(self) -> None:
        """Start to read the prompts of those who wait, as far as there is room."""
        while self._waiting and len(self._readers) < self.room.reading:
            job = self._waiting[0]
            if self.running and self.running + job.ask.samples > self.room.writing:
                return
            with self._queue:
                self._waiting.popleft()
            self.metrics.queued(time.monotonic() - job.started)
            try:
                self._readers.append(reader := self._reader(job))
                self.metrics.cached(reader.cached)
            except TTTError as error:
                job.tell(Failed(getattr(error, "status", 400), str(error)))
            except Exception:
                log.exception("a request could not be started")
                job.tell(Failed(500, BROKEN))

    def _reader(self, job: Job) -> Reader:
        """What is to be read of a job's prompt, and the state to begin with."""
        ask, prompt = job.ask, list(job.ask.prompt)
        start = self._start(job)
        context = [*start.tokens, *prompt]
        if not context:
            raise TTTError("the prompt is empty")
        learning = start.learning if ask.learning is None else ask.learning
        tokens = [*start.tokens[-1:], *prompt][:-1]
        cache, cached = start.cache, 0
        if ask.state is None and not ask.prompt_logprobs:
            found, cached = self._store.find(learning, tokens)
            cache = cache if found is None else found
        writers = [Writer(job, i, start, context, learning, self._text(context, ask.stop)) for i in range(ask.samples)]
        return Reader(job, tokens, cache, writers, done=cached, cached=cached)

    def _text(self, context: list[int], stop: Sequence[str]) -> VisibleText:
        return VisibleText(cast(Any, self.vocabulary), context[-CONTEXT_TOKENS:], stop)

    def _start(self, job: Job) -> TextState:
        """What the job's text goes on from."""
        if job.ask.state is None:
            return TextState(self.model.make_cache())
        assert self.states is not None
        state = self.states.load(job.ask.state)
        # Plain caches only: a batch holds one kind.
        state.cache = [c.plain() if isinstance(c, RewindableTTTCache) else c for c in state.cache]
        return state

    # Reading prompts

    def _read(self) -> None:
        """Read a part of all prompts, as many tokens of each, so that nothing is padded."""
        group = [reader for reader in self._readers if reader.left]
        try:
            if group:
                T = min(max(PREFILL_STEP_SIZE // len(group), 1), *(reader.left for reader in group))
                self._read_part(group, T)
        except Exception:
            log.exception("reading %d prompts failed", len(group))
            self._suspect(group)
        for reader in [reader for reader in self._readers if not reader.left]:
            self._readers.remove(reader)
            self._join(reader)

    def _read_part(self, group: list[Reader], T: int) -> None:
        """Read the next T tokens of each."""
        ids = mx.array([reader.tokens[reader.done : reader.done + T] for reader in group])
        cache = _merged([reader.cache for reader in group])
        logits = self.model(ids, cache, _scale([reader.learning for reader in group]))  # [B, T, V], rarely computed
        mx.eval([c.arrays for c in cache])
        for i, reader in enumerate(group):
            if reader.job.ask.prompt_logprobs and not reader.again:
                reader.logprobs += self._likely(logits[i], reader, T)
            reader.cache = [c.extract(i) for c in cache] if len(group) > 1 else cache
            reader.done += T
        mx.eval([c.arrays for reader in group for c in reader.cache])
        self.beat = time.monotonic()
        self.metrics.read(T * len(group))

    def _likely(self, logits: mx.array, reader: Reader, T: int) -> Iterator[Likely]:
        """What the model expected, [T, V], of the T tokens after those that it has read."""
        following = [*reader.tokens, reader.writers[0].context[-1]][reader.done + 1 : reader.done + T + 1]
        logprobs = log_probabilities(logits)
        found = mx.take_along_axis(logprobs, mx.array(following)[:, None], axis=-1)[:, 0]
        top, values = most_likely(logprobs, reader.job.ask.logprobs or 0)
        columns: Any = found.tolist(), top.tolist(), values.tolist()
        for token, logprob, tokens, likely in zip(following, *columns, strict=True):
            yield Likely(token, logprob, list(zip(tokens, likely, strict=True)))

    def _join(self, reader: Reader) -> None:
        """A text has been read: its continuations join the batch."""
        job = reader.job
        if job.is_over:
            return
        if not reader.again:
            logprobs = reader.logprobs if job.ask.prompt_logprobs else None
            job.tell(Read(len(job.ask.prompt), reader.cached, logprobs))
            if job.ask.state is None:
                self._store.keep(reader.learning, reader.tokens, reader.cache)
            if job.ask.max_tokens == 0:
                for writer in reader.writers:
                    job.tell(Written(writer.sample, "", None, "length"))
                    self._finish(writer, reader.cache)
                return
        cache = _merged([reader.cache for _ in reader.writers])
        self._cache = _merged([self._cache, cache]) if self._writers else cache
        self._writers += reader.writers

    # Writing

    def _write(self) -> None:
        """Write one token of each continuation."""
        try:
            if self._writers:
                self._advance()
        except Exception:
            log.exception("writing %d texts failed", len(self._writers))
            writers, self._writers, self._cache = self._writers, [], []
            self._suspect([self._from_the_start(w) for w in writers if not w.is_over])

    def _advance(self) -> None:
        writers = self._writers
        ids = mx.array([[writer.last] for writer in writers])
        scales = [writer.learning for writer in writers]
        logits = self.model(ids, self._cache, _scale(scales))[:, -1]  # [B, V]
        best = mx.argmax(logits, axis=-1)
        chosen = [self._choose(logits[i], best[i], writer) for i, writer in enumerate(writers)]
        mx.eval(best, [list(arrays) for arrays in chosen if arrays is not None])
        self.beat = time.monotonic()
        for i, (writer, arrays) in enumerate(zip(writers, chosen, strict=True)):
            if arrays is None:
                continue
            try:
                self._take(writer, *arrays)
                if writer.over:
                    self._finish(writer, [c.extract(i) for c in self._cache])
            except Exception:
                log.exception("one text failed")
                writer.fail()
        self._keep([i for i, writer in enumerate(writers) if not writer.is_over])

    def _choose(self, logits: mx.array, best: mx.array, writer: Writer) -> tuple[mx.array, ...] | None:
        """The next token and, if asked for, its log probability and the likeliest tokens, still to be computed."""
        ask = writer.job.ask
        sampling = ask.sampling
        try:
            token = best
            if sampling.changes_logits or not sampling.is_greedy:
                scores = changed(logits, sampling, ask.prompt, writer.written) if sampling.changes_logits else logits
                token = choose(scores, sampling, writer.seed, len(writer.written))
            if ask.logprobs is None:
                return (token,)
            logprobs = log_probabilities(logits)
            return token, logprobs[token], *most_likely(logprobs, ask.logprobs)
        except Exception:
            log.exception("choosing a token failed")
            writer.fail()
            return None

    def _take(self, writer: Writer, token: mx.array, *likely: mx.array) -> None:
        """A continuation gets its next token."""
        ask, value = writer.job.ask, int(cast(Any, token.item()))
        if not 0 <= value < self.model.args.vocab_size:
            return writer.fail("the model's output is not a number")
        said: Likely | int = value
        if likely:
            told: Any = [x.tolist() for x in likely]
            logprob, top, values = told
            if math.isnan(logprob):
                return writer.fail("the model's output is not a number")
            said = Likely(value, logprob, list(zip(top, values, strict=True)))
        writer.written.append(value)
        is_eos = value in self.tokenizer.eos_token_ids
        segment, finish = writer.text.after(value, is_eos=is_eos, is_last=len(writer.written) == ask.max_tokens)
        writer.over = finish is not None
        self.metrics.wrote(1)
        if len(writer.written) == 1:
            self.metrics.first_token(time.monotonic() - writer.job.started)
        writer.job.tell(Written(writer.sample, segment, said, finish))

    def _finish(self, writer: Writer, cache: list[TTTCache]) -> None:
        """A continuation has ended, in this state. The job has if it was the last one."""
        job, ask = writer.job, writer.job.ask
        tokens = [*writer.context, *writer.written]
        if ask.state is None:
            self._store.keep(writer.learning, tokens[:-1], cache)
        if ask.save_state is not None:
            assert self.states is not None
            state = TextState(cache, tokens[-CONTEXT_TOKENS:], writer.start.learning)
            try:
                self.states.save(ask.save_state, state)
            except TTTError as error:
                return job.tell(Failed(getattr(error, "status", 500), str(error), "state_not_saved"))
            job.tell(Saved(ask.save_state, len(state)))
        job.unfinished -= 1
        if not job.unfinished:
            job.tell(Done())

    # When the model fails on a batch

    def _suspect(self, readers: list[Reader]) -> None:
        """Have these texts read again, one by one."""
        self.metrics.batch_failed()
        self._readers = [reader for reader in self._readers if reader not in readers]
        for reader in readers:
            reader.cache, reader.done, reader.cached, reader.logprobs = reader.writers[0].start.cache, 0, 0, []
            self._suspects.append(reader)

    def _from_the_start(self, writer: Writer) -> Reader:
        """All that a continuation has read, to be read again."""
        tokens = [*writer.start.tokens[-1:], *writer.job.ask.prompt, *writer.written][:-1]
        return Reader(writer.job, tokens, writer.start.cache, [writer], again=True)

    def _read_alone(self) -> None:
        """Read one of the suspects alone. If that works, and a token can be written after it, it was not the cause."""
        if not self._suspects:
            return
        reader = self._suspects.popleft()
        others, self._writers, self._cache, cache = self._writers, [], [], self._cache
        try:
            while reader.left:
                self._read_part([reader], min(reader.left, PREFILL_STEP_SIZE))
            self._join(reader)
            if self._writers:
                self._advance()
        except Exception as error:
            log.error("a text failed alone: %s", error)
            for writer in reader.writers:
                writer.fail()
            self._writers, self._cache = [], []
        if others:
            self._cache = _merged([cache, self._cache]) if self._writers else cache
        self._writers = others + self._writers


def _merged(caches: Sequence[list[TTTCache]]) -> list[TTTCache]:
    """The sequences of several lists of caches in one, layer by layer."""
    if len(caches) == 1:
        return [c.copy() for c in caches[0]]
    return [layers[0].merge(layers) for layers in zip(*caches, strict=True)]


def _scale(scales: list[float]) -> Any:
    """The learning scale as the model takes it: one number if it is 1 for all, which costs nothing."""
    return 1.0 if all(scale == 1 for scale in scales) else scales
