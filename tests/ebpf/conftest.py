import pytest
from watching import Watched


@pytest.fixture
def idle(tmp_path):
    """A cgroup and a namespace without a sensor yet."""
    made = Watched(tmp_path)
    yield made
    made.close()


@pytest.fixture
def watched(idle):
    """The same with a sensor over them."""
    idle.start()
    return idle
