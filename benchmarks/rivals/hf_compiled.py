"""Transformers as in `hf_careful`, compiled by `torch.compile` as a whole.

A hook that changes would be compiled anew, so that ablations are a mask of all neurons, which every
edit writes anew: one program for all of them.
"""

from __future__ import annotations

import torch

from benchmarks.rivals import hf
from benchmarks.rivals.serve import Work


def prefill(work: Work):
    """Compute the logits at the last token, [B, V]."""
    model = hf.load(work)
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    logits = torch.compile(
        lambda: model(input_ids=ids, pixel_values=pixels, logits_to_keep=1, use_cache=False).logits
    )

    @torch.inference_mode()
    def run():
        return hf.numpy(logits=logits()[:, -1])

    return run


def sweep(work: Work):
    """Compute the logits of the options under each ablation, [R, B, 4]."""
    model, options = hf.load(work), hf.tensor(work, "options")
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    ablated, downs = hf.tensor(work, "neurons"), [b.mlp.down_proj for b in hf.blocks(model)]
    mask = torch.ones(len(downs), downs[0].in_features, dtype=hf.dtype(work), device=ids.device)

    def ablate(layer: int):
        return lambda module, args: (args[0] * mask[layer],)

    for layer, down in enumerate(downs):
        down.register_forward_pre_hook(ablate(layer))
    logits = torch.compile(
        lambda embeds: model(inputs_embeds=embeds, logits_to_keep=1, use_cache=False).logits
    )

    @torch.inference_mode()
    def run():
        embeds, found = hf.merged(model, ids, pixels), []
        for layer, neurons in zip(work.inputs["layers"], ablated, strict=True):
            mask.fill_(1)[layer, neurons] = 0
            found.append(logits(embeds)[:, -1, options])
        return hf.numpy(logits=torch.stack(found))

    return run
