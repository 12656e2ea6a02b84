"""Of a large model some of every kind is compared, the same on any machine, and what was not compared is said."""

import json
import re
from pathlib import Path

import pytest

from megatron_joy.cli.main import main
from megatron_joy.convert import export_job, import_job, verify
from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.from_hf import from_hf
from megatron_joy.convert.mapping import conversion_plan
from megatron_joy.convert.safetensors_file import file_problem, read_header, write_file
from megatron_joy.convert.sample import VERIFY_BYTES, Sample, kind_of
from megatron_joy.convert.to_hf import to_hf
from megatron_joy.errors import WorkError
from megatron_joy.recipe import load_recipe
from tests.convert.worlds import Reference

SMALL = Sample(at_most=60_000, seed=3)
OPTIONS = {"max_shard_bytes": 200_000, "sample": SMALL}


@pytest.fixture(scope="module")
def sizes() -> dict[str, int]:
    """Every tensor of the 48B in bf16."""
    plan = conversion_plan(load_recipe("joyai_48b_a3b").model)
    return {tensor.name: 2 * tensor.elements for tensor in plan.tensors}


def test_a_model_up_to_the_limit_is_compared_whole() -> None:
    sizes = {"a.1": VERIFY_BYTES - 1, "a.2": 1}
    assert Sample().draw(sizes) == sizes.keys()
    assert len(Sample().draw(sizes | {"a.3": 1})) == 2
    assert Sample(None).draw({"a.1": 10**15, "a.2": 1}) == {"a.1", "a.2"}


def test_the_48b_gives_some_of_every_kind_and_about_as_many_bytes_as_allowed(sizes: dict[str, int]) -> None:
    drawn = Sample().draw(sizes)
    kinds = {kind_of(name) for name in sizes}
    assert {kind_of(name) for name in drawn} == kinds
    assert len(kinds) == 28  # 3 once, 8 of attention, 4 of dense and 9 more of sparse layers, 5 of MTP, one norm in two
    assert 0.99 * VERIFY_BYTES < sum(sizes[name] for name in drawn) <= VERIFY_BYTES


def test_names_and_seed_alone_decide_what_is_drawn(sizes: dict[str, int]) -> None:
    backwards = dict(reversed(sizes.items()))
    assert Sample(seed=1).draw(sizes) == Sample(seed=1).draw(backwards)
    shared = Sample(seed=1).draw(sizes) & Sample(seed=2).draw(sizes)
    # Independent samples of a fifth share a fifth of a fifth.
    assert len(shared) / len(sizes) == pytest.approx((VERIFY_BYTES / sum(sizes.values())) ** 2, rel=0.1)


def test_every_kind_is_compared_even_where_that_is_more_than_allowed(sizes: dict[str, int]) -> None:
    drawn = Sample(at_most=0).draw(sizes)
    assert sorted(map(kind_of, drawn)) == sorted({kind_of(name) for name in sizes})


def test_an_export_says_which_tensors_were_not_compared(
    reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(verify, "memory_problem", lambda plan: "as of a large model")
    done = to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(**OPTIONS))  # type: ignore[arg-type]
    found = done.verification
    assert found is not None
    assert found.seed == 3
    assert found.only_hashed > 0
    told = json.loads((tmp_path / "hf" / "joy_conversion.json").read_text())
    compared = {name for name, entry in told["tensors"].items() if entry["compared"]}
    assert (len(compared), len(told["tensors"])) == (found.tensors, found.tensors + found.only_hashed)
    kinds = {kind_of(f"{entry['megatron']} {name}") for name, entry in told["tensors"].items()}
    assert {kind_of(f"{told['tensors'][name]['megatron']} {name}") for name in compared} == kinds
    # The MTP layer's attention is of other kinds than the decoder's, though called the same.
    assert any(name.startswith("model.layers.4.self_attn.q_a_proj") for name in compared)
    assert f"Of the other {found.only_hashed:,} only" in (tmp_path / "hf" / "README.md").read_text()


def flipping(name: str) -> object:
    """`write_file`, but a bit of this tensor flips afterwards."""

    def flip(path: Path, *args: object) -> dict[str, str]:
        digests = write_file(path, *args)  # type: ignore[arg-type]
        place = read_header(path).get(name)
        if place is not None:
            content = bytearray(path.read_bytes())
            content[place[2]] ^= 1
            path.write_bytes(content)
        return digests

    return flip


