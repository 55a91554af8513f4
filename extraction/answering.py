"""One loaded model at work on many clips: read ahead by threads, in batches that memory has room for.

    answering = Answering(model, job, size=64, results=ledger)
    answering.run(samples)               # every clip ends in results.keep or results.lose
    answering.unload()

While the device answers one batch, the host hands over the batch before it. Whatever ends the run
(a signal, a full disk, a broken file, a bug), batches that the device has answered are handed over
first.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import TYPE_CHECKING, Any, Protocol

from base import UserError, first_line, log
from machine.files import is_machine_trouble
from machine.running import finishing
from vlm.contract import FirstAnswers

if TYPE_CHECKING:                  # torch is imported when the first batch is answered
    import numpy as np
    import torch

    from clips.dataset import Sample
    from vlm.contract import Answer, NotNumbers, VisionLanguageModel

    Clip = tuple[Sample, torch.Tensor]           # a sample and its prepared pixels (n, 3, S, S)

BATCHES_AHEAD = 2                  # decoded clips waiting for the model, in batches


@dataclasses.dataclass(frozen=True)
class Job:
    """What a model is asked about each clip, and how the clips are read."""

    name: str                                        # of the model, in the log
    # What the model sees of a sample; or a MediaError
    read: Callable[[Sample], list[np.ndarray]]
    questions: list[str]
    max_new_tokens: int
    num_workers: int                                 # threads that read and prepare clips ahead


class Results(Protocol):
    """What takes the answers. A call that raised may be repeated with the same answers."""

    def keep(self, answered: list[tuple[Sample, list[Answer]]]) -> None:
        """Clips with an answer to each question; when it returns, the answers outlive a crash."""

    def lose(self, sample: Sample, reason: str) -> None:
        """A clip whose files can't be read, or that the model can't answer."""


class Answering:
    """A loaded model that answers a job's questions, about `size` clips at a time or fewer."""

    def __init__(self, model: VisionLanguageModel, job: Job, size: int, results: Results):
        self.model, self.job, self.size, self.results = model, job, size, results
        self.engine: Any = None                      # made for the first clips and kept
        self.shape: object = None                    # of the clips that it was made for
        # Batches that the device has been given, oldest first: samples, and a function that waits
        # for their answers.
        self.in_flight: collections.deque[tuple[list[Sample], Callable]] = collections.deque()
        self.first_answers = FirstAnswers(job.name, usable=False)

    def run(self, samples: Iterable[Sample]) -> None:
        """Answer all questions about these samples.

        After a signal, only batches already begun are answered.
        """
        with finishing("the clips in hand are answered") as stopping:
            try:
                for clips in self._batches(samples, stopping):
                    self._start(clips)
                self._hand_over_rest()
            except BaseException:
                with contextlib.suppress(Exception):     # a second error tells nothing new
                    self._hand_over()
                raise

    # ------------------------------------------------------------------------------------- reading
    def _batches(self, samples: Iterable[Sample], stopping: Callable[[], bool]) -> Iterator[list[Clip]]:
        """Clips to answer at once: `size`, or fewer where the next clip has another shape."""
        clips: list[Clip] = []
        for sample, pixels in self._pixels_of(samples, BATCHES_AHEAD * self.size):
            if stopping():
                return
            if isinstance(pixels, Exception):
                self.results.lose(sample, str(pixels))
                continue
            if len(clips) >= self.size or (clips and clips[0][1].shape != pixels.shape):
                yield clips
                clips = []
            clips.append((sample, pixels))
        if clips and not stopping():
            yield clips

    def _pixels_of(self, samples: Iterable[Sample], ahead: int) -> Iterator[tuple]:
        """(sample, its prepared pixels or the MediaError), with `ahead` samples read in advance."""
        from clips.dataset import read_ahead

        return read_ahead(self._prepare, samples, self.job.num_workers, ahead)

    def _prepare(self, sample: Sample) -> torch.Tensor:
        """A sample's prepared pixels (n, 3, S, S); a UserError where the machine is in trouble."""
        try:
            return self.model.prepare(self.job.read(sample))
        except (OSError, MemoryError, RuntimeError) as error:
            if not is_machine_trouble(error):
                raise
            raise UserError(f"clip {sample.key} can't be read: {first_line(error)}. This is no fault of the "
                            "clip: put it right, then give the same command again") from error

    # ----------------------------------------------------------------------------------- answering
    def _start(self, clips: list[Clip]) -> None:
        """Give the clips to the device, at once or, where memory is short, in smaller batches."""
        while clips:
            batch = clips[:self.size]
            shortage = self._try(batch)
            if shortage is None:
                clips = clips[len(batch):]
            elif self.size > 1:
                self.size //= 2
                log(f"extract | {self.job.name} | WARNING | {shortage}; going on with {self.size}")
            else:
                self.results.lose(batch[0][0], shortage)
                clips = clips[1:]
        if len(self.in_flight) > 1:                   # handing over was put off
            self._hand_over_rest()

    def _try(self, batch: list[Clip]) -> str | None:
        """Start answering a batch. Where memory is short: free it, and return the device's words."""
        from vlm.errors import short_of_memory
        from vlm.loading import free_memory

        samples, pixels = [sample for sample, _ in batch], [pixels for _, pixels in batch]
        try:
            if self.engine is None or self.shape != pixels[0].shape:
                self.engine = None                    # the old caches make room for the new ones
                self.engine = self.model.open_batches(
                    self.job.questions, self.job.max_new_tokens, pixels[0], self.size)
                self.shape = pixels[0].shape
            self.in_flight.append((samples, self.engine.answer(pixels, self._hand_over_meanwhile)))
            return None
        except (RuntimeError, MemoryError) as error:  # on a CPU a plain RuntimeError
            if not short_of_memory(error):
                raise
            shortage = f"out of memory with {len(batch)} clips at a time: {first_line(error)}"
        self.engine = None
        free_memory()
        return shortage

    # -------------------------------------------------------------------------------- handing over
    def _hand_over(self) -> None:
        """Wait for each batch in flight and hand it over.

        It stays in flight until its answers are safe.
        """
        while self.in_flight:
            samples, wait = self.in_flight[0]
            answered, failed = apart(samples, wait())
            self.results.keep(answered)
            self.in_flight.popleft()
            self.first_answers.usable |= bool(answered)
            for sample, reason in failed:
                self.results.lose(sample, reason)
                self.first_answers.failed(reason)

    def _hand_over_meanwhile(self) -> None:
        """Hand over while the next batch begins.

        A lack of memory is not that batch's: it is put off until later.
        """
        from vlm.errors import short_of_memory

        try:
            self._hand_over()
        except (RuntimeError, MemoryError) as error:
            if not short_of_memory(error):
                raise

    def _hand_over_rest(self) -> None:
        """Hand over with nothing else to do; where memory is short, once more after freeing some."""
        from vlm.errors import short_of_memory
        from vlm.loading import free_memory

        try:
            self._hand_over()
            return
        except (RuntimeError, MemoryError) as error:
            if not short_of_memory(error):
                raise
        self.engine = None
        free_memory()
        try:
            self._hand_over()
        except (RuntimeError, MemoryError) as error:
            if not short_of_memory(error):
                raise
            raise UserError(f"no memory is left to take over the answers of {self.job.name}: "
                            f"{first_line(error)}; free some and give the same command again") from error

    # -------------------------------------------------------------------------------------- ending
    def parity(self, samples: list[Sample], tokens_of: Callable[[Sample, int], list[int]]) -> dict:
        """How many answers transformers gives alike, one by one: in float32 all, in 16 or 4 bits not all.

        tokens_of(sample, number of the question): the tokens that batches gave.
        """
        from vlm.contract import NotNumbers

        self.engine = None                            # its memory is needed
        equal = []
        for sample, pixels in self._pixels_of(samples, self.job.num_workers):
            if isinstance(pixels, Exception):         # answered once, its file is gone now
                continue
            for number, question in enumerate(self.job.questions):
                try:
                    [answer] = self.model.answer([pixels], [question], self.job.max_new_tokens)
                    equal.append(answer.tokens == tokens_of(sample, number))
                except NotNumbers:
                    equal.append(False)
        log(f"extract | {self.job.name} | parity | {sum(equal)} of {len(equal)} answers are those "
            "of one by one")
        return {"answers": len(equal), "equal": sum(equal)}

    def unload(self) -> None:
        """Free the model's memory."""
        self.engine = None                            # it holds the weights
        self.model.unload()


def apart(samples: Sequence[Sample], results: list[list[Answer] | NotNumbers]) -> tuple[list, list]:
    """(clips with their answers, clips that failed with the reason)."""
    answered, failed = [], []
    for sample, result in zip(samples, results):
        if isinstance(result, Exception):
            failed.append((sample, str(result)))
        else:
            answered.append((sample, result))
    return answered, failed
