"""Every test of the examples starts as a new process would: accelerate keeps its precision for a process's whole life."""

import pytest

from tests.examples.generator_world import fresh_accelerator


@pytest.fixture(autouse=True)
def _fresh_accelerator():
    fresh_accelerator()
