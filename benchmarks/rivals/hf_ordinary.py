"""Transformers in common use: forward hooks, and a full forward pass for each condition."""

from __future__ import annotations

import torch

from benchmarks import latents
from benchmarks.rivals import hf
from benchmarks.rivals.serve import Work


def sweep(work: Work):
    """Compute the logits of the options under each ablation, [R, B, 4]."""
    model, options = hf.load(work), hf.tensor(work, "options")
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    mask, ablated = torch.ones_like(ids), hf.tensor(work, "neurons")

    @torch.no_grad()
    def run():
        found = []
        for layer, neurons in zip(work.inputs["layers"], ablated, strict=True):

            def ablate(module, args, out, at=neurons):
                out[..., at] = 0
                return out

            hook = hf.blocks(model)[layer].mlp.act_fn.register_forward_hook(ablate)
            out = model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
            hook.remove()
            found.append(out.logits[:, -1, options])
        return hf.numpy(logits=torch.stack(found))

    return run


def dictionary(work: Work):
    """Compute the logits of the options without single latents, [R, B, 4].

    As SAELens does: reconstruction from the edited latents, and the error of the clean one.
    """
    model, options = hf.load(work), hf.tensor(work, "options")
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    mask = torch.ones_like(ids)
    block = hf.blocks(model)[work.fields["steered_layers"][0]]
    width = model.config.text_config.hidden_size
    d = {name: torch.from_numpy(array) for name, array in latents.weights(width).items()}

    def encode(x):
        pre = (x - d["b_dec"]) @ d["W_enc"] + d["b_enc"]
        return pre.relu() * (pre > d["threshold"])

    def decode(z):
        return z @ d["W_dec"] + d["b_dec"]

    @torch.no_grad()
    def run():
        found = []
        for latent in latents.edited(width, len(work.inputs["layers"])):

            def ablate(module, args, out, latent=int(latent)):
                x = out[0] if isinstance(out, tuple) else out
                z = encode(x)
                error = x - decode(z)
                z[..., latent] = 0
                x = decode(z) + error
                return (x, *out[1:]) if isinstance(out, tuple) else x

            hook = block.register_forward_hook(ablate)
            out = model(input_ids=ids, pixel_values=pixels, attention_mask=mask)
            hook.remove()
            found.append(out.logits[:, -1, options])
        return hf.numpy(logits=torch.stack(found))

    return run


def score(work: Work):
    """Compute the log-likelihood of each candidate [C], by a full forward pass each."""
    model = hf.load(work)
    ids, pixels = (hf.tensor(work, name, rows=1) for name in ("ids", "pixels"))
    candidates = [c[c >= 0] for c in hf.tensor(work, "candidates")]

    @torch.no_grad()
    def run():
        found = []
        for candidate in candidates:
            whole = torch.cat([ids, candidate[None]], 1)
            logits = model(input_ids=whole, pixel_values=pixels).logits[0, -len(candidate) - 1 : -1]
            found.append(logits.float().log_softmax(-1).gather(-1, candidate[:, None]).sum())
        return hf.numpy(scores=torch.stack(found))

    return run
