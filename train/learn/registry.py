"""What `sft.objective` may be, by name."""

from __future__ import annotations

from .objectives import MaskedThought, ResponseOnly, RewardWeighted, Signed, Talr, Tokens
from .preferences import Aft, Cpo, Dpo, Fait, Ipo, Kto, Orpo

Objective = ResponseOnly | MaskedThought | RewardWeighted | Talr | Signed | Fait | Dpo | Ipo | Orpo | Cpo | Aft | Kto
OBJECTIVES: dict[str, type[Tokens]] = {
    "response_only": ResponseOnly,
    "masked_thought": MaskedThought,
    "reward_weighted": RewardWeighted,
    "talr": Talr,
    "signed": Signed,
    "fait": Fait,
    "dpo": Dpo,
    "ipo": Ipo,
    "orpo": Orpo,
    "cpo": Cpo,
    "aft": Aft,
    "kto": Kto,
}
