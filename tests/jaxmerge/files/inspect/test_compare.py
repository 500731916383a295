"""Comparing checkpoints: the measures against NumPy in float64, out of core, as a table and as a picture."""

import itertools
import json
import pathlib
import re
import xml.etree.ElementTree as ET

import ml_dtypes
import numpy as np
import pytest
from helpers.llamas import Reluctant
from safetensors.numpy import save_file

from jaxmerge.files.checkpoints.open import open_source
from jaxmerge.files.checkpoints.source import Source
from jaxmerge.files.inspect import compare as compare_module
from jaxmerge.files.inspect import moments, picture
from jaxmerge.files.inspect.canvas import LIGHT, text_width
from jaxmerge.files.inspect.compare import compare, statistics
from jaxmerge.files.inspect.table import table


def reference(base: np.ndarray, *others: np.ndarray) -> dict:
    """The definitions, in float64 and in the plainest way."""
    a, xs = base.astype(np.float64).ravel(), [x.astype(np.float64).ravel() for x in others]

    def cosine(u, v):
        length = np.linalg.norm(u) * np.linalg.norm(v)
        return u @ v / length if length else None

    models, pairs = [], []
    for x in xs:
        d = x - a
        models.append(
            {
                "norm": np.linalg.norm(d), "relative": np.linalg.norm(d) / np.linalg.norm(a), "cosine": cosine(a, x),
                "largest": np.abs(d).max(), "changed": np.mean(d != 0), "flipped": np.mean(np.sign(a) * np.sign(x) < 0),
            }
        )  # fmt: skip
    for i, j in itertools.combinations(range(len(xs)), 2):
        d, e = xs[i] - a, xs[j] - a
        both = (d != 0) & (e != 0)
        opposite = np.sign(d) * np.sign(e) < 0
        conflict = opposite.sum() / both.sum() if both.any() else None
        pairs.append({"models": [i, j], "cosine": cosine(d, e), "overlap": np.mean(both), "conflict": conflict})
    return {"elements": a.size, "norm": np.linalg.norm(a), "models": models, "pairs": pairs}


def near(found: dict, wanted: dict) -> None:
    def close(a, b, key=""):
        if isinstance(b, dict):
            for name in b:
                close(a[name], b[name], name)
        elif isinstance(b, list):
            assert len(a) == len(b)
            for one, two in zip(a, b, strict=True):
                close(one, two, key)
        elif key in ("changed", "flipped", "overlap", "conflict", "elements", "models"):
            assert a == b, key
        else:
            assert (a is None) if b is None else a == pytest.approx(b, rel=2e-6, abs=1e-7), key

    close(found, wanted)


def arrays(count: int, size: int, seed: int = 0, dtype: type = np.float32) -> list[np.ndarray]:
    """A base and models that changed a part of it."""
    r = np.random.default_rng(seed)
    base = r.standard_normal(size).astype(dtype)
    models = [
        np.where(r.random(size) < 0.7, base.astype(np.float32) + 0.1 * r.standard_normal(size), base).astype(dtype)
        for _ in range(count)
    ]
    return [base, *models]


@pytest.mark.parametrize("dtype", [np.float32, ml_dtypes.bfloat16, np.float16, np.float64])
@pytest.mark.parametrize("count", [1, 2, 4])
@pytest.mark.parametrize("size", [1, 8191, moments.BLOCK + 3])
def test_measures(dtype, count, size):
    given = arrays(count, size, dtype=dtype)
    near(statistics(*given), reference(*given))


def test_digits_of_the_cosine_of_nearly_equal_models():
    base, _ = arrays(1, 100_000)
    other = base * np.float32(1.0) + np.float32(1e-4) * np.random.default_rng(3).standard_normal(100_000).astype(
        np.float32
    )
    found, wanted = statistics(base, other), reference(base, other)
    assert 1 - found["models"][0]["cosine"] == pytest.approx(1 - wanted["models"][0]["cosine"], rel=1e-4)


def test_unequal_dtypes_and_integers():
    base, other = arrays(1, 1000)
    low = other.astype(ml_dtypes.bfloat16)
    near(statistics(base, low), reference(base, low))
    one, two = np.arange(2**40, 2**40 + 9), np.arange(2**40, 2**40 + 9) + 1
    assert statistics(one, two)["models"][0]["norm"] == 3.0