@pytest.mark.parametrize("precision", [None, "int8-channel"])
def test_a_bit_that_flips_in_a_tensor_outside_the_sample_is_found(
    precision: str | None, reference: Reference, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    quiet = ExportOptions(**OPTIONS, precision=precision, verify=False)  # type: ignore[arg-type]
    to_hf(reference.checkpoint, tmp_path / "whole", quiet)
    with export_job.open_export(reference.checkpoint, quiet) as job:
        name = next(tensor.name for tensor in job.plan.tensors if tensor.name not in job.compared)
    monkeypatch.setattr(export_job, "write_file", flipping(name))
    with pytest.raises(WorkError, match=rf"safetensors: {re.escape(name)} on disk is not what was written"):
        to_hf(
            reference.checkpoint,
            tmp_path / "hf",
            ExportOptions(**OPTIONS, precision=precision),  # type: ignore[arg-type]
        )
    assert [path.name for path in tmp_path.iterdir()] == ["whole"]


def test_what_is_wrong_with_a_file_is_told_by_the_tensors_name(reference: Reference, tmp_path: Path) -> None:
    to_hf(reference.checkpoint, tmp_path / "hf", ExportOptions(verify=False))
    told = json.loads((tmp_path / "hf" / "joy_conversion.json").read_text())["tensors"]
    digests = {name: entry["blake3"] for name, entry in told.items()}
    with export_job.open_export(reference.checkpoint, ExportOptions()) as job:
        (file, entries), *_ = job.files.items()
    path = tmp_path / "hf" / file
    assert file_problem(path, entries, digests) is None
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)
    assert file_problem(path, entries, digests) == entries[-1].name
    path.write_bytes(content[:-1])
    assert file_problem(path, entries, digests) == "its size"
    content[12] ^= 1
    path.write_bytes(content)
    assert file_problem(path, entries, digests) == "its header"


def test_an_import_says_which_parameters_were_not_compared(exported: Path, tmp_path: Path) -> None:
    done = from_hf(exported, tmp_path / "ckpt", sample=SMALL)
    told = json.loads((tmp_path / "ckpt" / "joy_conversion.json").read_text())
    compared = {key for key, entry in told["parameters"].items() if entry["compared"]}
    assert 0 < done.compared == len(compared) < done.parameters == len(told["parameters"])
    assert told["verification"] == {
        "parameters": done.compared,
        "bytes": told["verification"]["bytes"],
        "only_hashed": done.parameters - done.compared,
        "seed": 3,
    }
    whole = from_hf(exported, tmp_path / "whole")
    assert (whole.compared, whole.seed) == (whole.parameters, None)


def test_a_parameter_outside_the_sample_that_spoils_on_disk_is_found(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write = import_job.write_streamed

    def spoil(folder: Path, file: str, *args: object) -> object:
        written = write(folder, file, *args)  # type: ignore[arg-type]
        content = bytearray((folder / file).read_bytes())
        content[len(content) // 2] ^= 1
        (folder / file).write_bytes(content)
        return written

    monkeypatch.setattr(import_job, "write_streamed", spoil)
    with pytest.raises(WorkError, match=r"__0_0\.distcp: expected blake3 \w+, found blake3 \w+; .*not kept"):
        from_hf(exported, tmp_path / "ckpt", sample=Sample(at_most=0))
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--no-verify", "--verify-sample", "5GB"], "--verify-sample: nothing is verified with --no-verify"),
        (["--no-verify", "--verify-seed", "5"], "--verify-seed: nothing is verified with --no-verify"),
        (["--verify-sample", "all", "--verify-seed", "5"], "--verify-seed: --verify-sample all compares everything"),
        (["--verify-sample", "some"], "--verify-sample some: not a size; expected a number and a unit, as 5GB"),
    ],
)
@pytest.mark.parametrize("command", ["to-hf", "from-hf"])
def test_a_sample_that_could_have_no_effect_is_refused(
    command: str, arguments: list[str], said: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(["convert", command, str(tmp_path / "x"), "--out", str(tmp_path / "y"), *arguments]) == 2
    error = capsys.readouterr().err
    assert said in error
    assert error.count("\n") == 1
