"""DECODE.md, its pictures and the log line say what decode.json says, with ratios of totals and
nothing smuggled in.

The sums, by hand: hybrid decodes in 0.5 s drafting + 1 s verifying, none in 3 s, generate in 8 -
0.5 s; vision takes 1 s, each prefill 0.25 s, EventGPT 1.25 s. Draft free that is 2.75 s, plainly
4.25 s, draft charged 4 s.
"""

import copy
import json
import sys
from pathlib import Path

import pytest
from PIL import Image

import report
from base import UserError
from reports import decode_report
from reports.blocks import ratio
from reports.charts import DECODE_CHARTS
from reports.decode_figures import FORMAT, one_line, speed_ups, totals
from reports.html import PAGE
from tests.reports.test_task_report import HOSTILE, check_hostile_text, write_task

EXACT = {"verdict": "exact"}
TIE = {"verdict": "tie", "position": 2, "gap": 0.0125, "ours": [5], "plain": [6]}
WRONG = {"verdict": "WRONG", "position": 3, "gap": 0.75, "ours": [7], "plain": [8]}


def ran(proposed: list[int], accepted: list[int], tokens: int, draft_s: float,
        verify_s: float) -> dict:
    return {
        "tokens": tokens, "proposed": proposed, "accepted": accepted, "draft_s": draft_s,
        "prefill_s": 0.125, "verify_s": verify_s, **EXACT
    }


def answers() -> list[dict]:
    """Two answers, of 6 and 4 tokens."""
    hybrids = ran([0, 4, 2], [0, 3, 0], 6, 0.25, 0.5), ran([2, 3], [1, 1], 4, 0.25, 0.5)
    return [{
        "sample_id": f"id{n}", "sequence": "thun_00_a", "clip": n, "question_idx": 0,
        "query": "What?", "text": "", "tokens": [1] * length, "vision_s": 0.5, "eventgpt_s": 0.625,
        "runs": {"hybrid": hybrids[n], "none": ran([0] * length, [0] * length, length, 0.0, 1.5)
                 }, "generate": {"tokens": length, "all_s": 4.0, "first_token_s": 0.25, **EXACT}
    } for n, length in enumerate((6, 4))]


def decoding(compare: bool = True, rows: list[dict] | None = None, parallel: dict | None = None,
             **changes) -> dict:
    """What speculative_decode.py writes."""
    rows = copy.deepcopy(rows or answers())
    for row in rows:
        if not compare:
            del row["generate"], row["runs"]["none"], row["runs"]["hybrid"]["verdict"]
        chosen = row["runs"][changes.get("drafter", "hybrid")]
        row["tokens"] = (row["tokens"] + [1] * chosen["tokens"])[:chosen["tokens"]]
    costs = {
        "vision": 100.0, "prefill": 20.0,
        "verify": {str(k): 10 + (k - 1) / 2
                   for k in range(1, 18)}, "proposal": {"hybrid": 2.0, "none": 0.0},
        "eventgpt": {"vision": 1.0, "prefill": 2.0, "verify": {"1": 3.0}}
    }
    results = {
        "kind": "decoding", "task": "1s", "date": "2026-01-28 04:15:03", "config": {
            "gamma": "auto", "compare": compare
        }, "drafter": "hybrid", "gamma": "auto", "memory_share": 0.5, "reads_draft": [
            "hybrid", "adapter", "copy"
        ], "simulated_tau": {"hybrid": {"1": 1.5, "8": 4.5}}, "dtype": "bfloat16",
        "quantization": "none", "device": "GPU", "noise": 0.05, "failed": [], "costs_ms": costs,
        "target": {"name": "models/v", "revision": "local",
                   "vocab_size": 32000}, "answers": rows, "totals": totals(rows), "provenance": {
                       "argv": ["speculative_decode.py", "--compare"], "git_commit": None,
                       "versions": {"python": "3.11"}
                   }
    }
    if parallel:
        results["totals"]["parallel"] = parallel
    return json.loads(json.dumps({**results, **changes}))


def page(folder: Path, plots: bool = False, **changes) -> str:
    (folder / "decode.json").write_text(json.dumps(decoding(**changes)))
    decode_report.write_decode_report(folder, plots=plots)
    return (folder / "DECODE.md").read_text()


