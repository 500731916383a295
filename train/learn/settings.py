"""How a model is fine-tuned, as configured: the examples a step takes, how one is computed, what is watched."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from ..log import UserError
from ..models.config import Lora
from ..models.settings import Source
from ..resolve import FINISH_WITH, at_least
from ..runtime.settings import Distributed, Mesh
from ..tasks.settings import FamilySpec, Ingredient
from .decay import Beside
from .distill import Distill
from .masks import Everything, Masking
from .objectives import ResponseOnly
from .optimizers import AdamW, Lion, Optimizer, ScheduleFree, Sgd
from .picks import All, Picking
from .registry import Objective


@dataclasses.dataclass(frozen=True)
class Step:
    """How one update of fine-tuning is computed."""

    attention: Literal["auto", "xla", "tiled", "cudnn", "splash"] = "auto"
    """Attention is computed by this program; auto takes tiled on CPUs, cudnn on GPUs and splash on TPUs if it can
    compute what the model needs, and xla otherwise."""
    remat: Literal["none", "full", "dots"] = "none"
    """The backward pass computes this again instead of keeping it: nothing, every layer (full), or all but matrix
    products (dots)."""
    layers: Literal["unrolled", "stacked"] = "unrolled"
    """stacked: one layer is compiled and run over all, which compiles many times faster; unrolled may run faster."""
    masters: Literal["float32", "bfloat16"] = "float32"
    """Weights are kept in this precision between the steps; bfloat16 halves them and loses updates below 1/256 of a
    weight. Moments are float32."""
    logits_at_once: int = 1024
    """The logits of this many tokens, of all rows of a device together, are in memory at a time."""
    clip: float = 1.0
    """A gradient whose global norm is larger than this is scaled down to it."""
    weight_decay: float = 0.0
    """An update subtracts ηλ times the parameter, whatever the optimizer: λ is this key and η the learning rate."""
    decay: tuple[str, ...] = ()
    """Parameters decay if their path matches one of these patterns; () means all except norms and biases."""
    ema: float = 0.0
    """Above 0, a moving average of the weights is returned; its decay at step n is this, at most (1 + n)/(10 + n)."""
    spike: float = 0.0
    """Above 0, an update is skipped if its loss exceeds this many times the median of the last 32 losses."""
    max_skipped: int = 3
    """Training stops if this many updates in a row were skipped (loss or gradient not finite, or a spike)."""
    router_aux_loss_coef: float | None = None
    """The load-balancing loss of a mixture of experts is added with this coefficient; null takes the one of the model's
    config.json, 0 adds none. A dense model has no such loss."""

    def __post_init__(self):
        at_least(self, "sft.step", logits_at_once=1, spike=0, max_skipped=1)
        if self.router_aux_loss_coef is not None:
            at_least(self, "sft.step", router_aux_loss_coef=0)
        if not self.clip > 0:
            raise UserError(
                f"sft.step.clip is {self.clip}; it must be above 0, the norm that gradients are scaled down to; to "
                "clip none give a large one, 1e9"
            )
        if not 0 <= self.ema < 1:
            raise UserError(f"sft.step.ema is {self.ema}; it must lie in [0, 1)")
        if 0 < self.spike <= 1:
            raise UserError(f"sft.step.spike is {self.spike}; it must be above 1, or 0 for never")


@dataclasses.dataclass(frozen=True)
class Watch:
    """What is measured while fine-tuning, and where it is written beside steps.jsonl."""

    held_out: int = 0
    """This many examples are kept out of the training, drawn by the seed, to measure the loss on. All examples of a
    question are kept out or none, so there may be a few more."""
    evaluate_every: int = 50
    """The held-out loss is measured every so many steps, and at the end."""
    sinks: tuple[Literal["tensorboard", "wandb"], ...] = ()
    """The metrics of every step are also sent there; `improve` sends those of every round too."""
    trace_from: int = 0
    """A profiler trace is written to `trace/` from this step on, counted from 1; 0 writes none."""
    trace_steps: int = 3
    """The profiler trace covers this many steps."""

    def __post_init__(self):
        at_least(self, "sft.watch", held_out=0, evaluate_every=1, trace_from=0, trace_steps=1)


@dataclasses.dataclass(frozen=True)
class Stay:
    """`sft.stay`; in `improve` the weights stayed near are the original model's, in every round."""

    l2: float = 0.0
    """The penalty λ/2 ‖θ − θ_0‖² has this λ; its gradient is added before clipping. 0 switches it off."""
    kl: float = 0.0
    """The penalty β D(p_θ, p_0), a mean over the learnt tokens, has this β, and both models are computed; 0: none."""
    divergence: Literal["forward", "reverse", "skewed", "skewed_reverse", "masked", "jsd"] = "forward"
    """D of the penalty `kl`: KL(p_0 ‖ p_θ) (forward), KL(p_θ ‖ p_0) (reverse), one of them with a tenth of the first
    distribution mixed into the second (skewed, skewed_reverse), forward without the token that is learnt (masked), or
    Jensen and Shannon's (jsd)."""
    freeze: tuple[str, ...] = ()
    """Parameters whose path matches one of these patterns keep their values."""
    stop_at: float = 1.0
    """Training stops after this share of the steps; the learning rate's schedule is that of all of them."""

    def __post_init__(self):
        at_least(self, "sft.stay", l2=0, kl=0)
        if not 0 < self.stop_at <= 1:
            raise UserError(f"sft.stay.stop_at is {self.stop_at}; it must be above 0 and at most 1")

    @property
    def penalised(self) -> bool:
        return self.l2 > 0 or self.kl > 0

    def last(self, steps: int) -> int:
        """The update that is the last one, of a schedule of `steps`."""
        return max(1, round(self.stop_at * steps))


