"""What README.md and WORKFLOW.md say exists, exists; and every flag is documented."""

import dataclasses
import re
from pathlib import Path

import pytest

import benchmarks.adapter
import benchmarks.decode
import benchmarks.extract
import benchmarks.load
import benchmarks.prepare
import benchmarks.train
import extract_tokens_train
import make_demo
import prepare_dsec
import speculative_decode
import train_and_evaluate

ROOT = Path(__file__).parents[1]
PAGES = [(ROOT / name).read_text() for name in ("README.md", "WORKFLOW.md")]
CONFIGS = [extract_tokens_train.ExtractConfig, train_and_evaluate.TrainConfig, speculative_decode.DecodeConfig,
           benchmarks.adapter.Config, benchmarks.decode.Config, benchmarks.extract.Config, benchmarks.load.Config,
           benchmarks.prepare.Config, benchmarks.train.Config, make_demo.DemoConfig, prepare_dsec.PrepareConfig]


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__module__)
def test_every_flag_stands_in_the_workflow_with_its_default(config):
    for field in dataclasses.fields(config):
        said = re.findall(rf"^\| `--{field.name}` \| (.*?) \|", PAGES[1], re.M)
        assert said, f"--{field.name} is not in a table of WORKFLOW.md"
        if isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool):
            assert str(field.default) in [default.strip("`") for default in said], field.name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__module__)
def test_the_table_of_a_program_names_no_flag_that_it_lacks(config):
    """The table is the one that holds most of the program's flags."""
    fields = {field.name for field in dataclasses.fields(config)}
    tables = [set(re.findall(r"^\| `--(\w+)` \|", block, re.M)) for block in PAGES[1].split("\n\n")]
    assert max(tables, key=lambda said: (len(said & fields), -len(said))) <= fields


def test_every_flag_in_the_pages_exists():
    known = {field.name for config in CONFIGS for field in dataclasses.fields(config)}
    known |= {"demo", "new", "help", "rebuild"}      # of the shell script, report.py and argparse
    for page in PAGES:
        said = re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]+)(?!\S*\.py)", page)
        assert set(said) <= known


def test_every_file_in_the_map_and_every_link_exists():
    block = re.search(r"```text\n(README\.md.*?)```", PAGES[0], re.S)[1]
    folder = ""
    for line in block.splitlines():
        name = line.split()[0]
        path = folder + name if line.startswith(" ") else name
        folder = name if name.endswith("/") and not line.startswith(" ") else folder
        assert (ROOT / path).exists(), f"{path} is in the map of files but not there"
    for page in PAGES:
        for link in re.findall(r"\]\((?!http|#)([^)]+)\)", page):
            assert (ROOT / link.split("#")[0]).exists(), link


def test_every_python_file_is_in_the_map():
    block = re.search(r"```text\n(README\.md.*?)```", PAGES[0], re.S)[1]
    for path in [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *(init.parent for init in ROOT.glob("*/__init__.py"))]:
        assert path.name in block, path


def test_the_pages_have_no_blanks_left_to_fill():
    for page in PAGES:
        assert not re.search(r"^[A-Z_]{4,}$|TODO|FIXME|XXX", page, re.M)
