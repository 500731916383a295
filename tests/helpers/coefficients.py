"""Coefficients, statistics and tolerances to hold every rule of `RULES` to its contract."""

import jax
import jax.numpy as jnp
import numpy as np

from jaxmerge import RULES, tree

# Coefficients to call a rule with, and others of the same kind: the second call must not compile again.


# Coefficients to call a rule with, and others of the same kind: the second call must not compile again.
W1, W2 = [0.2, 0.5, 0.4], [0.3, 0.1, 0.4]
COEFFICIENTS = {
    "interpolate": ({"t": 0.3}, {"t": 0.6}),
    "average": ({"weights": W1}, {"weights": W2}),
    "task_arithmetic": ({"weights": W1, "scale": 0.9}, {"weights": W2, "scale": 0.5}),
    "extrapolate": ({"alpha": 0.4}, {"alpha": 0.7}),
    "extrapolation_merge": ({"alphas": [0.4, 0.1, 0.2], "weights": W1}, {"alphas": [0.3, 0.2, 0.2], "weights": W2}),
    "passthrough": ({"scale": 1.0}, {"scale": 0.5}),
    "imm": ({"alpha": 0.5, "drop": 0.2}, {"alpha": 0.3, "drop": 0.4}),
    "slerp": ({"t": 0.3}, {"t": 0.6}),
    "nuslerp": ({"weights": [0.2, 0.5]}, {"weights": [0.3, 0.1]}),
    "multislerp": ({"weights": W1}, {"weights": W2}),
    "karcher": ({}, {}),
    "dare": (
        {"density": [0.6, 0.5, 0.7], "weights": W1, "scale": 0.9},
        {"density": [0.3, 0.5, 0.7], "weights": W2, "scale": 0.8},
    ),
    "dare_ties": ({"density": 0.6, "weights": W1, "scale": 0.9}, {"density": 0.3, "weights": W2, "scale": 0.8}),
    "ties": (
        {"density": [0.6, 0.5, 0.7], "weights": W1, "scale": 0.9},
        {"density": [0.3, 0.5, 0.7], "weights": W2, "scale": 0.8},
    ),
    "della": ({"density": 0.6, "epsilon": 0.2, "weights": W1}, {"density": 0.3, "epsilon": 0.1, "weights": W2}),
    "della_linear": ({"density": 0.6, "epsilon": 0.2, "weights": W1}, {"density": 0.3, "epsilon": 0.1, "weights": W2}),
    "breadcrumbs": ({"density": 0.6, "gamma": 0.1, "weights": W1}, {"density": 0.3, "gamma": 0.2, "weights": W2}),
    "breadcrumbs_ties": ({"density": 0.6, "gamma": 0.1, "weights": W1}, {"density": 0.3, "gamma": 0.2, "weights": W2}),
    "sce": ({"select_topk": 0.6, "weights": W1}, {"select_topk": 0.3, "weights": W2}),
    "model_stock": ({}, {}),
    "norm_aware": ({"weights": W1, "scale": 0.9}, {"weights": W2, "scale": 0.5}),
    "tatr": ({"region": 0.6, "weights": W1, "scale": 0.9}, {"region": 0.3, "weights": W2, "scale": 0.5}),
    "nearswap": ({"t": 0.3}, {"t": 0.6}),
    "arcee_fusion": ({}, {}),
    "ram": ({"epsilon": 0.5}, {"epsilon": 0.3}),
    "ramplus_tl": ({"epsilon": 0.5, "r": 0.2, "alpha": 0.3}, {"epsilon": 0.3, "r": 0.3, "alpha": 0.2}),
    "fisher": ({"weights": W1, "floor": 0.1}, {"weights": W2, "floor": 0.2}),
    "regmean": ({"damping": 0.1}, {"damping": 0.3}),
    "grafting": ({}, {}),
}
# A new rule is under the contract with its defaults, until it has a line above.
COEFFICIENTS |= {name: ({}, {}) for name in RULES if RULES[name] not in map(RULES.get, COEFFICIENTS)}
# Coefficients that move a mask: nothing can be differentiated in them.
EACH = {"weights", "alphas", "density", "gamma"}
# Units in the last place where sums over a tensor (or a solve) take part: their order is the mesh's.
TOLERANCE = {
    **dict.fromkeys(
        ["slerp", "nuslerp", "multislerp", "karcher", "model_stock", "norm_aware", "sce", "arcee_fusion"], 16
    ),
    "regmean": 256,
    # A decomposition is as exact as its largest singular value, and vectors as the gaps between them.
    **dict.fromkeys(["tsvm", "iso_c", "iso_cts", "wudi", "svc", "opcm"], 2048),
}
MASKING = {"density", "drop", "epsilon", "gamma", "region", "select_topk"}


def statistics(name, models, base):
    positive = [jax.tree.map(lambda x: jnp.square(x) if tree.is_merged(x) else x, model) for model in models]
    if name == "fisher":
        return {"fishers": positive}
    if name == "grafting":
        return {"mask": jax.tree.map(lambda x: jnp.clip(x, 0, 1) if tree.is_merged(x) else x, positive[0])}
    if name == "regmean":
        rng = np.random.default_rng(5)
        width = models[0]["lm_head"]["weight"].shape[-1]
        inputs = rng.standard_normal((len(models), 20, width))
        return {"grams": [{"lm_head/weight": jnp.asarray(x.T @ x, jnp.float32)} for x in inputs]}
    return {}
