"""RESULTS.md and the pictures say what results.json says, plainly, and nothing that a file name
smuggles in.
"""

import contextlib
import json
import os
import re
import subprocess
import sys
import urllib.parse
from pathlib import Path

import numpy as np
import pytest
from matplotlib.figure import Figure
from PIL import Image

import report as program
from acceptance.comparison import compare
from acceptance.simulation import stream
from base import ROOT, UserError
from drafting.baselines import Fixed
from pairs.formats import load_pairs
from pairs.pairs import Pairs
from reports import charts
from reports import task_report as report
from reports.charts import CURVES, DRAFTER_CURVES
from reports.html import PAGE
from reports.shapes import check_shape, optional
from reports.task_figures import FORMAT

# of the others there is none: they are drawn all the same
STYLES = {"adapter": ("-", "#D55E00")}
HOSTILE = "a|b\n# <script>alert(1)</script> [x](http://evil) `y` $z$ ![w](v)"


def measured(share: float, num_pairs: int = 10, length: int = 6, constant: bool = True) -> dict:
    """Metrics of an adapter that is right in this share of the positions; the constant string gets
    55 %.
    """
    target = np.tile(np.array([7, 8] * (length // 2), np.int32), num_pairs)
    target[1::2] += np.arange(len(target) // 2, dtype=np.int32)
    places = np.arange(num_pairs) * length, np.full(num_pairs, length)
    names = [""] * num_pairs
    pairs = Pairs(target + 1, *places, target, *places, names, names, [])
    hits = np.arange(length * num_pairs).reshape(num_pairs, length) < share * length * num_pairs
    found = {
        "loss": 1.5, **compare(hits, hits, pairs, pairs if constant else None), "memory_share": {},
        "stream": True, "step_ms": None, "adapter_minus": {}, "drafters": {},
        "whole_test": num_pairs
    }
    proposals = np.where(hits, pairs.padded("target", length), -1)[:, :, None].repeat(5, 2)
    for name, drafter in (("adapter", Fixed(proposals, pairs)), ("copy of the draft",
                                                                 Fixed(proposals * 0, pairs))):
        found["drafters"][name] = {**stream(drafter, pairs), "parameters": 0}
        del found["drafters"][name]["top1"]
    return found


def write_task(task: Path, epochs: int = 3, share: float = 0.9, name: str = "1s_20260128_020530",
               **changes) -> Path:
    task.mkdir(exist_ok=True)
    history = [{"epoch": epoch, "phase": "draft", "train_loss": 5 / epoch, "train_alpha": 0.3,
                "validation_loss": 6 / epoch, "validation_alpha": 0.2, "validation_top5": 0.5,
                "learning_rate": 1e-4, "seconds": 1.0} for epoch in range(1, epochs + 1)]
    file = {
        "path": name, "format": "extraction", "rows": 12, "used": 10,
        "dropped": {"no token list": 2}, "flagged": {"empty draft": 1}
    }
    results = {
        "kind": "training", "task": name, "date": "2026-01-28 02:07:11", "config": {
            "num_epochs": 3, "checkpoint": name, "conditioning": "draft"
        }, "adapter": {"contract": "target[i] from draft[:i+1]",
                       "conditioning": "draft"}, "files": {"train": [file], "test": [file]},
        "split": {"by": "drive", "validation": [name], "train": ["thun_01"]
                  }, "warnings": [], "history": history, "best_epoch": 1 if epochs else None,
        "refitted": False, "seconds": {"until_trained": 3.0, "all": 4.0}, "metrics": {
            "train": measured(0.9), "validation": measured(0.8), "test": measured(share)
        }, "provenance": {
            "argv": ["train_and_evaluate.py", "--task_name", name], "git_commit": None,
            "folder": name, "device": "CPU", "versions": {"python": "3.11"}
        }, **changes
    }
    (task / "results.json").write_text(json.dumps(results))
    return task


def page(task: Path, plots: bool = False) -> str:
    report.write_report(task, STYLES, plots=plots)
    return (task / "RESULTS.md").read_text()


def test_the_page_leads_with_the_answer(tmp_path):
    lead = page(write_task(tmp_path)).split("\n\n")[1]
    assert lead.startswith("**The adapter predicts 90.0 % of the target's tokens on 10 test pairs "
                           "(60 positions); copying the draft gets 0.0 % right.**")
    assert "35.0 points above a constant string of the commonest training tokens (55.0 %)" in lead


def test_an_adapter_that_does_not_beat_the_constant_string_is_called_so(tmp_path):
    assert "**It does not beat a constant string" in page(write_task(tmp_path, share=0.5))


def check_hostile_text(text: str, again: str, times: int) -> None:
    """HOSTILE stands in the page at least so many times, always as plain text, and once in a code
    block.
    """
    shown = [line for line in text.splitlines() if "script" in line]
    assert len(shown) >= times and "<script" not in text
    for line in shown:
        assert r"a\|b \# &lt;script&gt;alert\(1\)&lt;/script&gt; \[x\]\(http\://evil\)" in line
        assert r"\`y\` \$z\$ \!\[w\]\(v\)" in line
    assert [line[:4] for line in again.splitlines() if "script>" in line] == ["    "]


def test_names_from_files_stay_text(tmp_path):
    text, again = page(write_task(tmp_path, name=HOSTILE, warnings=[HOSTILE])).split("## Again")
    check_hostile_text(text, again, 6)


def test_rows_that_were_dropped_or_flagged_and_warnings_are_on_the_page(tmp_path):
    text = page(write_task(tmp_path, warnings=["train and test share 1 drives: thun_01"]))
    assert "> **Warning:** train and test share 1 drives: thun\\_01" in text
    assert "| 10 of 12 | 2 x no token list | 1 x empty draft |" in text


def test_degenerate_answers_of_a_pair_file_are_flagged_on_the_page(tmp_path):
    answers = [([5], [7, 8, 9, 10]), ([0] * 50, [7] * 4), ([5], [10887] * 80), ([5], [10887, 2]),
               ([], [7] * 4)]
    rows = [{"sample_idx": i, "egpt_tokens": draft, "vl_tokens": target}
            for i, (draft, target) in enumerate(answers)]
    (tmp_path / "pairs.json").write_text(json.dumps(rows))
    file, = load_pairs([tmp_path / "pairs.json"]).files
    text = page(write_task(tmp_path / "task", files={"train": [file], "test": [file]}))
    for flag in ("2 x one id repeated", "1 x target under 4 tokens", "1 x empty draft"):
        assert text.count(flag) == 2


def test_control_characters_and_halves_of_characters_are_shown_as_what_they_are(tmp_path):
    name = "a\x1b[31m\u202e\ud83d www.evil.com @you"
    text = page(write_task(tmp_path, name=name, warnings=["\x00\x9b"]), plots=True)
    assert all(letter.isprintable() or letter == "\n" for letter in text)
    assert r"a\\x1b\[31m\\u202e\\ud83d www\.evil.com \@you" in text and r"\\x00\\x9b" in text


def test_long_answers_are_shown_in_bins_that_hold_every_position(tmp_path):
    metrics = {"test": measured(0.5, length=130)}
    text = page(write_task(tmp_path,
                           metrics=metrics)).split("## By position")[1].split("## Training")[0]
    names = [
        line.split()[0] for line in text.splitlines() if line.startswith("    ") and "%" in line
    ]
    assert (names[0], names[1], names[-1], len(names)) == ("0-2", "3-5", "129-129", 44)


@pytest.mark.parametrize("epochs", [1, 3])
def test_pictures_are_drawn_large_enough_and_named_on_the_page(tmp_path, epochs):
    text = page(write_task(tmp_path, epochs), plots=True)
    for name in CURVES:
        assert f"![{name}]({name})" in text
        with Image.open(tmp_path / name) as picture:
            assert picture.format == "PNG" and picture.info["dpi"][
                0] >= 150 and picture.width >= 1000


def test_a_measured_checkpoint_has_no_curves_and_says_so(tmp_path):
    task = write_task(tmp_path, epochs=0, split=None,
                      metrics={"test": measured(0.5, constant=False)})
    text = page(task, plots=True)
    assert "there are no training curves" in text and "no constant string" in text
    assert {path.name for path in tmp_path.glob("*.png")} == set(DRAFTER_CURVES)


def test_rebuild_makes_the_same_page_again_from_results_alone(tmp_path, monkeypatch):
    first = page(write_task(tmp_path), plots=True)
    for path in tmp_path.glob("[!r]*"):
        path.unlink()
    monkeypatch.setattr("sys.argv", ["report.py", "--rebuild", str(tmp_path)])
    program.main()
    assert (tmp_path / "RESULTS.md").read_text() == first
    assert {path.name for path in tmp_path.glob("*.png")} == {*CURVES, *DRAFTER_CURVES}


def test_the_summary_has_one_line_for_each_task_and_writes_nothing(tmp_path, monkeypatch, capsys):
    tasks = [write_task(tmp_path / name, name=name) for name in ("1s_a", "500ms_b")]
    monkeypatch.setattr("sys.argv", ["report.py", *map(str, tasks)])
    program.main()
    lines = [line.split("SUMMARY | ")[1] for line in capsys.readouterr().out.splitlines()]
    assert [line.split()[0] for line in lines[-3:]] == ["task", "1s_a", "500ms_b"]
    # 60 tokens in 15 passes
    assert "10/10" in lines[-2] and "90.0 %" in lines[-2] and "4.00" in lines[-2]
    assert [path.name for task in tasks for path in task.iterdir()] == ["results.json"] * 2


@pytest.mark.parametrize("change", [
    lambda r: r["metrics"].update(test={}),
    lambda r: r.update(metrics=5), lambda r: r["metrics"].update(test=["a"]),
    lambda r: r["metrics"]["test"]["adapter"].update(alpha="x"), lambda r: r.pop("adapter"),
    lambda r: r["metrics"]["test"].update(drafters={}),
    lambda r: r.pop("history"), lambda r: r.update(files=3),
    lambda r: r["metrics"]["test"]["drafters"].update(
        {HOSTILE: r["metrics"]["test"]["drafters"]["adapter"]})])
def test_results_that_no_program_wrote_are_one_clear_error(tmp_path, monkeypatch, change):
    task = write_task(tmp_path / "task")
    results = json.loads((task / "results.json").read_text())
    change(results)
    (task / "results.json").write_text(json.dumps(results))
    monkeypatch.setattr("sys.argv", ["report.py", "--rebuild", str(task)])
    with pytest.raises(UserError, match=r"results\.json"):
        program.main()
    assert not (task / "RESULTS.md").exists()


@pytest.mark.parametrize(("content", "words"), [
    (None, "no finished task"), ("[]", "not the results"), ("{", "JSON"),
                                                ('{"metrics": {}}', "not the results")])
def test_a_folder_without_results_is_a_user_error(tmp_path, content, words):
    if content:
        (tmp_path / "results.json").write_text(content)
    with pytest.raises(UserError, match=words):
        program.summary([tmp_path])


# -------------------------------------------------------------------------------- charts and shapes
@pytest.mark.parametrize("backend", ["module://matplotlib_inline.backend_inline", "no such backend"])
def test_the_users_matplotlib_plays_no_part(tmp_path, backend):
    """MPLBACKEND as notebooks export it, and an rc file that would turn every text into LaTeX."""
    (tmp_path /
     "matplotlibrc").write_text("text.usetex: True\nfigure.dpi: 10\nsavefig.format: pdf\n")
    task = write_task(tmp_path / "task")
    code = (f"from pathlib import Path; from reports.task_report import write_report; "
            f"write_report(Path({str(task)!r}), {{}})")
    environment = {**os.environ, "MPLBACKEND": backend, "PYTHONPATH": str(ROOT)}
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, text=True,
                          capture_output=True)
    assert done.returncode == 0 and "WARNING" not in done.stdout, done.stdout + done.stderr
    for name in (*CURVES, *DRAFTER_CURVES):
        with Image.open(task / name) as picture:
            assert picture.width >= 1000


def test_a_picture_that_fails_is_a_warning_and_the_page_stands(tmp_path, monkeypatch, capsys):
    def fail(axes, *_) -> None:
        raise RuntimeError("no font\nat all")

    monkeypatch.setattr(charts, "draw_loss", fail)
    text = page(write_task(tmp_path), plots=True)
    # It holds the loss
    assert "loss_curve.png" not in text and "training_curves.png" not in text
    assert "![accuracy_curve.png]" in text and (tmp_path / "accuracy_curve.png").exists()
    log = capsys.readouterr().out
    assert "WARNING" in log and "loss_curve.png was not drawn: RuntimeError: no font" in log


def test_a_drafter_without_a_style_is_drawn_all_the_same(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr(charts, "draw_tau",
                        lambda axes, drafters, styles: drawn.append((drafters, styles)))
    page(write_task(tmp_path), plots=True)
    (drafters, styles), = drawn
    axes = Figure().subplots()
    charts.draw_drafters(axes, drafters, styles)
    assert [line.get_label() for line in axes.lines] == ["adapter", "copy of the draft"]
    assert [line.get_color() for line in axes.lines] == ["#D55E00", charts.UNKNOWN_STYLE[1]]


def test_results_of_a_later_version_are_refused_and_of_today_and_before_read(tmp_path):
    for number in (None, FORMAT):
        page(write_task(tmp_path, **({} if number is None else {"format": number})))
    with pytest.raises(UserError, match=f"format {FORMAT + 1}, this version reads formats up to"):
        page(write_task(tmp_path, format=FORMAT + 1))


@pytest.mark.parametrize(("value", "words"), [
    ({"a": 1, "b": [{"c": "x"}]}, None), ({"a": None, "b": []}, None), ({"b": []}, None),
    ({"a": "x", "b": []}, r"\$\.a is str, wanted int"), ({"a": 1}, r"\$\.b is NoneType, wanted a list"),
    ([], r"\$ is list, wanted an object"), ({"b": [{"c": 2}]}, r"\$\.b\[0\]\.c is int, wanted str")])
def test_the_first_place_that_does_not_fit_is_named(tmp_path, value, words):
    shape = {"a": optional(int), "b": [{"c": str}]}
    with pytest.raises(UserError, match=words) if words else contextlib.nullcontext():
        check_shape(tmp_path / "x.json", value, shape, "make it again")


def figures_to_null(value):
    """The value with null in place of every figure that is no whole number."""
    if isinstance(value, dict):
        return {key: figures_to_null(part) for key, part in value.items()}
    if isinstance(value, list):
        return [figures_to_null(part) for part in value]
    return None if isinstance(value, float) else value


def test_a_task_whose_figures_are_all_null_has_a_page(tmp_path):
    task = write_task(tmp_path)
    file = task / "results.json"
    results = figures_to_null(json.loads(file.read_text()))
    results["seconds"]["until_trained"] = None
    file.write_text(json.dumps(results))
    report.write_report(task, {}, plots=False)
    assert "None" not in (task / "RESULTS.md").read_text().split("## Settings")[0]


# ------------------------------------------------------------------------------------- REPORT.html
def test_the_page_of_a_task_leads_with_its_best_drafter_and_holds_every_table(tmp_path):
    page(write_task(tmp_path))
    html = (tmp_path / PAGE).read_text()
    assert "<strong>90.0 % of the target’s tokens</strong> on 10 answers" in html
    sections = re.findall(r"<summary><h2>(.*?)</h2>", html)
    assert sections == re.findall(r"^## (.*)$", (tmp_path / "RESULTS.md").read_text(), re.M)
    # text alternatives: as many as charts, each with figures
    assert html.count("<svg role=img") == html.count("<desc") == 3


def test_one_page_over_several_tasks_links_to_theirs(tmp_path, monkeypatch, capsys):
    tasks = [write_task(tmp_path / name, name=name) for name in ("1s_a", "javascript:alert(1)")]
    page(tasks[0])
    page(tasks[1])
    capsys.readouterr()
    monkeypatch.setattr("sys.argv", ["report.py", "--html", *map(str, tasks)])
    program.main()
    assert capsys.readouterr().out.splitlines()[-1].endswith(
        f"RESULT | open {tmp_path / PAGE} in a browser: all clips, figures and files")
    html = (tmp_path / PAGE).read_text()
    links = re.findall(r'href="([^"#]+)"', html)
    assert links == ["./1s_a/REPORT.html", "./javascript%3Aalert%281%29/REPORT.html"]
    assert all((tmp_path / urllib.parse.unquote(link)).is_file() for link in links)
    assert "2 tasks side by side" in html
    summary = (tmp_path / "SUMMARY.md").read_text()
    assert summary.count("| 10/10 |") == 2 and "- 1s\\_a/RESULTS.md" in summary


def test_a_long_name_does_not_cover_the_figures_of_a_chart(tmp_path):
    task = write_task(tmp_path / "a", name="x" * 300)
    program.summary([task], html=True)
    labels = re.findall(r"<text x=[^>]*>(x+…?)</text>", (tmp_path / PAGE).read_text())
    assert labels == ["x" * 44 + "…"]


def test_hostile_texts_of_a_task_stay_text_on_its_page(tmp_path):
    results = json.loads((write_task(tmp_path) / "results.json").read_text())
    results |= {"task": HOSTILE, "warnings": [HOSTILE], "date": HOSTILE}
    results["config"][HOSTILE] = HOSTILE
    (tmp_path / "results.json").write_text(json.dumps(results))
    page(tmp_path)
    html = (tmp_path / PAGE).read_text()
    assert html.count("<script") == 1 and "evil)" in html and 'href="http' not in html


def test_each_of_several_questions_has_its_own_row(tmp_path):
    results = json.loads((write_task(tmp_path)).joinpath("results.json").read_text())
    adapter = results["metrics"]["test"]["drafters"]["adapter"]
    adapter["questions"] = {"0": {"answers": 6, "alpha": 0.95, "tau": 5.0},
                            "4": {"answers": 4, "alpha": 0.825, "tau": None}}
    (tmp_path / "results.json").write_text(json.dumps(results))
    text = page(tmp_path)
    assert "| 0 | 6 | 95.0 % | 5.00 |" in text and "| 4 | 4 | 82.5 % | - |" in text
    adapter["questions"]["4"] = {"answers": "many"}
    (tmp_path / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match="answers is str"):
        page(tmp_path)
