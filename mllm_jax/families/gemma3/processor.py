"""The processor of Gemma 3."""

from __future__ import annotations

from mllm_jax.processors.processor import Processor
from mllm_jax.processors.rows import Picture

END_OF_TURN = "<end_of_turn>"
_BEGIN, _END = "<start_of_image>", "<end_of_image>"


class Gemma3Processor(Processor):
    """A processor that marks the beginning and end of a picture, on separate lines.

    Pictures are resized to a square; there are no crops ("pan and scan").
    """

    image_text = "<image_soft_token>"
    placeholder = _BEGIN
    written_placeholder = _BEGIN
    end_of_turn = END_OF_TURN
    markers = _BEGIN, _END

    def picture_text(self, picture: Picture) -> str:
        """Return the text that represents a picture in the prompt."""
        del picture
        return f"\n\n{_BEGIN}{self.image_text}{_END}\n\n"
