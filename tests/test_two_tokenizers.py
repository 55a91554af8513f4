"""Draft and target with tokenizers of their own: EventGPT's answers in other ids, the same words.

The draft model of these tests is the demo's, its ids permuted in tokenizer and weights: it says what
the demo's says, so that whatever compares text must find the same figures.
"""

import json
import random
import shutil
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import extract_tokens_train
import speculative_decode
import train_and_evaluate
from base import UserError
from drafting.checkpoints import load_adapter, save_adapter
from drafting.table import LIVE_NAMES
from pairs.formats import load_pairs
from pairs.splits import ValidationSplit, load_data
from pairs.tokenizers import UNKNOWN, Tokenizers
from token_adapter import AdapterConfig, TokenAdapter
from training.checkpoints import Fingerprint
from vlm.tokenizers import load_tokenizer
from vlm.vocabulary import Translation, digest_of, is_same

SMALL = (
    "--embed_dim",
    32,
    "--num_layers",
    1,
    "--num_heads",
    2,
    "--num_epochs",
    2,
    "--no-refit",
    "--no-online",
    "--device",
    "cpu",
    "--no-plots",
)


def permuted(folder: Path, source: Path) -> Path:
    """A copy of an EventGPT whose ids, but for the control tokens, are others."""
    shutil.copytree(source, folder)
    settings = json.loads((folder / "tokenizer.json").read_text())
    size = len(settings["model"]["vocab"])
    others = list(range(3, size))
    random.Random(0).shuffle(others)
    new = [0, 1, 2, *others]  # old id -> new id
    settings["model"]["vocab"] = {
        token: new[old] for token, old in settings["model"]["vocab"].items()
    }
    (folder / "tokenizer.json").write_text(json.dumps(settings))
    state = load_file(folder / "model.safetensors")
    old = torch.tensor(new).argsort()  # new id -> old id
    for name in ("lm_head.weight", "model.embed_tokens.weight"):
        state[name] = state[name][old].contiguous()
    save_file(state, folder / "model.safetensors", {"format": "pt"})
    return folder


def call(monkeypatch, program, *words) -> None:
    monkeypatch.setattr(sys, "argv", [f"{program.__name__}.py", *map(str, words)])
    program.main()


@pytest.fixture(scope="module")
def separate(demo, tmp_path_factory) -> dict:
    """Pairs of two tokenizers, a task of each conditioning trained on them, and a decoding."""
    folder = tmp_path_factory.mktemp("two_tokenizers")
    places = {
        "model": permuted(folder / "eventgpt", demo.models / "eventgpt"),
        "pairs": folder / "pairs.json",
        "decoding": folder / "decoding",
    }
    models = (
        "--draft_model",
        places["model"],
        "--target_model",
        demo.models / "video_llava",
        "--device",
        "cpu",
        "--max_new_tokens",
        80,
        "--dataset_dir",
        demo.test_1s,
    )
    with pytest.MonkeyPatch.context() as monkeypatch:
        call(monkeypatch, extract_tokens_train, *models, "--output_file", places["pairs"])
        for conditioning in ("prefix+draft", "draft"):
            places[conditioning] = folder / conditioning
            call(
                monkeypatch,
                train_and_evaluate,
                "--train_benchmark",
                places["pairs"],
                "--test_benchmark",
                places["pairs"],
                "--task_folder",
                places[conditioning],
                *SMALL,
                "--conditioning",
                conditioning,
            )
        call(
            monkeypatch,
            speculative_decode,
            *models,
            "--task",
            places["draft"],
            "--max_samples",
            3,
            "--compare",
            "--no-plots",
            "--output_folder",
            places["decoding"],
        )
    return places


def results_of(task: Path) -> dict:
    return json.loads((task / "results.json").read_text())


# ------------------------------------------------------------------------------------- vocabularies
def test_vocabularies_are_compared_by_id_and_token_whatever_their_sizes(demo, separate):
    eventgpt, target, other = map(
        load_tokenizer, (demo.models / "eventgpt", demo.models / "video_llava", separate["model"])
    )
    assert len(eventgpt) != len(target) and is_same(eventgpt, target)
    assert digest_of(eventgpt) == digest_of(target) != digest_of(other)
    assert not is_same(other, target)


def test_a_translation_is_what_the_target_would_have_written(demo, separate):
    translation = Translation(
        load_tokenizer(separate["model"]), load_tokenizer(demo.models / "video_llava")
    )
    output = json.loads(separate["pairs"].read_text())
    usual = json.loads((demo.tokens / "test_tokens_1s.json").read_text())
    for row, wanted in zip(output["results"], usual["results"], strict=True):
        assert (
            row["egpt_text"] == wanted["egpt_text"] and row["egpt_tokens"] != wanted["egpt_tokens"]
        )
        assert row["egpt_vl_tokens"] == wanted["egpt_tokens"] == translation(row["egpt_tokens"])


