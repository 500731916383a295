"""The library for a person at a prompt: signatures, names, the table of rules, and what a misspelt name is told."""

import doctest
import inspect
import json
import pkgutil
import pydoc
import re
import subprocess
import sys
import tomllib
import types
import typing

import jax
import jax.numpy as jnp
import pytest
from helpers import ROOT

import jaxmerge
from jaxmerge import RULES
from jaxmerge.contract import coefficients_of
from jaxmerge.rules import RULES as REGISTRY
from jaxmerge.rules import families, paper, plain

COMPOSED = {
    "of trim": jaxmerge.delta_rule(jaxmerge.trim(), "l1", jaxmerge.elect_sign),
    "of rank_drop": jaxmerge.delta_rule(jaxmerge.rank_drop(0.5), "inverse"),
    "of nothing": jaxmerge.delta_rule(),
    "masked": jaxmerge.masked(jaxmerge.ties, "mlp"),
}
EVERY = RULES | COMPOSED
TREES = {"mask", "reference"}  # pytrees, which may be anything
ONE, BASE = {"layers": [{"w": jnp.ones(3)}] * 2}, {"layers": [{"w": jnp.zeros(3)}] * 2}


@pytest.mark.parametrize("name", EVERY)
def test_the_one_signature_with_every_coefficient_in_sight(name):
    parameters = list(inspect.signature(EVERY[name]).parameters.values())
    assert [p.name for p in parameters[:6]] == ["models", "base", "key", "names", "stacked", "donate"]
    assert [p.default for p in parameters[1:6]] == [None, None, None, (), False]
    assert {p.kind for p in parameters[1:]} == {inspect.Parameter.KEYWORD_ONLY}
    assert {p.name for p in parameters[6:]} == set(coefficients_of(EVERY[name]))
    assert all(p.annotation is not inspect.Parameter.empty for p in parameters)


@pytest.mark.parametrize("name", RULES)
def test_coefficients_have_real_types(name):
    hints = typing.get_type_hints(RULES[name])
    for coefficient, parameter in coefficients_of(RULES[name]).items():
        kind = hints[coefficient]
        assert kind is not typing.Any or coefficient in TREES, coefficient
        if parameter.default not in (inspect.Parameter.empty, None):
            kinds = typing.get_args(kind) if typing.get_origin(kind) in (typing.Union, types.UnionType) else (kind,)
            values = [value for k in kinds for value in typing.get_args(k)]
            assert type(parameter.default) in kinds or parameter.default in values, coefficient


def test_what_help_shows():
    text = pydoc.plain(pydoc.render_doc(jaxmerge.ties))
    assert "density: 'PerModel', weights: 'PerModel' = 1.0, scale: 'Coefficient' = 1.0, normalize: 'bool' = " in text
    assert "density: 'PerModel' = 0.5, epsilon: 'PerModel' = 0.15" in pydoc.plain(
        pydoc.render_doc(COMPOSED["of rank_drop"])
    )
    assert "density" not in coefficients_of(COMPOSED["of nothing"])
    assert coefficients_of(COMPOSED["of trim"])["rescale"].default == "l1"
    required = {n for n in RULES if any(p.default is p.empty for p in coefficients_of(RULES[n]).values())}
    assert required == {
        "extrapolate", "extrapolation_merge", "dare", "dare_linear", "dare_ties", "ties", "della", "della_linear",
        "breadcrumbs", "breadcrumbs_ties", "nearswap", "fisher", "regmean", "grafting",
    }  # fmt: skip


def test_a_rule_may_not_hide_its_coefficients():
    with pytest.raises(TypeError, match=r"rule mine takes \*rest, which hides its coefficients; write each"):

        @jaxmerge.requires()
        def mine(models, *, base=None, key=None, names=None, stacked=(), **rest):
            return models[0]


def test_no_module_has_the_name_of_a_rule_or_of_a_public_function():
    modules = {module.name for module in pkgutil.iter_modules(jaxmerge.__path__)}
    assert "where" in modules
    assert modules.isdisjoint(RULES)
    assert modules.isdisjoint(jaxmerge.__all__)
    code = (
        "import jaxmerge, pkgutil\nfor m in pkgutil.iter_modules(jaxmerge.__path__): __import__('jaxmerge.' + m.name)"
    )
    code += "\nprint(all(getattr(jaxmerge, name) is rule for name, rule in jaxmerge.RULES.items()))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "True"
    assert set(RULES) <= set(jaxmerge.__all__)


