"""Make spectral.npz anew: what fusion-bench 0.2.33 makes of three random changes of one matrix, float32.

`PYTHONPATH=tests:. python -m helpers.goldens.make_spectral`, in an environment with fusion-bench and transformers
4.57.6 (under transformers 5 its OPCM cannot be imported).
"""

import pathlib
import types

import numpy as np

SHAPE, COUNT = (12, 8), 3


def inputs():
    """The base and the changes of three models."""
    rng = np.random.default_rng(20)
    draw = [rng.standard_normal(SHAPE).astype(np.float32) for _ in range(1 + COUNT)]
    return draw[0], [np.float32(0.3) * change for change in draw[1:]]


def made():
    """Rule → the merged change."""
    import torch
    from fusion_bench import BaseModelPool
    from fusion_bench.method.isotropic_merging.iso_utils import iso_c, iso_cts
    from fusion_bench.method.magmax.magmax import MagMaxAlgorithm
    from fusion_bench.method.opcm.opcm import OPCMForCLIP
    from fusion_bench.method.singular_value_calibration import utils as calibration
    from fusion_bench.method.tall_mask.utils import generate_task_masks
    from fusion_bench.method.task_singular_vector.utils import TSVM_utils

    base, changes = inputs()
    vectors = [{"w": torch.tensor(change)} for change in changes]
    start, tuned = torch.tensor(base), [torch.tensor(base + change) for change in changes]
    found = {
        "tsvm": TSVM_utils.compute_and_sum_svd_mem_reduction(vectors, accelerator="cpu")["w"],
        "iso_c": iso_c(vectors, accelerator="cpu")["w"],
        "iso_cts": iso_cts(vectors, 0.8, accelerator="cpu")["w"],
    }
    merged = start + sum(map(torch.tensor, changes))
    found["svc"] = calibration.subspace_consistency_spectral_calibration(start, tuned, merged, 1.0) - start

    def linear(weight):
        module = torch.nn.Sequential(torch.nn.Linear(SHAPE[1], SHAPE[0], bias=False))
        module[0].weight.data = weight.clone()
        return module

    def pool():
        return BaseModelPool({"_pretrained_": linear(start)} | {f"m{i}": linear(w) for i, w in enumerate(tuned)})

    opcm = OPCMForCLIP(alpha=0.5, shuffle_order=False, save_on_every_step=False)
    opcm._program = types.SimpleNamespace(taskpool=types.SimpleNamespace(_test_datasets={}))
    type(opcm).log_dir = None
    found["opcm"] = opcm.run(pool())[0].weight.data - start
    found["magmax"] = MagMaxAlgorithm(scaling_factor=0.5).run(pool())[0].weight.data - start
    flat = torch.stack([torch.tensor(change).flatten() for change in changes])
    masks = generate_task_masks(flat, start.flatten() + flat, start.flatten(), tall_mask_lambda=0.4)
    found["consensus_ta"] = torch.where(masks.reshape(COUNT, *SHAPE).sum(0) >= 2, sum(map(torch.tensor, changes)), 0.0)
    return {name: np.asarray(change, np.float32) for name, change in found.items()}


if __name__ == "__main__":
    np.savez_compressed(pathlib.Path(__file__).with_name("spectral.npz"), **made())
