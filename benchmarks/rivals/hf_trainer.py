"""Fine-tune the projector as LLaVA's trainer does, reimplemented in plain torch.

The frozen vision tower runs in every step without gradients, and logits are computed at every
token. Unlike in its scripts, no layer is recomputed to save memory. What trains is float32.
"""

from __future__ import annotations

import copy
import math

import numpy as np
import torch

from benchmarks.rivals import hf
from benchmarks.rivals.serve import Work


def finetune(work: Work, cached: bool = False, everywhere: bool = True, lora: bool = False):
    """Return the function that trains and returns the loss of each step.

    Args:
      work: The model, inputs and settings.
      cached: Whether the features of the tower are computed once, beforehand.
      everywhere: Whether logits are computed at every token, or at answers alone.
      lora: Whether low-rank matrices of the language model train, rather than the projector.
    """
    model = hf.load(work).requires_grad_(False)
    size, answer = work.fields["batch"], work.fields["answer"]
    words = hf.tensor(work, "ids")
    words = words[words != work.fields["image_token"]].reshape(len(words), -1)
    pictures = hf.tensor(work, "pixels").split(size)
    fold = work.fields["fold"]
    if cached:
        pictures = [_features(model, some, fold) for some in pictures]
    kernels = [hf.tensor(work, f"fold_kernel_{i}").T for i in (0, 1)]
    low_ranks = _low_ranks(model) if lora else []
    starts = [copy.deepcopy(low_rank.state_dict()) for low_rank in low_ranks]
    narrow = torch.autocast(
        words.device.type, torch.bfloat16, enabled=hf.dtype(work) == torch.bfloat16
    )

    def run():
        projector = _projector(kernels).to(words.device)
        for low_rank, start in zip(low_ranks, starts, strict=True):
            low_rank.load_state_dict(start)
        modules = torch.nn.ModuleList(low_ranks) if lora else projector
        trained = list(modules.parameters())
        optimiser = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0)
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimiser, lambda step: (1 + math.cos(math.pi * step / len(pictures))) / 2
        )
        losses = []
        for ids, images in zip(words.split(size), pictures, strict=True):
            features = images if cached else _features(model, images, fold)
            with narrow:
                projected = projector(features)
            states = _states(model, ids, projected.to(hf.dtype(work)))
            wanted = ids[:, -answer:]
            if everywhere:
                logits = model.lm_head(states)[:, -answer - 1 : -1]
            else:
                logits = model.lm_head(states[:, -answer - 1 : -1])
            loss = torch.nn.functional.cross_entropy(logits.float().flatten(0, 1), wanted.flatten())
            optimiser.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
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


class _LowRank(torch.nn.Module):
    """The change of a linear map, as a hook that adds scale * x A B to its output."""

    def __init__(self, linear: torch.nn.Linear, a: np.ndarray, scale: float):
        super().__init__()
        b = torch.zeros(a.shape[-1], linear.out_features)
        self.a = torch.nn.Parameter(torch.tensor(a, dtype=torch.float32))
        self.b = torch.nn.Parameter(b)
        self.to(linear.weight.device)
        self.scale = scale
        linear.register_forward_hook(self)

    def forward(self, linear, args, out):
        x = args[0]
        return out + x @ self.a.to(x.dtype) @ self.b.to(x.dtype) * self.scale


def _low_ranks(model, rank: int = 8, alpha: float = 16.0) -> list[_LowRank]:
    """Return changes of all matrices of the language model, drawn as `parts.Lora.start` does."""
    rng = np.random.default_rng(0)
    found: list[_LowRank] = []
    of = {"self_attn": ("k_proj", "o_proj", "q_proj", "v_proj"),
          "mlp": ("down_proj", "gate_proj", "up_proj")}  # fmt: skip
    for part, names in of.items():
        for name in names:
            linears = [getattr(getattr(block, part), name) for block in hf.blocks(model)]
            inputs = linears[0].in_features
            a = rng.uniform(-1, 1, (len(linears), inputs, rank)) / math.sqrt(inputs)
            found += map(_LowRank, linears, a, [alpha / rank] * len(linears))
    return found


@torch.no_grad()
def _features(model, pixels: torch.Tensor, fold: int) -> torch.Tensor:
    """Return [B, p, fold^2 E], fold x fold neighbouring patches in each token."""
    tower, layer = model.model.vision_tower, model.config.vision_feature_layer
    seen = tower(pixels, output_hidden_states=True).hidden_states[layer][:, 1:]
    B, P, E = seen.shape
    grid = round(P**0.5)
    seen = seen.reshape(B, grid // fold, fold, grid // fold, fold, E).transpose(2, 3)
    return seen.reshape(B, P // fold**2, fold**2 * E)


def _states(model, ids: torch.Tensor, images: torch.Tensor) -> torch.Tensor:
    """Return the final states, with the picture after the first word."""
    embeds = model.get_input_embeddings()(ids)
    embeds = torch.cat([embeds[:, :1], images, embeds[:, 1:]], 1)
    return model.model.language_model(inputs_embeds=embeds, use_cache=False).last_hidden_state
