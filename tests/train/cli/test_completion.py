"""The scripts of `jaxmerge completion`: what a shell offers after each word."""

import re
import shutil
import subprocess

import pytest

from train.cli.completion import SHELLS, script
from train.cli.keys import settable
from train.cli.verbs import VERBS

DRIVER = """
source completion
COMP_WORDS=({words})
COMP_CWORD=$(({number} - 1))
_jaxmerge
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def offered(tmp_path):
    """What bash offers for the last of some words, split as bash splits them: `=` is a word of its own."""
    (tmp_path / "completion").write_text(script("bash", VERBS))
    (tmp_path / "tiny.yaml").write_text("")
    (tmp_path / "folder with spaces").mkdir()

    def complete(*words: str) -> list[str]:
        driver = DRIVER.format(words=" ".join(f"'{word}'" for word in ("jaxmerge", *words)), number=len(words) + 1)
        done = subprocess.run(
            ["bash", "--norc", "-c", driver], cwd=tmp_path, capture_output=True, text=True, check=True
        )
        assert done.stderr == ""
        return [line for line in done.stdout.splitlines() if line]

    return complete


def test_bash_offers_verbs_then_keys_flags_and_files(offered):
    assert offered("") == [*VERBS, "--help", "--version"]
    assert offered("ex") == ["extract-lora", "export"]
    assert offered("--v") == ["--version"]
    assert offered("improve", "merge.al") == ["merge.alpha="]
    assert offered("improve", "ti") == ["tiny.yaml"]
    assert offered("merge", "--") == ["--dry-run", "--help"]
    assert offered("merge", "tiny.yaml", "s") == ["seed="]
    assert offered("inspect", "")[:4] == ["picture=", "json=", "spectrum=", "--help"]
    assert sorted(offered("inspect", "")[4:]) == ["completion", "folder with spaces", "tiny.yaml"]
    assert offered("inspect", "json", "=", "ti") == offered("inspect", "json", "=")[-1:] == ["tiny.yaml"]
    assert offered("inspect", "f") == ["folder with spaces"]
    assert offered("no-such-verb", "zz") == []


@pytest.mark.parametrize("shell", SHELLS)
def test_every_shell_knows_every_verb_and_every_key(shell):
    text = script(shell, VERBS)
    for name, verb in VERBS.items():
        (line,) = re.findall(rf"^(?: +{name}\)|.*seen_subcommand_from {name}\").*$", text, re.MULTILINE)
        words = set(re.split(r"[\s\"()=]+", line))
        assert set(settable((*verb.settings, *verb.also))) <= words, name
        assert {*verb.flags, "--help"} <= words, name
    assert "NAME" not in text
    assert "[]" not in text
    assert not re.search("@[A-Z]+@", text)


@pytest.mark.parametrize("shell", SHELLS)
def test_the_shell_reads_its_script(shell, tmp_path):
    """By the shell itself where it is installed; brackets and quotes are in pairs in any case."""
    text = script(shell, VERBS)
    for line in text.splitlines():
        if not line.lstrip().startswith(("#", "esac")):
            assert line.count('"') % 2 == 0, line
    assert text.count("case ") == text.count("esac")
    assert text.count("{") == text.count("}")
    if shutil.which(shell):
        (tmp_path / "script").write_text(text)
        done = subprocess.run([shell, "-n", str(tmp_path / "script")], capture_output=True, text=True, check=False)
        assert (done.returncode, done.stderr) == (0, "")
