"""A model at hand: loaded, asked, changed by the library's rules, saved."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from ..generate.rollout import Sample
from ..generate.run import generate
from ..generate.settings import SampleOptions
from ..log import UserError
from ..models import open as files
from ..models.decoder import Params
from ..models.hf import check_fit, save_hf
from ..resolve import build
from ..runtime.disk import check_folder
from ..runtime.mesh import make_mesh
from ..runtime.settings import Mesh
from ..runtime.start import start_jax

Message = Mapping[str, str]
Asked = str | Mapping[str, Any] | Sequence[Message]


@dataclasses.dataclass(frozen=True, repr=False)
class Model(files.Model):
    """A language model in memory: sizes, parameters and tokenizer.

    Attributes:
      config: the sizes.
      params: nested dictionaries of arrays under their Hugging Face names, which every rule of `jaxmerge` takes.
      tokenizer: text to tokens and back, with the chat template.
      path: where the model was loaded from or saved to; None once its parameters are others.
    """

    path: str | None = None

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, mesh: Mapping[str, int] | None = None) -> Model:
        """Load a model, its parameters in float32.

        Args:
          path: a Hugging Face folder, a GGUF file, `package:NAME/FILE.gguf`, a hub name `org/name`, or a checkpoint
            of a run.
          mesh: the parameters lie over these devices, as in {"fsdp": 8}; by default on the first device.

        Raises:
          UserError: there is no model, or it is damaged or of a kind not known.

        Example:
          >>> model = Model.load("HuggingFaceTB/SmolLM2-135M-Instruct")  # doctest: +SKIP
          >>> model.generate(["What is 2 + 2?"])  # doctest: +SKIP
          ['2 + 2 = 4.']
        """
        start_jax()
        found = files.open_model(os.fspath(path), make_mesh(build(Mesh, dict(mesh or {}), "mesh")))
        return cls(found.config, found.params, found.tokenizer, os.fspath(path))

    def __repr__(self) -> str:
        count = sum(leaf.size for leaf in jax.tree.leaves(self.params))
        return f"Model({self.path or 'in memory'}: {self.config.family}, {count / 1e6:,.4g} M parameters)"

    def generate(self, prompts: Asked | Sequence[Asked], *, logprobs: bool = False, **keys: Any) -> list[Any]:
        """Answer prompts.

        Args:
          prompts: a text, a conversation [{"role": …, "content": …}, …], or a list of these. A text is put through
            the chat template if the model has one; `chat=False` takes it as it is.
          logprobs: give a `Sample` in place of each text: `text`, `tokens`, `logprobs` (one for each token) and
            `reason` (eos, stop or length).
          keys: as of `jaxmerge sample`: temperature (0, the default, takes the likeliest token), max_new_tokens (128),
            samples, top_k, top_p, stop, seed, chat, date, slots, dtype, decode (a dictionary).

        Returns:
          One text for each prompt; with `samples` above 1 a list of texts for each.

        Raises:
          UserError: a key is not known, or a prompt is too long or no prompt.

        Example:
          >>> model.generate(["2 + 2 =", "3 + 3 ="], temperature=0.7, samples=4, seed=1)  # doctest: +SKIP
        """
        if isinstance(keys.get("stop"), str):
            keys["stop"] = [keys["stop"]]
        options = build(SampleOptions, keys, "generate")
        one = isinstance(prompts, str | Mapping) or (bool(prompts) and is_conversation(prompts))
        lines = [to_line(prompt) for prompt in ([prompts] if one else prompts)]
        start_jax()
        found = generate(self, lines, [f"prompts[{i}]" for i in range(len(lines))], options)
        given: list[list[Sample] | list[str]] = [
            samples if logprobs else [sample.text for sample in samples] for samples in found
        ]
        return [samples[0] for samples in given] if options.samples == 1 else given

    def replace(self, *, params: Params) -> Model:
        """The same model with other parameters, as a rule of `jaxmerge` makes them.

        Raises:
          UserError: names or shapes are not this model's.

        Example:
          >>> merged = base.replace(params=jaxmerge.imm([tuned.params], base=base.params, alpha=0.5))  # doctest: +SKIP
        """
        check_fit(self.config, params, "params")
        return dataclasses.replace(self, params=params, path=None)

    def save(self, folder: str | os.PathLike[str], *, dtype: str = "float32") -> Model:
        """Write a Hugging Face folder that transformers loads, whole or not at all.

        Args:
          folder: a new one.
          dtype: float32, bfloat16 or float16; the parameters are cast once.

        Returns:
          This model with the folder as its path, so that `finetune` and `improve` can begin from it.
        """
        if dtype not in ("float32", "bfloat16", "float16"):
            raise UserError(f"dtype={dtype!r}; choose float32, bfloat16 or float16")
        check_folder(Path(folder))
        save_hf(folder, self.config, self.params, dtype=jnp.dtype(dtype), tokenizer_from=self.tokenizer)
        return dataclasses.replace(self, path=os.fspath(folder))


def is_conversation(prompts: Any) -> bool:
    """Whether a list is the messages of one conversation, and no list of prompts."""
    return isinstance(prompts, Sequence) and all(isinstance(m, Mapping) and "role" in m for m in prompts)


def to_line(prompt: Any) -> dict[str, Any]:
    """A prompt as a line of `jaxmerge sample`."""
    if isinstance(prompt, str):
        return {"prompt": prompt}
    return dict(prompt) if isinstance(prompt, Mapping) else {"messages": list(prompt)}
