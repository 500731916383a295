"""Getting TPU machines, sending work to them, and compiling for slices that nobody has (README.md).

In a checkout this package is `tpu` and imports `train`, which lies beside it. Installed they are `jaxmerge.tpu` and
`jaxmerge.train`; then the name `train` stands for `jaxmerge.train`, and no module is loaded twice.
"""

import importlib
import importlib.abc
import importlib.machinery
import sys

if __name__ == "jaxmerge.tpu":

    class _Installed(importlib.abc.MetaPathFinder, importlib.abc.Loader):
        """Finds `train` and what lies in it as the modules of `jaxmerge.train`."""

        def find_spec(self, fullname, path=None, target=None):
            if fullname != "train" and not fullname.startswith("train."):
                return None
            return importlib.machinery.ModuleSpec(fullname, self)

        def create_module(self, spec):
            module = importlib.import_module(f"jaxmerge.{spec.name}")
            spec.loader_state = module.__spec__
            return module

        def exec_module(self, module):
            assert module.__spec__ is not None
            module.__spec__ = module.__spec__.loader_state  # the import system put that of `train` in its place

    sys.meta_path.insert(0, _Installed())
