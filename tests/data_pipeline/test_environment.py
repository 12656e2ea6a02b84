"""The text of the Python environment: real, at least 20 MB, the same each time, nothing from outside it."""

from data_pipeline.config import load_pipeline
from data_pipeline.environment import PARTS, description_of, environment_files
from data_pipeline.inventory import take_inventory


def test_there_are_at_least_twenty_megabytes_for_the_demo() -> None:
    inventory = take_inventory(load_pipeline("demo"))
    assert 20e6 < inventory.text_bytes < 35e6
    assert {file.source for file in inventory.inputs} == {0, 1, 2}


def test_the_inventory_is_the_same_each_time() -> None:
    assert take_inventory(load_pipeline("demo")) == take_inventory(load_pipeline("demo"))


def test_files_are_sorted_unique_and_stay_inside() -> None:
    for part in PARTS:
        paths = [file.path for file in environment_files(part)]
        assert len(paths) > 50
        assert len(set(paths)) == len(paths)
        assert not any(path.startswith(("/", "..")) or "/../" in path for path in paths)
    assert any(file.path.startswith("torch/") for file in environment_files("package_sources"))
    assert any(file.licence for file in environment_files("package_sources"))


def test_metadata_gives_its_long_description() -> None:
    head = "Metadata-Version: 2.1\nName: x\nLicense: MIT\n"
    assert description_of(head + "\n# Title\n\nText.\n") == "# Title\n\nText.\n"
    assert description_of(head + "Description: old style\n").strip() == "old style"
    assert description_of(head) == ""
