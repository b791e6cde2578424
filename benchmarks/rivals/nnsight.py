"""nnsight 0.8: a trace per condition around the model of transformers.

Pictures are given to each trace; `nnsight_reuse` gives embeddings.
"""

from __future__ import annotations

import torch
from nnsight import NNsight

from benchmarks.rivals import hf
from benchmarks.rivals.serve import Work


def sweep(work: Work, reuse: bool = False):
    """Compute the logits of the options under each ablation, [R, B, 4]."""
    network = hf.load(work)
    model = NNsight(network)
    options, rows = hf.tensor(work, "options"), work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    ablated = hf.tensor(work, "neurons")

    @torch.no_grad()
    def run():
        inputs = {"input_ids": ids, "pixel_values": pixels}
        if reuse:
            inputs = {"inputs_embeds": hf.merged(network, ids, pixels)}
        found = []
        for layer, neurons in zip(work.inputs["layers"], ablated, strict=True):
            with model.trace(**inputs, logits_to_keep=1, use_cache=False):
                model.model.language_model.layers[layer].mlp.act_fn.output[..., neurons] = 0
                logits = model.output.logits[:, -1, options].save()
            found.append(logits)
        return hf.numpy(logits=torch.stack(found))

    return run
