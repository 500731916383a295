"""`jaxmerge improve`: the loop, and the one place of a run that touches disk.

    run_phases: for every phase of the plan that is not committed: compute it, commit it.

What a phase needs from earlier ones is in memory if this process made it, else read back from the run folder.
Weights go from phase to phase as arrays on the mesh; Orbax keeps a copy for the next start.
"""

from __future__ import annotations

import dataclasses
import shutil
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import jax
import numpy as np
import yaml

import jaxmerge

from . import checkpoint, evaluate, export, round, summary
from .config import Improve, Sampling, Selection, Sft
from .config import Merge as MergeConfig
from .generate.rollout import Sample, Settings, batched, rollout
from .journal import Journal, write_durably
from .learn.dataset import read_jsonl, read_version, write_jsonl, write_version
from .learn.sft import fine_tune, steps_of, to_rows
from .log import UserError, progress, say
from .mesh import make_mesh, shardings
from .models.decoder import Params, shapes
from .models.load import Model, load_model
from .models.source import load_source
from .plan import BASE, Outcome, Phase, Plan, plan
from .resolve import build, differences, fingerprint, to_dict
from .tasks import Question, build_suite

Row = dict[str, Any]


def improve(config: Improve, *, name: str, out: Path | None = None, command: str = "") -> Path:
    """Run or resume a self-improvement run; returns its folder.

    Args:
      name: of the config; part of the default folder's name.
      out: run folder; `runs/<name>-<8 hex of the config>` by default.
      command: what reproduces the run, for the report.

    Raises:
      UserError: the folder holds a run of another config, or a phase met a mistake of the user's.
    """
    folder = out or Path("runs") / f"{name}-{fingerprint(config)}"
    check_same_config(folder, config)
    finished = summary.read_finished(folder)
    if finished is not None:
        summary.show(finished, folder)
        return folder
    todo, outcomes = plan(config)
    with Journal(folder) as journal:
        write_durably(folder / "config.yaml", yaml.safe_dump(to_dict(config), sort_keys=False, allow_unicode=True))
        journal.reconcile(phase.name for phase in todo.phases)
        run = Run(config, journal, todo, outcomes, name=name, command=command)
        run.run_phases()
        summary.show(run.summarise(finished=True), folder)
    return folder


def check_same_config(folder: Path, config: Any) -> None:
    """Refuse to mix two runs in one folder."""
    path = folder / "config.yaml"
    if not path.exists():
        return
    theirs = yaml.safe_load(path.read_text())
    changed = differences(to_dict(config), theirs if isinstance(theirs, dict) else {})
    if changed:
        raise UserError(
            f"{folder} holds a run of another config ({'; '.join(changed)}); choose another folder with out=DIR"
        )


