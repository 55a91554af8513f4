"""Greedy answers about many clips at once, to several questions each: the engine of extraction.

    batches = Batches(model, questions, max_new_tokens=50, pictures=8, clips=64)
    wait = batches.answer(pixels)      # of up to 64 clips; returns while the device still works
    for clip in wait():                # a list of Answers in the order of the questions, or NotNumbers

The part of the prompt up to the end of the pictures is the same for all questions about a clip: it
passes the layers once and is cached once. Each row (a clip and a question) has a small cache of its
own behind it for the question and the answer. So no position of a long prompt is padding; only
questions are padded, to the longest one. One token of all rows is one CUDA graph. Now and then the
host checks whether all answers have ended; it never waits for the step it has just started.
"""

import math
from collections.abc import Callable, Sequence
from typing import Any

import torch

from base import log
from machine.graphs import capture
from vlm.attention import causal, shared_and_own
from vlm.contract import Answer, NotNumbers, VisionLanguageModel
from vlm.errors import short_of_memory
from vlm.greedy import answer_of, cut_at_end
from vlm.llama import NO_NUMBER, SAME, Llama, Next, apart, position_bytes
from vlm.loading import check_positions, free_gib

READ_TOKENS = 16_384  # prompt positions that pass the layers at once: enough to fill a GPU
ASKED, ROWS = 16, 256  # questions per clip, and rows in all, side by side: more gain little
CPU_CLIPS = 8                      # clips at a time on a CPU, where more are no faster
LOOK = 8                           # steps from one check of the ends to the next
FILLED = 0.9                       # share of the free memory that may be used


