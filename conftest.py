"""What every test of the repository runs under."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

# Before torch is imported, and for sub-processes too: on few cores, several processes of several threads each
# are many times slower than several processes of one.
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import hypothesis
import pytest
import torch

from tools import assets as store

# Where a change is judged, the same cases every time; elsewhere new ones, to find what nobody thought of.
hypothesis.settings.register_profile("judge", derandomize=True)
if os.environ.get("CI"):
    hypothesis.settings.load_profile("judge")

torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_runtest_setup(item: pytest.Item) -> None:
    """`@pytest.mark.assets("smollm2")`: skip where it was not fetched, fail where CI promised to."""
    for mark in item.iter_markers("assets"):
        for name in mark.args:
            if store.find(name) is None:
                reason = f"asset {name!r} is not in {store.ROOT}; `hatch run assets {name}` fetches it"
                if os.environ.get("CI"):
                    pytest.fail(reason, pytrace=False)
                pytest.skip(reason)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def asset() -> Callable[[str], Path]:
    """The folder of an asset that the test's `assets` marker names."""

    def folder(name: str) -> Path:
        found = store.find(name)
        assert found is not None, f"the test needs @pytest.mark.assets({name!r})"
        return found

    return folder
