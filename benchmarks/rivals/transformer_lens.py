"""TransformerLens 4: a bridge around the model of transformers, `run_with_hooks` per condition.

Pictures are given to each pass as its guide does; `transformer_lens_reuse` gives embeddings.
"""

from __future__ import annotations

import tokenizers
import torch
import transformers
from transformer_lens.model_bridge import TransformerBridge

from benchmarks.rivals import hf
from benchmarks.rivals.serve import Work


def sweep(work: Work, reuse: bool = False):
    """Compute the logits of the options under each ablation, [R, B, 4]."""
    model = hf.load(work)
    bridge = TransformerBridge.boot_transformers(
        str(work.checkpoint),
        hf_model=model,
        tokenizer=_tokenizer(work),
        device=str(hf.device(work)),
    )  # fmt: skip
    options, rows = hf.tensor(work, "options"), work.fields["pictures"]
    ids, pixels = (hf.tensor(work, name, rows=rows) for name in ("ids", "pixels"))
    ablated = hf.tensor(work, "neurons")

    @torch.inference_mode()
    def run():
        inputs = {"input": ids, "pixel_values": pixels}
        if reuse:
            inputs = {"input": hf.merged(model, ids, pixels)}
        found = []
        for layer, neurons in zip(work.inputs["layers"], ablated, strict=True):

            def ablate(gated, hook, at=neurons):
                gated[..., at] = 0
                return gated

            logits = bridge.run_with_hooks(
                **inputs, logits_to_keep=1, use_cache=False,
                fwd_hooks=[(f"blocks.{layer}.mlp.out.hook_in", ablate)],
            )  # fmt: skip
            found.append(logits[:, -1, options])
        return hf.numpy(logits=torch.stack(found))

    return run


def _tokenizer(work: Work):
    """Return a tokenizer read from files: the bridge requires one, although inputs are tensors."""
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel({"a": 0, "b": 1}, unk_token="a"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, bos_token="b", eos_token="b", pad_token="a", unk_token="a"
    )
    directory = work.checkpoint.with_name("tokenizer")
    tokenizer.save_pretrained(directory)
    return transformers.PreTrainedTokenizerFast.from_pretrained(directory)
