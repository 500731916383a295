#!/usr/bin/env bash
# optax.contrib.muon(nesterov=True) gives Nesterov's momentum to its Adam part too.
#
# Versions: optax 0.2.8, with the jax that pip chooses for it (0.10.2 on Python 3.11).
# One would guess: `nesterov` is a parameter of Muon; what is not a matrix is Adam's, and the first update of Adam is
#   the sign of the gradient, size 1.0 times the learning rate.
# What happens: the flag reaches the Adam part as well. Its first update has the size 1 + b1/(1 + b1), 1.474 for
#   b1 = 0.9: the gradient and its momentum, each with the bias correction of its own step.
# Seen:
#   optax 0.2.8, jax 0.10.2
#   first update of a 1-D parameter by muon, nesterov=True: 1.474
#   first update of a 1-D parameter by muon, nesterov=False: 1.000
#   first update of a 1-D parameter by adam: 1.000
# Exits with 0 while that is so, and with 1 once it changes.
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
python3 -m venv "$work/venv"
"$work/venv/bin/python" -m pip install -qq --disable-pip-version-check optax==0.2.8
cd "$work"
JAX_PLATFORMS=cpu "$work/venv/bin/python" - <<'PYTHON'
import sys

import jax
import jax.numpy as jnp
import optax

print(f"optax {optax.__version__}, jax {jax.__version__}")
params = {"matrix": jnp.zeros((4, 4)), "bias": jnp.zeros(4)}
grads = {"matrix": jnp.eye(4), "bias": jnp.full(4, -0.3)}


def first(**settings):
    muon = optax.contrib.muon(learning_rate=1.0, adam_b1=0.9, **settings)
    return float(muon.update(grads, muon.init(params), params)[0]["bias"][0])


adam = optax.adam(1.0, b1=0.9)
alone = float(adam.update(grads["bias"], adam.init(params["bias"]))[0][0])
found = {"muon, nesterov=True": first(nesterov=True), "muon, nesterov=False": first(nesterov=False), "adam": alone}
for name, size in found.items():
    print(f"first update of a 1-D parameter by {name}: {size:.3f}")
wanted = (1 + 0.9 / 1.9, 1.0, 1.0)
sys.exit(any(abs(size - expected) > 1e-3 for size, expected in zip(found.values(), wanted)))
PYTHON
