"""One model's generation: prompts are read, and their continuations are written in one batch.

A step reads a part of the prompts that wait to be read, and writes one token of every continuation. Between two steps
continuations join and leave the batch. A continuation's last token is always unread, as in `TextState`.

The device is given the next token of every continuation before the host looks at the last one, so that it never waits
for the host. The token that comes after the end of a text is dropped. Where a call of the model returns only when it
has been computed, the host looks first: there is nothing to gain.

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
from ..network.model import Model, computes_when_called
from ..network.rewind import RewindableTTTCache
from ..text.state import CONTEXT_TOKENS, PREFILL_STEP_SIZE, TextState
from ..text.visible import VisibleText
from ..text.vocabulary import Vocabulary
from .batch import BROKEN, Batch, Choice, Step, Writer, merged, scale
from .jobs import Done, Failed, Job, Read, Saved, Written
from .metrics import Metrics
from .prompt_store import PromptStore
from .sampling import Likely, log_probabilities, most_likely
from .states import States

log = logging.getLogger("mlx_ttt.serve")

CLEAR_EVERY = 256  # steps, after which MLX gives back memory that it keeps for arrays of sizes that may not come again


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
        ahead: bool | None = None,
    ):
        """
        Args:
            ahead: whether to give the next token to the device before looking at the last one. By default, unless that
                would only be computed sooner.
        """
        self.model, self.tokenizer, self.room = model, tokenizer, room or Room()
        self.vocabulary = Vocabulary(tokenizer)
        self.states, self.metrics = states, metrics or Metrics()
        self._ahead = not computes_when_called() if ahead is None else ahead
        self._waiting: deque[Job] = deque()
        self._queue = threading.Lock()  # for those who wait
        self.beat = time.monotonic()  # when the model was last called with success
        self._steps = 0
        self._empty()

    def _empty(self) -> None:
        self._readers: list[Reader] = []
        self._suspects: deque[Reader] = deque()
        self._batch = Batch()
        self._given: Step | None = None  # to the device, and not looked at yet
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
        return len(self._batch.writers) + sum(len(reader.writers) for reader in self._all_readers())

    # The loop

    def step(self) -> bool:
        """Do a little of everything; says whether there was anything to do."""
        self._drop()
        self._admit()
        if not (self._readers or self._suspects or self._batch.writers):
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
        jobs = [*(reader.job for reader in self._all_readers()), *(w.job for w in self._batch.writers)]
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
        for job in {*(r.job for r in self._all_readers()), *(w.job for w in self._batch.writers), *waiting}:
            if now > job.deadline:
                job.tell(Failed(504, "the request took longer than the server allows", "timeout"))
        if any(job.is_over for job in waiting):
            with self._queue:
                self._waiting = deque(job for job in self._waiting if not job.is_over)
        self._suspects = deque(reader for reader in self._suspects if not reader.job.is_over)
        self._readers = [reader for reader in self._readers if not reader.job.is_over]
        self._leave()

    def _leave(self) -> None:
        """Go on without the writers that are over."""
        self._batch.keep([i for i, writer in enumerate(self._batch.writers) if not writer.is_over])
        if self._given is not None and self._given.is_over:
            self._given = None

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
        cache = merged([reader.cache for reader in group])
        logits = self.model(ids, cache, scale([reader.learning for reader in group]))  # [B, T, V], rarely computed
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
        self._batch.extend(Batch(reader.writers, merged([reader.cache for _ in reader.writers])))

    # Writing

    def _write(self) -> None:
        """Write one token of each continuation."""
        texts, before = self._batch.writers, self._given
        try:
            self._given = self._next()
            if before is not None:
                self._look(before)
            if self._given is not None and not self._ahead:
                self._look(self._given)
                self._given = None
        except Exception:
            log.exception("writing %d texts failed", len(texts))
            self._batch, self._given = Batch(), None
            self._suspect([self._from_the_start(w) for w in texts if not w.is_over])

    def _next(self) -> Step | None:
        """Give the device the next token of each continuation that needs one."""
        batch = self._batch
        batch.keep([i for i, writer in enumerate(batch.writers) if not writer.is_asked_for])
        if not batch.writers:
            return None
        logits = self.model(batch.unread[:, None], batch.cache, batch.scale)[:, -1]  # [B, V]
        best = mx.argmax(logits, axis=-1)
        choices = [self._choose(logits[i], best[i], writer) for i, writer in enumerate(batch.writers)]
        tokens = mx.stack([c.token for c in choices]) if any(w.is_choosy for w in batch.writers) else best
        # What logits that are no numbers have given is read before the host can refuse it.
        batch.unread = mx.minimum(tokens, self.model.args.vocab_size - 1)
        cache = [c.copy() for c in batch.cache] if self._ahead else batch.cache
        step = Step(batch.writers, tokens, choices, cache)
        mx.async_eval(step.arrays, batch.unread)
        return step

    def _choose(self, logits: mx.array, best: mx.array, writer: Writer) -> Choice:
        """A continuation's next token, and what is asked to be told of it."""
        ask = writer.job.ask
        try:
            token = writer.chosen(logits) if writer.is_choosy else best
            writer.asked += 1
            if ask.logprobs is None:
                return Choice(token)
            logprobs = log_probabilities(logits)
            return Choice(token, logprobs[token], *most_likely(logprobs, ask.logprobs))
        except Exception:
            log.exception("choosing a token failed")
            writer.fail()
            return Choice(best)

    def _look(self, step: Step) -> None:
        """Wait for a step, and tell of its tokens."""
        mx.eval(step.arrays)
        self.beat = time.monotonic()
        tokens: Any = step.tokens.tolist()
        for i, (writer, token, choice) in enumerate(zip(step.writers, tokens, step.choices, strict=True)):
            if writer.is_over:
                continue
            try:
                if self._take(writer, token, choice):
                    self._finish(writer, [c.extract(i) for c in step.cache])
            except Exception:
                log.exception("one text failed")
                writer.fail()
        self._leave()

    def _take(self, writer: Writer, value: int, choice: Choice) -> bool:
        """A continuation gets its next token. Says whether it ends with it."""
        ask = writer.job.ask
        if not 0 <= value < self.model.args.vocab_size:
            writer.fail("the model's output is not a number")
            return False
        said: Likely | int = value
        if choice.logprob is not None:
            told: Any = [x.tolist() for x in choice.told]
            logprob, top, values = told
            if math.isnan(logprob):
                writer.fail("the model's output is not a number")
                return False
            said = Likely(value, logprob, list(zip(top, values, strict=True)))
        writer.written.append(value)
        is_eos = value in self.tokenizer.eos_token_ids
        segment, finish = writer.text.after(value, is_eos=is_eos, is_last=len(writer.written) == ask.max_tokens)
        writer.over = finish is not None
        self.metrics.wrote(1)
        if len(writer.written) == 1:
            self.metrics.first_token(time.monotonic() - writer.job.started)
        writer.job.tell(Written(writer.sample, segment, said, finish))
        return writer.over

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
        writer.forget_asked()
        tokens = [*writer.start.tokens[-1:], *writer.job.ask.prompt, *writer.written][:-1]
        return Reader(writer.job, tokens, writer.start.cache, [writer], again=True)

    def _read_alone(self) -> None:
        """Read one of the suspects alone. If that works, and a token can be written after it, it was not the cause."""
        if not self._suspects:
            return
        reader = self._suspects.popleft()
        others, self._batch, given, self._given = self._batch, Batch(), self._given, None
        try:
            while reader.left:
                self._read_part([reader], min(reader.left, PREFILL_STEP_SIZE))
            self._join(reader)
            if (step := self._next()) is not None:
                self._look(step)
        except Exception as error:
            log.error("a text failed alone: %s", error)
            for writer in reader.writers:
                writer.fail()
            self._batch = Batch()
        others.extend(self._batch)
        self._batch, self._given = others, given
