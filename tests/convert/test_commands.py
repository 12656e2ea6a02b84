"""`joy convert` and `joy generate` from the command line: results, --json, and one line for a mistake."""

import json
from pathlib import Path

import pytest

from megatron_joy.cli.convert_command import size_in_bytes
from megatron_joy.cli.main import main
from megatron_joy.convert import verify
from megatron_joy.errors import UserError
from megatron_joy.recipe import dump_recipe
from tests.convert.tokenizers_made import make_tokenizer
from tests.convert.worlds import Reference, make_recipe

PROMPT = "def make"


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tokenizer(tmp_path_factory.mktemp("tokenizer"), 290)


@pytest.fixture(scope="module")
def folder(large: Reference, tokenizer: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Exported by the command itself."""
    out = tmp_path_factory.mktemp("exported") / "hf"
    arguments = [str(large.checkpoint), "--out", str(out), "--tokenizer", str(tokenizer), "--no-verify"]
    assert main(["convert", "to-hf", *arguments]) == 0
    return out


def test_to_hf_and_back_by_command(folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dump_recipe(make_recipe(vocab_size=300, num_hidden_layers=2)))
    out = tmp_path / "run" / "checkpoints" / "step_00000000"
    arguments = [str(folder), "--out", str(out), "--recipe", str(recipe), "--json"]
    assert main(["convert", "from-hf", *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["verified"] is True
    assert Path(told["run_recipe"]).is_file()
    again = tmp_path / "again"
    arguments = [str(tmp_path / "run"), "--out", str(again), "--tokenizer", str(folder), "--no-verify", "--json"]
    assert main(["convert", "to-hf", *arguments]) == 0
    assert json.loads(capsys.readouterr().out)["tensors"] > 0
    for path in folder.glob("*.safetensors"):
        assert (again / path.name).read_bytes() == path.read_bytes()


def test_to_hf_verifies_and_says_what_it_found(
    large: Reference,
    tokenizer: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    agreement = verify.LogitsAgreement(64, 2.4e-7, 1e-8, 5.123, 1.0)
    monkeypatch.setattr(verify, "compare_logits", lambda *args: agreement)
    arguments = [str(large.checkpoint), "--out", str(tmp_path / "hf"), "--tokenizer", str(tokenizer)]
    assert main(["convert", "to-hf", *arguments]) == 0
    said = capsys.readouterr().out
    assert "tensors read back bit for bit" in said
    assert (
        "logits of 64 tokens agree with transformers' to 2.4e-07 (largest logit 5.12), the first choice at 100.0%"
        in said
    )


@pytest.mark.parametrize("model", ["checkpoint", "folder"])
def test_generate_writes_the_same_from_either_form(
    model: str, large: Reference, folder: Path, tokenizer: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = large.checkpoint.parents[1] if model == "checkpoint" else folder
    arguments = ["--prompt", PROMPT, "--max-new-tokens", "20", "--tokenizer", str(tokenizer)]
    assert main(["generate", str(folder), *arguments]) == 0
    expected = capsys.readouterr()
    assert expected.out.startswith(PROMPT)
    assert "tokens" in expected.err
    assert main(["generate", str(path), *arguments]) == 0
    assert capsys.readouterr().out == expected.out
    assert main(["generate", str(path), *arguments, "--json", "--speculative", "--drafts", "2"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert PROMPT + told["texts"][0]["text"] == expected.out.removesuffix("\n")
    assert told["acceptance_length"] >= 1


def test_generate_goes_on_from_several_prompts(folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["--prompt", "one", "--prompt", "another", "--max-new-tokens", "5", "--temperature", "1", "--json"]
    assert main(["generate", str(folder), *arguments]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [entry["prompt"] for entry in told["texts"]] == ["one", "another"]
    assert told["acceptance_length"] is None


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--prompt", "a", "--speculative", "--temperature", "1"], "--speculative: drafts are checked greedily"),
        (
            ["--prompt", "a", "--prompt", "b", "--speculative"],
            "--speculative: takes one prompt at a time",
        ),
        (["--prompt", "a", "--precision", "fp8"], "--precision fp8: expected fp32 or bf16"),
        (["--prompt", ""], "--prompt: has no tokens"),
        (["--prompt", "a", "--top-p", "2"], "top-p 2.0: expected more than 0 and at most 1"),
        ([], "Missing option '--prompt'"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    arguments: list[str], said: str, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["generate", str(folder), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1


def test_converting_what_is_no_checkpoint_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["convert", "to-hf", str(tmp_path / "nothing"), "--out", str(tmp_path / "hf")]) == 2
    assert "no such folder" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("text", "size"), [("5GB", 5_000_000_000), ("1.5 MiB", 1_572_864), ("200kb", 200_000), ("17", 17)]
)
def test_sizes_are_read_with_their_units(text: str, size: int) -> None:
    assert size_in_bytes(text) == size


@pytest.mark.parametrize("text", ["", "5 parsecs", "-1GB", "0", "GB"])
def test_a_size_without_meaning_is_refused(text: str) -> None:
    with pytest.raises(UserError, match="--max-shard-size"):
        size_in_bytes(text)