@dataclasses.dataclass(frozen=True)
class Sft:
    """Supervised fine-tuning: an optimizer, warm-up then cosine, loss on the completion only."""

    learning_rate: float = 2e-5
    """This is the highest learning rate of the schedule."""
    epochs: int = 3
    """Each example is seen this many times."""
    batch: int = 64
    """An update takes this many examples (pairs of answers count once), over all devices; with packing, this many
    rows."""
    micro_batch: int | None = None
    """A forward pass takes this many rows, and the batch is accumulated from several; null takes the batch at once."""
    warmup: float = 0.03
    """The learning rate rises from 0 over this share of the steps."""
    schedule: Literal["cosine", "constant"] = "cosine"
    """The learning rate takes this course after the warm-up."""
    max_length: int = 512
    """An example has at most this many tokens; with packing a row has exactly this many."""
    overlong: Literal["drop", "truncate"] = "drop"
    """Longer examples are left out (drop), or cut at max_length (truncate); they are counted either way."""
    packing: bool = False
    """Several examples are put into a row, and `batch` counts rows. The loss stays that of the examples one by one."""
    share_prompts: bool = True
    """The two answers of a preference pair are put into one row behind their prompt, which is computed once, where that
    takes fewer operations; false gives each a row of its own. The loss is the same."""
    loss: Literal["completion", "all"] = "completion"
    """The loss is taken over the completion's tokens, or over the prompt's too (all)."""
    start: Literal["merged", "original"] = "merged"
    """A round is fine-tuned from the last merged model or from the original one."""
    snapshots: int = 1
    """This many checkpoints of a round are kept, equally spaced, the last at the end; exme picks from them."""
    checkpoint_every: int = 200
    """Training can resume from a checkpoint every so many steps; a kill loses at most these steps."""
    optimizer: Optimizer = dataclasses.field(default=AdamW(), metadata={FINISH_WITH: "aa22b70"})
    objective: Objective = dataclasses.field(default=ResponseOnly())
    step: Step = Step()
    watch: Watch = Watch()
    stay: Stay = Stay()
    distill: Distill | None = None
    """A teacher's next-token distributions are learnt; null learns what the objective says alone."""
    mask: Masking = dataclasses.field(default=Everything())
    beside: Beside = dataclasses.field(default=Beside())
    lora: Lora | None = None
    """Low-rank adapters {rank, alpha, targets, dropout} are trained and merged at the end; null trains all weights."""

    def __post_init__(self):
        at_least(self, "sft", epochs=1, batch=1, max_length=2, snapshots=1, checkpoint_every=1)
        if self.learning_rate < 0 or not 0 <= self.warmup <= 1:
            raise UserError(
                f"sft: learning_rate is {self.learning_rate} (≥ 0), warmup is {self.warmup} (a share, 0 to 1)"
            )
        if isinstance(self.optimizer, ScheduleFree) and (self.step.ema or self.step.masters != "float32"):
            raise UserError(
                f"sft.step: ema is {self.step.ema}, masters is {self.step.masters}; schedule_free keeps an average of "
                "its own, in float32: leave ema at 0 and masters at float32, or take another sft.optimizer"
            )
        if self.self_taught and (self.step.ema or isinstance(self.optimizer, ScheduleFree)):
            raise UserError(
                f"sft.distill.teacher is null: the average of the weights teaches, and step.ema={self.step.ema} or "
                "schedule_free would keep another one; leave step.ema at 0 and take another sft.optimizer, or give a "
                "teacher"
            )
        if self.beside.every and (self.step.ema or isinstance(self.optimizer, ScheduleFree)):
            raise UserError(
                "sft.beside: sft.step.ema and schedule_free return an average of their own; give one of the three"
            )
        if self.beside.every and self.lora is not None:
            raise UserError(
                "sft.beside: the mean of the products B·A is not the product of the means; leave sft.lora, or take "
                "sft.step.ema, which averages A and B"
            )
        if not isinstance(self.mask, Everything) and (self.lora is not None or self.step.layers == "stacked"):
            raise UserError(
                f"sft.mask is {self.mask.name}; it is of all weights, layer by layer: leave sft.lora, and "
                "sft.step.layers at unrolled"
            )
        if self.mask.sparse and not isinstance(self.optimizer, AdamW | Lion | Sgd):
            raise UserError(
                f"sft.mask: {self.mask.name} trains single entries, and {self.optimizer.name} does not work entry by "
                "entry; take adamw, lion or sgd"
            )
        if self.lora is not None and (self.stay.penalised or self.stay.freeze):
            raise UserError("sft.stay: l2, kl and freeze speak of all weights, sft.lora trains none of them; give one")
        if self.objective.learns in ("pairs", "labels") and (self.packing or self.loss == "all"):
            raise UserError(
                f"sft.objective: {self.objective.name} compares answers, each in a row of its own; leave sft.packing "
                "off and sft.loss at completion"
            )
        if self.objective.learns in ("pairs", "labels") and self.distill is not None:
            raise UserError(
                f"sft.distill is of single answers, and sft.objective {self.objective.name} compares; give one"
            )
        if self.micro_batch is not None and (self.micro_batch < 1 or self.batch % self.micro_batch):
            raise UserError(f"sft.micro_batch is {self.micro_batch}; it must divide sft.batch={self.batch}")

    @property
    def self_taught(self) -> bool:
        """Whether the average of the weights is kept to teach them."""
        return self.distill is not None and self.distill.by_itself

    @property
    def reads_original(self) -> bool:
        """Whether a round of `improve` reads the original model beside the one that it trains."""
        return self.stay.penalised or self.objective.reference_model() == "original"


