"""What every test shares: one Hypothesis profile, so that a test that passes passes again."""

from __future__ import annotations

import os
from collections.abc import Iterator

import pytest
from hypothesis import settings

# Fixed seed and no time limit: the machines that run the tests are small and shared.
settings.register_profile("ci", derandomize=True, deadline=None, max_examples=50, print_blob=True)
settings.register_profile("long", derandomize=False, deadline=None, max_examples=2000, print_blob=True)
settings.load_profile(os.environ.get("HYPOTHESIS_PROFILE", "ci"))


def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("gpu") is not None:
        import torch

        if not torch.cuda.is_available():
            pytest.skip("no CUDA device here")


@pytest.fixture(autouse=True, scope="session")
def _own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Captured traces are kept under the tests' own folder, not in the user's."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("VDNN_CACHE", str(tmp_path_factory.mktemp("cache")))
        yield