def test_nothing_changed_and_zero_bases():
    same = statistics(np.ones(4), np.ones(4), np.ones(4))
    assert (same["models"][0]["relative"], same["models"][0]["cosine"], same["models"][0]["changed"]) == (0.0, 1.0, 0.0)
    assert (same["pairs"][0]["cosine"], same["pairs"][0]["conflict"]) == (None, None)
    new = statistics(np.zeros(4), np.ones(4))
    assert (new["models"][0]["relative"], new["models"][0]["cosine"]) == (None, None)
    empty = statistics(np.zeros(0), np.zeros(0))
    assert empty["models"][0]["changed"] is None


def test_squares_beyond_float32():
    base, other = np.array([[1e30, 1.0], [-1e30, 1.0]], np.float32)
    near(statistics(base, other), reference(base, other))


def test_nonfinite_elements_are_set_aside():
    given = arrays(2, 1000)
    clean = [a.copy() for a in given]
    given[1][3], given[1][4], given[2][4], given[0][7] = np.nan, np.inf, -np.inf, np.nan
    for a in clean:
        a[[3, 4, 7]] = 0
    near(statistics(*given), reference(*clean))


# --- folders -----------------------------------------------------------------------------------------------

SHAPES = {
    "model.embed_tokens.weight": (16, 6),
    **{f"model.layers.{l}.mlp.up_proj.weight": (8, 6) for l in range(3)},
    **{f"model.layers.{l}.self_attn.q_proj.weight": (6, 6) for l in range(3)},
    **{f"model.layers.{l}.input_layernorm.weight": (6,) for l in range(3)},
    "model.norm.weight": (6,),
    "lm_head.weight": (16, 6),
}


def weights(seed: int, dtype: type = np.float32) -> dict[str, np.ndarray]:
    base, own = np.random.default_rng(0), np.random.default_rng(seed)
    return {
        n: (base.standard_normal(s) + (0.1 * own.standard_normal(s) if seed else 0)).astype(dtype)
        for n, s in SHAPES.items()
    }


def source(path: pathlib.Path, tensors: dict[str, np.ndarray]) -> Source:
    path.mkdir()
    save_file(tensors, path / "model.safetensors")
    (path / "config.json").write_text("{}")
    return open_source(str(path))


@pytest.fixture
def three(tmp_path):
    return [source(tmp_path / name, weights(i, ml_dtypes.bfloat16)) for i, name in enumerate(["base", "one", "two"])]


def test_tensors_layers_and_all(three):
    result = compare(*three)
    given = [weights(i, ml_dtypes.bfloat16) for i in range(3)]
    assert set(result["tensors"]) == set(SHAPES)
    for name, found in result["tensors"].items():
        near(found, reference(*(w[name] for w in given)))
        assert (found["shape"], found["dtypes"]) == (list(SHAPES[name]), ["bfloat16"] * 3)
    layers = {n: n.rpartition(".")[0].replace(".", "/") for n in SHAPES if "layers" not in n}
    layers |= {n: f"model/layers/{n.split('.')[2]}" for n in SHAPES if "layers" in n}
    for group, found in result["layers"].items():
        names = [n for n in SHAPES if layers[n] == group]
        near(found, reference(*(np.concatenate([w[n].ravel() for n in names]) for w in given)))
    near(result["overall"], reference(*(np.concatenate([w[n].ravel() for n in SHAPES]) for w in given)))
    assert result["bytes"] == 3 * sum(w.nbytes for w in given[0].values())
    json.dumps(result, allow_nan=False)


def test_neither_chunks_nor_threads_matter(three, monkeypatch):
    whole = compare(*three, threads=1)
    monkeypatch.setattr(compare_module, "SPAN", 7)
    one, four = (compare(*three, threads=threads) for threads in (1, 4))
    for result in (whole, one, four):
        result.pop("seconds")
    assert one == four
    near(one["overall"], whole["overall"])


def test_a_tensor_that_cannot_be_read_in_parts_is_read_once(three, monkeypatch):
    monkeypatch.setattr(compare_module, "SPAN", 7)
    name = "lm_head.weight"
    three[1].tensors[name] = slow = Reluctant(three[1].tensors[name])
    near(compare(*three)["tensors"][name], reference(*(weights(i, ml_dtypes.bfloat16)[name] for i in range(3))))
    assert slow.reads == 1


