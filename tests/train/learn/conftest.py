"""A model, examples and a finished run that the tests of fine-tuning look at."""

import pytest
from helpers.sft_cases import SFT, SIZES, tune

from train.learn.batches import to_rows
from train.models.characters import PAD_ID, encode
from train.models.open import random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.tasks.pretraining import MINIATURE, pretraining_examples


@pytest.fixture(scope="module")
def mesh():
    return make_mesh(Mesh())


@pytest.fixture(scope="module")
def model(mesh):
    return random_model(SIZES, mesh, seed=0)


@pytest.fixture(scope="module")
def examples():
    """32 worked problems of the miniature, of at most 47 symbols, as the loop hands them over."""
    texts = pretraining_examples(MINIATURE, seed=1, row=48)
    lines = [next(texts) for _ in range(32)]
    return [{"tokens": encode(line), "prompt_length": line.index("?") + 1, "weight": 1.0} for line in lines]


@pytest.fixture(scope="module")
def rows(examples):
    return to_rows(examples, SFT, PAD_ID)


@pytest.fixture(scope="module")
def undisturbed(model, rows, mesh):
    return tune(model, rows, SFT, mesh)