def lead(folder: Path, **changes) -> str:
    return page(folder, **changes).split("\n## ")[0]


def cells(text: str, label: str) -> list[str]:
    """The cells of the table row that begins with this label."""
    row, = [line for line in text.splitlines() if line.startswith(f"| {label} |")]
    return [cell.strip() for cell in row.strip("|").split("|")]


def judged(hybrid: list[dict], generate: list[dict] = (EXACT, EXACT)) -> list[dict]:
    rows = answers()
    for row, of_hybrid, of_generate in zip(rows, hybrid, generate):
        row["runs"]["hybrid"] |= of_hybrid
        row["generate"] |= of_generate
    return rows


# ------------------------------------------------------------------------------------------ numbers
def test_totals_are_the_sums_of_the_answers():
    sums = totals(answers())
    assert sums["runs"]["hybrid"] == {
        "tokens": 10, "passes": 5, "tau": 2.0, "proposed": 11, "accepted": 5,
        "accepted_lengths": {0: 2, 1: 2, 3: 1}, "draft_s": 0.5, "prefill_s": 0.25, "verify_s": 1.0,
        "verdicts": {"exact": 2}
    }
    assert sums["runs"]["none"]["passes"] == 10 and sums["runs"]["none"]["tau"] == 1
    assert (sums["answers"], sums["vision_s"], sums["eventgpt_s"]) == (2, 1.0, 1.25)
    assert sums["generate"] == {
        "tokens": 10, "all_s": 8.0, "first_token_s": 0.5, "verdicts": {"exact": 2}
    }
    assert sums["verdicts"] == {"exact": 6}


def test_speed_ups_are_ratios_of_totals():
    rows = answers()
    rows[0]["runs"]["none"]["verify_s"], rows[1]["runs"]["none"]["verify_s"] = 2.75, 0.25
    rows[0]["runs"]["hybrid"]["verify_s"], rows[1]["runs"]["hybrid"]["verify_s"] = 0.875, 0.125
    found = speed_ups(decoding(rows=rows), "hybrid")
    assert found == {"plain": 2.0, "generate": 5.0, "whole": 8 / 2.75}
    # The mean of the two answers' own ratios would be 2.75 / 1.125 and 0.25 / 0.375, together 1.56.


def test_a_time_that_is_lost_in_the_clock_gives_no_ratio():
    assert ratio(3.0, 2.0) == 1.5
    assert not any(
        ratio(*seconds) for seconds in ((-0.5, 1.0), (1.0, 0.0), (None, 1.0), (0.0, 1.0)))


def test_answers_of_one_token_have_no_speed_up(tmp_path):
    rows = answers()
    for row in rows:
        # by chance slower than the whole answer
        row["generate"]["first_token_s"] = 4.5
        row["runs"]["hybrid"] = ran([0], [0], 1, 0.0, 0.0)
    text = page(tmp_path, rows=rows, plots=True)
    assert cells(text, "**hybrid**")[7:9] == ["-", "-"] and "can't be told" in text


@pytest.mark.parametrize(("changes", "line"), [
    ({}, "2 answers | 2 exact | hybrid | tau 2.00 | decode 2.0x over plain, 5.0x over generate"),
    ({"compare": False}, "2 answers | hybrid | tau 2.00"),
    ({"drafter": "none"}, "2 answers | 2 exact | none | tau 1.00 | decode 2.5x over generate"),
    ({"rows": judged([TIE, WRONG])},
     "2 answers | 1 tie, 1 WRONG | hybrid | tau 2.00 | decode 2.0x over plain, 5.0x over generate"),
    ({"rows": judged([EXACT, EXACT], [TIE, TIE])},
     "2 answers | 2 exact | hybrid | tau 2.00 | decode 2.0x over plain, 5.0x over generate | "
     "elsewhere 2 ties"),
    ({"compare": False, "failed": [{}]}, "2 answers | hybrid | tau 2.00 | failed 1"),
])
def test_the_log_line_says_what_is_known(changes, line):
    assert one_line(decoding(**changes)) == line