@dataclasses.dataclass(frozen=True)
class Part:
    """One source of a mixture: a file, a dataset of the hub, a TFDS version, or reasoning-gym families."""

    path: str = ""
    """The part is this file of JSON lines, this dataset of the hub, or this folder of a TFDS version."""
    families: tuple[FamilySpec, ...] = ()
    """The part is drawn from these families instead of `path`."""
    rate: float | None = None
    """This share of the examples is drawn from the part, relative to the other parts' rates; null for all parts takes
    each example once an epoch."""
    format: str | None = None
    """The lines have this format; null tells it by their keys."""
    split: str = "train"
    """This split of a TFDS version or of a dataset on the hub is read."""
    ignore: tuple[str, ...] = ()
    """These keys of the lines are passed over; other unknown keys are errors."""
    stages: tuple[float, ...] = ()
    """Training goes through stages, and takes this share of the part's examples, 0 to 1, in each; () has no stages. All
    parts have as many."""

    def __post_init__(self):
        if any(not 0 <= share <= 1 for share in self.stages):
            raise UserError(
                f"data.parts: the stages of {self.path or 'a suite'} are {list(self.stages)}; shares, 0 to 1"
            )
        if bool(self.path) == bool(self.families):
            raise UserError("data.parts: a part has either a path or families, not both and not neither")
        if self.families and (self.format is not None or self.ignore):
            raise UserError("data.parts: format and ignore are of files; a part with families has neither")
        if self.rate is not None and not (self.rate > 0 and math.isfinite(self.rate)):
            raise UserError(f"data.parts: the rate of {self.path or 'a suite'} is {self.rate}; give a positive number")


