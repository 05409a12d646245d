"""Every test of the examples starts as a new process would: accelerate keeps its precision for as long as one lives."""

import pytest

from tests.examples.generator_world import fresh_accelerator


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    fresh_accelerator()