# --------------------------------------------------------------------------------------------- page
def test_the_page_leads_with_the_answer(tmp_path):
    text = lead(tmp_path)
    assert "**With hybrid the target emits 2.00 tokens per pass (tau), gamma auto, over 2 answers.**" in text
    assert "Of 11 proposed tokens 5 were accepted (45.5 %)" in text
    assert "**All 2 answers are word for word those of plain decoding.**" in text
    assert (
        "**2.00x** the speed of our own loop without drafts and **5.00x** the speed of "
        "transformers' generate; "
        "end to end, draft free, at **2.91x** the speed of generate.") in text
    assert "**On this machine hybrid pays most:**" in text and "Warning" not in text and "WRONG" not in text


@pytest.mark.parametrize(("verdicts", "said", "unsaid"), [
    ([EXACT, TIE], ["1 of 2 answers are word for word", "There is 1 tie:"], ["WRONG", "All 2"]),
    ([TIE, TIE], ["0 of 2 answers are", "There are 2 ties:"], ["WRONG", "those of plain decoding.**"]),
    ([EXACT, WRONG], ["1 of 2 answers are", "**1 of 2 is WRONG: different by more than rounding.**"],
     ["tie"]),
    ([TIE, WRONG], ["0 of 2 answers are", "There is 1 tie:", "**1 of 2 is WRONG"],
     ["those of plain decoding.**"])])
def test_ties_and_wrong_answers_are_told_in_the_lead(tmp_path, verdicts, said, unsaid):
    first = lead(tmp_path, rows=judged(verdicts)).split("\n\n")[1]
    assert all(words in first for words in said) and not any(words in first for words in unsaid)


def test_wrong_answers_of_generate_and_others_are_told_too(tmp_path):
    text = page(tmp_path, rows=judged([EXACT, EXACT], [WRONG, EXACT]))
    assert "**Among the others: 1 WRONG; see the table of differences.**" in text
    assert cells(text, "thun\\_00\\_a 0")[1:] == ["0", "generate", "3", "0.75", "**WRONG**"]


def test_differences_are_listed_wrong_ones_first_and_at_most_20(tmp_path):
    rows = [{**copy.deepcopy(answers()[0]), "clip": n} for n in range(25)]
    for n, row in enumerate(rows):
        row["runs"]["hybrid"] |= WRONG if n == 24 else TIE
    text = page(tmp_path, rows=rows).split("## Verdicts")[1].split("\n## ")[0]
    shown = [line for line in text.splitlines() if line.startswith("| thun")]
    assert len(shown) == 20 and "5 more are in decode.json" in text
    assert "_a 24 | 0 | hybrid | 3 | 0.75 | **WRONG** |" in shown[0]
    assert "_a 0 | 0 | hybrid | 2 | 0.0125 | tie |" in shown[1]
    assert "the noise, 0.05 here" in text


def test_when_no_drafter_pays_the_page_says_so_and_why(tmp_path):
    rows = answers()
    for row in rows:
        row["runs"]["hybrid"]["draft_s"] = 1.25                              # 2.5 + 1 s against 3
    text = lead(tmp_path, rows=rows)
    assert "**On this machine no drafter pays:** the best, hybrid, takes 3.50 s" in text
    assert "plainly 3.00 s" in text
    assert (
        "One of its proposals costs 2.00 ms and one token of plain decoding 10.00 ms; verifying 9 "
        "tokens costs 1.40 "
        "times as much as one") in text


def test_another_drafter_that_pays_more_is_named(tmp_path):
    rows = answers()
    for row in rows:
        row["runs"]["memory"] = ran([4, 4], [3, 2], 6, 0.125, 0.25)
    assert (
        "**On this machine memory pays most:** decoding everything takes it 0.75 s, decoding "
        "plainly 3.00 s, "
        "4.00x the speed (this run chose hybrid)") in lead(tmp_path, rows=rows)


def test_a_drafter_with_wrong_answers_is_not_said_to_pay(tmp_path):
    rows = judged([EXACT, WRONG])
    assert "pays on this machine can't be told" in lead(tmp_path, rows=rows)
    for row in rows:
        # slower than hybrid, and right
        row["runs"]["memory"] = ran([4, 4], [3, 2], 6, 0.5, 0.75)
    assert "**On this machine memory pays most:**" in lead(tmp_path, rows=rows)


def test_four_bit_verification_is_warned_of_with_the_measured_figure(tmp_path):
    assert (
        "> **Warning:** verifying several tokens is slow with these 4-bit products: 9 tokens take "
        "1.40 times"
        in lead(tmp_path, quantization="4bit"))
    assert "4-bit" not in lead(tmp_path, quantization="8bit")


