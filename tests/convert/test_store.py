"""Boxes of a checkpoint's tensors, read without a model, are the bits that torch.distributed.checkpoint would give."""

import io
import pickle
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from megatron_joy.checkpoint.find import open_checkpoint
from megatron_joy.convert.mapping import check_parameters, conversion_plan
from megatron_joy.convert.store import TensorStore, _DescriptionUnpickler
from megatron_joy.errors import WorkError
from tests.convert.worlds import Reference, make_recipe, reshard
from tests.gloo import run_world


def test_the_keys_are_exactly_the_models(reference: Reference) -> None:
    with TensorStore(open_checkpoint(reference.checkpoint)) as store:
        assert store.shapes == {key: tuple(tensor.shape) for key, tensor in reference.weights.items()}
        check_parameters(conversion_plan(make_recipe().model), store.shapes, "ckpt")


@pytest.mark.parametrize("dtype", ["fp32", "bf16"])
def test_whole_tensors_are_the_models_bits(dtype: str, request: pytest.FixtureRequest) -> None:
    made: Reference = request.getfixturevalue("reference" if dtype == "fp32" else "reference_bf16")
    with TensorStore(open_checkpoint(made.checkpoint)) as store:
        for key, expected in made.weights.items():
            found = store.read(key)
            assert found.dtype == expected.dtype
            assert torch.equal(found, expected), key


@pytest.mark.parametrize("layout", ["dp2", "tp2", "tp2etp2", "ep2"])
def test_boxes_across_the_chunks_of_several_ranks_are_put_together(
    layout: str, reference: Reference, tmp_path: Path
) -> None:
    run_world(reshard, make_recipe(layout=layout).layout.world_size, reference.checkpoint, tmp_path, layout, "fp32")
    with TensorStore(open_checkpoint(tmp_path / "step_00000000")) as store:
        generator = torch.Generator().manual_seed(0)
        for key, expected in reference.weights.items():
            for _ in range(5):
                low = [int(torch.randint(n, (), generator=generator)) for n in expected.shape]
                size = [
                    int(torch.randint(1, n - a + 1, (), generator=generator))
                    for a, n in zip(low, expected.shape, strict=True)
                ]
                box = tuple(slice(a, a + n) for a, n in zip(low, size, strict=True))
                assert torch.equal(store.read(key, low, size), expected[box]), (key, low, size)


def test_a_file_that_ends_early_is_said_and_not_read_as_zeros(reference: Reference, tmp_path: Path) -> None:
    copy = shutil.copytree(reference.checkpoint, tmp_path / "step_00000007")
    (data,) = copy.glob("*.distcp")
    with TensorStore(open_checkpoint(copy)) as store:
        data.write_bytes(data.read_bytes()[:100_000])
        with pytest.raises(WorkError, match=r"distcp: (ends at byte|the archive of)"):
            _ = [store.read(key) for key in store.shapes]


def test_an_archive_that_names_a_function_is_refused_unread(reference: Reference, tmp_path: Path) -> None:
    copy = shutil.copytree(reference.checkpoint, tmp_path / "step_00000007")
    (data,) = copy.glob("*.distcp")
    content = data.read_bytes()
    # The same length, so that every archive stays where it is. It has no checksum: the unpickler refuses by itself.
    data.write_bytes(content.replace(b"ctorch._utils\n_rebuild_tensor_v2\n", b"cos\nsystem\n" + b"0" * 22))
    assert data.read_bytes() != content
    with TensorStore(open_checkpoint(copy)) as store, pytest.raises(WorkError, match=r"can't be read: .*os\.system"):
        store.read("decoder.final_norm.weight")


def test_only_tensors_can_be_described_by_an_archive() -> None:
    with pytest.raises(pickle.UnpicklingError, match=r"names builtins\.print"):
        _DescriptionUnpickler(io.BytesIO(pickle.dumps(print))).load()


def test_an_index_that_points_to_another_tensor_is_found(reference: Reference) -> None:
    with TensorStore(open_checkpoint(reference.checkpoint)) as store:
        index = store._index.storage_data
        one, other = (
            next(place for place in index if place.fqn == key)
            for key in ("decoder.final_norm.weight", "decoder.layers.3.mlp.router.weight")
        )
        index[one] = replace(index[other])
        with pytest.raises(WorkError, match=r"of decoder\.final_norm\.weight at \[0\] has .* \[6, 40\], expected"):
            store.read("decoder.final_norm.weight")
