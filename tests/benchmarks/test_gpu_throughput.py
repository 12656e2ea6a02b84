"""benchmarks/gpu/throughput.py without a GPU: what it refuses, what it would build, and the whole way in small."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from benchmarks.gpu import throughput
from benchmarks.gpu.reference import megatron_stack
from tests.gloo import run_world


def test_without_a_gpu_it_says_so_in_one_line_and_writes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    out = tmp_path / "out.json"
    assert throughput.main(["--out", str(out)]) == 2
    said = capsys.readouterr()
    assert said.out == ""
    missing = "no GPU is visible; use a CUDA GPU with Transformer Engine, or --dry-run"
    assert said.err == f"throughput.py: nothing to measure on: {missing}\n"
    assert not out.exists()


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["--precisions", "bf16,fp4"], r"--precisions fp4: not known; choose from bf16, tensorwise, blockwise, mxfp8"),
        (["--pairs", "1"], r"--pairs 1: too few for quartiles; give 2 or more"),
    ],
)
def test_what_it_cannot_measure_is_named(words: list[str], line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert throughput.main(["--dry-run", *words]) == 2
    assert capsys.readouterr().err == f"throughput.py: {line}\n"


def test_fp8_is_measured_where_the_gpu_multiplies_so(monkeypatch: pytest.MonkeyPatch) -> None:
    expected = {(8, 0): ["bf16"], (8, 9): ["bf16", "tensorwise"], (9, 0): ["bf16", "tensorwise", "blockwise"]}
    for capability, names in expected.items():
        monkeypatch.setattr(torch.cuda, "get_device_capability", lambda found=capability: found)
        assert [name for name in throughput.PRECISIONS if throughput.missing(name) is None] == names
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda: (10, 0))
    assert not any(map(throughput.missing, throughput.PRECISIONS))


def test_the_measured_model_has_the_true_widths() -> None:
    recipe = throughput.recipe_of(throughput.parsed([]), "blockwise")
    whole = throughput.load_recipe("joyai_48b_a3b")
    fewer = {"num_hidden_layers": 4, "n_routed_experts": 32, "backend": "te"}
    assert recipe.model == whole.model.model_copy(update=fewer)
    assert recipe.layout.world_size == 1
    assert (recipe.precision.fp8.recipe, recipe.precision.fp8.emulate) == ("blockwise", False)


def test_the_reference_is_megatron_cores_specification_with_norms_of_the_latents() -> None:
    from megatron.core.extensions.transformer_engine import TELayerNormColumnParallelLinear
    from megatron.core.models.hybrid.hybrid_layer_specs import hybrid_stack_spec

    def linears(stack: Any) -> Any:
        return stack.submodules.mla_layer.submodules.self_attention.submodules

    stack, own = megatron_stack(), hybrid_stack_spec
    changed = {name for name, value in vars(linears(stack)).items() if value is not getattr(linears(own), name)}
    assert changed == {"linear_q_up_proj", "linear_kv_up_proj"}
    assert linears(stack).linear_q_up_proj is linears(stack).linear_kv_up_proj is TELayerNormColumnParallelLinear
    layers = {name for name, value in vars(stack.submodules).items() if value is not getattr(own.submodules, name)}
    assert layers == {"mla_layer"}


def dry_run(out: str) -> int:
    words = ["--dry-run", "--precisions", "bf16,blockwise", "--optimizer", "muon", "--out", out, "run.peak_tflops=0.01"]
    return throughput.main(words)


def test_the_dry_run_goes_the_whole_way(tmp_path: Path) -> None:
    out = tmp_path / "out.json"
    assert run_world(dry_run, 1, str(out), log_folder=tmp_path) == [0]
    result = json.loads(out.read_text())
    assert [row["precision"] for row in result["rows"]] == ["bf16", "blockwise"]
    assert result["environment"]["optimizer"] == "muon"
    for row in result["rows"]:
        assert row["one_model"] is True
        assert row["pairs"] == 2
        for one in (row["ours"], row["megatron_core"]):
            assert one["tokens_per_second"] == pytest.approx(2 * 64 / one["seconds"])
            assert one["mfu"] == pytest.approx(one["tokens_per_second"] * row["model_flops_per_token"] / 1e10)
    (parity,) = result["parity"]
    assert parity["holds"] is True
    assert len(parity["losses"]) == 3
    assert parity["losses"][0] == pytest.approx(8.32, abs=0.1)  # ln 4096, and a little
    log = (tmp_path / "rank_0.log").read_text()
    assert "blockwise" in log
    assert "dry run: both models are of portable blocks, the figures mean nothing" in log
