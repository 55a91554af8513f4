"""Pages as a browser shows them: quiet, no network, narrow, dark, by keyboard, without script."""

import itertools
import json

import pytest

from reports import decode_report
from reports.decode_page import THUMBNAILS
from reports.html import PAGE
from tests.browser import NAMES, Browser, chromium
from tests.reports.test_decode_page import THUMBNAIL, WORDS, hostile_page, recorded
from tests.reports.test_decode_report import TIE, decoding

# Contrast of text and ground by WCAG 2.2, success criterion 1.4.3.
CONTRAST = """(() => {
  const light = (colour) => colour.map((part) => part / 255)
    .map((part) => part <= 0.04045 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4)
    .reduce((sum, part, place) => sum + part * [0.2126, 0.7152, 0.0722][place], 0);
  const numbers = (text) => text.match(/[\\d.]+/g).map(Number);
  const ground = (node) => {
    for (; node; node = node.parentElement) {
      const colour = numbers(getComputedStyle(node).backgroundColor);
      if (colour.length < 4 || colour[3] > 0) return colour.slice(0, 3);
    }
    return [255, 255, 255];
  };
  const ratios = [...document.querySelectorAll("h1, h1 strong, p, b, s, small, dd, dt, th, td, a, summary")]
    .filter((node) => node.offsetParent && node.textContent.trim()).map((node) => {
      const [one, other] = [light(numbers(getComputedStyle(node).color).slice(0, 3)), light(ground(node))];
      return (Math.max(one, other) + 0.05) / (Math.min(one, other) + 0.05);
    });
  return Math.min(...ratios);
})()"""


@pytest.fixture(scope="module")
def browser():
    program = chromium()
    if not program:
        pytest.skip(f"no browser here: none of {', '.join(NAMES)} is installed")
    browser = Browser(program)
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def report(tmp_path_factory):
    """A page of four clips of two sequences; one has no miss, one is a tie."""
    folder = tmp_path_factory.mktemp("page")
    rows = [
        recorded(sequence=sequence, clip=clip)
        for sequence in ("thun_00_a", "zurich_01_b")
        for clip in range(2)
    ]
    rows[0]["runs"]["hybrid"] |= TIE
    # every proposal is right, from every kind of source
    by = {
        "memory": [0.9, None, None, None, 0.5, 0.9],
        "adapter": [None, 0.8, None, None, 0.5, None],
        "draft": [None, None, True, None, None, None],
        "prompt": [None, None, None, True, None, None],
    }
    rows[3]["runs"]["hybrid"] |= {"proposed": [6], "accepted": [6]}
    rows[3]["passes"] = [{"tokens": [0, 1, 2, 3, 4, 5], "by": by}]
    (folder / "decode.json").write_text(json.dumps(decoding(rows=rows, words=WORDS, format=2)))
    (folder / THUMBNAILS).write_text(
        json.dumps(
            {f"thun_00_a/{clip}": {"events": THUMBNAIL, "frames": THUMBNAIL} for clip in range(2)}
        )
    )
    decode_report.write_decode_report(folder, plots=False)
    return folder / PAGE


@pytest.fixture(scope="module")
def tab(browser, report):
    return browser.open(report)


@pytest.fixture(scope="module")
def hostile(browser, tmp_path_factory):
    folder = tmp_path_factory.mktemp("hostile")
    hostile_page(folder)
    return browser.open(folder / PAGE, width=380, dark=True)


def is_quiet(tab) -> bool:
    """No word on the console, no dialog, and nothing was asked for but the file itself."""
    own = [url for url in tab.requests() if not url.startswith("data:")]
    return not tab.troubles() and not tab.events("Page.javascriptDialogOpening") and len(own) == 1


def shown(tab) -> int:
    return tab.value(
        "[...document.querySelectorAll('#clips > article')]"
        ".filter((one) => one.offsetParent).length"
    )


def test_the_page_is_quiet_and_no_request_leaves_it(tab):
    assert is_quiet(tab), (tab.troubles(), tab.requests())


def test_all_clips_are_there_and_counted(tab):
    assert shown(tab) == 4
    assert tab.value("document.getElementById('count').textContent") == "4 of 4 clips"


