import pytest
from staging import Stage, own_place


@pytest.fixture
def make_stage():
    """Return a function that brings a lab of its own up: make_stage(configuration_text="")."""
    made = []

    def make(given="", *, gate=True):
        stage = Stage(own_place())
        made.append(stage)
        stage.up(given, gate=gate)
        return stage

    yield make
    for stage in made:
        stage.down()


@pytest.fixture(scope="module")
def stage():
    """A lab with the default configuration, shared by the tests of one module."""
    made = Stage(own_place())
    made.up()
    yield made
    made.down()
