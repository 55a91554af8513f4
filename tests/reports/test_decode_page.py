"""REPORT.html marks each word by its part in the decoding, counts what decode.json counts, and
runs no text from a file.
"""

import html.parser
import json
import re

import pytest

from base import UserError
from reports import clip_cards, decode_report, word_sections
from reports.decode_page import THUMBNAILS, answers_of, clips_of, shown_clips
from reports.html import PAGE, digest, inline, table
from reports.tokens import ACCEPTED, FULL, MISS, NONE, counted, missed_words
from tests.reports.test_decode_report import TIE, answers, decoding, ran

HOSTILE = "\"><script>alert(1)</script><img src=x onerror=alert(2)>\u202e'&amp;{{7*7}}\x07"
WORDS = {
    str(token): text
    for token, text in enumerate(
        [" A", " bus", " stands", " parked", " here", ".", "</s>", " car", " truck", "s"]
    )
}
THUMBNAIL = "data:image/jpeg;base64,/9j/4AAQSkZJRg=="

# Pass 0 accepts "A bus"; a miss follows: "stands" where car was proposed. Pass 1 accepts nothing:
# truck and car were proposed where the target says parked. Pass 2 accepts all of a chain and adds "."
# Pass 3 proposes nothing.
RECORDED = {
    "sample_id": "id0",
    "sequence": "thun_00_a",
    "clip": 7,
    "question_idx": 0,
    "query": "What is there?",
    "text": "A bus stands parked here.",
    "draft_text": "There is a parked bus.",
    "draft_tokens": [1],
    "tokens": [0, 1, 2, 3, 4, 5, 6],
    "vision_s": 0.5,
    "eventgpt_s": 0.625,
    "runs": {
        "hybrid": ran([4, 2, 1, 0], [2, 0, 1, 0], 7, 0.25, 0.5),
        "none": ran([0] * 7, [0] * 7, 7, 0.0, 1.5),
    },
    "generate": {"tokens": 7, "all_s": 4.0, "first_token_s": 0.25, "verdict": "exact"},
    "passes": [
        {
            "tokens": [0, 7, 1, 7],
            "parents": [-1, -1, 0, 2],
            "by": {"memory": [0.9, 0.05, 0.8, 0.5], "adapter": [0.7, None, None, 0.3]},
        },
        {"tokens": [8, 7], "parents": [-1, -1], "by": {"memory": [0.6, 0.2]}},
        {"tokens": [4], "by": {"memory": [0.6], "adapter": [None]}},
        {"tokens": []},
    ],
}


def recorded(**changes) -> dict:
    return {**json.loads(json.dumps(RECORDED)), **changes}


def written(folder, thumbnails=None, **changes) -> str:
    results = decoding(**{"words": WORDS, "format": 2, "rows": [recorded()], **changes})
    (folder / "decode.json").write_text(json.dumps(results))
    if thumbnails is not None:
        (folder / THUMBNAILS).write_text(json.dumps(thumbnails))
    decode_report.write_decode_report(folder, plots=False)
    return (folder / PAGE).read_text()


