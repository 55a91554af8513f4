"""What the benchmark of several processes measures of journals: sizes and a merge that loses nothing."""

from benchmarks.together import measure_merge


def test_made_up_journals_are_merged_whole(capsys):
    figures = measure_merge(clips=20, questions=2, tokens=5, journals=3)
    assert figures["pairs"] == 40 and figures["journals"] == 3
    assert "40 pairs of 20 clips x 2 questions | 0 failed" in capsys.readouterr().out
    assert all(figures[name] > 0 for name in figures)