@dataclasses.dataclass(frozen=True)
class Data:
    """Examples of `jaxmerge sft`: files, a mixture of sources, or text generated by the miniature's recipe."""

    path: str = ""
    """Examples are read from this file of JSON lines (prompt and completion, messages, Alpaca, GSM8K, MBPP, multiple
    choice, pairs of answers: told by the keys), this dataset of the hub (hf:ORG/NAME/SUBSET@REVISION:SPLIT), or this
    folder of a TFDS version: a set of ours, the samples of a run, or math_qa, ai2_arc, openbookqa, lbpp."""
    parts: tuple[Part, ...] = ()
    """Several sources are mixed at their rates, instead of `path`."""
    draws: int | None = None
    """An epoch of a mixture has this many examples; null goes on until every example of every part has come once."""
    format: str | None = None
    """The lines of `path` have this format; null tells it by their keys."""
    split: str = "train"
    """This split of a TFDS version or of a dataset on the hub is read."""
    ignore: tuple[str, ...] = ()
    """These keys of the lines are passed over; other unknown keys are errors."""
    pick: Picking = dataclasses.field(default=All())
    learn: Literal["assistant", "last", "each"] = "assistant"
    """These turns of a conversation have a loss: all of the assistant's; the last alone; or all, each in an example
    that ends with it, for templates that render earlier turns otherwise (Qwen3's, which drops their reasoning)."""
    chat_template: str = ""
    """Conversations are rendered with this Jinja file in place of the model's own template; it is saved with the tuned
    model."""
    pretraining_tokens: int = 0
    """This many tokens of worked problems are generated instead of reading `path`, in rows of `row` tokens, and every
    token is learnt."""
    ingredients: tuple[Ingredient, ...] = ()
    """The generated text is drawn from these families, each with its share."""
    row: int = 96
    """A row of generated text has this many tokens."""
    exclude: str = ""
    """The generated text holds none of the questions of the improve run with this config."""

    def __post_init__(self):
        if bool(self.path) + bool(self.parts) + bool(self.pretraining_tokens) != 1:
            raise UserError("data: give one of data.path, data.parts and data.pretraining_tokens")
        if self.pretraining_tokens and not self.ingredients:
            raise UserError("data.pretraining_tokens needs data.ingredients: families with their shares")
        if self.parts and (self.format is not None or self.ignore or self.split != "train"):
            raise UserError("data.format, data.split and data.ignore are of data.path; give them to each of data.parts")
        rated = sum(part.rate is not None for part in self.parts)
        if rated not in (0, len(self.parts)):
            raise UserError(f"data.parts: {rated} of {len(self.parts)} parts have a rate; give all one, or none")
        if self.draws is not None:
            at_least(self, "data", draws=1)
        counts = {len(part.stages) for part in self.parts}
        if len(counts) > 1:
            raise UserError(
                f"data.parts: the parts have {sorted(counts)} stages; give each as many, a share of 0 for none"
            )
        if any(counts) and (rated or self.draws is not None):
            raise UserError("data: with stages every part has its shares; leave out rate and draws")
        if empty := [
            i for i, shares in enumerate(zip(*(part.stages for part in self.parts), strict=True)) if not any(shares)
        ]:
            raise UserError(f"data.parts: no part has a share in stage {empty[0] + 1}; leave the stage out")

    @property
    def sources(self) -> tuple[Part, ...]:
        """The parts; `path` is one."""
        one = Part(self.path, format=self.format, split=self.split, ignore=self.ignore) if self.path else None
        return self.parts if one is None else (one,)


@dataclasses.dataclass(frozen=True)
class Finetune:
    """`jaxmerge sft`: one fine-tuning or pretraining run."""

    model: Source
    data: Data
    sft: Sft = dataclasses.field(default_factory=Sft)
    mesh: Mesh = dataclasses.field(default_factory=Mesh)
    distributed: Distributed = dataclasses.field(default_factory=Distributed)
    seed: int = 0
    """The order of the examples and every random draw come from this seed."""

    def __post_init__(self):
        if self.sft.self_taught:
            raise UserError(
                "sft.distill.teacher is null: the average of the student teaches on its own samples, in a method of "
                "improve with improver: distill; give sft.distill.teacher={path: MODEL}"
            )
