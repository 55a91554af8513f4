"""Answering with fakes: what goes wrong while batches are in flight costs no answer and no other clip."""

import types

import pytest
import torch

import vlm.contract
from base import UserError
from clips.dataset import Sample
from clips.limits import MachineTrouble, MediaError
from extraction.answering import Answering, Job
from machine.running import Stopped
from vlm.contract import Answer, NotNumbers

SAMPLES = [Sample(number, str(number), "town_00_a", number) for number in range(7)]
SHORT = torch.OutOfMemoryError("no room")


class Model:
    """What it sees of a clip is the clip's number."""

    @staticmethod
    def prepare(number: int) -> torch.Tensor:
        return torch.full((1, 1), number)

    @staticmethod
    def open_batches(questions, max_new_tokens, clip, clips):
        return Engine()


class Engine:
    """Stands in for vlm.batches.Batches; `plan` maps (stage, number of the batch) to an error, raised once.

    The stages of a batch: made, begun, running (after the batch before it was handed over), done
    (waited for).
    """

    plan: dict = {}                # noqa: RUF012 - each test sets its own
    sizes: list[int] = []          # noqa: RUF012

    def __init__(self):
        self.raise_planned("made", len(Engine.sizes))

    @staticmethod
    def raise_planned(stage: str, number: int) -> None:
        error = Engine.plan.get((stage, number))
        if isinstance(error, list):                                  # raised again and again
            raise error[0]
        if error and Engine.plan.pop((stage, number)):
            raise error

    def answer(self, pixels, meanwhile):
        number = len(Engine.sizes)
        self.raise_planned("begun", number)
        meanwhile()
        self.raise_planned("running", number)
        Engine.sizes.append(len(pixels))
        names = [int(clip) for clip in pixels]

        def wait():
            self.raise_planned("done", number)
            spoilt = Engine.plan.get("nan", [])
            return [
                NotNumbers("float16") if name in spoilt else [Answer([name], "", True)]
                for name in names
            ]

        return wait


class Results:
    """Keeps all that it is given.

    before, after: number of a call of keep -> an error, raised once there.
    """

    def __init__(self, before: dict | None = None, after: dict | None = None):
        self.before, self.after = before or {}, after or {}
        self.answers, self.lost, self.calls = {}, {}, 0

    def keep(self, answered) -> None:
        self.calls += 1
        if error := self.before.pop(self.calls, None):
            raise error
        self.answers |= {sample.clip: answers[0].tokens for sample, answers in answered}
        if error := self.after.pop(self.calls, None):
            raise error

    def lose(self, sample, reason) -> None:
        assert sample.clip not in self.lost, f"clip {sample.clip} fails twice"
        self.lost[sample.clip] = reason


@pytest.fixture
def answer():
    """Answer 7 clips, 2 at a time; returns (the results, Answering, the error that ended it)."""
    def call(plan: dict | None = None, results: Results | None = None,
             read=lambda sample: sample.clip, size=2):
        Engine.plan, Engine.sizes = plan or {}, []
        results = results or Results()
        answering = Answering(Model(), Job("draft", read, ["?"], 9, 1), size, results)
        error = None
        try:
            answering.run(SAMPLES)
        except BaseException as caught:
            error = caught
        return results, answering, error
    return call


ALL = {number: [number] for number in range(7)}


def test_every_clip_is_answered_once(answer):
    results, _, error = answer()
    assert error is None and results.answers == ALL and results.calls == 4 and Engine.sizes == [2, 2, 2, 1]


@pytest.mark.parametrize("stage", ["made", "begun", "running"])
@pytest.mark.parametrize("number", [0, 1, 3])
def test_a_lack_of_memory_halves_the_batch_and_loses_nothing(answer, stage, number):
    results, answering, error = answer({(stage, number): SHORT})
    assert error is None and results.answers == ALL and not results.lost
    # The engine is made but once
    assert answering.size == (2 if stage == "made" and number else 1)


# ------------------------------------------- while the batch before is handed over (the old fault)
@pytest.mark.parametrize("short", [SHORT, MemoryError(), RuntimeError("CUDA error: out of memory")], ids=repr)
@pytest.mark.parametrize("number", [0, 2, 3])
@pytest.mark.parametrize("where", ["waiting for the device", "keep"])
@pytest.mark.parametrize("size", [1, 2])
def test_a_lack_of_memory_while_answers_are_handed_over_costs_no_answer_and_no_clip(
        answer, where, number, short, size):
    if where == "keep":
        results, answering, error = answer({}, Results(before={number + 1: short}), size=size)
    else:
        results, answering, error = answer({("done", number): short}, size=size)
    assert error is None and results.answers == ALL and not results.lost and answering.size == size


