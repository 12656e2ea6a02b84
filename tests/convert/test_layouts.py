"""Whatever layout a checkpoint goes through, the exported bytes are the same."""

from pathlib import Path

import pytest

from megatron_joy.convert.export_job import ExportOptions
from megatron_joy.convert.from_hf import from_hf
from megatron_joy.convert.to_hf import to_hf
from tests.convert.worlds import LAYOUTS, make_recipe, reshard
from tests.gloo import run_world


@pytest.fixture(scope="module")
def imported(exported: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("imported") / "step_00000000"
    from_hf(exported, out)
    return out


@pytest.mark.parametrize("layout", LAYOUTS)
def test_hugging_face_into_a_layout_and_out_of_it_gives_the_same_bytes(
    layout: str, imported: Path, exported: Path, tmp_path: Path
) -> None:
    run_world(reshard, make_recipe(layout=layout).layout.world_size, imported, tmp_path, layout, "fp32")
    to_hf(tmp_path / "step_00000000", tmp_path / "hf", ExportOptions(max_shard_bytes=200_000, verify=False))
    for path in exported.glob("*.safetensors"):
        assert (tmp_path / "hf" / path.name).read_bytes() == path.read_bytes(), path.name
