"""Fixtures that several test files of the core share."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
from toys import toys


@pytest.fixture(scope="module")
def toy_methods() -> Iterator[None]:
    """The toy methods, registered while the tests of one file run."""
    with toys():
        yield
