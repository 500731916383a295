"""Datasets of the Hugging Face hub by name, wherever a file of examples is taken: `hf:ORG/NAME`.

    hf:ORG/NAME[/SUBSET][@REVISION][:SPLIT]
    hf:openai/gsm8k/main@e53f048:test

Files are downloaded once, by the hub's own client, and then read from its cache (HF_HOME), also where there is no
network. A revision may be a branch, a tag or a commit; a run replaces it by the commit it found (`pin`), so that it
goes on with the same examples.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar, cast

from jaxmerge import install

from ..log import UserError
from ..resolve import build, read_yaml, to_dict
from ..runtime.jsonl import Row, numbered_jsonl
from .layout import Layout, lay_out

T = TypeVar("T")
PREFIX = "hf:"
FORM = "hf:ORG/NAME[/SUBSET][@REVISION][:SPLIT], such as hf:openai/gsm8k/main:train"
CONVERTED = "refs/convert/parquet"
"""The branch in which the hub keeps its own conversion of a dataset to parquet."""
NOT_MODELS = ("model", "roles")
"""Keys of configs under which a `path` is a model's."""
_NAME = re.compile(
    r"hf:(?P<repo>\w[\w.-]*/\w[\w.-]*)(?:/(?P<subset>[^@:\s]+))?(?:@(?P<revision>[\w./-]+))?(?::(?P<split>\w[\w.+-]*))?"
)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclasses.dataclass(frozen=True)
class Name:
    """A dataset's name, taken apart; parts that are not given are empty."""

    repo: str
    subset: str = ""
    revision: str = ""
    split: str = ""

    def __str__(self) -> str:
        parts = (("/", self.subset), ("@", self.revision), (":", self.split))
        return f"{PREFIX}{self.repo}{''.join(sign + part for sign, part in parts if part)}"

    @property
    def stem(self) -> str:
        """What a file's name would be: `gsm8k_main`."""
        return "_".join(filter(None, (self.repo.partition("/")[2], self.subset.replace("/", "_"))))


class Dataset(NamedTuple):
    """A dataset at one commit.

    Attributes:
      files: names of its files; where the hub could not be asked, those in the cache.
      asked: whether the hub was asked.
    """

    repo: str
    commit: str
    layout: Layout
    asked: bool


def is_hub(path: Any) -> bool:
    """Whether a path names a dataset of the hub."""
    return str(path).startswith(PREFIX)


def parse(path: Any) -> Name:
    """Take a name apart.

    Example:
      >>> parse("hf:openai/gsm8k/main@v1:test")
      Name(repo='openai/gsm8k', subset='main', revision='v1', split='test')
    """
    match = _NAME.fullmatch(str(path))
    if match is None:
        raise UserError(f"{path}: no name of a dataset; write {FORM}")
    return Name(**{part: text or "" for part, text in match.groupdict().items()})


def one_split(path: Any, given: str | None, default: str = "train") -> str:
    """The split that is read: what the name says, else `given`, else the default; refused where the two differ."""
    name = parse(path)
    if name.split and given not in (None, default, name.split):
        raise UserError(f"{path} names the split {name.split}, and split is {given}; give one of them")
    return name.split or given or default


def splits_of(path: Any) -> list[str]:
    """The splits of the subset that a path names."""
    name = parse(path)
    return list(splits(name, dataset_of(name.repo, name.revision)))


def read(path: Any, split: str) -> Iterator[tuple[str, Row]]:
    """The rows of a split, each with its place for errors; files are downloaded unless they are in the cache.

    Parquet has a value for every column in every row: those that are null are left out, as JSON lines leave them out.

    Raises:
      UserError: no such dataset, revision, subset or split, a dataset that is closed to this user, or no network and
        nothing in the cache.
    """
    name = parse(path)
    found = dataset_of(name.repo, name.revision)
    known = splits(name, found)
    label = str(dataclasses.replace(name, split=split))
    if split not in known:
        raise UserError(f"{label}: no split {split!r}; there are: {', '.join(known)}{unasked(found)}")
    number = 0
    for file in known[split]:
        with closed(label):
            from huggingface_hub import hf_hub_download

            local = Path(hf_hub_download(found.repo, file, repo_type="dataset", revision=found.commit))
        for row in read_file(local, f"{label}, {file}"):
            number += 1
            yield f"{label}, row {number}", row


