"""Effective ranks and shared directions of changes, against singular value decompositions and planted subspaces."""

import json

import numpy as np
import pytest
from helpers import llamas

from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.inspect.spectrum import decompose, effective_rank, spectra, spectrum_table
from train.cli import __main__ as cli


def basis(seed, n, count):
    return np.linalg.qr(np.random.default_rng(seed).standard_normal((n, count)))[0]


@pytest.mark.parametrize("shape", [(12, 30), (30, 12), (9, 9)])
def test_values_and_vectors_are_those_of_an_svd(shape):
    delta = 1e-4 * np.random.default_rng(0).standard_normal(shape)
    values, vectors = decompose(delta)
    u, s, v = np.linalg.svd(delta, full_matrices=False)
    np.testing.assert_allclose(values, s, rtol=1e-7)
    short = u if shape[0] <= shape[1] else v.T
    np.testing.assert_allclose(np.abs(np.sum(vectors * short, axis=0)), 1, atol=1e-6)


def test_the_effective_rank_of_equal_values_is_their_number():
    for count in (1, 3, 7):
        delta = basis(0, 20, count) @ basis(1, 16, count).T
        assert effective_rank(decompose(delta)[0]) == pytest.approx(count, rel=1e-4)
    values = np.array([4.0, 2.0, 1.0, 1.0])
    shares = values / 8
    assert effective_rank(values) == pytest.approx(np.exp(-np.sum(shares * np.log(shares))))


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Changes of two directions in one matrix: A and B share one of them, C has the other matrices alone."""
    root = tmp_path_factory.mktemp("models")
    base = llamas.tensors(0, layers=1)
    llamas.folder(root / "base", base, layers=1)
    name = "model.layers.0.mlp.up_proj.weight"
    rows, columns = base[name].shape
    left = basis(2, min(rows, columns), 3)
    right = basis(3, max(rows, columns), 2)

    def changed(directions):
        delta = left[:, directions] @ right.T
        delta = delta if rows <= columns else delta.T
        return {**base, name: base[name] + (1e-2 * delta).astype(np.float32)}

    llamas.folder(root / "a", changed([0, 1]), layers=1)
    llamas.folder(root / "b", changed([0, 2]), layers=1)
    other = next(n for n in base if "q_proj" in n)
    llamas.folder(root / "c", {**base, other: base[other] + np.float32(0.01)}, layers=1)
    return root, name


def test_planted_directions_are_found(folders):
    root, name = folders
    found = spectra(*(open_source(str(root / n)) for n in ("base", "a", "b", "c")), rank=2)
    entry = found["tensors"][name]
    assert entry["effective_rank"] == pytest.approx([2, 2, 0], abs=0.05)
    assert entry["overlap"] == [pytest.approx(0.5, abs=1e-3), None, None]
    assert entry["chance"] == pytest.approx(2 / min(open_source(str(root / "a")).tensors[name].shape))
    layer = found["layers"]["model/layers/0"]
    assert layer["overlap"][0] == pytest.approx(0.5, abs=1e-3)  # of the matrices that both changed
    assert all(len(e["effective_rank"]) == 3 for e in found["tensors"].values())
    assert not any("norm" in n for n in found["tensors"])


def test_the_command_prints_and_writes_it(folders, tmp_path, capsys):
    root, _ = folders
    words = ["inspect", str(root / "base"), f"{root / 'a'},{root / 'b'}", "spectrum=2", f"json={tmp_path / 'x.json'}"]
    assert cli.main(words) == 0
    out = capsys.readouterr().out
    found = json.loads((tmp_path / "x.json").read_text())["spectrum"]
    assert spectrum_table(found) in out
    assert "50.0 %" in out
    assert cli.main(["inspect", str(root / "base"), "spectrum=2"]) == 2
    assert "give BASE and MODELS" in capsys.readouterr().err
    with pytest.raises(ValueError, match="wanted at least 1"):
        spectra(open_source(str(root / "base")), open_source(str(root / "a")), rank=0)
