"""What every test shares: `gpu` tests need a CUDA device and say so where there is none; CI draws the same examples."""

import os
import signal
from pathlib import Path

import hypothesis
import pytest

from tests.slurm_cluster import slurm, slurm_session

__all__ = ["slurm", "slurm_session"]  # fixtures

# Property tests look for new counterexamples where a person is there to read them. Under CI the same commit must give
# the same verdict twice, so what a search has found becomes an example of its test, and no example fails for its time.
hypothesis.settings.register_profile(
    "ci", derandomize=True, deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("ci")

# A suite started in the background of a shell inherits an ignored Ctrl-C, and what its tests start would ignore it too.
signal.signal(signal.SIGINT, signal.default_int_handler)

TESTS = Path(__file__).parent
# Rooms whose tests share what takes long to make (a Slurm, unbroken runs): with several workers one takes them all, and
# first, or the other would have nothing left to do beside it.
TOGETHER = {"slurm", "train"}


@pytest.hookimpl(tryfirst=True)  # before xdist's own, which reads the groups
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        file = item.path.relative_to(TESTS)
        room = file.parts[0]
        item.add_marker(pytest.mark.xdist_group(room if room in TOGETHER else str(file)))
    items.sort(key=lambda item: item.path.relative_to(TESTS).parts[0] not in TOGETHER)
    wanting = [item for item in items if item.get_closest_marker("gpu")]
    if not wanting:
        return
    # Torch is imported only for a collection that has such tests: the others stay quick and torch-free.
    import torch

    if not torch.cuda.is_available():
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="needs a CUDA device"))