def read_file(local: Path, where: str) -> list[Row]:
    """The rows of a file of parquet or of JSON lines."""
    if local.suffix != ".parquet":
        return [row for _, row in numbered_jsonl(local)]
    try:
        import pyarrow
        from pyarrow import parquet
    except ImportError as error:
        raise UserError(f"{where}: reading parquet needs pyarrow ({error}); {install.extra('train')}") from error
    try:
        rows = parquet.ParquetFile(local).read().to_pylist()
    except (pyarrow.ArrowException, OSError) as error:
        raise UserError(f"{where}: could not be read: {' '.join(str(error).split())[:200]}") from error
    return [without_nulls(row) for row in rows]


def without_nulls(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without_nulls(v) for key, v in value.items() if v is not None}
    return [without_nulls(v) for v in value] if isinstance(value, list) else value


def splits(name: Name, found: Dataset) -> Mapping[str, list[str]]:
    """Split → files of the subset that a name means."""
    layout, subset = found.layout, name.subset or found.layout.default
    if subset is None:
        raise UserError(
            f"{name}: the dataset has the subsets {shown(layout.subsets)}; name one: {PREFIX}{name.repo}/SUBSET"
        )
    if subset not in layout.subsets:
        raise UserError(f"{name}: no subset {subset!r}; there are: {shown(layout.subsets)}{unasked(found)}")
    return layout.subsets[subset]


def shown(names: Mapping[str, Any], most: int = 40) -> str:
    listed = ", ".join(list(names)[:most])
    return f"{listed} and {len(names) - most} more" if len(names) > most else listed


def unasked(found: Dataset) -> str:
    return "" if found.asked else " in the cache; the hub could not be asked for others (no network, or HF_HUB_OFFLINE)"


@functools.lru_cache(maxsize=64)
def dataset_of(repo: str, revision: str) -> Dataset:
    """A dataset at the commit that a revision is now, or was when it was last asked for; '' is the default branch.

    Where the default branch holds no file that can be read, the hub's own conversion to parquet is taken.
    """
    where = str(Name(repo, "", revision))
    found = at_revision(repo, revision or None, where)
    if not found.layout.subsets and not revision:
        with contextlib.suppress(UserError):
            found = at_revision(repo, CONVERTED, where)
    if not found.layout.subsets and not found.asked:
        raise UserError(unreachable(where))
    if not found.layout.subsets:
        raise UserError(
            f"{where}: it holds no parquet and no JSON lines, and the hub has no conversion of it; "
            "download it and write JSON lines (docs/data.md)"
        )
    return found


def at_revision(repo: str, revision: str | None, where: str) -> Dataset:
    with closed(where):
        from huggingface_hub import HfApi, errors, snapshot_download

        from jaxmerge.files.checkpoints.hub import connection_error  # settings are read without jax

        head = {"repo_type": "dataset", "revision": revision, "allow_patterns": ["README.md", ".gitattributes"]}
        try:
            files = [file.rfilename for file in HfApi().dataset_info(repo, revision=revision).siblings or ()]
        except errors.RevisionNotFoundError:
            raise
        except (OSError, connection_error(errors)) as error:
            try:
                folder = Path(snapshot_download(repo, local_files_only=True, **head))
            except errors.LocalEntryNotFoundError:
                raise error from None
            files = None
        else:
            # This keeps in the cache which commit the revision is, for times without a network.
            folder = Path(snapshot_download(repo, **head))
    here = sorted(p.relative_to(folder).as_posix() for p in folder.rglob("*") if p.is_file())
    card = folder / "README.md"
    text = card.read_text(encoding="utf-8", errors="replace") if card.is_file() else ""
    return Dataset(repo, folder.name, lay_out(here if files is None else files, text, where), files is not None)