def test_without_compare_the_whole_page_claims_nothing_that_was_not_measured(tmp_path):
    text = page(tmp_path, plots=True, compare=False)
    first = text.split("\n## ")[0]
    assert "was not measured: run again with --compare" in first
    assert "2 answers took 2.75 s draft free" in first
    assert "word for word" not in first and "pays" not in first and "x**" not in first
    assert cells(text, "**hybrid**")[-4:] == ["-"] * 4
    assert cells(text, "draft charged") == ["draft charged", "2", "4.00", "2.000", "-", "-"]
    assert "## Verdicts" not in text and "generate |" not in text.split("## Stages")[1].split(
        "\n## ")[0]
    assert {path.name for path in tmp_path.glob("*.png")} == set(DECODE_CHARTS[:2])
    assert "drafter_speed_up" not in text


def test_sampled_answers_are_said_to_be_beyond_comparing(tmp_path):
    text = lead(tmp_path, compare=False, config={"temperature": 0.7})
    assert "sampled at temperature 0.7" in text and "run again with --compare" in text
    text = lead(tmp_path, config={"temperature": 0.7})
    assert "of sampling without drafts from the same seeds (temperature 0.7)" in text


def test_the_drafters_stand_side_by_side(tmp_path):
    text = page(tmp_path)
    assert cells(text, "**hybrid**") == [
        "**hybrid**", "2.00", "5", "11", "45.5 %", "0.50", "1.00", "2.00x", "5.00x", "2.91x",
        "2 / 0 / 0"
    ]
    assert cells(text, "none")[1:5] == ["1.00", "10", "0", "-"] and cells(text,
                                                                          "none")[-1] == "reference"


def test_three_accountings(tmp_path):
    text = page(tmp_path)
    assert cells(text, "draft free")[1:] == ["2", "2.75", "1.375", "2.91x", "1.55x"]
    assert cells(text, "draft charged")[1:] == ["2", "4.00", "2.000", "2.00x", "1.06x"]
    assert cells(text, "draft in parallel")[1:] == ["not measured: run with --parallel"] * 5
    assert "needs no draft" not in text


