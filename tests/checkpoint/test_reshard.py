"""Written under one layout, read under another: every weight, router bias, moment and count is the same, bit for bit.

Whole tensors are joined here from what each rank holds, by global name and offset (`worlds.joined`).
"""

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from tests.checkpoint import worlds
from tests.gloo import run_world

# Of both kinds: how Megatron-core chains optimizers changes (EP 2 has two, the others one), or how tensors are cut.
PAIRS = [
    ("ep2", "one"),
    ("ep2", "tp2ep2"),
    ("ep2", "tp2etp2"),
    ("one", "pp2ep2"),
    ("pp2ep2", "one"),
    ("pp2vpp2", "dp2"),
    ("dp2", "cp2"),
    ("cp2", "tp2"),
    ("tp2", "pp2vpp2"),
    ("tp2ep2", "pp2"),
    ("tp2etp2", "ep2"),
]
STEPS = 2


@pytest.fixture(scope="module")
def written(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """layout, dtype -> (checkpoint's path, whole tensors, updates), each trained and saved once."""
    kept: dict[tuple[str, str], tuple[Path, dict[str, np.ndarray], int]] = {}

    def write(layout: str, dtype: str) -> tuple[Path, dict[str, np.ndarray], int]:
        if (layout, dtype) not in kept:
            folder = tmp_path_factory.mktemp(layout)
            ranks = run_world(worlds.train_and_save, worlds.world_size(layout), layout, folder, STEPS, dtype)
            path = folder / f"step_{STEPS:08d}"
            kept[layout, dtype] = (path, worlds.joined([boxes for _, boxes, _ in ranks]), ranks[0][2])
        return kept[layout, dtype]

    return write


def _assert_read_as_written(written: Any, wrote: str, reads: str, dtype: str) -> dict[str, np.ndarray]:
    path, before, updates = written(wrote, dtype)
    ranks = run_world(worlds.load_and_tell, worlds.world_size(reads), reads, path, 0, dtype)
    after = worlds.joined([boxes for _, boxes, _, _ in ranks])
    assert after.keys() == before.keys()
    assert [key for key in before if not np.array_equal(before[key], after[key])] == []
    for state, _, done, _ in ranks:
        assert state == {"step": STEPS, "samples": STEPS * worlds.GLOBAL_BATCH}
        assert done == updates == STEPS
    return after


@pytest.mark.parametrize(("wrote", "reads"), PAIRS, ids=[f"{a}_to_{b}" for a, b in PAIRS])
def test_another_layout_reads_the_same_bits(written: Any, wrote: str, reads: str) -> None:
    tensors = _assert_read_as_written(written, wrote, reads, "fp32")
    assert any(np.any(tensors[key]) for key in tensors if key.endswith("router.expert_bias"))
    weights = {key for key in tensors if not key.startswith("optimizer.")}
    moments = {key for key in weights if not key.endswith("expert_bias")}
    for kind in ("exp_avg", "exp_avg_sq"):
        assert {f"optimizer.state.{kind}.{key}" for key in moments} <= tensors.keys()
        assert all(np.any(tensors[f"optimizer.state.{kind}.{key}"]) for key in moments)


@pytest.mark.parametrize(("wrote", "reads"), [("ep2", "one"), ("tp2", "pp2ep2")])
def test_fp32_master_weights_of_a_bf16_run_travel_too(written: Any, wrote: str, reads: str) -> None:
    tensors = _assert_read_as_written(written, wrote, reads, "bf16")
    masters = {key: value for key, value in tensors.items() if key.startswith("optimizer.state.param.")}
    assert masters
    # Masters have bits that bf16 has not: it isn't the weights that were written twice.
    assert any((value.view(np.uint32) & 0xFFFF).any() for value in masters.values())


@pytest.mark.parametrize("layout", ["dp2", "ep2", "cp2"])
def test_data_parallel_ranks_write_equally_much(written: Any, layout: str) -> None:
    path = written(layout, "bf16")[0]
    first, second = ((path / f"__{rank}_0.distcp").stat().st_size for rank in (0, 1))
    assert abs(first - second) < 0.2 * second


def test_what_was_written_names_no_layout(written: Any) -> None:
    keys = {frozenset(written(layout, "fp32")[1]) for layout in ("one", "ep2", "tp2ep2", "pp2vpp2")}
    assert len(keys) == 1
