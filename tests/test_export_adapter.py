"""A drafter that is handed on decodes as its task does, and its card tells the run's own figures."""

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import huggingface_hub
import pytest
from huggingface_hub import constants

import export_adapter
from base import ROOT, UserError
from decoding import exported
from decoding.task import read_task
from reports.adapter_card import card, metrics_of
from reports.blocks import number, percent
from tests.test_speculative_decode import run_main


@pytest.fixture(scope="module")
def task(demo) -> Path:
    """The 1s task of the shortened demo, with the decoding in it."""
    return next(folder for folder in demo.tasks.glob("1s_2*"))


def export(monkeypatch, *arguments) -> None:
    monkeypatch.setattr(sys, "argv", ["export_adapter.py", *map(str, arguments)])
    export_adapter.main()


@pytest.fixture(scope="module")
def handed(task, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("export") / "handed"
    with pytest.MonkeyPatch.context() as monkeypatch:
        export(monkeypatch, task, folder)
    return folder


@pytest.fixture
def folder(handed, tmp_path) -> Path:
    """A copy of what was handed on."""
    return shutil.copytree(handed, tmp_path / "handed")


def test_what_was_handed_on_decodes_with_the_same_answers_and_the_same_tau(
        monkeypatch, demo, task, folder, tmp_path):
    flags = ["--gamma", "8", "--tree", "0", "--max_samples", "2"]
    mine = run_main(monkeypatch, demo, task, tmp_path / "mine", *flags)
    theirs = run_main(monkeypatch, demo, folder, tmp_path / "theirs", *flags)
    assert [row["tokens"] for row in theirs["answers"]] == [row["tokens"] for row in mine["answers"]]
    assert theirs["totals"]["runs"]["hybrid"]["tau"] == mine["totals"]["runs"]["hybrid"]["tau"] > 1
    assert theirs["simulated_tau"] == mine["simulated_tau"]


def test_the_card_tells_the_figures_of_the_run_and_no_place_of_this_machine(folder, task, demo):
    results = json.loads((task / "results.json").read_text())["metrics"]["test"]
    decoding = json.loads(next(task.glob("decode_*/decode.json")).read_text())
    text = (folder / "README.md").read_text()
    for drafter in results["drafters"].values():
        assert percent(drafter["alpha"]) in text and number(drafter["simulated"]["8"]["tau"]) in text
    verdicts, answers = decoding["totals"]["runs"]["hybrid"]["verdicts"], decoding["totals"]["answers"]
    assert f"{verdicts['exact']} of {answers} exact" in text and decoding["device"] in text
    assert "license_name: to-be-filled-in" in text and "word for word" in text
    for name in ("README.md", "metrics.json", "config.json"):
        content = (folder / name).read_text()
        assert str(demo.tasks.parent) not in content and str(ROOT) not in content
    models = json.loads((folder / "config.json").read_text())["models"]
    assert models["videollava"][0]["vocab_size"] == 691 and models["eventgpt"][0]["revision"]
    assert all(facts["tokenizer"] in text for of_role in models.values() for facts in of_role)


def test_a_sampled_decoding_is_marked_so_in_the_card(task):
    results = json.loads((task / "results.json").read_text())
    decoding = json.loads(next(task.glob("decode_*/decode.json")).read_text())
    decoding["config"]["temperature"] = 0.7
    text = card("a", metrics_of(results, [decoding]), {}, None)
    assert "sampled at temperature 0.7" in text


def test_a_damaged_task_is_one_line_and_nothing_is_written(monkeypatch, task, tmp_path):
    damaged = shutil.copytree(task, tmp_path / "task")
    results = json.loads((damaged / "results.json").read_text())
    del results["adapter"]["num_layers"]
    (damaged / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"values that don't fit together .*num_layers"):
        export(monkeypatch, damaged, tmp_path / "a")
    assert not (tmp_path / "a").exists()


def test_a_task_without_drafts_has_a_card_too(task):
    results = json.loads((task / "results.json").read_text())
    results["metrics"]["test"] |= {"direct_copy": None, "adapter_minus": {}}
    results["adapter"]["conditioning"] = results["config"]["conditioning"] = "prefix"
    text = card("a", metrics_of(results, []), {}, None)
    assert "What the draft adds: nothing: these pairs have no drafts." in text
    assert "a model that the pair files don't name" in text and "recorded no models" in text


def test_without_a_memory_no_answer_is_passed_on_and_the_card_says_so(monkeypatch, task, tmp_path, capsys):
    export(monkeypatch, task, tmp_path / "a", "--no-memory")
    assert not (tmp_path / "a" / "memory.npz").exists()
    assert "No memory of training answers is included" in (tmp_path / "a" / "README.md").read_text()
    assert not read_task(tmp_path / "a").parts.training_answers and read_task(task).parts.training_answers


def test_a_folder_is_whole_or_not_there_and_an_old_one_is_left_alone(monkeypatch, task, folder, tmp_path):
    before = {path.name: path.read_bytes() for path in folder.iterdir()}
    with pytest.raises(UserError, match="exists, nothing was changed"):
        export(monkeypatch, task, folder)
    assert before == {path.name: path.read_bytes() for path in folder.iterdir()}

    def full(*_, **__):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("token_adapter.save_file", full)
    with pytest.raises(OSError, match="No space"):
        export(monkeypatch, task, tmp_path / "b")
    assert [path.name for path in tmp_path.iterdir()] == ["handed"]


def test_nothing_is_uploaded_unasked_and_a_new_repository_is_private(monkeypatch, task, tmp_path):
    calls = []
    hub = SimpleNamespace(
        create_repo=lambda name, **how: calls.append((name, how["private"])),
        upload_folder=lambda **how: calls.append(how["repo_id"]) or SimpleNamespace(commit_url="url"))
    monkeypatch.setattr(huggingface_hub, "HfApi", lambda: hub)
    export(monkeypatch, task, tmp_path / "a")
    assert not calls
    export(monkeypatch, task, tmp_path / "b", "--push", "org/name")
    assert calls == [("org/name", True), "org/name"]
    assert 'from_pretrained("org/name")' in (tmp_path / "b" / "README.md").read_text()
    with pytest.raises(UserError, match="must be an id on the hub"):
        export(monkeypatch, task, tmp_path / "c", "--push", "name")


def test_a_hub_id_is_taken_from_the_cache_and_decodes_beside_the_scripts(monkeypatch, folder, tmp_path):
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    place, commit = tmp_path / "hub" / "models--org--name", "a" * 40
    with pytest.raises(UserError, match=r"org/name is no finished task: .*HF_HUB_OFFLINE forbids"):
        read_task(Path("org/name"))
    (place / "refs").mkdir(parents=True)
    (place / "refs" / "main").write_text(commit)
    shutil.copytree(folder, place / "snapshots" / commit)
    task = read_task(Path("org/name"))
    assert task.folder == ROOT / "task" / "org--name" and task.parts.training_answers
    assert task.digest == read_task(folder).digest
    (place / "snapshots" / commit / "memory.npz").unlink()            # half a download
    with pytest.raises(UserError, match="HF_HUB_OFFLINE forbids"):
        read_task(Path("org/name"))


def change(folder: Path, name: str, **changed) -> None:
    (folder / name).write_text(json.dumps({**json.loads((folder / name).read_text()), **changed}))


@pytest.mark.parametrize(("damage", "words"), {
    "metrics of a later version": (lambda f: change(f, "metrics.json", format=2), "format 2"),
    "metrics without figures": (lambda f: change(f, "metrics.json", metrics={}), r"metrics\.test"),
    "metrics cut": (lambda f: (f / "metrics.json").write_text("{"), "is not JSON"),
    "models": (lambda f: change(f, "config.json", models={"videollava": [{"name": {}}]}), "name is dict"),
    "config of a later version": (lambda f: change(f, "config.json", format=2), "format 2"),
    "weights cut": (lambda f: (f / "model.safetensors").write_bytes(
        (f / "model.safetensors").read_bytes()[:-9]), "not the folder of an adapter"),
    "memory cut": (lambda f: (f / "memory.npz").write_bytes(b"PK"), "not the memory of a task"),
    "nothing": (lambda f: [path.unlink() for path in f.iterdir()], "is no finished task"),
}.values())
def test_a_damaged_exported_folder_is_one_line(folder, damage, words):
    damage(folder)
    with pytest.raises(UserError, match=words) as raised:
        read_task(folder)
    assert len(str(raised.value).splitlines()) == 1


def test_names_from_files_stay_text_in_the_card(folder):
    metrics = json.loads((folder / "metrics.json").read_text())
    metrics["files"]["train"][0]["name"] = metrics["trained_on"] = "<script>a</script>\n| [x](y)"
    facts = {"name": "<script>", "revision": "a\u202eb|c", "vocab_size": "<b>"}
    text = card("a\n<script>' name", metrics, {"videollava": [facts], "<i>": [facts]}, 3)
    for line in text.splitlines():
        assert "<" not in line or line.startswith("    "), line
        assert line.isprintable()
    assert "\nbase_model" not in text


def test_the_name_of_a_hub_stays_and_the_folders_of_this_machine_do_not():
    names = ["LanguageBind/Video-LLaVA-7B-hf", "/home/me/models/EventGPT-7b", "../x/EventGPT-7b"]
    assert [export_adapter.public_name(name) for name in names] == [
        names[0], "EventGPT-7b", "EventGPT-7b"]
    assert exported.results_folder_of(Path("org/name")).name == "org--name"
