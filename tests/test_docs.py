"""What the pages say exists, exists; and every flag is documented."""

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
import convert_pairs
import export_adapter
import extract_tokens_train
import make_demo
import prepare_dsec
import speculative_decode
import train_and_evaluate

ROOT = Path(__file__).parents[1]
PATHS = [ROOT / "README.md", ROOT / "WORKFLOW.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md",
         *sorted(ROOT.glob("docs/*.md"))]
PAGES = [path.read_text() for path in PATHS]
# Flags of programs stand in the guide, those of benchmarks in docs/
GUIDE = "\n\n".join(PAGES)
CONFIGS = [
    extract_tokens_train.ExtractConfig, train_and_evaluate.TrainConfig,
    speculative_decode.DecodeConfig, benchmarks.adapter.Config, benchmarks.decode.Config,
    benchmarks.extract.Config, benchmarks.load.Config, benchmarks.prepare.Config,
    benchmarks.train.Config, make_demo.DemoConfig, prepare_dsec.PrepareConfig,
    export_adapter.ExportConfig, convert_pairs.ConvertConfig
]


def flags_of(config) -> dict[str, dataclasses.Field]:
    """Flag -> field, as base.parse_config names them."""
    return {field.name.rstrip("_"): field for field in dataclasses.fields(config)
            if not field.metadata.get("positional")}


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__module__)
def test_every_flag_stands_in_the_workflow_with_its_default(config):
    for name, field in flags_of(config).items():
        mentions = re.findall(rf"^\| `--{name}` \| (.*?) \|", GUIDE, re.M)
        assert mentions, f"--{name} is in no table of the pages"
        if isinstance(field.default, (int, float, str)) and not isinstance(field.default, bool):
            assert str(field.default) in [default.strip("`") for default in mentions], field.name


@pytest.mark.parametrize("config", CONFIGS, ids=lambda config: config.__module__)
def test_the_table_of_a_program_names_no_flag_that_it_lacks(config):
    """The table is the one that holds most of the program's flags."""
    fields = set(flags_of(config))
    tables = [set(re.findall(r"^\| `--(\w+)` \|", block, re.M)) for block in GUIDE.split("\n\n")]
    assert max(tables, key=lambda mentions: (len(mentions & fields), -len(mentions))) <= fields


# Of torchrun, accelerate launch, sbatch, srun and tools of hosts
LAUNCHERS_FLAGS = {
    "nproc_per_node", "nnodes", "node_rank", "rdzv_backend", "rdzv_endpoint", "rdzv_id", "standalone",
    "cpu", "num_processes", "multi_gpu", "nodes", "ntasks-per-node", "gpus-per-node", "cpus-per-task",
    "signal", "requeue", "open-mode", "time", "kill-on-bad-exit", "job-name", "output", "master_addr",
    "master_port", "array", "ntasks"}


def test_every_flag_in_the_pages_exists():
    known = {name for config in CONFIGS for name in flags_of(config)}
    # of run_full_workflow.sh, report.py and argparse
    known |= {"demo", "new", "only", "until", "help", "rebuild", "html"}
    known |= LAUNCHERS_FLAGS
    for page in PAGES:
        mentions = re.findall(r"(?<![\w-])--(?:no-)?([a-z][\w-]+)(?!\S*\.py)", page)
        assert set(mentions) <= known


def anchors_of(page: str) -> set[str]:
    """The anchors of a page's headings, as GitHub makes them."""
    headings = re.findall(r"^#+ (.*)$", page, re.M)
    return {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", PATHS, ids=lambda path: path.name)
def test_every_link_leads_somewhere(path):
    for link in re.findall(r"\]\((?!http)([^)]+)\)", path.read_text()):
        name, _, anchor = link.partition("#")
        linked = path.parent / name if name else path
        assert linked.exists(), link
        assert not anchor or anchor in anchors_of(linked.read_text()), link


def test_every_program_script_and_package_is_in_the_map():
    rows = (ROOT / "docs" / "architecture.md").read_text().split("## Map")[1].split("\n## ")[0]
    named = set(re.findall(r"`([\w./-]+)`|\(([\w./-]+)\)", rows))
    named = {name.rstrip("/").removeprefix("../") for pair in named for name in pair if name}
    there = [*ROOT.glob("*.py"), *ROOT.glob("*.sh"), *ROOT.glob("*.md"),
             *(init.parent for init in ROOT.glob("*/__init__.py"))]
    assert {path.name for path in there} - {"README.md"} <= named
    assert not [name for name in named
                if not (ROOT / name).exists() and not (ROOT / "docs" / name).exists()]


def test_the_pages_have_no_blanks_left_to_fill():
    for page in PAGES:
        assert not re.search(r"^[A-Z_]{4,}$|TODO|FIXME|XXX", page, re.M)