def test_progress(three):
    seen = []
    result = compare(*three, progress=lambda *args: seen.append(args))
    assert [done for done, _, _ in seen] == sorted(done for done, _, _ in seen)
    assert seen[-1][0] == seen[-1][1] == result["bytes"]
    assert {name for _, _, name in seen} == set(SHAPES)


def odd(tmp_path) -> list[Source]:
    """A base, and a model with other tensors, other shapes and elements that are not finite."""
    other = weights(1)
    del other["model.norm.weight"]
    other["score.weight"] = np.zeros((2, 6), np.float32)
    other["lm_head.weight"] = np.zeros((17, 6), np.float32)
    other["model.layers.1.mlp.up_proj.weight"][0, :3] = [np.nan, np.inf, np.nan]
    return [source(tmp_path / "base", weights(0)), source(tmp_path / "other", other)]


def test_what_does_not_match_is_listed(tmp_path):
    base, other = odd(tmp_path)
    result = compare(base, other)
    assert result["missing"] == {other.name: ["model.norm.weight"]}
    assert result["extra"] == {other.name: ["score.weight"]}
    assert result["unlike"] == [
        {"tensor": "lm_head.weight", "base": base.name, "model": other.name, "found": [17, 6], "wanted": [16, 6]}
    ]
    name = "model.layers.1.mlp.up_proj.weight"
    assert result["nonfinite"] == [{"model": other.name, "tensor": name, "nan": 2, "infinite": 1}]
    assert len(result["tensors"]) == len(SHAPES) - 2
    json.dumps(result, allow_nan=False)
    text = table(result)
    for piece in ("lacks 1 tensors", "has besides 1 tensors", "[17, 6]", "2 NaN, 1 infinite in A model.layers.1"):
        assert piece in text


def test_refused(tmp_path, three):
    with pytest.raises(ValueError, match="name at least one model"):
        compare(three[0])
    with pytest.raises(ValueError, match="no tensor in common"):
        compare(three[0], source(tmp_path / "x", {"other": np.zeros(3, np.float32)}))


def test_an_error_while_reading_is_raised(three):
    file = pathlib.Path(three[1].tensors["lm_head.weight"].where)
    file.write_bytes(file.read_bytes()[:-40])
    with pytest.raises(ValueError, match="truncated"):
        compare(*three)


# --- table and picture -------------------------------------------------------------------------------------


def made(layers: int, models: int, more: tuple[str, ...] = (), name: str = "tuned") -> dict:
    """A result of many layers, without files."""
    r = np.random.default_rng(0)
    kinds = ["self_attn.q_proj", "self_attn.k_proj", "mlp.down_proj", "input_layernorm", *more]
    names = ["model.embed_tokens.weight", *(f"model.layers.{l}.{k}.weight" for l in range(layers) for k in kinds)]
    parts = {
        n: moments.Workspace(models, np.dtype(np.float32)) for n in [*names, "model.norm.weight", "lm_head.weight"]
    }
    totals = {}
    for n, work in parts.items():
        base = r.standard_normal(20).astype(np.float32)
        totals[n] = work.measure(
            [base, *(base + np.float32(10.0 ** r.integers(-7, 1)) * base[::-1] for _ in range(models))]
        )
    groups: dict = {}
    for n, total in totals.items():
        group = compare_module.where.layer_group(n.replace(".", "/"))
        groups[group] = groups[group] + total if group in groups else total
    labels = [f"{name}-{i}" for i in range(models)]
    return {
        "base": "base", "models": labels, "tensors": {n: moments.summarise(t) for n, t in totals.items()},
        "layers": {n: moments.summarise(t) for n, t in groups.items()},
        "overall": moments.summarise(sum(totals.values(), start=moments.Moments.zero(models))),
        "missing": dict.fromkeys(labels, names[:9]), "extra": {m: [] for m in labels}, "unlike": [], "nonfinite": [],
    }  # fmt: skip


CASES = [made(2, 1), made(32, 2), made(130, 3, ("mlp." + "very" * 20,)), made(3, 9, name="long/" * 40), made(0, 1)]


