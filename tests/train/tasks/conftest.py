import pytest

from train.log import UserError
from train.tasks.sandbox import Sandbox


@pytest.fixture(scope="module")
def first():
    """What this machine takes by itself."""
    try:
        sandbox = Sandbox()
    except UserError as error:
        pytest.skip(str(error))
    with sandbox:
        yield sandbox
