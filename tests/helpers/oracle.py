"""What taps are compared with: the same networks, a plain loop over layers, NumPy at the sites."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np

from mllm_jax import sites

OTHER_FAMILIES = ("qformer.", "projector.deepstack")
SITES = [site for site in sites.TABLE if not site.name.startswith(OTHER_FAMILIES)]  # of a LLaVA
Change = tuple[str, int | None, Callable[[np.ndarray], np.ndarray]]  # site, layer, what to do


class Plain:
    """Taps without the library: changes tensors at (site, layer), and sees everything."""

    def __init__(self, changes: Sequence[Change] = ()):
        self.changes = changes
        self.layer: int | None = None
        self.seen: dict[str, list[np.ndarray]] = {}

    def module(self, name, lens=None) -> Plain:
        return self

    def only(self, *sites) -> Plain:
        return self

    def when(self, present) -> Plain:
        """These taps; in a layer without the tensor, some that change nothing."""
        if present:
            return self
        same = Plain()
        same.seen = self.seen
        return same

    def idle(self, site, x):
        return False

    def __call__(self, site, x):
        for name, layer, change in self.changes:
            if (name, layer) == (site.name, self.layer):
                x = jnp.asarray(change(np.array(x)), x.dtype)
        self.seen.setdefault(site.name, []).append(np.array(x))
        return x

    def scan(self, step, layers, x, extra=None):
        outs = []
        for self.layer in range(len(jax.tree.leaves(layers)[0])):
            layer, more = jax.tree.map(lambda a: a[self.layer], (layers, extra))
            x, out = step(layer, x, self, more)
            outs.append(out)
        self.layer = None
        return x, jax.tree.map(lambda *a: jnp.stack(a), *outs)

    def loop(self, step, layers, x):
        for self.layer, layer in enumerate(layers):
            x = step(layer, x, self)
        self.layer = None
        return x


def forward(model, batch, changes: Sequence[Change] = ()):
    """float32[B, T, V], and what was seen: by site, one array a layer."""
    taps = Plain(changes)
    x, _ = model(batch, taps)
    return np.asarray(model.logits(x, taps)), taps.seen


def spread(axes: Sequence[str], tokens: np.ndarray, units: np.ndarray) -> np.ndarray:
    """A mask of tokens [B, T] and a mask of units, laid along the axes of a site."""
    T = "P" if "P" in axes else "T"
    unit = next(a for a in axes if a in "EDFNKV")
    shape = [
        n if a in ("B", "I", T) else 1 for a, n in zip(axes, _sizes(axes, tokens), strict=True)
    ]
    return tokens.reshape(shape) & units.reshape([-1 if a == unit else 1 for a in axes])


def _sizes(axes, tokens):
    """The lengths of a token mask in the places of its two axes."""
    sizes = iter(tokens.shape)
    return [next(sizes) if a in "BITP" else 1 for a in axes]
