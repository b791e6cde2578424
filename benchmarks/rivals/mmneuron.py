"""MMNeuron (Huo et al. 2024) by the procedure of its published code: one picture at a time.

Reimplemented from a description of that code, which has no licence. Like that code, the count keeps
the graph of gradients; `mmneuron_no_grad` does not.
"""

from __future__ import annotations

import torch

from benchmarks.rivals import hf
from benchmarks.rivals.serve import Work


def counts(work: Work, grad: bool = True):
    """Count how often each neuron is above zero over all tokens, [L, F] by module."""
    model = hf.load(work)
    ids, pixels = hf.tensor(work, "ids"), hf.tensor(work, "pixels")
    sites = {
        "vision": [layer.mlp.activation_fn for layer in model.model.vision_tower.encoder.layers],
        "projector": [model.model.multi_modal_projector.act],
        "lm": [layer.mlp.act_fn for layer in hf.blocks(model)],
    }
    widths = {
        "vision": model.config.vision_config.intermediate_size,
        "projector": model.config.text_config.hidden_size,
        "lm": model.config.text_config.intermediate_size,
    }

    def run():
        total = {n: torch.zeros(len(m), widths[n], dtype=torch.int32) for n, m in sites.items()}
        value = {n: torch.zeros(len(m), widths[n], dtype=torch.float64) for n, m in sites.items()}

        def record(name, layer):
            def hook(module, args, out):
                total[name][layer] += (out > 0).sum(dim=(0, 1)).int()
                value[name][layer] += out.detach().sum(dim=(0, 1)).double()

            return hook

        hooks = [
            act.register_forward_hook(record(name, i))
            for name, acts in sites.items()
            for i, act in enumerate(acts)
        ]
        with torch.set_grad_enabled(grad):
            for i in range(work.fields["pictures"]):
                model(input_ids=ids[i : i + 1], pixel_values=pixels[i : i + 1])
        for hook in hooks:
            hook.remove()
        return hf.numpy(**{name: found.long() for name, found in total.items()})

    return run


def lens(work: Work):
    """Read entropy [L, B, T] and the ten most likely words; four logits of each layer are kept."""
    model = hf.load(work)
    ids, pixels = hf.tensor(work, "ids"), hf.tensor(work, "pixels")
    language = model.model.language_model

    def read(states):
        return model.lm_head(language.norm(states))

    def watch(layer, kept):
        """Read the attention output, the residual after it, the MLP output and the block output."""

        def attention(module, args, out):
            kept["attention"] = out[0]

        def middle(module, args):
            kept["middle"] = args[0]

        def mlp(module, args, out):
            kept["mlp"] = out

        def block(module, args, out):
            kept["block"] = out[0] if isinstance(out, tuple) else out
            for name in ("attention", "middle", "mlp", "block"):
                kept[name] = read(kept[name])

        return [
            layer.self_attn.register_forward_hook(attention),
            layer.post_attention_layernorm.register_forward_pre_hook(middle),
            layer.mlp.register_forward_hook(mlp),
            layer.register_forward_hook(block),
        ]

    @torch.no_grad()
    def run():
        pictures = []
        for i in range(work.fields["pictures"]):
            kept = [{} for _ in hf.blocks(model)]
            watched = zip(hf.blocks(model), kept, strict=True)
            hooks = [hook for layer, into in watched for hook in watch(layer, into)]
            model(input_ids=ids[i : i + 1], pixel_values=pixels[i : i + 1])
            for hook in hooks:
                hook.remove()
            layers = []
            for tensors in kept:
                logits = tensors["block"]
                entropy = torch.distributions.Categorical(logits=logits).entropy()
                best, words = logits.softmax(-1).topk(10)
                layers.append((entropy[0], best[0].log(), words[0]))
            pictures.append([torch.stack(part) for part in zip(*layers, strict=True)])
        entropy, best, words = (torch.stack(part, 1) for part in zip(*pictures, strict=True))
        return hf.numpy(entropy=entropy, log_probs=best, ids=words)

    return run
