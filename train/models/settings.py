"""Where the base model comes from, as configured."""

from __future__ import annotations

import dataclasses
from typing import Any, Literal

from ..log import UserError


@dataclasses.dataclass(frozen=True)
class Source:
    """Where the base model comes from, and the precision it computes in."""

    path: str = ""
    """The model is this Hugging Face folder, GGUF file, `package:NAME/FILE.gguf` or hub name."""
    sha256: str | None = None
    """The file at `path` is refused unless its digest is this one (single files only)."""
    random: dict[str, Any] | None = dataclasses.field(default=None, hash=False)
    """A model of these sizes with random weights is made instead of reading `path` (fields of ModelConfig)."""
    dtype: Literal["float32", "bfloat16"] = "float32"
    """Matrix products take their operands in this precision; sums and merges are float32 whatever this says."""

    def __post_init__(self):
        if bool(self.path) == (self.random is not None):
            raise UserError("model: give either model.path or model.random, not both and not neither")
