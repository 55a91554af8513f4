"""Greedy answers about many clips at once, to several questions each: what extraction runs.

    batches = Batches(model, questions, max_new_tokens=50, pictures=8, clips=64)      # model: VideoLlava or EventGPT
    coming = batches.answer(pixels)                     # of up to 64 clips; starts it all and returns before the end
    answers = coming()                                  # waits: for each clip its Answers in the order of the questions

A clip's part of the prompt is the same for all its questions: it goes through the layers once and is kept once.
Behind it every row (a clip and a question) has a small cache of its own for question and answer. So no position of a
long prompt is padding; only questions are filled up to the longest one. One token of all rows is a CUDA graph; now
and then the host looks whether all answers have ended, and it never waits for the step it has just started.
"""

import math
from collections.abc import Callable, Sequence

import torch

from base import log
from machine.graphs import capture
from vlm.attention import causal, shared_and_own
from vlm.contract import Answer, NotNumbers
from vlm.errors import short_of_memory
from vlm.llama import NO_NUMBER, SAME, Llama, Next, apart, position_bytes
from vlm.loading import check_positions, free_gib
from vlm.model import answer_of, cut_at_end

READ_TOKENS = 16_384         # prompt positions that go through the layers at once: enough to fill a GPU
ASKED, ROWS = 16, 256        # questions of a clip, and answers in all, side by side: more gain little
CPU_CLIPS = 8                # clips at a time on a CPU, where more are no faster
LOOK = 8                     # steps from one look at the ends to the next
FILLED = 0.9                 # share of the free memory that may be used


