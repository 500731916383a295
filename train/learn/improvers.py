"""Which ways there are to learn from fresh samples: what `improver` of a method may be."""

from __future__ import annotations

from ..log import UserError
from .on_policy_distill import OnPolicyDistillation
from .policy import Policy
from .rollouts import OnPolicy
from .settings import Sft

Improver = Policy | OnPolicyDistillation
IMPROVERS: dict[str, type[OnPolicy]] = {"grpo": Policy, "distill": OnPolicyDistillation}
"""By name: an entry here, and in the union above, is all that a new one needs."""


def check_taught(sft: Sft, improver: OnPolicy | None, where: str) -> None:
    """Refuse an improver without its teacher, and a student that teaches itself where nothing shows it anything.

    Args:
      where: the method, in messages.
    """
    if improver is None or not improver.teaches:
        if sft.self_taught:
            raise UserError(
                f"{where}.sft.distill.teacher is null: the student's own average teaches with improver: distill alone, "
                "which shows it demonstrations; name a teacher, or set that improver"
            )
    elif sft.distill is None:
        raise UserError(
            f"{where}: improver {improver.name} needs sft.distill: {{teacher: {{path: MODEL}}}} for another model as "
            "the teacher, or {} for the student's own average"
        )
    elif sft.self_taught and improver.demonstrate is False:
        raise UserError(
            f"{where}.improver.demonstrate is false: the student's own average has nothing to teach that the student "
            "does not know; leave it out, or name sft.distill.teacher"
        )