class Run:
    """One run in one process: the model, the questions, and the phases that work on them."""

    def __init__(
        self, config: Improve, journal: Journal, todo: Plan, outcomes: Sequence[Outcome], *, name="", command=""
    ):
        self.config, self.journal, self.todo, self.outcomes = config, journal, todo, outcomes
        self.name, self.command = name, command
        self.mesh = make_mesh(config.mesh)
        self.suite = build_suite(config.tasks.families, seed=config.tasks.seed, style=config.tasks.style)
        self.key = jax.random.key(config.seed)
        self.loaded: Model | None = None
        self.held: dict[str, Params] = {}
        self.steps: dict[str, Callable[[Phase, Path], Row]] = {
            "load": self.load,
            "sample": self.sample,
            "select": self.select,
            "sft": self.sft,
            "merge": self.merge,
            "rank": self.rank,
            "probe": self.probe,
            "evaluate": self.evaluate,
        }

    # --- the loop ---

    def run_phases(self) -> None:
        """Compute and commit what is not committed; let go of weights after their last use."""
        for index, phase in enumerate(self.todo.phases):
            if self.journal.committed(phase.name) is None:
                start = time.perf_counter()
                record = self.steps[phase.kind](phase, self.journal.folder(phase.name))
                self.journal.commit(
                    phase.name,
                    {"kind": phase.kind, "round": phase.round, "method": phase.method}
                    | ({"shared_by": phase.shared_by} if phase.shared_by else {})
                    | {"seconds": time.perf_counter() - start, **record},
                )
                if phase.kind == "evaluate":
                    self.summarise(finished=False)
            if phase.kind == "sft":
                shutil.rmtree(self.checkpoints(phase.name) / "state", ignore_errors=True)
            self.held = {name: p for name, p in self.held.items() if self.todo.last_use(name) > index}
            self.retain(index)

    def retain(self, index: int) -> None:
        """Delete the weights of rounds older than `keep` that no later phase reads."""
        if self.config.keep is None:
            return
        done = self.todo.phases[: index + 1]
        oldest = max(p.round for p in done) - self.config.keep
        for phase in done:
            if 0 < phase.round <= oldest and phase.makes_weights and self.todo.last_use(phase.name) <= index:
                shutil.rmtree(self.checkpoints(phase.name), ignore_errors=True)

    def summarise(self, *, finished: bool) -> Row:
        return summary.write(self, finished=finished)

    # --- models ---

    @property
    def model(self) -> Model:
        """The base model, loaded when first needed, and checked to be the one the run began with."""
        if self.loaded is None:
            self.loaded = load_source(self.config.model, self.mesh, seed=self.config.seed)
            record = self.journal.committed(f"{BASE}/load")
            found = checkpoint.digest(self.loaded.params)
            if record is not None and record["digest"] != found:
                raise UserError(
                    f"{self.config.model.path}: the weights changed since this run began (sha256 {found[:12]}…, "
                    f"then {record['digest'][:12]}…); restore them or choose another folder with out=DIR"
                )
        return self.loaded

    def checkpoints(self, name: str) -> Path:
        return self.journal.root / "checkpoints" / name

    def weights(self, name: str) -> Params:
        """The weights a phase made: held, read from its checkpoint, or (merges) made again from its inputs."""
        if name == BASE:
            return jaxmerge.onload(self.model.params)
        if name not in self.held:
            phase = self.todo[name]
            if phase.kind == "probe":
                self.held[name], _ = self.probed(phase)
            else:
                self.held[name] = self.read_weights(self.checkpoints(name) / "weights")
        return self.held[name]

    def read_weights(self, path: Path) -> Params:
        like = shapes(self.model.config)
        return checkpoint.load_weights(path, checkpoint.abstract(like, shardings(self.mesh, like)))

    def keep_weights(self, phase: Phase, params: Params) -> Row:
        """Put weights on disk and in memory; what the record says of them."""
        checkpoint.save_weights(self.checkpoints(phase.name) / "weights", params)
        self.held[phase.name] = params
        return {"digest": checkpoint.digest(params), "change": round.change(params, self.weights(BASE))}

    # --- phases: each returns what its record says ---

    def load(self, phase: Phase, folder: Path) -> Row:
        del phase, folder
        jaxmerge.check_finite(self.model.params, name=self.config.model.path or "model.random")
        export.describe(self.model, self.journal.root / "model")
        count = sum(x.size for x in jax.tree.leaves(self.model.params))
        digest = checkpoint.digest(self.model.params)
        if any(m.merge.get("offload", self.config.merge.offload) for m in self.config.methods.values()):
            self.loaded = dataclasses.replace(self.model, params=jaxmerge.offload(self.model.params))
        say(f"{self.config.model.path or 'random model'}: {count / 1e6:.1f} M parameters on {self.mesh.size} device(s)")
        return {"parameters": count, "digest": digest, "majority": self.suite.majority_baselines()}

    def sample(self, phase: Phase, folder: Path) -> Row:
        config: Sampling = phase.settings
        questions = self.suite.questions("train", domain="id")
        settings = Settings(
            config.samples,
            config.temperature,
            config.top_k,
            config.top_p,
            config.max_new_tokens,
            config.stop,
            config.slots,
            self.config.model.dtype,
        )
        key = jax.random.fold_in(self.key, phase.round)
        rows, seconds = self.generate(
            phase.inputs["model"], questions, settings, key, folder, batch=config.batch, title=phase.name
        )
        tokens = sum(len(r["tokens"]) for r in rows)
        return {
            "questions": len(questions),
            "samples": len(rows),
            "tokens": tokens,
            "tokens_per_second": tokens / seconds if seconds else None,
        }

    def generate(
        self,
        model: str,
        questions: Sequence[Question],
        settings: Settings,
        key,
        folder: Path,
        *,
        batch: int,
        title: str,
    ) -> tuple[list[Row], float]:
        """Completions of every question, committed a batch at a time to `folder`; (rows, seconds spent here)."""
        prompts = round.prompts(self.suite, self.model.tokenizer, questions, self.config.tasks.few_shot)
        groups = list(batched(prompts, batch))
        paths = [folder / f"batch-{i:04d}.jsonl" for i in range(len(groups))]
        done = sum(len(g) for g, path in zip(groups, paths, strict=True) if path.exists()) * settings.samples
        start = time.perf_counter()
        with progress(title, total=len(prompts) * settings.samples, unit="samples", done=done) as bar:
            for group, path in zip(groups, paths, strict=True):
                if path.exists():
                    continue
                samples = rollout(
                    self.model.config,
                    self.weights(model),
                    self.model.tokenizer,
                    group,
                    settings,
                    key,
                    on_sample=lambda tokens: bar.advance(1),
                )
                write_jsonl(path, [sample_row(s) for s in samples])
        return [row for path in paths for row in read_jsonl(path)], time.perf_counter() - start

    def select(self, phase: Phase, folder: Path) -> Row:
        config: Selection = phase.settings
        questions = self.suite.questions("train", domain="id")
        source = self.todo[phase.inputs["samples"]]
        rows = [
            row
            for path in sorted(self.journal.committed_folder(source.name).glob("batch-*.jsonl"))
            for row in read_jsonl(path)
        ]
        scored = round.verify(self.suite, {q.id: q for q in questions}, rows)
        earlier = [
            row
            for role, name in phase.inputs.items()
            if role.startswith("earlier")
            for row in self.read_examples(self.todo[name])
        ]
        examples, counts = round.select(
            self.suite,
            self.model.tokenizer,
            questions,
            scored,
            config,
            shots=self.config.tasks.few_shot,
            seed=self.config.seed * 1000 + phase.round,
            earlier=earlier,
        )
        if not examples:
            failures = self.suite.unjudged()
            raise UserError(
                f"{phase.name}: none of {len(rows)} samples can be trained on ({counts['correct']} right, "
                f"{counts['unjudged']} could not be judged{f': {failures}' if failures else ''}, "
                f"{counts['unfinished']} unfinished); take an easier family, more samples, a higher "
                "sampling.max_new_tokens, or selection.real_ratio above 0"
            )
        write_jsonl(folder / "scored.jsonl", [{k: r[k] for k in ("question_id", "sample", "score")} for r in scored])
        provenance = {
            "round": phase.round,
            "method": phase.method,
            "model": self.digest(source.inputs["model"]),
            "seed": self.config.seed,
            "sampling": to_dict(source.settings),
            "selection": to_dict(config),
            "counts": {k: v for k, v in counts.items() if isinstance(v, int)},
        }
        name, version = dataset_of(phase)
        write_version(self.journal.root / "samples", name, version, examples, provenance)
        return {**counts, "dataset": f"{name}/{version}"}

    def digest(self, model: str) -> str:
        record = self.journal.committed(f"{BASE}/load" if model == BASE else model)
        assert record is not None, f"{model} is read before it is committed"
        return record["digest"]

    def read_examples(self, phase: Phase) -> list[Row]:
        return read_version(self.journal.root / "samples", *dataset_of(phase))[0]

    def sft(self, phase: Phase, folder: Path) -> Row:
        config: Sft = phase.settings
        rows = to_rows(self.read_examples(self.todo[phase.inputs["data"]]), config, self.model.tokenizer.pad_id or 0)
        home = self.checkpoints(phase.name)
        kept = checkpoint.SftCheckpoints(home / "state", home / "snapshots")
        with progress(phase.name, total=steps_of(rows, config), unit="steps") as bar:
            params, log = fine_tune(
                self.model.config,
                self.weights(phase.inputs["model"]),
                rows,
                config,
                mesh=self.mesh,
                seed=self.config.seed * 1000 + phase.round,
                dtype=self.config.model.dtype,
                checkpoints=kept,
                on_step=lambda m: bar.advance(1, note=f"loss {m['loss']:.3f}"),
            )
        write_jsonl(folder / "steps.jsonl", log)
        thin = max(1, len(log) // 200)
        return {
            "steps": len(log),
            "epochs": config.epochs,
            "examples": len(rows.tokens),
            "dropped": rows.dropped,
            "tokens": int(sum(m["targets"] for m in log)),
            "learning_rate": config.learning_rate,
            "loss": [[m["step"], m["loss"]] for m in log[::thin]],
            "loss_first": log[0]["loss"],
            "loss_last": log[-1]["loss"],
            **self.keep_weights(phase, params),
        }

    def merge(self, phase: Phase, folder: Path) -> Row:
        config = build(MergeConfig, phase.settings["merge"], "merge")
        anchor, tuned = (self.weights(phase.inputs[role]) for role in ("anchor", "tuned"))
        key = jax.random.fold_in(jax.random.fold_in(self.key, phase.round), np.uint32(0xDA2E))
        reference = None
        if config.reference != "anchor":
            reference = load_model(config.reference, sharding=shardings(self.mesh, shapes(self.model.config))).params

        def merged(alpha):
            return round.merge(anchor, tuned, config, alpha, reference=reference, key=key)

        searched: Row = {}
        if isinstance(config.alpha, dict) and "search" in config.alpha:
            scores = {}
            for alpha in config.alpha["search"]:
                self.held["candidate"] = merged(alpha)
                scores[alpha] = self.validate("candidate", folder / f"alpha-{alpha:g}", f"{phase.name} α={alpha:g}")
            self.held.pop("candidate", None)
            alpha = max(scores, key=lambda a: (scores[a], -a))
            searched = {"searched": {f"{a:g}": s for a, s in scores.items()}}
        else:
            alpha = jaxmerge.alpha_schedule(phase.round, self.config.rounds, config.alpha)
        return {
            "rule": config.rule,
            "coefficients": {"alpha": alpha, "drop": config.drop, **searched},
            "anchor": phase.inputs["anchor"],
            **self.keep_weights(phase, merged(alpha)),
        }

    def validate(self, model: str, folder: Path, title: str) -> float:
        """Mean over the domains of the accuracy on validation questions: what searches maximise."""
        questions = self.suite.questions("validation")
        if not questions:
            raise UserError(f"{title}: a search needs validation questions; give tasks.families validation: N")
        folder.mkdir(exist_ok=True)
        scores, _ = self.answer(model, questions, folder, title)
        table = evaluate.rows(questions, scores, method="", round=0, seconds=0.0)
        pooled = [row["accuracy"] for row in table if row["family"] == "all"]
        return sum(pooled) / len(pooled)

    def rank(self, phase: Phase, folder: Path) -> Row:
        """Order the snapshots of a fine-tuning run by their accuracy on validation."""
        paths = self.snapshots(phase.inputs["snapshots"])
        scores = []
        for index, path in enumerate(paths):
            self.held["candidate"] = self.read_weights(path)
            scores.append(self.validate("candidate", folder / f"snapshot-{index}", f"{phase.name} {index}"))
        self.held.pop("candidate", None)
        best = sorted(range(len(scores)), key=lambda i: (-scores[i], i))
        return {"scores": scores, "best": best}

    def snapshots(self, name: str) -> list[Path]:
        """The snapshots of a fine-tuning run in the order of their steps; the last one is its result."""
        home = self.checkpoints(name)
        early = sorted((home / "snapshots").glob("[0-9]*"), key=lambda p: int(p.name))
        return [*early, home / "weights"]

    def probe(self, phase: Phase, folder: Path) -> Row:
        del folder
        self.held[phase.name], notes = self.probed(phase)
        record = {"change": round.change(self.held[phase.name], self.weights(BASE)), **notes}
        return {"rule": phase.settings["kind"], "digest": checkpoint.digest(self.held[phase.name]), **record}

    def probed(self, phase: Phase) -> tuple[Params, Row]:
        """A probe's weights from its inputs: cheap and exact, so they are not kept on disk."""
        base, settings = self.weights(BASE), phase.settings
        kind = settings["kind"]
        if kind == "expo":
            alpha = settings["alpha"]
            tuned = self.weights(phase.inputs["tuned"])
            return jaxmerge.extrapolate([tuned], base=base, alpha=alpha), {"coefficients": {"alpha": alpha}}
        if kind == "line":
            coefficient = settings["coefficient"]
            tuned = self.weights(phase.inputs["tuned"])
            merged = jaxmerge.extrapolate([tuned], base=base, alpha=coefficient - 1.0)
            return merged, {"coefficients": {"lambda": coefficient}}
        record = self.journal.committed(phase.inputs["rank"])
        assert record is not None, f"{phase.inputs['rank']} is read before it is committed"
        paths = self.snapshots(phase.inputs["tuned"])
        chosen = [self.read_weights(paths[i]) for i in record["best"][:2]]
        alphas, weights = settings["alphas"], settings["weights"]
        merged = jaxmerge.extrapolation_merge(chosen, base=base, alphas=alphas, weights=weights)
        cosine = float(jaxmerge.collinear(chosen, base=base)[0, 1])
        notes = []
        if abs(cosine) > 0.999:
            line = sum(w * (1 + a) for w, a in zip(weights, alphas, strict=True))
            notes = [
                f"the two checkpoints lie on one line through the base (cosine {cosine:.4f}): this is ExPO with "
                f"another coefficient (about 1 + α = {line:.3f}), not a method of its own"
            ]
        return merged, {
            "coefficients": {"alphas": alphas, "weights": weights},
            "snapshots": record["best"][:2],
            "cosine": cosine,
            "notes": notes,
        }

    def evaluate(self, phase: Phase, folder: Path) -> Row:
        questions = [q for split in self.config.evaluation.splits for q in self.suite.questions(split)]
        if not questions:
            raise UserError(f"evaluation.splits={list(self.config.evaluation.splits)}: no family has such questions")
        scores, seconds = self.answer(phase.inputs["model"], questions, folder, phase.name)
        outcome = next(o for o in self.outcomes if o.evaluate == phase.name)
        table = evaluate.rows(
            questions, scores, method=phase.method, round=phase.round, seconds=seconds, **outcome.extra
        )
        write_jsonl(folder / "scores.jsonl", [{"question_id": q.id, "score": scores[q.id]} for q in questions])
        return {"model": phase.inputs["model"], "rows": table}

    def answer(self, model: str, questions: Sequence[Question], folder: Path, title: str):
        """Greedy answers, judged: ({question id: 1.0 or 0.0}, seconds); what cannot be judged counts as wrong."""
        config = self.config.evaluation
        settings = Settings(
            max_new_tokens=config.max_new_tokens, stop=config.stop, slots=config.slots, dtype=self.config.model.dtype
        )
        rows, seconds = self.generate(model, questions, settings, self.key, folder, batch=config.batch, title=title)
        scored = round.verify(self.suite, {q.id: q for q in questions}, rows)
        return {row["question_id"]: float(row["score"] == 1.0) for row in scored}, seconds

    def scores(self, name: str) -> dict[str, float]:
        """Right or wrong, question by question, of a committed evaluation."""
        return {r["question_id"]: r["score"] for r in read_jsonl(self.journal.committed_folder(name) / "scores.jsonl")}


def sample_row(sample: Sample) -> Row:
    return {
        "question_id": sample.prompt_id,
        "sample": sample.index,
        "text": sample.text,
        "tokens": list(sample.tokens),
        "reason": sample.reason,
    }


def dataset_of(phase: Phase) -> tuple[str, str]:
    """TFDS name and version of the examples a select phase writes: a dataset a method, a version a round."""
    return phase.method.replace("-", "_").lower(), f"{phase.round}.0.0"
