"""The programs from Python: what a config says as keyword arguments, what a run leaves as an object (docs/api.md)."""

from .model import Model
from .programs import Run, evaluate, finetune, improve

__all__ = ["Model", "Run", "evaluate", "finetune", "improve"]
