"""`joy data` and `joy tokenizer` as a person types them: output, JSON, exit codes."""

import json
from pathlib import Path

import pytest

from megatron_joy.cli.main import main
from tests.data_pipeline.corpora import texts, write_jsonl, write_pipeline


@pytest.fixture(scope="module")
def out(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("cli")
    write_jsonl(folder / "in" / "a.jsonl", texts(100), licence="MIT")
    (folder / "in" / "b.jsonl").write_bytes(b'{"text": "caf\xe9"}\n')
    pipeline = write_pipeline(folder / "in", folder / "out", shard_megabytes=0.1)
    assert main(["data", "run", str(pipeline), "sources.0.licence_field=licence", "--workers", "1"]) == 0
    return folder / "out"


def test_run_prints_what_became_of_every_record(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = out.parent / "in" / "pipeline.toml"
    arguments = ["data", "run", str(pipeline), "sources.0.licence_field=licence"]
    assert main(arguments) == 0
    text = capsys.readouterr().out
    for part in ("records read", "- not_utf8", "unigram entropy", "kept from an earlier run", "quarantine.jsonl"):
        assert part in text
    assert main([*arguments, "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert result["tasks_done"] == 0
    assert [report["split"] for report in result["sets"]] == ["train", "validation"]


def test_verify_says_whole_or_names_every_problem(
    out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    import shutil

    assert main(["data", "verify", str(out)]) == 0
    assert capsys.readouterr().out.count(": whole: ") == 2
    copy = shutil.copytree(out, tmp_path / "copy")
    for name in ("train/shard_00000.bin", "validation/shard_00000.idx"):
        (copy / name).write_bytes((copy / name).read_bytes()[:-1])
    assert main(["data", "verify", str(copy)]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert all(line.startswith(f"error: {copy}/") and ": found " in line and ", expected " in line for line in errors)
    assert {"shard_00000.bin", "shard_00000.idx"} == {line.split(": ")[1].rpartition("/")[2] for line in errors}
    assert main(["data", "verify", str(copy), "--json"]) == 2
    assert [len(result["problems"]) > 0 for result in json.loads(capsys.readouterr().out)] == [True, True]


def test_stats_are_the_manifests_numbers(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "stats", str(out / "train"), "--json"]) == 0
    (report,) = json.loads(capsys.readouterr().out)
    assert report["documents_in"] == report["documents"] + sum(report["dropped"].values())
    assert report["longest_tokens"] >= report["median_tokens"] > 1
    assert main(["data", "stats", str(out)]) == 0


def test_inspect_shows_text_tokens_and_origin(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["data", "inspect", str(out / "train"), "--doc", "3", "--json"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["origin"]["licence"] == "MIT"
    assert report["text"].removesuffix("<|endoftext|>") in texts(100)
    assert report["tokens"][-1] == 0
    assert main(["data", "inspect", str(out / "train"), "--doc", "3"]) == 0
    assert report["origin"]["file"] in capsys.readouterr().out


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["inspect", "{out}/train", "--doc", "100000"], "has documents 0 to"),
        (["inspect", "{out}", "--doc", "0"], "holds 2 shard sets; name one"),
        (["verify", "{out}/nowhere"], "no manifest.json here"),
        (["stats", "/dev/null"], "no manifest.json here"),
        (["run", "demo", "--executor", "spark"], "available: local, mpi, ray, slurm"),
        (["run", "nosuch"], "cannot be read"),
        (["run", "demo", "seed=x", "--workers", "0"], "--workers 0"),
    ],
)
def test_a_mistake_is_one_line_and_exit_code_2(
    out: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], says: str
) -> None:
    assert main(["data", *(argument.format(out=out) for argument in arguments)]) == 2
    error = capsys.readouterr().err
    assert says in error
    assert error.count("\n") == 1


def test_tokenizer_train_writes_a_folder_that_loads(
    out: Path, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    arguments = ["tokenizer", "train", "--input", str(out.parent / "in"), "--vocab-size", "300", "--out"]
    assert main([*arguments, str(tmp_path / "new")]) == 0
    text = capsys.readouterr().out
    assert "300 entries from" in text
    assert "put aside: 1 not_utf8" in text
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["tokenizer.json", "tokenizer_config.json"]
    assert main([*arguments, str(tmp_path / "new")]) == 2


def test_inspect_writes_out_what_would_steer_a_terminal(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    hostile = "red \x1b[31m title \x1b]0;x\x07 over\rwritten \u202eturned\n\tcaf\u00e9 \u4e2d [bold]"
    documents = [hostile, *texts(20)]
    write_jsonl(tmp_path / "in" / "a.jsonl", documents)
    pipeline = write_pipeline(tmp_path / "in", tmp_path / "out")
    assert main(["data", "run", str(pipeline), "output.validation_share=0.0", "--workers", "1"]) == 0
    capsys.readouterr()
    found = ""
    for number in range(len(documents)):
        assert main(["data", "inspect", str(tmp_path / "out" / "train"), "--doc", str(number)]) == 0
        found += capsys.readouterr().out
    assert r"red \x1b[31m title \x1b]0;x\x07 over\rwritten \u202eturned" in found
    assert "\tcaf\u00e9 \u4e2d [bold]" in found
    assert not {"\x1b", "\x07", "\r", "\u202e"} & set(found)


def test_a_finished_run_under_slurm_submits_nothing(out: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pipeline = out.parent / "in" / "pipeline.toml"
    arguments = ["data", "run", str(pipeline), "sources.0.licence_field=licence", "--executor", "slurm"]
    assert main(arguments) == 0
    assert "0 tasks done" in capsys.readouterr().out