@pytest.mark.parametrize("result", CASES)
def test_table_fits_and_is_aligned(result):
    lines = table(result).split("\n")
    assert max(map(len, lines)) <= 100
    rows = lines[len(result["models"]) + 2 :][: len(result["layers"]) + 2]
    assert rows[0].startswith("layer")
    assert [row.split()[0] for row in rows[1:]] == [*result["layers"], "all"]
    count = len(re.split(r"\s{2,}", rows[-1].strip()))
    # Columns are apart: each row has as many fields as the last.
    assert all(
        len(re.findall(r"(?:× )?[^\s%]+(?: %)?", row)) == len(re.findall(r"(?:× )?[^\s%]+(?: %)?", rows[-1]))
        for row in rows[1:]
    )
    assert count >= 4
    assert ("… and 4 more" in table(result)) == (len(result["layers"]) > 3)


def boxes(root: ET.Element) -> list[tuple[str, tuple[float, float, float, float]]]:
    """Where each text is, in the font that matplotlib measures with; what readers have is narrower."""
    found = []
    for text in root.iter("{http://www.w3.org/2000/svg}text"):
        size = float(text.get("font-size", "nan"))
        width = text_width(text.text or "", size, bold=text.get("font-weight") == "600")
        x, y = float(text.get("x", 0)), float(text.get("y", 0))
        left = x - {"start": 0, "middle": width / 2, "end": width}[text.get("text-anchor", "start")]
        found.append((text.text or "", (left, y - 0.8 * size, left + width, y + 0.2 * size)))
    return found


@pytest.mark.parametrize("result", CASES)
def test_picture_is_whole_and_nothing_overlaps(result):
    root = ET.fromstring(picture.svg(result))
    width, height = float(root.get("width", 0)), float(root.get("height", 0))
    texts = boxes(root)
    for text, (left, top, right, bottom) in texts:
        assert left >= 0, text
        assert right <= width, text
        assert top >= 0, text
        assert bottom <= height, text
    for (one, a), (two, b) in itertools.combinations(texts, 2):
        apart = a[2] <= b[0] or b[2] <= a[0] or a[3] <= b[1] or b[3] <= a[1]
        assert apart, (one, two)
    cells = list(root.iter("{http://www.w3.org/2000/svg}rect"))[1:]  # the first is the paper
    for cell in cells:
        x, y, w, h = (float(cell.get(k, 0)) for k in ("x", "y", "width", "height"))
        assert x >= 0
        assert x + w <= width
        assert y + h <= height
        for text, (left, top, right, bottom) in texts:
            assert x + w <= left or right <= x or y + h <= top or bottom <= y, text
    kinds = 4 + (len(result["tensors"]) > 600)
    layers = sum(g.startswith("model/layers/") for g in result["layers"])
    shades = picture.SHADES + 1
    assert len(cells) == shades + len(result["models"]) * (kinds * layers + 3)


def test_picture_says_its_numbers(three):
    result = compare(*three)
    text = picture.svg(result)
    assert "prefers-color-scheme:dark" in text
    share = result["tensors"]["model.layers.2.self_attn.q_proj.weight"]["models"][1]["relative"]
    assert f"q, layer 2: {100 * share:.3g} %" in text
    assert f"lm_head {100 * result['layers']['lm_head']['models'][0]['relative']:.3g} %" in text


def test_picture_of_models_that_do_not_change_and_of_nasty_names(tmp_path):
    base = source(tmp_path / "base", weights(0))
    result = compare(base, base)
    result["models"] = ['<script>alert("x")</script>\x00\ud800&']
    root = ET.fromstring(picture.svg(result))
    shades = {r.get("fill") for r in list(root.iter("{http://www.w3.org/2000/svg}rect"))[picture.SHADES + 2 :]}
    assert shades == {LIGHT["paper"]}
    assert not list(root.iter("{http://www.w3.org/2000/svg}script"))
    assert "�" in table(result)


def test_several_containers_of_layers():
    result = made(2, 1)
    result["tensors"] |= {f"vision.blocks.{n}": v for n, v in made(1, 1)["tensors"].items() if "layers.0" in n}
    text = picture.svg(result)
    assert ">model/layers<" in text
    assert ">vision/blocks/model/layers<" in text
