"""Fine-tune the projector as LLaVA's trainer does, reimplemented in plain torch.

The frozen vision tower runs in every step without gradients, and logits are computed at every
token. Unlike in its scripts, no layer is recomputed to save memory, and nothing is in bfloat16.
"""

from __future__ import annotations

import torch
import transformers

from benchmarks.rivals import hf
from benchmarks.rivals.serve import Work


def finetune(work: Work, cached: bool = False, everywhere: bool = True):
    """Return the function that trains and returns the loss of each step.

    Args:
        work: the model, inputs and settings.
        cached: whether the features of the tower are computed once, beforehand.
        everywhere: whether logits are computed at every token, or at answers alone.
    """
    model = hf.load(work).requires_grad_(False)
    size, answer = work.fields["batch"], work.fields["answer"]
    words = hf.tensor(work, "ids")
    words = words[words != work.fields["image_token"]].reshape(len(words), -1)
    pictures = hf.tensor(work, "pixels").split(size)
    if cached:
        pictures = [_features(model, some) for some in pictures]
    start = [hf.tensor(work, f"fold_kernel_{i}").T for i in (0, 1)]

    def run():
        projector = _projector(start)
        optimiser = torch.optim.AdamW(projector.parameters(), lr=1e-3, weight_decay=0)
        schedule = transformers.get_cosine_schedule_with_warmup(optimiser, 1, len(pictures))
        losses = []
        for ids, images in zip(words.split(size), pictures, strict=True):
            features = images if cached else _features(model, images)
            states = _states(model, ids, projector(features))
            wanted = ids[:, -answer:]
            if everywhere:
                logits = model.lm_head(states)[:, -answer - 1 : -1]
            else:
                logits = model.lm_head(states[:, -answer - 1 : -1])
            loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), wanted.flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(projector.parameters(), 1.0)
            optimiser.step()
            schedule.step()
            losses.append(loss.detach())
        return hf.numpy(losses=torch.stack(losses))

    return run


def _projector(kernels: list[torch.Tensor]) -> torch.nn.Module:
    linears = [torch.nn.Linear(kernel.shape[1], kernel.shape[0]) for kernel in kernels]
    with torch.no_grad():
        for linear, kernel in zip(linears, kernels, strict=True):
            linear.weight.copy_(kernel)
            linear.bias.zero_()
    return torch.nn.Sequential(linears[0], torch.nn.GELU(), linears[1])


@torch.no_grad()
def _features(model, pixels: torch.Tensor) -> torch.Tensor:
    """Return float32[B, p, 4 E], four neighbouring patches in each token."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    seen = tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
    B, P, E = seen.shape
    grid = round(P**0.5)
    seen = seen.reshape(B, grid // 2, 2, grid // 2, 2, E).transpose(2, 3)
    return seen.reshape(B, P // 4, 4 * E)


def _states(model, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the final states, with the picture after the first word."""
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :1], images, embeds[:, 1:]], 1)
    return model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