def test_answers_that_memory_is_never_enough_for_end_the_run_and_the_others_are_kept(answer):
    results, _, error = answer({("done", 1): [SHORT]})
    assert isinstance(error, UserError)
    assert "no memory is left to take over the answers of draft" in str(error)
    assert results.answers == {0: [0], 1: [1]} and not results.lost


# ------------------------------------------------------------------------ whatever else ends a run
ENDS = [KeyboardInterrupt(), Stopped(143), RuntimeError("device-side assert"), ValueError("a bug"),
        UserError("stop"), OSError(28, "No space left on device")]


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("stage", ["begun", "running"])
def test_what_ends_a_run_loses_no_batch_that_the_device_was_given(answer, end, stage):
    results, _, error = answer({(stage, 2): end})
    assert error is end and results.answers == {number: [number] for number in range(4)} and not results.lost


@pytest.mark.parametrize("end", ENDS, ids=repr)
@pytest.mark.parametrize("when", ["before", "after"])
def test_what_ends_a_run_while_answers_are_kept_loses_only_what_could_not_be_written(answer, end, when):
    """Keeping is tried once more: the disk may have room for less, and a signal is no reason to lose any."""
    results, _, error = answer({}, Results(**{when: {2: end}}))
    assert error is end and results.answers == {number: [number] for number in range(4)}


def test_a_disk_that_stays_full_ends_the_run_with_its_own_error(answer):
    full = OSError(28, "No space left on device")
    results, _, error = answer({}, Results(before=dict.fromkeys(range(2, 99), full)))
    assert error is full and results.answers == {0: [0], 1: [1]}


@pytest.mark.parametrize("trouble", [
    MachineTrouble("mp4/ is gone"), OSError(5, "Input/output error"), MemoryError()])
def test_trouble_of_the_machine_while_reading_ends_the_run_after_what_was_begun(answer, trouble):
    def read(sample):
        if sample.clip == 4:
            raise trouble
        return sample.clip

    results, _, error = answer(read=read)
    assert isinstance(error, UserError) and not results.lost
    assert str(trouble) in str(error)
    # The next two waited for a third
    assert results.answers == {0: [0], 1: [1]}


def test_a_file_that_is_broken_fails_its_clip_alone(answer):
    def read(sample):
        if sample.clip in (0, 3, 6):
            raise MediaError("broken")
        return sample.clip

    results, _, error = answer(read=read)
    assert error is None and results.lost == dict.fromkeys((0, 3, 6), "broken")
    assert sorted(results.answers) == [1, 2, 4, 5]


# ---------------------------------------------------------------------------- logits that are none
def test_a_clip_without_numbers_fails_alone_and_says_the_dtype(answer):
    results, _, error = answer({"nan": [5]})
    assert error is None and sorted(results.answers) == [0, 1, 2, 3, 4, 6]
    assert list(results.lost) == [5] and "float16" in results.lost[5]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_clip_without_numbers_fails_once_when_its_batch_is_handed_over_twice(answer, when):
    results, _, error = answer({"nan": [5]}, Results(**{when: {3: SHORT}}))
    assert error is None and list(results.lost) == [5] and len(results.answers) == 6


def test_a_model_that_gives_no_numbers_from_the_start_is_not_tried_on_all_clips(answer, monkeypatch):
    monkeypatch.setattr(vlm.contract, "FAILURES_AT_START", 3)
    results, _, error = answer({"nan": [*range(7)]})
    assert isinstance(error, UserError) and "draft: none of the first 3 could be answered" in str(error)
    assert "logits in float16 are no numbers" in str(error)
    assert not results.answers and 3 <= len(results.lost) < 7 and len(Engine.sizes) < 4


def test_a_model_that_has_answered_one_clip_is_tried_on_all(answer, monkeypatch):
    monkeypatch.setattr(vlm.contract, "FAILURES_AT_START", 3)
    results, _, error = answer({"nan": [0, 1, 3, 4, 5, 6]})
    assert error is None and sorted(results.answers) == [2] and len(results.lost) == 6


# ------------------------------------------------------------------------------------------ parity
def test_an_answer_that_one_by_one_has_no_numbers_for_is_not_equal():
    def broken(pixels, questions, max_new_tokens):
        if int(pixels[0]) == 1:
            raise NotNumbers("bfloat16")
        return [Answer([int(pixels[0])], "", True)]

    model = types.SimpleNamespace(prepare=Model.prepare, answer=broken)
    answering = Answering(model, Job("draft", lambda sample: sample.clip, ["?"], 9, 1), 2,
                          Results())
    assert answering.parity(SAMPLES[:3],
                            lambda sample, number: [sample.clip]) == {"answers": 3, "equal": 2}
