"""The processor of PaliGemma."""

from __future__ import annotations

from mllm_jax.processors.chat_template import Questions
from mllm_jax.processors.processor import Processor
from mllm_jax.processors.prompts import IMAGE, Chat


class PaliGemmaProcessor(Processor):
    """A processor of plain prompts: the pictures, a BOS token, the text and a newline."""

    def render(self, prompt: str | Chat, images: int) -> tuple[str, Questions]:
        """Return the whole text of a prompt with its images, and the spans of the question."""
        if not isinstance(prompt, str):
            return super().render(prompt, images)
        written = prompt if IMAGE in prompt else IMAGE * images + prompt
        start = written.rfind(IMAGE) + len(IMAGE) if IMAGE in written else 0
        begin = str(self.tokenizer.bos_token or "")
        text = f"{written[:start]}{begin}{written[start:]}\n"
        before = slice(0, start) if IMAGE in prompt else slice(0, 0)
        return text, (before, slice(start + len(begin), len(text) - 1))

    def _needs_special_tokens(self, prompt: str | Chat, text: str) -> bool:
        return not isinstance(prompt, str) and super()._needs_special_tokens(prompt, text)
