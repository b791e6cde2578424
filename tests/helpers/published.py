"""MMNeuron's published procedure, transcribed in torch from its description: the reference."""

from __future__ import annotations

import numpy as np
import pytest

torch = pytest.importorskip("torch")


def count(network, batches) -> dict[str, tuple[np.ndarray, int]]:
    """{module: (counts [L, F], tokens)} by hooks after the activations, every position counted.

    Args:
      network: A LLaVA of transformers.
      batches: Of one example each.
    """
    vision, lm = network.model.vision_tower, network.model.language_model
    acts = {
        "lang": [layer.mlp.act_fn for layer in lm.layers],
        "vision": [layer.mlp.activation_fn for layer in vision.encoder.layers],
        "mmproj": [network.model.multi_modal_projector.act],
    }
    counts = {m: [0] * len(layers) for m, layers in acts.items()}
    seen = dict.fromkeys(acts, 0)

    def hook(module, layer):
        def add(_, inputs, output):
            counts[module][layer] = counts[module][layer] + (output > 0).sum((0, 1)).numpy()
            seen[module] += output.shape[0] * output.shape[1] * (layer == 0)

        return add

    handles = [
        act.register_forward_hook(hook(module, layer))
        for module, layers in acts.items()
        for layer, act in enumerate(layers)
    ]
    with torch.no_grad():
        for batch in batches:
            network(
                input_ids=torch.from_numpy(batch.ids.astype(int)),
                pixel_values=torch.from_numpy(batch.pixels.transpose(0, 3, 1, 2)),
            )
    for handle in handles:
        handle.remove()
    return {module: (np.stack(counts[module]), seen[module]) for module in acts}


def select(counts, tokens, top=0.01, filter_=0.95, bar_=0.95):
    """Identification: a list over domains of lists over layers, and the gap in entropy at the cut.

    Args:
      counts: int[D_, L, F].
      tokens: int[D_].
    """
    c = torch.from_numpy(counts).permute(1, 2, 0).contiguous()  # [L, F, D_]
    p = c / torch.tensor(tokens)
    q = torch.nan_to_num(p / p.sum(-1, keepdim=True), nan=0.0)
    h = -(q * torch.where(q > 0, q.log(), 0.0)).sum(-1)
    flat = p.flatten()
    tau = flat.kthvalue(round(filter_ * len(flat))).values.item()
    h[~(p > tau).any(-1)] = torch.inf
    k = round(top * h.numel())
    chosen = h.flatten().topk(k, largest=False).indices
    gap = h.flatten().sort().values[k - 1 : k + 1]
    bar = flat.kthvalue(round(bar_ * len(flat))).values.item()
    member = p.flatten(0, 1)[chosen] > bar  # [k, D_]
    found = []
    for domain in range(len(counts)):
        mine = chosen[member[:, domain]]
        layers = [sorted(int(i % c.shape[1]) for i in mine if i // c.shape[1] == l)
                  for l in range(len(c))]  # fmt: skip
        found.append(layers)
    while found and not any(found[-1]):  # a split by bincount ends at the last domain it meets
        found.pop()
    return found, float(gap[1] - gap[0])
