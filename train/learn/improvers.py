"""Which ways there are to learn from fresh samples: what `improver` of a method may be."""

from __future__ import annotations

from .policy import Policy
from .rollouts import OnPolicy

Improver = Policy
IMPROVERS: dict[str, type[OnPolicy]] = {"grpo": Policy}
"""By name: an entry here, and in the union above, is all that a new one needs."""
