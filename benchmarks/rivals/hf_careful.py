"""Transformers in optimised use: batched, without gradients, sdpa, no unneeded computation.

Vision features are computed once, logits at the last token alone; hooks touch as little as they
can. `torch.compile` is not used here, see `hf_compiled`.
"""

from __future__ import annotations

import copy
import functools

import torch
import transformers

from benchmarks import latents
from benchmarks.rivals import hf, hf_trainer
from benchmarks.rivals.serve import Work

CHUNK = {"cpu": 256, "cuda": 1024}  # tokens whose logits exist at one time


def sweep(work: Work):
    """Compute the logits of the options under each ablation, [R, B, 4]."""
    model, options = hf.load(work), hf.tensor(work, "options")
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    ablated = hf.tensor(work, "neurons")

    @torch.inference_mode()
    def run():
        embeds = hf.merged(model, ids, pixels)
        found = []
        for layer, neurons in zip(work.inputs["layers"], ablated, strict=True):
            hook = hf.blocks(model)[layer].mlp.down_proj.register_forward_pre_hook(
                functools.partial(_ablate, neurons)
            )
            out = model(inputs_embeds=embeds, logits_to_keep=1, use_cache=False)
            hook.remove()
            found.append(out.logits[:, -1, options])
        return hf.numpy(logits=torch.stack(found))

    return run


def _ablate(neurons, module, args):
    args[0].index_fill_(-1, neurons, 0)


def dictionary(work: Work):
    """Compute the logits of the options without single latents, [R, B, 4]: a vector is removed."""
    model, options = hf.load(work), hf.tensor(work, "options")
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    block = hf.blocks(model)[work.fields["steered_layers"][0]]
    width = model.config.text_config.hidden_size
    d = {name: torch.from_numpy(array) for name, array in latents.weights(width).items()}

    def remove(latent, module, args, out):
        x = out[0] if isinstance(out, tuple) else out
        pre = x @ d["W_enc"][:, latent] + d["b_enc"][latent]
        value = pre.relu() * (pre > d["threshold"][latent])
        x = x - value[..., None] * d["W_dec"][latent]
        return (x, *out[1:]) if isinstance(out, tuple) else x

    @torch.inference_mode()
    def run():
        embeds = hf.merged(model, ids, pixels)
        found = []
        for latent in latents.edited(width, len(work.inputs["layers"])):
            hook = block.register_forward_hook(functools.partial(remove, int(latent)))
            out = model(inputs_embeds=embeds, logits_to_keep=1, use_cache=False)
            hook.remove()
            found.append(out.logits[:, -1, options])
        return hf.numpy(logits=torch.stack(found))

    return run


def counts(work: Work):
    """Count how often each neuron is above zero over all tokens, [L, F] by module."""
    model = hf.load(work)
    model.lm_head = torch.nn.Identity()
    batch, ids = work.fields["batch"], hf.tensor(work, "ids")
    pixels = hf.tensor(work, "pixels")
    sites = {
        "vision": [layer.mlp.fc1 for layer in model.model.vision_tower.encoder.layers],
        "projector": [model.model.multi_modal_projector.linear_1],
        "lm": [layer.mlp.gate_proj for layer in hf.blocks(model)],
    }  # an activation has the sign of its input

    @torch.inference_mode()
    def run():
        total = {
            name: torch.zeros(len(maps), maps[0].out_features, dtype=torch.int64, device=ids.device)
            for name, maps in sites.items()
        }

        def count(into):
            def hook(module, args, out):
                into.add_((out > 0).flatten(0, -2).sum(0))

            return hook

        hooks = [
            linear.register_forward_hook(count(total[name][i]))
            for name, maps in sites.items()
            for i, linear in enumerate(maps)
        ]
        for start in range(0, work.fields["pictures"], batch):
            at = slice(start, start + batch)
            model.model(input_ids=ids[at], pixel_values=pixels[at], use_cache=False)
        for hook in hooks:
            hook.remove()
        return hf.numpy(**total)

    return run