def test_drafting_in_parallel_is_compared_over_the_clips_it_ran_on(tmp_path):
    # 3 clips, 2 questions
    rows = [{**answers()[0], "clip": n // 2, "question_idx": n % 2} for n in range(6)]
    for n, row in enumerate(rows):
        # to question 0: 1, 3 and 5 s
        row["generate"] = {**row["generate"], "all_s": float(1 + n)}
    together = {"clips": 2, "all_s": 1.6, "plain_all_s": 2.4, "draft_device": "cuda"}
    text = page(tmp_path, rows=rows, parallel=together)
    assert cells(text, "draft in parallel")[1:] == ["2", "1.60", "0.800", "2.50x", "1.50x"]
    text = page(tmp_path, compare=False, parallel=together)
    assert cells(text, "draft in parallel")[1:] == ["2", "1.60", "0.800", "-", "1.50x"]


def test_stages_add_up(tmp_path):
    text = page(tmp_path).split("## Stages")[1].split("\n## ")[0]
    assert cells(text, "prefill")[1:] == ["-", *["125.0 (0.25)"] * 3]
    assert cells(text, "EventGPT")[1:] == ["-", "-", "-", "625.0 (1.25)"]
    assert cells(text, "**all**")[1:] == [
        "4000.0 (8.00)", "2125.0 (4.25)", "1375.0 (2.75)", "2000.0 (4.00)"
    ]


def test_break_even_weighs_a_round_against_single_tokens(tmp_path):
    text = page(tmp_path, gamma="8").split("### Break-even")[1]
    assert cells(text, "8")[1:] == ["14.00", "1.40", "16.00", "30.00", "3.00", "4.50", "1.50x"]
    assert cells(text, "1")[1:] == ["10.50", "1.05", "2.00", "12.50", "1.25", "1.50", "1.20x"]
    assert cells(text, "16")[1:] == ["18.00", "1.80", "32.00", "50.00", "5.00", "-", "-"]
    assert "**Best gamma for hybrid: 8**, expected 1.50x the speed of plain decoding." in text
    assert "No gamma" not in text
    assert "No gamma is expected to pay" in page(tmp_path, simulated_tau={"hybrid": {"8": 2.9}})
    assert "holds no simulated tau of hybrid" in page(tmp_path, simulated_tau={"adapter": {"8": 9}})


def test_accepted_lengths_are_drawn_as_text_with_the_empty_ones(tmp_path):
    text = page(tmp_path).split("## Accepted proposals per pass")[1].split("\n## ")[0]
    assert [line.split() for line in text.splitlines() if "%" in line] == [
        ["0", "2", "40.0%", "#" * 16], ["1", "2", "40.0%", "#" * 16], ["2", "0", "0.0%"],
        ["3", "1", "20.0%", "#" * 8]]


def test_failed_clips_are_told_with_their_reason(tmp_path):
    failed = [{
        "sample_id": f"id{n}", "sequence": "thun_01_a", "clip": n,
        "model": None if n else "videollava", "reason": "no such video"
    } for n in range(22)]
    text = page(tmp_path, failed=failed)
    assert "> **Warning:** clips that could not be decoded: 22;" in text
    assert "2 more are in decode.json" in text
    assert cells(text,
                 "thun\\_01\\_a 0") == ["thun\\_01\\_a 0", "id0", "videollava", "no such video"]


def test_names_from_files_stay_text(tmp_path):
    rows = judged([TIE, EXACT])
    for row in rows:
        row["sequence"] = HOSTILE
        for name in ("hybrid", "none"):
            row["runs"][HOSTILE if name == "hybrid" else name] = row["runs"].pop(name)
    costs = decoding()["costs_ms"]
    costs["proposal"][HOSTILE] = 2.0
    failed = {
        "sample_id": HOSTILE, "sequence": HOSTILE, "clip": HOSTILE, "model": HOSTILE,
        "reason": HOSTILE
    }
    text, again = page(
        tmp_path, plots=True, rows=rows, task=HOSTILE, date=HOSTILE, drafter=HOSTILE, gamma=HOSTILE,
        costs_ms=costs, device=HOSTILE, dtype=HOSTILE, failed=[failed], config={HOSTILE: HOSTILE},
        target={"name": HOSTILE, "revision": HOSTILE}, provenance={
            "argv": ["x", HOSTILE], "git_commit": HOSTILE, "versions": {HOSTILE: HOSTILE}
        }).split("## Again")
    check_hostile_text(text, again, 20)


# ------------------------------------------------------------------------------- pictures and files
def test_pictures_are_drawn_large_enough_and_named_on_the_page(tmp_path):
    text = page(tmp_path, plots=True)
    for name in DECODE_CHARTS:
        assert f"![{name}]({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.info["dpi"][
                0] >= 159 and picture.width >= 1000
    # nothing temporary stays
    assert len(list(tmp_path.iterdir())) == 6


def test_dollars_in_names_are_no_formula_in_a_picture(tmp_path):
    page(tmp_path, plots=True, task=r"$\no$ such $\symbol{$")
    assert len(list(tmp_path.glob("*.png"))) == 3


def test_without_pictures_none_are_named(tmp_path):
    assert ".png" not in page(tmp_path) and not list(tmp_path.glob("*.png"))


@pytest.mark.parametrize("compare", [True, False])
def test_a_run_without_a_drafter_has_a_page(tmp_path, compare):
    rows = answers()
    for row in rows:
        row["runs"]["hybrid"] = ran([0] * 2, [0] * 2, 2, 0.0, 1.0)
    changes = {"drafter": "none"} if compare else {}
    text = page(tmp_path, plots=True, rows=rows, compare=compare, **changes)
    assert "Nothing was proposed." in text
    if compare:
        assert "the speed of our own loop" not in text
        assert "compared with transformers' generate: **All 2" in text
        assert "none reads nothing of EventGPT's answer" in text


def test_the_same_page_is_made_again_from_decode_json_alone(tmp_path, monkeypatch):
    first = page(tmp_path, plots=True)
    for path in tmp_path.glob("[!d]*"):
        path.unlink()
    monkeypatch.setattr("sys.argv", ["report.py", "--rebuild", str(tmp_path)])
    report.main()
    assert (tmp_path / "DECODE.md").read_text() == first and (tmp_path / "stage_times.png").exists()


@pytest.mark.parametrize(("content", "words"), [
    (None, "no such file"), ("[]", "is not the decode.json"), ("{", "JSON"),
    ('{"kind": "training"}', "is not the decode.json")])
def test_a_folder_without_decode_json_is_a_user_error(tmp_path, content, words):
    if content:
        (tmp_path / "decode.json").write_text(content)
    with pytest.raises(UserError, match=words):
        decode_report.write_decode_report(tmp_path)


def test_the_summary_tells_the_newest_decoding_of_a_task_and_where_it_is(tmp_path, capsys):
    task = write_task(tmp_path / "a", name="1s_a")
    other = write_task(tmp_path / "b", name="500ms_b")
    for name, drafter in (("decode_20260128_041503", "hybrid"), ("decode_20260127_235959", "none"),
                          ("decode_20260129_000000", None)):  # the last one was killed
        (task / name).mkdir()
        if drafter:
            page(task / name, plots=True, drafter=drafter)
    capsys.readouterr()
    assert report.summary([task, other], html=False) == 0
    lines = [line.split("SUMMARY | ")[1] for line in capsys.readouterr().out.splitlines()]
    newest = task / "decode_20260128_041503"
    paths = [str(newest / name) for name in (PAGE, "DECODE.md", *DECODE_CHARTS)]
    assert lines[:len(paths)] == paths                  # then the notes, then the tables
    assert [line.partition(" | what the draft adds")[0] for line in lines[len(paths):][:2]] == [
        "1s_a", "500ms_b"]
    assert [line.split(" | ")[0].strip() for line in lines[-5:]] == [
        "task", "1s_a", "500ms_b", "decoding", "a/decode_20260128_041503"]
    assert [cell.strip() for cell in lines[-1].split(" | ")[1:]] == [
        "hybrid", "2", "2 / 0 / 0", "0", "2.00", "2.00x", "5.00x", "2.91x"]


def test_the_page_over_tasks_names_the_models_that_ran_and_no_speed_that_was_not_measured(
        tmp_path, monkeypatch):
    task = write_task(tmp_path / "a", name="1s_a")
    folder = task / "decode_20260128_041503"
    folder.mkdir()
    page(folder, compare=False, titles={"target": "Qwen"})
    report.summary([task], html=True)
    html = (tmp_path / PAGE).read_text()
    assert "Qwen answered 2 questions about 2 clips" in html and "Video-LLaVA" not in html
    assert "0.00x" not in html
    monkeypatch.setattr(sys, "argv", ["report.py", "--html", "--rebuild", str(task)])
    with pytest.raises(UserError, match="give one of both"):
        report.main()


def test_a_wrong_answer_ends_the_summary_with_exit_3_however_often_it_is_asked_for(
        tmp_path, capsys, monkeypatch):
    task = write_task(tmp_path / "a", name="1s_a")
    results = decoding()
    results["totals"]["verdicts"] = {"exact": 3, "WRONG": 2}
    (task / "decode_20260128_041503").mkdir()
    (task / "decode_20260128_041503" / "decode.json").write_text(json.dumps(results))
    monkeypatch.setattr(sys, "argv", ["report.py", str(task)])
    with pytest.raises(SystemExit) as ended:
        report.main()
    assert ended.value.code == 3
    assert "ERROR | 2 decoded answers are not the target's own" in capsys.readouterr().out


def test_a_decoding_of_a_later_version_is_refused_and_of_today_and_before_read(tmp_path):
    page(tmp_path)
    page(tmp_path, format=FORMAT)
    with pytest.raises(UserError, match=f"format {FORMAT + 1}, this version reads formats up to"):
        page(tmp_path, format=FORMAT + 1)


def test_an_answer_of_one_token_is_no_decoding_however_long_it_took(tmp_path):
    rows = answers()
    for row in rows:
        for name in ("hybrid", "none"):
            row["runs"][name] = ran([0], [0], 1, 0.25, 0.5)
    assert speed_ups(decoding(rows=rows),
                     "hybrid") == {"plain": None, "generate": None, "whole": 8 / 2.75}
    text = lead(tmp_path, rows=rows)
    assert "the speed of" not in text and "can't be told" in text


@pytest.mark.parametrize(("tree", "words"), [
    (None, "gamma auto, over 2"), ("0", "gamma auto, over 2"),
    ("auto", "gamma auto, trees of as many nodes as are worth their cost, over 2"),
    ("32", "gamma auto, trees of up to 32 nodes, over 2")])
def test_the_lead_says_whether_proposals_were_trees(tmp_path, tree, words):
    assert words in lead(tmp_path, **({} if tree is None else {"tree": tree}))


def without(results: dict, *places: str) -> dict:
    """The results with null at these places: costs_ms.verify.1; * stands for every key."""
    def blank(value: dict, first: str, *rest: str) -> None:
        for key in list(value) if first == "*" else [first]:
            if rest:
                blank(value[key], *rest)
            else:
                value[key] = None

    for place in places:
        blank(results, *place.split("."))
    return results


FIGURES = ("noise", "costs_ms.vision", "costs_ms.prefill", "costs_ms.verify.*", "costs_ms.verify.1",
           "costs_ms.verify.9", "costs_ms.proposal.*", "costs_ms.eventgpt.verify.*",
           "totals.runs.*.tau")


@pytest.mark.parametrize("slow", [False, True])             # no drafter pays: another sentence
@pytest.mark.parametrize("places", [*[(place,) for place in FIGURES], FIGURES])
def test_a_figure_that_is_null_leaves_a_page_and_a_log_line(tmp_path, monkeypatch, places, slow):
    rows = answers()
    for row in rows:
        row["runs"]["hybrid"]["verify_s"] *= 20 if slow else 1
    results = without(decoding(rows=rows), *places)
    monkeypatch.setattr(sys.modules[__name__], "decoding", lambda: results)
    text = page(tmp_path, plots="totals.runs.*.tau" in places)
    assert "None" not in text.split("## Settings")[0]
    assert "hybrid" in one_line(results)


def test_trees_are_described_and_their_sizes_weighed(tmp_path):
    """Two passes with trees: 3 nodes, 2 deep; 4 nodes, 3 deep. 2 ms drafting a node on average."""
    rows = answers()
    for row in rows:
        row["runs"]["hybrid"] |= {"proposed": [0, 3, 4], "accepted": [0, 2, 1], "draft_s": 0.014}
        row["passes"] = [{"tokens": []}, {"tokens": [1, 1, 7], "parents": [-1, 0, 0]},
                         {"tokens": [1, 7, 8, 9], "parents": [-1, 0, 1, -1]}]
        row["runs"]["hybrid"]["tokens"] = 6
    costs = decoding()["costs_ms"] | {"verify": {"1": 10.0, "17": 12.0, "33": 14.0}}
    text = page(tmp_path, rows=rows, tree="auto", costs_ms=costs,
                simulated_trees={"hybrid": {"16": 6.6, "32": 8.0}})
    assert "Of the 4 passes whose proposals branched: 3.5 nodes (at most 4), 2.5 deep, of which 1.5" in text
    # 12 + 16 * 2 = 44 ms: 4.4 plain steps, of which 6.6 tokens make 1.5
    section = text.split("### Trees")[1]
    assert cells(section, "16")[1:] == ["12.00", "32.00", "44.00", "4.40", "6.60", "1.50x"]
    assert cells(section, "32")[4:] == ["7.80", "8.00", "1.03x"]
    assert "### Trees" not in page(tmp_path)


# ------------------------------------------------------------------------------------- by question
def test_each_of_several_questions_has_its_own_figures(tmp_path):
    rows = answers()
    rows[1] |= {"question_idx": 1, "query": "And | now?"}
    text = page(tmp_path, rows=rows)
    # 6 tokens in 3 passes, 4 in 2; the second decodes in 0.75 s instead of 1.5
    assert cells(text, "What?")[1:6] == ["1", "2.00", "50.0 %", "2.00x", "5.00x"]
    assert r"| And \| now? | 1 | 2.00 | 40.0 % | 2.00x |" in text
    assert "By question: hybrid" in (tmp_path / PAGE).read_text()
    assert "By question" not in page(tmp_path)


def test_a_damaged_count_of_accepted_proposals_is_one_line(tmp_path):
    results = decoding()
    results["totals"]["runs"]["hybrid"]["accepted_lengths"]["999999999"] = 1
    with pytest.raises(UserError, match="a pass of 999999999 accepted proposals"):
        page(tmp_path, totals=results["totals"])