class Tags(html.parser.HTMLParser):
    """The tags of a page with their attributes, and its text outside of style and script."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.words, self.inside = [], [], []
        self.feed(page)
        self.close()

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        if tag in ("script", "style"):
            self.inside.append(tag)

    def handle_endtag(self, tag):
        if self.inside and self.inside[-1] == tag:
            self.inside.pop()

    def handle_data(self, data):
        if not self.inside:
            self.words.append(data)


# ---------------------------------------------------------------------------------------- the words
def test_every_token_has_its_part():
    (answer,) = answers_of(decoding(rows=[recorded()], words=WORDS))
    assert [(token.text, token.kind, token.number) for token in answer.tokens] == [
        (" A", ACCEPTED, 0),
        (" bus", ACCEPTED, 0),
        (" stands", MISS, 0),
        (" parked", MISS, 1),
        (" here", ACCEPTED, 2),
        (".", FULL, 2),
        ("</s>", NONE, 3),
    ]
    assert [token.who for token in answer.tokens[:2]] == ["several", "memory"]
    assert answer.tokens[0].by == {"memory": 0.9, "adapter": 0.7}
    assert [proposal.text for proposal in answer.tokens[3].instead] == [" truck", " car"]
    assert [one.path for one in answer.passes] == [[0, 2], [], [0], []]


def test_the_counts_add_up_with_decode_json():
    results = decoding(rows=[recorded(), recorded(clip=8)], words=WORDS)
    counts = counted([answer.tokens for answer in answers_of(results)])
    run = results["totals"]["runs"]["hybrid"]
    assert sum(counts.values()) == run["tokens"]
    assert (
        sum(count for kind, count in counts.items() if kind.startswith(ACCEPTED)) == run["accepted"]
    )
    assert counts == {"accepted, several": 2, "accepted, memory": 4, MISS: 4, FULL: 2, NONE: 2}


def test_the_page_shows_as_many_marks_as_decode_json_counts(tmp_path):
    page = written(tmp_path, rows=[recorded(clip=clip) for clip in range(5)])
    words = page.split("<div id=clips>")[1].split("</main>")[0]
    classes = re.findall(r"<b class=(\w) data-t", words)
    run = decoding(rows=[recorded()], words=WORDS)["totals"]["runs"]["hybrid"]
    assert len(classes) == 5 * run["tokens"]
    assert (
        len([mark for mark in classes if mark in clip_cards.MARKS.values()]) == 5 * run["accepted"]
    )
    assert classes.count("x") == 10
    assert page.count("<article") == 5 + 1  # and the example


def test_a_word_of_several_tokens_is_missed_as_a_whole():
    (answer,) = answers_of(decoding(rows=[recorded()], words={**WORDS, "2": " bu", "3": "ses"}))
    assert missed_words(answer.tokens, "two buses") == [("buses", True), ("buses", True)]
    assert missed_words(answer.tokens, "a bus") == [("buses", False), ("buses", False)]


def test_missed_words_in_the_draft_are_named(tmp_path):
    text = " ".join(Tags(written(tmp_path)).words)
    assert "1 of these stand in EventGPT’s own answer" in text and "2 misses" in text


def test_a_missed_word_of_several_tokens_is_shown_with_what_was_proposed_instead(tmp_path):
    page = written(tmp_path, words={**WORDS, "2": " bu", "3": "ses"})
    row = page.split("<td>buses</td>")[1].split("</tr>")[0]
    assert re.findall(r"<td[^>]*>([^<]*)</td>", row) == ["2", "0", "car, truck"]


def test_a_speed_that_was_not_measured_is_no_bar(tmp_path):
    chart = "Decoding over our loop without proposals"
    assert f"<figcaption>{chart}" in written(tmp_path)
    rows = [recorded(), recorded(clip=8)]
    for row in rows:
        row["runs"]["none"] |= {"draft_s": 0.0, "verify_s": 0.0}
    page = written(tmp_path, rows=rows)
    assert f"<figcaption>{chart}" not in page and "0.00x" not in page


def test_the_filters_offer_what_the_shown_clips_have(tmp_path, monkeypatch):
    monkeypatch.setattr(word_sections, "SHOWN_CLIPS", 1)
    quick = recorded(sequence="bern_01_a")
    quick["runs"]["hybrid"] |= {"proposed": [6], "accepted": [6], **TIE}
    quick["passes"] = [{"tokens": [0, 1, 2, 3, 4, 5]}]
    page = written(tmp_path, rows=[recorded(), quick])
    assert re.findall(r"<option value=\"([^\"]*)\">", page.split("<form")[1].split("</form>")[0]) == [
        "", "thun_00_a", "", "exact", "missed"]


def test_proposals_are_shown_as_a_tree(tmp_path):
    tree = written(tmp_path).split("<details class=tree>")[1].split("</details>")[0]
    assert "<li><b>✓ A bus</b><ul><li><s>car</s></li></ul></li><li><s>car</s></li>" in tree
    assert (
        "Prefill: 2 of 4 proposals accepted; the target&#x27;s own: <b>stands</b>".replace(
            "&#x27;", "'"
        )
        in tree
    )
    assert "Pass 1: 0 of 2" in tree and "Pass 3: 0 of 0" in tree


def test_hovering_names_sources_with_their_probabilities(tmp_path):
    page = written(tmp_path)
    assert "“A” proposed by memory 90 %, adapter 70 %, accepted in prefill" in page
    assert "Proposed instead: “truck” (memory 60 %); “car” (memory 20 %)" in page


# ----------------------------------------------------------------------------------------- the page
def test_the_page_leads_with_the_end_to_end_figure_in_a_sentence(tmp_path):
    text = " ".join("".join(Tags(written(tmp_path)).words).split())
    # 4 s by generate; 0.5 vision + 0.125 prefill + 0.75 decoding
    assert "2.9 times as fast from pictures to answer as with transformers’ generate" in text
    assert (
        "every answer word for word its own" in text and "1.38 s an answer instead of 4 s" in text
    )


def test_without_a_comparison_the_page_claims_no_speed_up(tmp_path):
    text = "".join(Tags(written(tmp_path, compare=False)).words)
    assert "was not measured: run again with --compare" in text and "word for word" not in text


def test_a_sampled_decoding_says_why_generate_was_not_timed(tmp_path):
    row = recorded()
    del row["generate"]
    row["runs"]["hybrid"]["verdict"] = "exact"
    page = written(tmp_path, rows=[row], config={"temperature": 0.7, "compare": True})
    text = " ".join("".join(Tags(page).words).split())
    assert "sampled at temperature 0.7; generate draws other random numbers and was not timed" in text
    assert "2.0x the speed of the same loop without proposals" in text and "run again" not in text


def test_the_worst_clips_come_first():
    wrong = recorded(clip=2)
    wrong["runs"]["hybrid"]["verdict"] = "WRONG"
    quick = recorded(clip=3)
    quick["tokens"] = quick["tokens"][:3]
    quick["runs"]["hybrid"] |= {"proposed": [4], "accepted": [2], "tokens": 3}
    results = decoding(rows=[quick, recorded(clip=1), wrong], words=WORDS, compare=True)
    assert [clip.answers[0].row["clip"] for clip in clips_of(answers_of(results))] == [2, 1, 3]
    assert shown_clips(results) == ["thun_00_a/2", "thun_00_a/1", "thun_00_a/3"]


@pytest.mark.parametrize("form", [0, 1])
def test_a_file_of_an_older_version_gives_a_page(tmp_path, form):
    page = written(tmp_path, rows=answers(), format=form, words={})
    assert page.count("<article") == 3
    assert "accepted" in page and "own, proposals not recorded" in page
    # what was missed is unknown there, and not nothing
    assert "is not recorded for 2 of 2 answers" in page
    assert "No miss" not in page and "0 misses" not in page and "unmissed" not in page


def test_a_clip_with_several_questions_is_one_card(tmp_path):
    page = written(tmp_path, rows=[recorded(), recorded(question_idx=1, query="And now?")])
    assert page.count("<article") == 2 and "And now?" in page


def test_a_page_is_made_again_letter_by_letter(tmp_path):
    first = written(tmp_path, {"thun_00_a/7": {"frames": THUMBNAIL}})
    decode_report.write_decode_report(tmp_path, plots=False)
    assert (tmp_path / PAGE).read_text() == first and f'src="{THUMBNAIL}"' in first


def test_a_page_of_a_hundred_clips_stays_below_five_megabytes(tmp_path, monkeypatch):
    picture = f"data:image/jpeg;base64,{'A' * 60_000}"
    rows = [recorded(clip=clip) for clip in range(120)]
    page = written(
        tmp_path, {f"thun_00_a/{clip}": {"frames": picture} for clip in range(120)}, rows=rows
    )
    assert len(page.encode()) < 5_000_000
    shown = page.split("<div id=clips>")[1].count("<article")
    assert 60 < shown < 100 and f"{120 - shown} further clips" in page


# -------------------------------------------------------------------------------------- hostile text
def hostile_page(folder) -> str:
    rows = [
        recorded(
            sequence=HOSTILE, clip=HOSTILE, query=HOSTILE, draft_text=HOSTILE, sample_id=HOSTILE
        ),
        recorded(sequence="x" * 10_000, clip="\u202egnp.exe", query="?" * 10_000),
    ]
    words = {token: HOSTILE for token in WORDS}
    thumbnails = {
        f"{HOSTILE}/{HOSTILE}": {
            "frames": "javascript:alert(3)",
            "events": 'data:image/svg+xml,<svg onload="alert(4)">',
        }
    }
    failed = {
        "sample_id": HOSTILE,
        "sequence": HOSTILE,
        "clip": HOSTILE,
        "model": None,
        "reason": HOSTILE,
    }
    return written(
        folder,
        thumbnails,
        rows=rows,
        words=words,
        task=HOSTILE,
        date=HOSTILE,
        device=HOSTILE,
        failed=[failed],
        config={HOSTILE: HOSTILE},
        gamma=HOSTILE,
        titles={"draft": HOSTILE, "target": HOSTILE},
        target={"name": HOSTILE, "revision": HOSTILE},
        provenance={"argv": ["x", HOSTILE], "git_commit": HOSTILE, "versions": {"a": HOSTILE}},
    )


def test_no_text_from_a_file_can_run(tmp_path):
    page = hostile_page(tmp_path)
    tags = Tags(page).tags
    scripts = [tag for tag, _ in tags if tag == "script"]
    assert len(scripts) == 1
    for tag, attributes in tags:
        assert not [key for key in attributes if key.startswith("on")], (tag, attributes)
        assert not {"src", "href", "action", "style", "srcdoc"} & set(attributes) or (
            tag == "a" and attributes["href"].startswith("#")
        ), (tag, attributes)
    assert "alert(3)" not in page and "alert(4)" not in page
    assert "\u202e" not in page and "\x07" not in page
    assert "x" * 200 not in page.split("data-s=")[0]


def test_the_policy_lets_the_pages_own_script_and_style_run_and_nothing_else(tmp_path):
    page = written(tmp_path)
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    script, style = (
        re.search(rf"<{tag}>(.*?)</{tag}>", page, re.S)[1] for tag in ("script", "style")
    )
    assert f"script-src '{digest(script)}';" in policy and f"style-src '{digest(style)}';" in policy
    assert policy.startswith("default-src 'none'; img-src data:;")
    assert not re.search(r"https?://", page.split("<body>")[1].split("<script>")[0])


def test_markdown_of_a_section_becomes_html_that_shows_the_same():
    assert (
        inline(r"**a** \*b\* &lt;c&gt; \`d\` `e`")
        == "<strong>a</strong> *b* &lt;c&gt; `d` <code>e</code>"
    )
    assert inline("<script>\"'") == "&lt;script&gt;&quot;&#x27;"
    assert "<td class=n>1.5 %</td>" in table(["a"], [["1.5 %"], ["-"]])


def test_the_bound_of_shown_clips_holds():
    rows = [recorded(clip=clip) for clip in range(word_sections.SHOWN_CLIPS + 1)]
    assert len(shown_clips(decoding(rows=rows, words=WORDS))) == word_sections.SHOWN_CLIPS


@pytest.mark.parametrize(
    ("change", "where"),
    [
        (lambda r: r.update(words=["a"]), "words is list"),
        (lambda r: r["words"].update({"1": 5}), "is int, wanted str"),
        (lambda r: r.update(titles="EventGPT"), "titles is str"),
        (lambda r: r["answers"][0].update(passes={}), "passes is dict"),
        (lambda r: r["answers"][0]["passes"][0].update(tokens=[None]), r"tokens\[0\] is NoneType"),
        (lambda r: r["answers"][0]["passes"][0].update(parents=[0, 0, 0, 0]), "don't fit together"),
        (lambda r: r["answers"][0]["passes"][0].update(by={"memory": 0.5}), "is float, wanted a list"),
        (lambda r: r["answers"][0]["passes"][0].update(by={"memory": ["x"]}), "is str"),
        (lambda r: r["answers"][0].update(tokens=[1]), "don't fit together"),
        (lambda r: r["answers"][0]["passes"][3].update(tokens=[0] * 5000), "5000 proposals of one pass"),
        (lambda r: r["answers"][0]["runs"]["hybrid"].pop("accepted"), "accepted is NoneType"),
        (lambda r: r["answers"][0]["runs"]["hybrid"].update(verdict=["exact"]), "verdict is list"),
    ],
)
def test_a_damaged_file_is_one_clear_error(tmp_path, change, where):
    results = decoding(words=dict(WORDS), rows=[recorded()])
    change(results)
    (tmp_path / "decode.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=where):
        decode_report.write_decode_report(tmp_path, plots=False)
    assert not (tmp_path / PAGE).exists()
