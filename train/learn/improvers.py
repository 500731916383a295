"""Which ways there are to learn from fresh samples: what `improver` of a method may be."""

from __future__ import annotations

from .on_policy_distill import OnPolicyDistillation
from .policy import Policy
from .rollouts import OnPolicy

Improver = Policy | OnPolicyDistillation
IMPROVERS: dict[str, type[OnPolicy]] = {"grpo": Policy, "distill": OnPolicyDistillation}
"""By name: an entry here, and in the union above, is all that a new one needs."""
