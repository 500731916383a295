"""Tests that `make test` leaves out are those that tests/helpers/tiers.py names, and it names what there is."""

import re

import pytest
from helpers import ROOT, tiers


@pytest.mark.parametrize(("path", "starts"), tiers.TESTS.items(), ids=list(tiers.TESTS))
def test_every_long_test_exists(path, starts):
    names = re.findall(r"^def (test_\w+)", (ROOT / path).read_text(), re.MULTILINE)
    assert [start for start in starts if not any(name.startswith(start) for name in names)] == []


@pytest.mark.parametrize(("path", "parameter"), [(path, name) for path, (name, _) in tiers.KINDS.items()])
def test_every_parameter_exists(path, parameter):
    given = re.findall(r"parametrize\(\(?([^\[)=]+)[,)]", (ROOT / path).read_text())
    assert any(f'"{parameter}"' in names for names in given)


def test_which_are_long():
    contract = "tests/jaxmerge/test_contract.py"
    assert tiers.is_long(contract, "test_merging_x_with_x_is_x", {"name": "wudi"})
    assert not tiers.is_long(contract, "test_merging_x_with_x_is_x", {"name": "ties"})
    assert not tiers.is_long(contract, "test_lookup_lists_the_rules", {})
    assert tiers.is_long("tests/train/search/test_run.py", "test_anything", {})
    assert tiers.is_long("tests/train/learn/test_sft.py", "test_what_decays", {})
    assert not tiers.is_long("tests/train/learn/test_sft.py", "test_speed_is_in_the_metrics", {})


def test_what_is_wanted(monkeypatch):
    for given, wanted in {"no": (True, False), "1": (True, True), "only": (False, True)}.items():
        monkeypatch.setattr(tiers, "LONG", given)
        assert (tiers.is_wanted(False), tiers.is_wanted(True)) == wanted
