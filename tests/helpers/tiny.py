"""A tiny processor for the tiny model: forty words, a chat template, pictures made small."""

from __future__ import annotations

import functools
from collections.abc import Sequence

import numpy as np
import PIL.Image
import tokenizers
import transformers

from mllm_jax import families
from mllm_jax.families.instructblip import model as instructblip
from mllm_jax.families.instructblip.processor import InstructBlipProcessor
from mllm_jax.families.llava import model as llava
from mllm_jax.processors.processor import Processor

TEXT = (
    "what is shown in the picture ? a an cat dog ship tree star cell page yes no of which one . "
    "user assistant red green blue small large left right first second kind : or and not it"
)
SPECIAL = ("<unk>", "<s>", "<eos>", "<|start|>", "<|end|>", "<image>")
TEMPLATE = (
    "{% for m in messages %}<|start|>{{ m['role'] }}\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|start|>assistant\n{% endif %}"
)


def tokenizer(
    config: llava.LlavaConfig, template: str | None = TEMPLATE, begin: bool = True,
    names: Sequence[str] = SPECIAL, words: str = "", lines: Sequence[str] = ("\n",), **special,
):  # fmt: skip
    """Words and line ends are tokens; `<s>` begins a text unless it is told not to.

    Args:
      names: The special tokens, that of images last. words: more of them.
      lines: The line ends that are one token, of which the longest that fits is taken.
    """
    # A config of -1 leaves the id to the tokenizer.
    vocab = {names[-1]: config.image_token if config.image_token >= 0 else 95}
    for word in (*names[:-1], *lines, *TEXT.split(), *words.split()):
        vocab.setdefault(word, len(vocab) - 1)
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="<unk>"))
    ends = "|".join(sorted(lines, key=len, reverse=True))
    pattern = tokenizers.Regex(rf"{ends}|\w+|[^\w\s]")
    core.pre_tokenizer = tokenizers.pre_tokenizers.Split(pattern, "removed", invert=True)
    core.add_special_tokens(list(names))
    if begin:
        core.post_processor = tokenizers.processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", vocab["<s>"])]
        )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", chat_template=template,
        **{"eos_token": "<eos>"} | special,
    )  # fmt: skip


def shrink(pictures: Sequence[PIL.Image.Image], size: int) -> dict[str, np.ndarray]:
    """As an image processor of transformers does: float32[n, 3, size, size]."""
    small = [np.asarray(p.resize((size, size)), np.float32) / 255 for p in pictures]
    return {"pixel_values": np.stack(small).transpose(0, 3, 1, 2)}


def processor(
    config: llava.LlavaConfig, template: str | None = TEMPLATE, kind=None, **how
) -> Processor:
    side = config.vision.image_size

    def make():
        if not config.pinpoints:
            return lambda pictures, return_tensors: shrink(pictures, side)
        cuts, square = [list(size) for size in config.pinpoints], {"height": side, "width": side}
        if not config.vision.has_cls:
            return transformers.LlavaOnevisionImageProcessorPil(
                size=square, image_grid_pinpoints=cuts
            )
        return transformers.LlavaNextImageProcessorPil(
            size={"shortest_edge": side}, crop_size=square, image_grid_pinpoints=cuts
        )

    kind = kind or families.of(config).processor
    return kind(tokenizer(config, template, **how), make, config)


def qformer_tokenizer():
    """The same words under other numbers, between [CLS] and [SEP]."""
    special = ("[PAD]", "[UNK]", "[CLS]", "[SEP]")
    vocab = {word: i for i, word in enumerate(dict.fromkeys((*special, *TEXT.split())))}
    core = tokenizers.Tokenizer(tokenizers.models.WordLevel(vocab, unk_token="[UNK]"))
    core.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    core.add_special_tokens(list(special))
    core.post_processor = tokenizers.processors.TemplateProcessing(
        single="[CLS] $A [SEP]", special_tokens=[(s, vocab[s]) for s in special[2:]]
    )
    return transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, pad_token="[PAD]", unk_token="[UNK]"
    )


def instructblip_processor(
    config: instructblip.InstructBlipConfig, template: str | None = None
) -> InstructBlipProcessor:
    kind = functools.partial(InstructBlipProcessor, qformer_tokenizer=qformer_tokenizer())
    return processor(config, template, kind)


def picture(seed: int, height: int = 24, width: int | None = None) -> PIL.Image.Image:
    shape = (height, width or height, 3)
    noise = np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)
    return PIL.Image.fromarray(noise)