def test_every_id_that_ends_a_draft_answer_becomes_the_end_of_its_translation(demo):
    words = load_tokenizer(demo.models / "video_llava")
    other = words.convert_tokens_to_ids("<unk>")
    text = words("a bus", add_special_tokens=False).input_ids
    translation = Translation(words, words, ends=[other])
    for end in (words.eos_token_id, other):
        assert translation([*text, end]) == [*text, words.eos_token_id]
    assert translation(text) == text and translation([]) == []
    assert Translation(words, words)([*text, other])[-1] != words.eos_token_id


# -------------------------------------------------------------------------------------------- pairs
def test_pair_files_record_both_tokenizers(demo, separate):
    output = json.loads(separate["pairs"].read_text())
    usual = json.loads((demo.tokens / "test_tokens_1s.json").read_text())
    digests = [
        [file["models"][name]["tokenizer"] for name in ("eventgpt", "videollava")]
        for file in (output, usual)
    ]
    assert (output["same_tokenizer"], usual["same_tokenizer"]) == (False, True)
    assert digests[0][0] != digests[0][1] == digests[1][1] == digests[1][0]
    assert output["vocab_size"] == output["models"]["videollava"]["vocab_size"]
    pairs = load_pairs([separate["pairs"]])
    assert pairs.tokenizers == Tokenizers(*digests[0], False)
    assert list(pairs.select([3, 1]).answers("copy")) == [
        output["results"][row]["egpt_vl_tokens"] for row in (3, 1)
    ]


def test_pair_files_of_different_tokenizers_are_refused_together(
    demo, separate, tmp_path, monkeypatch
):
    usual = demo.tokens / "test_tokens_1s.json"
    with pytest.raises(UserError, match="are of different draft tokenizers"):
        load_pairs([usual, separate["pairs"]])
    with pytest.raises(UserError, match="are of different draft tokenizers"):
        call(
            monkeypatch,
            train_and_evaluate,
            "--train_benchmark",
            usual,
            "--test_benchmark",
            separate["pairs"],
            "--task_dir",
            tmp_path,
            *SMALL,
        )
    old = json.loads(usual.read_text())
    for facts in old["models"].values():
        del facts["tokenizer"]
    del old["same_tokenizer"]
    (tmp_path / "old.json").write_text(json.dumps(old))
    assert load_pairs([usual, tmp_path / "old.json"]).tokenizers.are_same
    assert load_pairs([tmp_path / "old.json"]).tokenizers == UNKNOWN
    with pytest.raises(UserError, match="does not tell of which tokenizers its ids are"):
        load_pairs([tmp_path / "old.json", separate["pairs"]])


def test_files_that_differ_in_having_one_tokenizer_are_refused_without_digests_too():
    one, two = Tokenizers(are_same=True), Tokenizers("aa", "bb", False)
    for ours, theirs in ((one, two), (two, one)):
        with pytest.raises(UserError, match="one tokenizer in one and different ones in two"):
            ours.check(theirs, *("one", "two")[:: 1 if ours is one else -1])
    assert two.joined(Tokenizers(target="bb")) == two
    two.check(Tokenizers(target="bb"), "two", "pairs of the target alone")


# ----------------------------------------------------------------------------------------- training
def test_draft_tokens_get_embeddings_of_their_own_and_checkpoints_say_so(separate):
    for conditioning in ("prefix+draft", "draft"):
        config = load_adapter(separate[conditioning] / "best_model.pt").config
        assert config.draft_embeddings == 688 and config.vocab_size == 691
        assert len({config.draft_tokenizer, config.target_tokenizer}) == 2
        assert results_of(separate[conditioning])["adapter"]["draft_embeddings"] == 688
    assert results_of(separate["prefix+draft"])["config"]["draft_text"] == 0


def test_copying_compares_text_and_finds_what_one_tokenizer_finds(demo, separate):
    usual = load_pairs([demo.tokens / "test_tokens_1s.json"])
    right = sum(
        a == b
        for draft, target in zip(usual.answers("draft"), usual.answers("target"))
        for a, b in zip(draft, target)
    )
    test = results_of(separate["draft"])["metrics"]["test"]
    assert test["direct_copy"]["alpha"] == pytest.approx(right / len(usual.target))
    assert test["drafters"]["copy of the draft"]["alpha"] == pytest.approx(
        right / len(usual.target)
    )


def config_of(conditioning: str = "prefix+draft", own: int = 0, **more) -> AdapterConfig:
    return AdapterConfig(40, conditioning, 32, 2, 4, 64, 16, draft_embeddings=own, **more)


