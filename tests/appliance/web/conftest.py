"""A real review API over TLS, on real evidence, and a client that shares no code with it."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2] / "capture"))
sys.path.insert(0, str(Path(__file__).parents[1] / "cli"))
sys.path.insert(0, str(Path(__file__).parent))

import pytest
from served_api import Api


@pytest.fixture
def api(tmp_path):
    with Api(tmp_path) as running:
        yield running


@pytest.fixture(scope="module")
def shared(tmp_path_factory):
    """One API for the tests of a module that only read."""
    with Api(tmp_path_factory.mktemp("api")) as running:
        yield running
