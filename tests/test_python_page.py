"""The blocks of docs/python.md run as they stand, one after the other."""

import re

from tests.conftest import ROOT


def test_the_page_runs_from_the_first_block_to_the_last(tmp_path, monkeypatch, capsys):
    page = (ROOT / "docs" / "python.md").read_text()
    blocks = re.findall(r"^```python\n(.*?)^```", page, re.M | re.S)
    assert len(blocks) == 7
    monkeypatch.chdir(tmp_path)
    names: dict = {"__name__": "python_page"}
    for number, block in enumerate(blocks):
        exec(compile(block, f"docs/python.md, block {number}", "exec"), names)
    assert names["alpha"] > 0.5                              # it has learnt to read drafts
    assert sorted(path.name for path in (tmp_path / "my_adapter").iterdir()) == [
        "README.md", "config.json", "model.safetensors"]
    assert 1 <= len(names["proposed"]) <= 3 and names["chain"] == [3, 4, names["chain"][2]]
    assert names["answers"] == list(names["unseen"].answers("target")) and names["tau"] > 1.5
    assert "prefix+draft 1 " in capsys.readouterr().out