def test_jax_is_imported_with_the_first_name_and_not_before():
    """`jaxmerge --help` lies in this package."""
    code = (
        "import jaxmerge, sys\nassert 'jax' not in sys.modules\nassert jaxmerge.__version__\n"
        "assert 'jax' not in sys.modules\nfrom jaxmerge import *\nassert jaxmerge.ties is ties is RULES['ties']\n"
        "assert 'jax' in sys.modules\nprint({*jaxmerge.__all__} <= {*dir(jaxmerge)} & {*globals()})"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "True"


def test_every_module_can_be_the_first_that_is_imported():
    """The package brings no other module along, so none may count on what came before it."""
    code = (
        "import importlib, pkgutil, sys, jaxmerge\n"
        "for module in [m.name for m in pkgutil.iter_modules(jaxmerge.__path__)]:\n"
        "    for name in [n for n in sys.modules if n.partition('.')[0] == 'jaxmerge']: del sys.modules[name]\n"
        "    found = importlib.import_module('jaxmerge.' + module)\n"
        "    assert getattr(importlib.import_module('jaxmerge'), module) is found\n"
        "print('done')"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.stdout.strip(), done.stderr) == ("done", "")


def test_the_version():
    assert jaxmerge.__version__ == tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["version"]
    assert (ROOT / "jaxmerge" / "py.typed").is_file()


def test_rules_print_as_a_table():
    head, line, *rows = repr(RULES).splitlines()
    assert head.split() == ["rule", "needs", "formula", "paper"]
    starts = [found.start() for found in re.finditer("─+", line)]
    cells = {
        row.split()[0]: [row[a:b].strip() for a, b in zip(starts, [*starts[1:], None], strict=True)] for row in rows
    }
    assert list(cells) == list(RULES)
    assert cells["ties"] == [
        "ties", "≥1 models, base", "θ_b + λ Σ_i M_i w_i d_i / Σ_i M_i w_i", "Yadav et al., arXiv:2306.01708",
    ]  # fmt: skip
    assert cells["slerp"][3] == "Shoemake, 1985"
    for name, (_, needs, formula, _) in cells.items():
        assert needs == str(RULES[name].needs)
        assert formula
        assert not set("\\{}") & set(formula), name
    assert max(map(len, repr(RULES).splitlines())) <= 150
    assert paper("no references") == ""
    assert plain(r"\frac12") == "frac12"


def test_a_new_rule_is_in_the_table_and_in_its_family_by_its_entry_alone(monkeypatch):
    @jaxmerge.requires(base="required")
    def sign_mean(models, *, base=None, key=None, names=None, stacked=(), scale: float = 1.0):
        r"""Add signs: $\theta_b + \lambda \sum_i \mathrm{sign}\,\tau_i$."""
        return base

    monkeypatch.setitem(REGISTRY, "sign_mean", sign_mean)
    assert repr(RULES).splitlines()[-1].split("  ")[0] == "sign_mean"
    assert "θ_b + λ Σ_i sign τ_i" in repr(RULES).splitlines()[-1]
    head, entry = families({"sign_mean": sign_mean}).splitlines()
    assert head == __doc__
    assert entry.split(maxsplit=1) == ["sign_mean", "Add signs: θ_b + λ Σ_i sign τ_i."]


def test_help_lists_the_rules_by_family():
    listed = pydoc.plain(pydoc.render_doc(jaxmerge))
    _, *groups = jaxmerge.__doc__.strip().split("\n\n")[1:]
    assert [group.splitlines()[0].split(":")[0] for group in groups][:3] == [
        "Linear rules", "Iterative model merging (IMM)", "Rules on the sphere",
    ]  # fmt: skip
    found = [line.split()[0] for group in groups for line in group.splitlines()[1:]]
    assert sorted(found) == sorted(RULES)
    (delta,) = (group for group in groups if "  ties " in group)
    assert {"dare", "della", "sce"} <= {line.split()[0] for line in delta.splitlines()}
    assert all(name in listed for name in RULES)


def test_a_misspelt_name_is_told_the_nearest():
    with pytest.raises(AttributeError, match=r"no attribute 'tise'; did you mean 'ties'\?$"):
        _ = jaxmerge.tise  # pyright: ignore
    with pytest.raises(AttributeError, match=r"no attribute 'nothing_like_it'$"):
        _ = jaxmerge.nothing_like_it  # pyright: ignore
    with pytest.raises(KeyError, match=r"no rule 'tise'; did you mean 'ties'\? there are interpolate, average, "):
        RULES["tise"]
    with pytest.raises(KeyError, match=r"no rule 3; there are"):
        RULES[3]  # type: ignore[index]
    assert RULES.get("tise") is None
    assert "tise" not in RULES
    for rule, given, words in [
        ("ties", {"densty": 0.2}, r"ties\(\) has no coefficient 'densty'; did you mean 'density'\? it takes density, "),
        (
            "extrapolate",
            {"alpa": 0.3},
            r"extrapolate\(\) has no coefficient 'alpa'; did you mean 'alpha'\? it",
        ),
        ("arcee_fusion", {"t": 1}, r"arcee_fusion\(\) has no coefficient 't'; it takes none"),
        ("extrapolate", {}, r"extrapolate\(\) needs alpha="),
        ("dare", {}, r"dare\(\) needs density="),
    ]:
        more = {"key": jax.random.key(0)} if RULES[rule].needs.key == "required" else {}
        with pytest.raises(TypeError, match=words):
            RULES[rule]([ONE], base=BASE, **more, **given)


def test_a_package_that_is_not_imported_says_how():
    code = "import jaxmerge\ntry: jaxmerge.files\nexcept AttributeError as e: print(e)\nfrom jaxmerge import files"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, cwd=ROOT)
    assert done.stdout.strip() == "jaxmerge.files is not imported yet; import jaxmerge.files"


