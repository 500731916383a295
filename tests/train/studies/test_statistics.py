"""`statistics`: gradients and activations of a tiny model beside float64, and the recipes that read them."""

import json
import pathlib

import jax
import numpy as np
import pytest
import yaml
from helpers import analysis_by_hand as hand
from safetensors.numpy import load_file

from train.cli import __main__ as cli
from train.models.hf import save_hf
from train.models.open import open_model, random_model
from train.runtime.mesh import make_mesh
from train.runtime.settings import Mesh
from train.studies import statistics
from train.studies.statistics_settings import Read, StatisticsOptions

SIZES = {
    "hidden_size": 4, "intermediate_size": 6, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1, "head_dim": 2, "max_position_embeddings": 32, "tie_word_embeddings": False,
    "rms_norm_eps": hand.CONFIG.rms_norm_eps, "initializer_range": 0.7,
}  # fmt: skip
TEMPLATE = (
    "{% for m in messages %}{{ m.role[0] }}: {{ m.content }};{% endfor %}{% if add_generation_prompt %}a: {% endif %}"
)
ROWS = [
    {"messages": [{"role": "user", "content": "1+2"}, {"role": "assistant", "content": "3"},
                  {"role": "user", "content": "2+2"}, {"role": "assistant", "content": "4"}]},
    {"messages": [{"role": "user", "content": "17+25+3="}, {"role": "assistant", "content": "45"}]},
    {"messages": [{"role": "user", "content": "9-8"}, {"role": "assistant", "content": "1"}]},
]  # fmt: skip


def words(root, name, kind, *more):
    places = [str(root / part) for part in (name, "data.jsonl", f"{kind}-{name}")]
    return ["statistics", *places, f"kind={kind}", f"data.chat_template={root / 'chat.jinja'}", *more]


@pytest.fixture(scope="module")
def measured(tmp_path_factory):
    """Two models, examples of one padded length, and the statistics of both kinds of each model."""
    root = tmp_path_factory.mktemp("measured")
    for seed, name in enumerate(("one", "two")):
        model = random_model(SIZES, make_mesh(Mesh()), seed=seed)
        save_hf(root / name, model.config, model.params, tokenizer_from=model.tokenizer)
    (root / "chat.jinja").write_text(TEMPLATE)
    (root / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in ROWS))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(statistics, "TOKENS_AT_ONCE", 64)  # two rows, then one beside a row that is none
        for name in ("one", "two"):
            for kind in ("fisher", "gram"):
                assert cli.main(words(root, name, kind)) == 0
    return root


def of(root, kind):
    return load_file(root / kind / "statistics.safetensors")


def examples(root, model):
    options = StatisticsOptions("gram", Read(chat_template=str(root / "chat.jinja")))
    return statistics.sequences(model, str(root / "data.jsonl"), options)


def test_fisher_is_the_mean_squared_gradient_of_the_answers(measured):
    """Beside central differences of a float64 decoder in NumPy."""
    model = open_model(str(measured / "one"))
    tree, given = hand.float64(model.params), examples(measured, model)
    assert [sum(one.learnt) > 1 for one in given] == [True] * 3  # two answers of the first, and the end of each turn
    found = of(measured, "fisher-one")
    assert set(found) == {name.replace("/", ".") for name in jax.tree.leaves(paths(tree))}

    def likelihood(one):  # of the tokens of the answers alone
        places = [i for i, is_learnt in enumerate(one.learnt) if is_learnt]
        return -sum(hand.nll(tree, [(one.tokens[:i], one.tokens[i : i + 1])]) for i in places)

    rng, step = np.random.default_rng(0), 1e-5
    for name, array in found.items():
        leaf = tree
        for key in name.split("."):
            leaf = leaf[key]
        rows = (given[0].tokens[3],) if "embed" in name else range(array.shape[0])
        for _ in range(2):
            at = (rng.choice(rows), *(rng.integers(size) for size in array.shape[1:]))
            before, values = leaf[at], {}
            for sign in (1, -1):
                leaf[at] = before + sign * step
                values[sign] = np.asarray([likelihood(one) for one in given])
            leaf[at] = before
            wanted = np.mean(((values[1] - values[-1]) / (2 * step)) ** 2)
            np.testing.assert_allclose(array[at], wanted, rtol=1e-3, atol=1e-7, err_msg=name)


