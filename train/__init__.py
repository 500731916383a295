"""The stack around the library: programs, the parts they are made of, and the ground these stand on.

Nothing imports from a room above its own, and rooms side by side are strangers (tests/repository/test_layers.py):

    cli, api              the command `jaxmerge`, and the same programs from Python: keys in, one program called
    studies               finished runs looked at: one, or many side by side
    improve               the self-improvement loop
    search                solutions looked for step by step
    learn, evaluate       examples in, tuned weights out; what a model can do, and what training changed
    tasks, generate       questions and who is right; prompts in, samples out
    models, data, report  the decoder and its files; examples on disk; a run as a page
    runtime               devices, processes, signals, a run's folder
    resolve.py, log.py    configs to dataclasses and back; what is said to a person

A program is a folder whose `run.py` is the program and whose `settings.py` holds its keys and their defaults.

From Python, `improve`, `finetune`, `evaluate` and `Model` of this package are the programs (docs/api.md).
"""

import sys
import types
from typing import TYPE_CHECKING, Any

__all__ = ["Model", "Run", "evaluate", "finetune", "improve"]

if TYPE_CHECKING:
    from .api import Model, Run, evaluate, finetune, improve

else:

    def _program(name: str) -> Any:
        """A function of `api` that also has the attributes of the room of its name.

        `import jaxmerge.train.improve.settings as settings` goes through the attribute `improve` of this module.
        """
        from . import api

        function = getattr(api, name)
        function.__dict__ = sys.modules[f"{__name__}.{name}"].__dict__
        return function

    def _kept_out(self: types.ModuleType, room: types.ModuleType) -> None:
        """Pass over a room that the import system wants to put in the place of the program of its name."""

    class _Package(types.ModuleType):
        """A module that imports `api`, and with it flax and the rest, when it is first asked for one of its names."""

        improve = property(lambda self: _program("improve"), _kept_out)
        evaluate = property(lambda self: _program("evaluate"), _kept_out)

        def __getattr__(self, name: str) -> Any:
            if name in __all__:
                from . import api

                return getattr(api, name)
            raise AttributeError(f"module {__name__!r} has no attribute {name!r}", name=name)

        def __dir__(self) -> list[str]:
            return sorted({*self.__dict__, *__all__})

    sys.modules[__name__].__class__ = _Package