@pytest.mark.parametrize(
    ("select", "value", "count"),
    [
        ("sequence", "thun_00_a", 2),
        ("outcome", "tie", 1),
        ("outcome", "exact", 3),
        ("outcome", "unmissed", 1),
    ],
)
def test_a_filter_shows_the_clips_that_fit(tab, select, value, count):
    choose = (
        "(() => {{ const one = document.getElementById('{}'); one.value = '{}';"
        "one.dispatchEvent(new Event('input', {{bubbles: true}})); }})()"
    )
    tab.value(choose.format(select, value))
    assert shown(tab) == count
    assert tab.value("document.getElementById('count').textContent") == f"{count} of 4 clips"
    tab.value(choose.format(select, ""))
    assert shown(tab) == 4


def test_the_arrow_keys_go_from_word_to_word_and_show_who_proposed_each(tab):
    tab.value("document.querySelector('.words').focus()")
    seen = []
    for key in ("ArrowRight", "ArrowRight", "ArrowLeft"):
        tab.press(key)
        seen.append(tab.value("getComputedStyle(document.activeElement, '::after').content"))
    assert seen[0] == seen[2] != seen[1] and "proposed by memory 90 %, adapter 70 %" in seen[0]
    # one stop for an answer: the next one lies outside of its words
    tab.press("Tab")
    assert tab.value("document.activeElement.closest('.words')") is None


def test_marks_differ_by_more_than_their_colour(tab):
    styles = tab.value("""[...new Set([...document.querySelectorAll('.words b')].map((one) => one.className))]
        .map((name) => { const style = getComputedStyle(document.querySelector(`.words b.${name}`));
            return [name, style.textDecorationStyle + style.textDecorationLine + style.borderTopStyle]; })""")
    assert {name for name, _ in styles} == set("madqvxfo")
    assert all(one[1] != other[1] for one, other in itertools.combinations(styles, 2)), styles


@pytest.mark.parametrize("dark", [False, True])
def test_a_narrow_page_is_not_wider_than_its_screen_and_can_be_read(browser, report, dark):
    tab = browser.open(report, width=380, dark=dark)
    tab.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert tab.value("document.documentElement.scrollWidth") == 380
    assert tab.value(CONTRAST) >= 4.5
    assert tab.value("getComputedStyle(document.body).backgroundColor") == (
        "rgb(20, 22, 26)" if dark else "rgb(252, 252, 250)"
    )
    assert is_quiet(tab)


def test_print_is_dark_on_white_with_sections_open_and_trees_closed(browser, report):
    tab = browser.open(report, dark=True)
    dark = {"name": "prefers-color-scheme", "value": "dark"}
    tab.command("Emulation.setEmulatedMedia", media="print", features=[dark])
    assert tab.value("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"
    assert tab.value(CONTRAST) >= 4.5

    def seen(selector: str) -> bool:
        return tab.value(f"document.querySelector('{selector}').checkVisibility()")

    assert seen("#more table") and not seen("details.tree .pass")
    paper = {"width": 680, "height": 900, "deviceScaleFactor": 1, "mobile": False}
    tab.command("Emulation.setDeviceMetricsOverride", **paper)
    widths = "[...document.querySelectorAll('.wide, pre')].map((one) => one.scrollWidth - one.clientWidth)"
    assert max(tab.value(widths)) <= 0                         # no column is cut off


def test_without_script_the_clips_are_there_and_the_filters_are_not(browser, report):
    tab = browser.open(report, script=False)
    root = tab.command("DOM.getDocument")["root"]["nodeId"]

    def nodes(selector: str) -> list[int]:
        return tab.command("DOM.querySelectorAll", nodeId=root, selector=selector)["nodeIds"]

    clips = nodes("#clips > article")
    assert len(clips) == 4
    assert all(
        tab.command("DOM.getBoxModel", nodeId=clip)["model"]["height"] > 100 for clip in clips
    )
    assert len(nodes("#filters[hidden]")) == 1


def test_names_that_attack_run_nothing_and_widen_nothing(hostile):
    hostile.value("document.querySelectorAll('details').forEach((one) => { one.open = true; })")
    assert hostile.value("document.documentElement.scrollWidth") == 380
    assert is_quiet(hostile), (hostile.troubles(), hostile.requests())
    assert hostile.value("document.scripts.length") == 1
    assert "<script>alert(1)</script>" in hostile.value("document.body.innerText")


def test_a_page_that_is_not_quiet_is_noticed(browser, tmp_path):
    for number, body in enumerate(
        ("<script>console.error(1)</script>", "<img src='other.png'>", "<script>missing()</script>")
    ):
        (tmp_path / f"{number}.html").write_text(body)
        assert not is_quiet(browser.open(tmp_path / f"{number}.html"))