def test_steps_equal_the_whole_pass_with_two_embeddings():
    torch.manual_seed(0)
    adapter = TokenAdapter(config_of(own=90)).eval()
    draft, prefix = torch.randint(90, (2, 7)), torch.randint(40, (2, 5))
    lengths = torch.tensor([7, 3])
    whole = adapter(draft, lengths, prefix)
    first, cache = adapter.start(draft, lengths)
    rest = adapter.step(prefix, cache)
    assert torch.allclose(torch.cat([first, rest], 1), whole, atol=1e-5)


@pytest.mark.parametrize("conditioning", ["prefix+draft", "draft", "prefix"])
def test_a_checkpoint_and_a_folder_of_two_embeddings_load_as_they_were(tmp_path, conditioning):
    torch.manual_seed(0)
    adapter = TokenAdapter(config_of(conditioning, 90, draft_tokenizer="aa", target_tokenizer="bb"))
    save_adapter(adapter, tmp_path / "best_model.pt")
    adapter.save_pretrained(tmp_path / "folder")
    for read in (
        load_adapter(tmp_path / "best_model.pt"),
        TokenAdapter.from_pretrained(tmp_path / "folder"),
    ):
        assert read.config == adapter.config
        assert all(
            torch.equal(read.state_dict()[name], weight)
            for name, weight in adapter.state_dict().items()
        )


def test_the_budget_holds_and_nothing_is_added_where_tokenizers_are_equal():
    with torch.device("meta"):
        sizes = [
            TokenAdapter(
                AdapterConfig(32_000, "prefix+draft", draft_embeddings=own)
            ).num_parameters()
            for own in (0, 32_000)
        ]
        names = TokenAdapter(AdapterConfig(32_000)).state_dict().keys()
    assert sizes[0] < 45.5e6 and sizes[1] - sizes[0] == 32_000 * 512
    assert "draft_embedding.weight" not in names


# -------------------------------------------------------------------------------------- one another's
def test_pairs_of_another_tokenizer_than_the_checkpoints_are_refused(
    demo, separate, tmp_path, monkeypatch
):
    usual = demo.tokens / "test_tokens_1s.json"
    for conditioning in ("prefix+draft", "draft"):
        if load_adapter(separate[conditioning] / "best_model.pt").config.conditioning == "prefix":
            continue
        with pytest.raises(
            UserError, match=r"best_model.pt and .*1s.json are of different draft tokenizers"
        ):
            call(
                monkeypatch,
                train_and_evaluate,
                "--checkpoint",
                separate[conditioning] / "best_model.pt",
                "--test_benchmark",
                usual,
                "--task_dir",
                tmp_path,
                "--no-plots",
                "--device",
                "cpu",
            )


def test_going_on_with_pairs_of_another_tokenizer_is_refused_and_named(demo, separate):
    fingerprints = [
        Fingerprint.of(load_data([path], [path], ValidationSplit(0.15, 0)))
        for path in (demo.tokens / "test_tokens_1s.json", separate["pairs"])
    ]
    assert "tokenizers" in fingerprints[0].differences(fingerprints[1].parts)
    assert fingerprints[1].differences(fingerprints[1].parts) == []


def test_every_drafter_decodes_losslessly_and_copy_proposes_the_drafts_text(separate, demo):
    decoding = json.loads((separate["decoding"] / "decode.json").read_text())
    assert set(decoding["totals"]["runs"]) == set(LIVE_NAMES)
    assert decoding["totals"]["verdicts"] == {"exact": 3 * (len(LIVE_NAMES) + 1)}
    usual = load_pairs([demo.tokens / "test_tokens_1s.json"])
    first = sum(
        draft[:1] == target[:1]
        for draft, target in zip(usual.answers("draft"), usual.answers("target"))
    )
    assert decoding["totals"]["runs"]["copy"]["proposed"] > 0
    assert decoding["totals"]["runs"]["copy"]["accepted"] > 0 or first < len(usual)


def test_models_of_another_tokenizer_than_the_adapters_are_refused(
    separate, demo, monkeypatch, tmp_path
):
    results = results_of(separate["draft"])
    for file in results["files"]["train"]:  # as if weights could not be told apart
        file["models"] = {}
    task = Path(shutil.copytree(separate["draft"], tmp_path / "task"))
    (task / "results.json").write_text(json.dumps(results))
    with pytest.raises(UserError, match=r"the adapter of .* are of different draft tokenizers"):
        call(
            monkeypatch,
            speculative_decode,
            "--task",
            task,
            "--dataset_dir",
            demo.test_1s,
            "--draft_model",
            demo.models / "eventgpt",
            "--target_model",
            demo.models / "video_llava",
            "--device",
            "cpu",
        )