def lens(work: Work):
    """Read entropy [L, B, T] and the ten most likely words [L, B, T, 10], in chunks of tokens."""
    model = hf.load(work)
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    norm = copy.copy(model.model.language_model.norm)

    @torch.inference_mode()
    def run():
        residuals = []
        hooks = [
            layer.register_forward_hook(
                lambda m, args, out: residuals.append(out[0] if isinstance(out, tuple) else out)
            )
            for layer in hf.blocks(model)
        ]  # the last entry of output_hidden_states is normed already
        model.model(input_ids=ids, pixel_values=pixels, use_cache=False)
        for hook in hooks:
            hook.remove()
        parts = []
        for chunk in torch.stack(residuals).flatten(0, -2).split(CHUNK[ids.device.type]):
            logits = model.lm_head(norm(chunk)).float()
            total = logits.logsumexp(-1)
            best, words = logits.topk(10)
            best = best - total[:, None]
            logits = logits.sub_(total[:, None])
            entropy = -torch.linalg.vecdot(logits.exp(), logits)
            parts.append((entropy, best, words))
        shape = (len(residuals), *ids.shape)
        entropy, best, words = (torch.cat(part) for part in zip(*parts, strict=True))
        return hf.numpy(
            entropy=entropy.view(shape),
            log_probs=best.view(*shape, 10),
            ids=words.view(*shape, 10),
        )

    return run


def score(work: Work):
    """Compute the log-likelihood of each candidate [C]; all share the cache of the prompt."""
    model = hf.load(work)
    ids, pixels = (hf.tensor(work, name, rows=1) for name in ("ids", "pixels"))
    candidates = hf.tensor(work, "candidates")
    real = candidates >= 0

    @torch.inference_mode()
    def run():
        cache = transformers.DynamicCache(config=model.config.text_config)
        out = model(input_ids=ids, pixel_values=pixels, past_key_values=cache, logits_to_keep=1)
        cache.batch_repeat_interleave(len(candidates))
        later = model(input_ids=candidates.clamp(min=0)[:, :-1], past_key_values=cache).logits
        logits = torch.cat([out.logits.expand(len(candidates), -1, -1), later], 1).float()
        said = logits.log_softmax(-1).gather(-1, candidates.clamp(min=0)[..., None])[..., 0]
        return hf.numpy(scores=(said * real).sum(-1))

    return run


def generate(work: Work):
    """Generate tokens greedily under two edits, [B, steps]."""
    model, steps = hf.load(work), work.fields["steps"]
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    ablate = functools.partial(_ablate, hf.tensor(work, "ablated"))
    vector = hf.tensor(work, "vector").to(hf.dtype(work))
    text = (ids != work.fields["image_token"])[..., None]

    def steer(module, args, out):
        states = out[0] if isinstance(out, tuple) else out
        states += vector * text if states.shape[1] > 1 else vector

    at = hf.blocks(model)
    at[work.fields["ablated_layer"]].mlp.down_proj.register_forward_pre_hook(ablate)
    for layer in range(*work.fields["steered_layers"]):
        at[layer].register_forward_hook(steer)

    @torch.inference_mode()
    def run():
        out = model.generate(
            input_ids=ids, pixel_values=pixels, attention_mask=torch.ones_like(ids),
            max_new_tokens=steps, min_new_tokens=steps, do_sample=False,
            eos_token_id=None, pad_token_id=0,
        )  # fmt: skip
        return hf.numpy(tokens=out[:, ids.shape[1] :])

    return run


def prefill(work: Work):
    """Compute the logits at the last token, [B, V]."""
    model = hf.load(work)
    rows = work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))

    @torch.inference_mode()
    def run():
        out = model(input_ids=ids, pixel_values=pixels, logits_to_keep=1, use_cache=False)
        return hf.numpy(logits=out.logits[:, -1])

    return run


def finetune(work: Work):
    """Return the loss of each step; features are computed once, logits at answers alone."""
    return hf_trainer.finetune(work, cached=True, everywhere=False)


def finetune_lora(work: Work):
    """Return the loss of each step of low-rank matrices, computed as those of the projector."""
    return hf_trainer.finetune(work, cached=True, everywhere=False, lora=True)


def load(work: Work):
    """Read the checkpoint onto the device."""

    def run():
        hf.read(work.checkpoint, hf.dtype(work), hf.device(work))
        return {}

    return run