def test_the_prompts_of_the_page_on_the_library():
    failed, tried = doctest.testfile(str(ROOT / "docs" / "library.md"), module_relative=False, encoding="utf-8")
    assert (failed, tried > 8) == (0, True)


SCRIPT = """\
import jax
import jaxmerge

tree = {"w": jax.numpy.ones(2)}
jaxmerge.ties([tree], base=tree)
jaxmerge.ties([tree], base=tree, densty=0.2, density=0.2)
jaxmerge.ties([tree], base=tree, density="a fifth")
jaxmerge.extrapolate([tree], base=tree)
jaxmerge.masked(jaxmerge.ties, "w")([tree], base=tree)
jaxmerge.tise
jaxmerge.della([tree], base=tree, density=0.2, rescale="l2", key=jax.random.key(0))

jaxmerge.ties([tree], base=tree, density=0.2, weights=[1, jax.numpy.float32(2)], scale={"w": [0.1, 0.2], "**": 1})
jaxmerge.dare([tree], base=tree, density=[{"w": 0.2}, [0.1, 0.2]], key=jax.random.key(0), rescale="l1")
jaxmerge.linear([tree, tree], weights=jax.numpy.ones(2), normalize=False)
jaxmerge.RULES["ties"]([tree], base=tree, density=0.2)
jaxmerge.delta_rule(jaxmerge.trim(0.2))([tree], base=tree, scale=0.5)
version: str = jaxmerge.__version__
"""


@pytest.mark.slow
def test_a_type_checker_flags_what_is_wrong_and_nothing_else(tmp_path):
    (tmp_path / "script.py").write_text(SCRIPT)
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, "script.py"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    errors = [e for e in json.loads(done.stdout)["generalDiagnostics"] if e["severity"] == "error"]
    found = {e["range"]["start"]["line"] + 1: e["message"] for e in errors}
    assert sorted(found) == [5, 6, 7, 8, 9, 10, 11], found
    assert 'Argument missing for parameter "density"' in found[5]
    assert 'No parameter named "densty"' in found[6]
    assert 'Argument missing for parameter "alpha"' in found[8]
    assert 'Argument missing for parameter "density"' in found[9]