class Batches(Llama):
    """Up to `clips` clips at a time, all the same questions about each."""

    def __init__(self, vlm, questions: list[str], max_new_tokens: int, pictures: int, clips: int,
                 graphs: bool | None = None):
        """vlm: the model; pictures: of each clip; graphs: None = on a CUDA device where the layers allow it."""
        self.vlm, self.clips, self.pictures, self.count = vlm, clips, pictures, len(questions)
        self.max_new_tokens = max_new_tokens
        before, self.after = prompt_of(vlm, questions, pictures)
        self.shared, longest = before, max(map(len, self.after))
        room = before + longest + max_new_tokens
        check_positions(before + longest, max_new_tokens, vlm.max_positions)
        super().__init__(*vlm.decoder, room=room)
        self.asked = asked_at_once(len(questions))
        self.seen, self.said = self.new_cache(clips, before), self.new_cache(clips * self.asked, room - before)
        self.slots = torch.arange(max(before, room - before), device=self.device)
        self.row = torch.arange(clips * self.asked, device=self.device)
        self.eos = torch.tensor(vlm.eos_ids, device=self.device)
        # What a step reads and writes: last id, tokens in `said`, whether the end is still to come; the step's number.
        self.ids, self.lengths, self.open = torch.zeros_like(self.row), torch.zeros_like(self.row), self.row >= 0
        self.number, self.tokens = self.row[:1].clone(), self.row.new_zeros(max_new_tokens, len(self.row))
        assert self.may_be_captured or not graphs, f"no CUDA graph of this model on {self.device}"
        # A graph is of one size: it answers for all rows, whatever stands in those that nobody asked about.
        self.fixed = self.may_be_captured and graphs is not False and max_new_tokens > LOOK
        self.graph, self.must = None, bool(graphs)

    @torch.inference_mode()
    def answer(self, pixels: Sequence[torch.Tensor], meanwhile: Callable = lambda: None) -> Callable:
        """pixels: of at most `clips` clips, as prepare() gives them -> a function that waits for their answers.

        It returns an entry per clip: a list with an Answer per question, or a NotNumbers (not raised) where the logits
        of any of the clip's answers were no numbers; the neighbours' answers are not touched. meanwhile() is called
        when the device is busy for long.
        """
        with self.on_device():
            return self._answer(pixels, meanwhile)

    def _answer(self, pixels: Sequence[torch.Tensor], meanwhile: Callable) -> Callable:
        clips = len(pixels)
        self._read(pixels)
        meanwhile()
        groups = [self.after[at:at + self.asked] for at in range(0, self.count, self.asked)]
        new = torch.cat([self._ask(group, clips) for group in groups], 1)         # (clips, questions, tokens)
        cuda = self.device.type == "cuda"
        found = torch.empty(new.shape, dtype=new.dtype, pin_memory=cuda).copy_(new, non_blocking=True)
        done = torch.cuda.Event() if cuda else None
        if done:
            done.record()
        tokenizer, eos_ids, dtype = self.vlm.tokenizer, self.eos.tolist(), self.dtype
        # The function does not hold self: who waits must not hold the caches.

        def wait() -> list[list[Answer] | NotNumbers]:
            if done:
                done.synchronize()
            return [answers_of(rows, eos_ids, tokenizer, dtype) for rows in found.tolist()]

        return wait

    # ------------------------------------------------------------------------------------------ the prompt
    def _read(self, pixels: Sequence[torch.Tensor]) -> None:
        """What the questions about each clip share, into `seen`: a few clips at a time."""
        size, positions = max(1, READ_TOKENS // self.shared), self.slots[:self.shared]
        for first in range(0, len(pixels), size):
            part = torch.stack(pixels[first:first + size])
            if self.device.type == "cuda":
                part = part.pin_memory()
            embeds = self.vlm.shared_embeds(part.to(self.device, non_blocking=True)).to(self.dtype)
            rows = slice(first, first + len(part))

            def attend(number: int, queries: torch.Tensor, rows=rows) -> torch.Tensor:
                keys, values = self.seen[number, :, rows]
                shape = (len(keys), self.shared, *queries.shape[1:])
                return causal(queries.view(shape), keys, values, planned=True).flatten(0, 1)

            places = torch.arange(rows.start * self.shared, rows.stop * self.shared, device=self.device)
            self.layers(embeds.flatten(0, 1), positions.repeat(len(part)), self.seen, places, attend, follow=False)

    def _ask(self, questions: list[list[int]], clips: int) -> torch.Tensor:
        """ids of the rest of the prompt for each question -> new tokens (clips, questions, max_new_tokens)."""
        asked, wanted, read = len(questions), len(questions), clips
        if self.fixed:
            questions, asked, clips = (questions + self.after[:1] * self.asked)[:self.asked], self.asked, self.clips
        rows, width = clips * asked, max(map(len, questions))
        ids = torch.tensor([[*ids, *[0] * (width - len(ids))] for ids in questions])
        lengths = torch.tensor([len(ids) for ids in questions])
        ids, lengths = ids.to(self.device).repeat(clips, 1), lengths.to(self.device).repeat(clips)
        self.said.zero_()                        # a NaN that an earlier answer may have left would reach this one
        x = self._forward(ids, self.slots[:width].expand(rows, -1), clips)
        best = self.following(x.view(rows, width, -1)[self.row[:rows], lengths - 1]).best
        wanted_rows = (self.row[:rows] // asked < read) & (self.row[:rows] % asked < wanted)
        self.ids[:rows] = best.clamp(min=0)
        self.lengths[:rows] = lengths
        self.open[:rows] = ~self._ends(best) & wanted_rows
        self.tokens[:] = self.eos[0]
        self.tokens[0, :rows] = best
        self.number.fill_(1)
        if self.fixed and not self.graph:
            self._capture()
        self._generate(rows, clips)
        return self.tokens[:, :rows].T.unflatten(0, (clips, asked))[:read, :wanted].clone()

    # ------------------------------------------------------------------------------------------ the answer
    def _forward(self, ids: torch.Tensor, slots: torch.Tensor, clips: int) -> torch.Tensor:
        """ids (rows, T), to be kept at slots (rows, T) of each row's cache -> (rows * T, D) before the last norm."""
        rows = len(ids)
        places = self.row[:rows, None] * self.said.shape[4] + slots

        def attend(number: int, queries: torch.Tensor) -> torch.Tensor:
            shared, own = self.seen[number, :, :clips], self.said[number, :, :rows]
            return shared_and_own(queries.unflatten(0, (rows, -1)), shared, own, slots)

        return self.layers(self.model.embed_tokens(ids.flatten()), (self.shared + slots).flatten(), self.said,
                           places.flatten(), attend)

    def _next(self, rows: int, clips: int) -> Next:
        """One token of every row, entirely on the device: what the graph captures."""
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
        """Tokens until all answers have ended, or max_new_tokens of each."""
        cuda = self.device.type == "cuda"
        still_open, looked = torch.ones((), dtype=torch.bool, pin_memory=cuda), None
        for number in range(1, self.max_new_tokens):
            if self.graph:
                self.graph.replay()
            else:
                self._next(rows, clips)
            if number % LOOK == 0:
                if looked:
                    looked.synchronize()         # the look before this one: meanwhile the device has work
                if not still_open:
                    return
                still_open.copy_(self.open[:rows].any(), non_blocking=True)
                if cuda:
                    looked = torch.cuda.Event()
                    looked.record()

    def _capture(self) -> None:
        """A graph of one token, believed only after it gave what eager gives (4-bit kernels are not PyTorch's)."""
        state = (self.ids, self.lengths, self.open, self.number)
        before = [part.clone() for part in state]

        def step() -> Next:
            return self._next(len(self.row), self.clips)

        def again() -> None:
            for part, value in zip(state, before):
                part.copy_(value)

        try:
            eager = step().logits.clone()
            again()
            graph, output = capture(step)
            again()
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
        again()


def answers_of(rows: list[list[int]], eos_ids: list[int], tokenizer, dtype) -> list[Answer] | NotNumbers:
    """rows: a clip's new tokens for each question, with whatever stands after their ends."""
    tokens = [cut_at_end(row, eos_ids) for row in rows]
    if any(NO_NUMBER in row for row in tokens):
        return NotNumbers(dtype)
    return [answer_of(row, eos_ids, tokenizer) for row in tokens]


# -------------------------------------------------------------------------------------------- how many at a time
def asked_at_once(questions: int) -> int:
    """Questions of a clip side by side: as many in every group, ASKED at most."""
    return math.ceil(questions / math.ceil(questions / ASKED))


def prompt_of(vlm, questions: list[str], pictures: int) -> tuple[int, list[list[int]]]:
    """(positions of the prompt up to the end of the pictures, ids of the rest for each question)."""
    parts = [vlm.prompt_parts(question) for question in questions]
    assert all(before == parts[0][0] for before, _ in parts), "the questions change what stands before the pictures"
    before = len(parts[0][0]) + vlm.visual_tokens(pictures)
    return before, [after[:max(1, vlm.max_prompt - before)] for _, after in parts]


def clips_that_fit(vlm, questions: list[str], max_new_tokens: int, pictures: int) -> int:
    """How many clips at a time the free memory has room for; on a CPU a fixed number."""
    device, dtype, config = vlm.runtime.device, vlm.runtime.dtype, vlm.decoder[0].config
    asked = asked_at_once(len(questions))
    if device.type != "cuda":
        return CPU_CLIPS
    shared, after = prompt_of(vlm, questions, pictures)
    longest = max(map(len, after))
    # While prompts or questions are read: hidden states, and what the widest layer makes of them.
    passing = (12 * config.hidden_size + 4 * config.intermediate_size) * dtype.itemsize
    positions = shared + asked * (longest + max_new_tokens)
    clip = positions * position_bytes(config, dtype) + passing * asked * longest
    read = passing * max(READ_TOKENS, shared)
    return int(min(max(1, (FILLED * free_gib(device) * 2**30 - read) // clip), max(1, ROWS // asked)))