def unreachable(where: str) -> str:
    return (
        f"{where}: it is not in the cache, and the hub cannot be reached (no network, or HF_HUB_OFFLINE is set); fetch "
        f"it where there is a network: jaxmerge data {where}"
    )


@contextlib.contextmanager
def closed(where: str) -> Iterator[None]:
    """Say in one line what kept a dataset from being fetched, and the way out."""
    try:
        from huggingface_hub import errors
    except ImportError as error:
        raise UserError(
            f"{where}: huggingface_hub is not installed, which downloads datasets; {install.extra('files')}"
        ) from error
    from jaxmerge.files.checkpoints.hub import connection_error

    try:
        yield
    except errors.GatedRepoError as error:
        raise UserError(
            f"{where}: its owner grants access one by one; ask for it on its page, then log in: hf auth login"
        ) from error
    except errors.RevisionNotFoundError as error:
        raise UserError(f"{where}: the dataset has no such revision") from error
    except errors.RepositoryNotFoundError as error:
        raise UserError(
            f"{where}: the hub has no such dataset, or it is private; if it is yours, log in: hf auth login"
        ) from error
    except (errors.HfHubHTTPError, errors.HFValidationError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"{where}: the hub does not give it ({reason})") from error
    except (errors.LocalEntryNotFoundError, connection_error(errors), ConnectionError) as error:
        raise UserError(unreachable(where)) from error
    except OSError as error:
        raise UserError(f"{where}: could not be written to the cache: {error.strerror or error}") from error


# --- the commit of a run -----------------------------------------------------------------------------------


def pin(config: T, folder: Path, on_first: Callable[..., Any]) -> T:
    """A config in which every dataset of the hub is named with its commit.

    It is the commit that the run in `folder` began with, or else the one that the hub has now.

    Args:
      on_first: calls a function on the first of several processes and tells all of them what it returned.
    """
    values = to_dict(config)
    wanted = sorted({path for path in paths_in(values) if not _COMMIT.fullmatch(parse(path).revision)})
    if not wanted:
        return config
    pins = on_first(pins_of, wanted, folder / "config.yaml")
    return build(cast(Any, type(config)), replaced(values, pins))


def pins_of(paths: list[str], begun: Path) -> dict[str, str]:
    """Path → the same with its commit."""
    there = [parse(path) for path in paths_in(read_yaml(begun))] if begun.is_file() else []
    pins = {}
    for path in paths:
        name = parse(path)
        twins = [other for other in there if dataclasses.replace(other, revision=name.revision) == name]
        commits = {other.revision for other in twins if _COMMIT.fullmatch(other.revision)}
        commit = commits.pop() if len(commits) == 1 else dataset_of(name.repo, name.revision).commit
        pins[path] = str(dataclasses.replace(name, revision=commit))
    return pins


def paths_in(values: Any) -> Iterator[str]:
    """Every dataset of the hub that a config names, as plain data."""
    if isinstance(values, Mapping):
        for key, value in values.items():
            if key == "path" and isinstance(value, str) and is_hub(value):
                yield value
            elif key not in NOT_MODELS:
                yield from paths_in(value)
    elif isinstance(values, list | tuple):
        for value in values:
            yield from paths_in(value)


def replaced(values: Any, pins: Mapping[str, str]) -> Any:
    """The same plain data with other names of datasets."""
    if isinstance(values, Mapping):
        return {
            key: pins.get(value, value) if key == "path" and isinstance(value, str)
            else value if key in NOT_MODELS else replaced(value, pins)
            for key, value in values.items()
        }  # fmt: skip
    return [replaced(value, pins) for value in values] if isinstance(values, list | tuple) else values