class Batches(Llama):
    """Up to `clips` clips at a time, the same questions about each."""

    def __init__(self, vlm: VisionLanguageModel, questions: list[str], max_new_tokens: int,
                 pictures: int, clips: int, graphs: bool | None = None, clip: Any = None):
        """pictures: per clip; graphs: None = on a CUDA device where the layers allow it.

        clip: one of them as prepare() gives it, where prompts differ in length with equally many
        pictures.
        """
        self.vlm, self.clips = vlm, clips
        self.max_new_tokens = max_new_tokens
        self.shared, self.after = vlm.layout(questions, pictures, clip)
        longest = max(map(len, self.after))
        room = self.shared + longest + max_new_tokens
        check_positions(self.shared + longest, max_new_tokens, vlm.max_positions)
        super().__init__(*vlm.decoder, room=room)
        self.asked = asked_at_once(len(questions))
        self.seen = self.new_cache(clips, self.shared)
        self.said = self.new_cache(clips * self.asked, room - self.shared)
        self.slots = torch.arange(max(self.shared, room - self.shared), device=self.device)
        self.row = torch.arange(clips * self.asked, device=self.device)
        self.eos = torch.tensor(vlm.eos_ids, device=self.device)
        # The state of a step, row by row: last id, tokens in `said`, whether the end is still to
        # come.
        self.ids = torch.zeros_like(self.row)
        self.lengths = torch.zeros_like(self.row)
        self.open = self.row >= 0
        self.number = self.row[:1].clone()                             # of the step
        self.tokens = self.row.new_zeros(max_new_tokens, len(self.row))
        assert self.may_be_captured or not graphs, f"no CUDA graph of this model on {self.device}"
        # A graph has one size: it computes all rows, whatever is in those that nobody asked about.
        self.fixed = self.may_be_captured and graphs is not False and max_new_tokens > LOOK
        self.graph = None
        self.must = bool(graphs)

    @torch.inference_mode()
    def answer(
        self, pixels: Sequence[torch.Tensor], meanwhile: Callable = lambda: None
    ) -> Callable:
        """Start answering all questions about at most `clips` clips; -> a function that waits for
        the answers.

        pixels: of each clip as prepare() gives them. The function returns an entry per clip: a list
        with an Answer per question, or a NotNumbers (not raised) where the logits of any answer of
        the clip were no numbers; the answers of its neighbours are not affected. meanwhile() is
        called while the device is busy for long.
        """
        with self.on_device():
            return self._answer(pixels, meanwhile)

    def _answer(self, pixels: Sequence[torch.Tensor], meanwhile: Callable) -> Callable:
        self._read(pixels)
        meanwhile()
        groups = [self.after[at:at + self.asked] for at in range(0, len(self.after), self.asked)]
        tokens = torch.cat([self._ask(group, len(pixels)) for group in groups], 1)
        cuda = self.device.type == "cuda"
        on_host = torch.empty(tokens.shape, dtype=tokens.dtype, pin_memory=cuda)
        on_host.copy_(tokens, non_blocking=True)               # (clips, questions, max_new_tokens)
        done = torch.cuda.Event() if cuda else None
        if done:
            done.record()
        # wait() must not hold self: whoever keeps it would keep the caches.
        tokenizer, eos_ids, dtype = self.vlm.tokenizer, self.eos.tolist(), self.dtype

        def wait() -> list[list[Answer] | NotNumbers]:
            if done:
                done.synchronize()
            return [answers_of(rows, eos_ids, tokenizer, dtype) for rows in on_host.tolist()]

        return wait

    # ----------------------------------------------------------------------------------- the prompt
    def _read(self, pixels: Sequence[torch.Tensor]) -> None:
        """Cache the shared part of each clip's prompts in `seen`, a few clips at a time."""
        size = max(1, READ_TOKENS // self.shared)
        positions = self.slots[:self.shared]
        for first in range(0, len(pixels), size):
            part = pixels[first:first + size]
            shared = self.vlm.shared_prompts(part)
            if shared.positions is not None:     # the same for all clips of one shape
                self.set_positions(shared.positions)
            rows = slice(first, first + len(part))

            def attend(number: int, queries: torch.Tensor, rows=rows) -> torch.Tensor:
                keys, values = self.seen[number, :, rows]
                shape = (len(keys), self.shared, *queries.shape[1:])
                return causal(queries.view(shape), keys, values, planned=True).flatten(0, 1)

            places = torch.arange(
                rows.start * self.shared, rows.stop * self.shared, device=self.device
            )
            self.layers(
                shared.embeds.to(self.dtype).flatten(0, 1),
                positions.repeat(len(part)),
                self.seen,
                places,
                attend,
                follow=False,
                added=None if shared.added is None else shared.added.flatten(1, 2),
            )

    def _ask(self, questions: list[list[int]], read: int) -> torch.Tensor:
        """Answer these questions about the first `read` clips -> new tokens (clips, questions,
        max_new_tokens).

        questions: ids of the rest of the prompt for each question.
        """
        asked, clips, wanted = len(questions), read, len(questions)
        if self.fixed:  # the graph's size: filled up with any question
            asked, clips = self.asked, self.clips
            questions = (questions + self.after[:1] * asked)[:asked]
        rows, width = clips * asked, max(map(len, questions))
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in questions])
        ids = ids.to(self.device).repeat(clips, 1)
        lengths = torch.tensor([len(ids) for ids in questions]).to(self.device).repeat(clips)
        self.said.zero_()  # a NaN that an earlier answer left would reach this one
        x = self._forward(ids, self.slots[:width].expand(rows, -1), clips)
        best = self.following(x.view(rows, width, -1)[self.row[:rows], lengths - 1]).best
        is_wanted = (self.row[:rows] // asked < read) & (self.row[:rows] % asked < wanted)
        self.ids[:rows] = best.clamp(min=0)
        self.lengths[:rows] = lengths
        self.open[:rows] = ~self._ends(best) & is_wanted
        self.tokens[:] = self.eos[0]
        self.tokens[0, :rows] = best
        self.number.fill_(1)
        if self.fixed and not self.graph:
            self._capture()
        self._generate(rows, clips)
        return self.tokens[:, :rows].T.unflatten(0, (clips, asked))[:read, :wanted].clone()

    # ----------------------------------------------------------------------------------- the answer
    def _forward(self, ids: torch.Tensor, slots: torch.Tensor, clips: int) -> torch.Tensor:
        """ids (rows, T), to be cached at slots (rows, T) of each row -> (rows * T, D) before the
        last norm.
        """
        rows = len(ids)
        places = self.row[:rows, None] * self.said.shape[4] + slots

        def attend(number: int, queries: torch.Tensor) -> torch.Tensor:
            shared, own = self.seen[number, :, :clips], self.said[number, :, :rows]
            return shared_and_own(queries.unflatten(0, (rows, -1)), shared, own, slots)

        return self.layers(self.model.embed_tokens(ids.flatten()), (self.shared + slots).flatten(),
                           self.said, places.flatten(), attend)

    def _next(self, rows: int, clips: int) -> Next:
        """One token of every row, entirely on the device: the contents of the graph."""
        slots = self.lengths[:rows, None]
        following = self.following(self._forward(self.ids[:rows, None], slots, clips))
        self.ids[:rows] = following.best.clamp(min=0)
        self.tokens[:, :rows].index_copy_(0, self.number, following.best[None])
        self.open[:rows] &= ~self._ends(following.best)
        self.lengths[:rows] += 1
        self.number += 1
        return following

    def _ends(self, best: torch.Tensor) -> torch.Tensor:
        """best (rows,) -> (rows,) bool: whether this token ends the answer, or there is none."""
        return (best[:, None] == self.eos).any(-1) | (best == NO_NUMBER)

    def _generate(self, rows: int, clips: int) -> None:
        """Steps until all answers have ended, at most max_new_tokens of them."""
        cuda = self.device.type == "cuda"
        still_open = torch.ones((), dtype=torch.bool, pin_memory=cuda)
        copied = None
        for number in range(1, self.max_new_tokens):
            if self.graph:
                self.graph.replay()
            else:
                self._next(rows, clips)
            if number % LOOK == 0:
                if copied:
                    copied.synchronize()  # the copy of the check before: the device still has work
                if not still_open:
                    return
                still_open.copy_(self.open[:rows].any(), non_blocking=True)
                if cuda:
                    copied = torch.cuda.Event()
                    copied.record()

    def _capture(self) -> None:
        """Capture one step; trust it only if it gives what an eager step gives (4-bit kernels are
        not PyTorch's).
        """
        state = (self.ids, self.lengths, self.open, self.number)
        before = [part.clone() for part in state]

        def step() -> Next:
            return self._next(len(self.row), self.clips)

        def restore() -> None:
            for part, value in zip(state, before):
                part.copy_(value)

        try:
            eager = step().logits.clone()
            restore()
            graph, output = capture(step)
            restore()
            graph.replay()
            if not (difference := apart(output.logits, eager)) <= SAME:
                raise RuntimeError(f"it differs from eager by {difference:.1%}")
            self.graph = graph
            log(f"batches | a CUDA graph for {len(self.row)} answers at a time")
        except RuntimeError as error:            # CUDA's refusals while capturing are RuntimeErrors
            if self.must or short_of_memory(error):
                raise
            self.fixed = False
            log(f"batches | WARNING | no CUDA graph, every step runs eagerly: {error}")
        restore()


def answers_of(rows: list[list[int]], eos_ids: list[int], tokenizer,
               dtype: torch.dtype) -> list[Answer] | NotNumbers:
    """The answers about one clip. rows: its new tokens for each question, with anything behind
    their ends.
    """
    tokens = [cut_at_end(row, eos_ids) for row in rows]
    if any(NO_NUMBER in row for row in tokens):
        return NotNumbers(dtype)
    return [answer_of(row, eos_ids, tokenizer) for row in tokens]


# ------------------------------------------------------------------------------- how many at a time
def asked_at_once(questions: int) -> int:
    """Questions per clip side by side: groups of equal size, ASKED at most."""
    return math.ceil(questions / math.ceil(questions / ASKED))


def clips_that_fit(
    vlm: VisionLanguageModel, questions: list[str], max_new_tokens: int, pictures: int
) -> int:
    """How many clips at a time the free memory has room for; on a CPU a fixed number."""
    device, dtype, config = vlm.runtime.device, vlm.runtime.dtype, vlm.decoder[0].config
    asked = asked_at_once(len(questions))
    if device.type != "cuda":
        return CPU_CLIPS
    shared, after = vlm.layout(questions, pictures)
    longest = max(map(len, after))
    # While prompts or questions are read: hidden states, and the output of the widest layer.
    passing = (12 * config.hidden_size + 4 * config.intermediate_size) * dtype.itemsize
    positions = shared + asked * (longest + max_new_tokens)
    clip = positions * position_bytes(config, dtype) + passing * asked * longest
    read = passing * max(READ_TOKENS, shared)
    fitting = (FILLED * free_gib(device) * 2**30 - read) // clip
    return int(min(max(1, fitting), max(1, ROWS // asked)))