def paths(tree):
    return jax.tree_util.tree_map_with_path(lambda path, leaf: "/".join(entry.key for entry in path), tree)


def test_grams_are_of_what_enters_each_linear_layer(measured):
    model = open_model(str(measured / "one"))
    tree, given = hand.float64(model.params), examples(measured, model)
    sums = {}
    for one in given:
        x = tree["model"]["embed_tokens"]["weight"][list(one.tokens)]
        for layer in (0, 1):
            seen = {}
            x = hand.block(tree["model"]["layers"][str(layer)], x, seen)
            for name, entered in seen.items():
                name = f"model.layers.{layer}.{name}.weight"
                sums[name] = sums.get(name, 0) + entered.T @ entered
        last = hand.norm(x, tree["model"]["norm"]["weight"])
        sums["lm_head.weight"] = sums.get("lm_head.weight", 0) + last.T @ last
    said = json.loads((measured / "gram-one" / "statistics.json").read_text())
    assert (said["kind"], said["model"], said["examples"]) == ("gram", str(measured / "one"), 3)
    assert said["tokens"] == sum(len(one.tokens) for one in given)
    found = of(measured, "gram-one")
    assert set(found) == set(sums)
    for name, array in found.items():
        np.testing.assert_allclose(array, sums[name] / said["tokens"], rtol=1e-4, atol=1e-5, err_msg=name)


@pytest.mark.parametrize(("method", "kind"), [("fisher", "fisher"), ("regmean", "gram")])
def test_recipes_read_them(measured, tmp_path, capsys, method, kind):
    models = [{"model": str(measured / of), "statistics": str(measured / f"{kind}-{of}")} for of in ("one", "two")]
    (tmp_path / "recipe.yaml").write_text(yaml.safe_dump({"merge_method": method, "models": models}))
    place = [str(tmp_path / "recipe.yaml"), str(tmp_path / "out")]
    assert cli.main(["merge", *place, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert ("regmean averages what has no Gram matrix: 6 tensors" in said) == (kind == "gram")
    assert cli.main(["merge", *place]) == 0
    assert cli.main(["verify", str(tmp_path / "out")]) == 0
    folders = (tmp_path / "out", measured / "one", measured / "two")
    found, one, two = (load_file(folder / "model.safetensors") for folder in folders)
    name = "model.layers.1.mlp.down_proj.weight"
    assert not np.allclose(found[name], (one[name] + two[name]) / 2, atol=1e-3)


def test_what_is_refused(measured, tmp_path, capsys):
    def refused(*command):
        assert cli.main([str(word) for word in command]) == 2
        said = capsys.readouterr().err
        assert said.count("\n") == 1
        return said

    model, data = measured / "one", tmp_path / "data.jsonl"
    assert "kind is missing; it has no default" in refused("statistics", model, data, tmp_path / "out")
    assert "kind is 'hessian'; it must be one of fisher, gram" in refused(
        "statistics", model, data, tmp_path / "out", "kind=hessian"
    )
    assert "already there and not empty" in refused("statistics", model, data, measured / "gram-one", "kind=gram")
    data.write_text(json.dumps({"prompt": "1+1=", "completion": "2" * 40}) + "\n")
    assert "example 1 has 45 tokens, and the model ends at 32; leave it out" in refused(
        "statistics", model, data, tmp_path / "out", "kind=gram"
    )
    data.write_text(json.dumps({"prompt": "1+1=", "chosen": "2", "rejected": "3"}) + "\n")
    assert "example 1 is a pair of answers" in refused("statistics", model, data, tmp_path / "out", "kind=fisher")
    assert not pathlib.Path(tmp_path / "out").exists()
