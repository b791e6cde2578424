"""Read untrusted tokenizers of checkpoints, and encode texts as ids and kinds of tokens."""

from __future__ import annotations

import functools
import json
import pathlib
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

from mllm_jax import files, tokens
from mllm_jax.files import shown
from mllm_jax.processors.prompts import IMAGE

if TYPE_CHECKING:
    from transformers import BatchEncoding, PreTrainedTokenizerFast

_TOKENIZER_BYTES = 2**28
_WITH_TEMPLATES = ("processor_config.json", "chat_template.json")


def first_line(error: BaseException) -> str:
    """Return the first line of an error's message, or the error's name."""
    lines = str(error).strip().splitlines()
    return files.line(lines[0], 120) if lines else type(error).__name__


def tokenizer_origin(tokenizer: PreTrainedTokenizerFast) -> str:
    """Return the origin of a tokenizer, for errors."""
    return files.line(getattr(tokenizer, "name_or_path", None) or "this model", 120)


def encode(tokenizer: PreTrainedTokenizerFast, text: str, **options: Any) -> BatchEncoding:
    """Return a tokenizer's encoding of a text.

    Args:
      tokenizer: A tokenizer of transformers.
      text: The text.
      **options: Options of the tokenizer's call.

    Raises:
      ValueError: The tokenizer raised any error.
    """
    return _guarded(
        lambda: tokenizer(text, return_attention_mask=False, **options),
        lambda: f"the tokenizer of {tokenizer_origin(tokenizer)} cannot read {shown(text)}",
    )


def _guarded(call: Callable[[], Any], describe: Callable[[], str]) -> Any:
    """Call into the tokenizers package, which may raise any error, including panics of Rust."""
    try:
        return call()
    except BaseException as error:
        if not isinstance(error, Exception) and type(error).__name__ != "PanicException":
            raise
        raise ValueError(f"{describe()}: {first_line(error)}") from error


def tokenize(
    tokenizer: PreTrainedTokenizerFast,
    text: str,
    questions: Sequence[slice],
    *,
    special: bool,
    vocab: int,
    image: int = -1,
) -> tuple[list[int], list[int]]:
    """Return the ids of a text, and their kinds: question or system.

    Args:
      tokenizer: A fast tokenizer of transformers.
      text: The text.
      questions: The spans of the question in the text.
      special: Whether the tokenizer adds its special tokens.
      vocab: The size of the model's vocabulary.
      image: The id of the image token.

    Raises:
      ValueError: The tokenizer is damaged, or not that of the model.
    """
    encoding = encode(tokenizer, text, add_special_tokens=special, return_offsets_mapping=True)
    in_question = [
        high > low and any(low < part.stop and high > part.start for part in questions)
        for low, high in encoding["offset_mapping"]
    ]
    ids = encoding["input_ids"]
    check_vocab(tokenizer, ids, vocab, image)
    words = "".join(text[part] for part in questions).replace(IMAGE, "").strip()
    if words and not any(q and token != image for q, token in zip(in_question, ids, strict=True)):
        raise ValueError(
            f"the tokenizer of {tokenizer_origin(tokenizer)} returns no token for "
            f"{shown(words)}: its files are incomplete"
        )
    return ids, [tokens.CODE["question" if q else "system"] for q in in_question]


def check_vocab(
    tokenizer: PreTrainedTokenizerFast, ids: Sequence[int], vocab: int, image: int = -1
) -> None:
    """Raise ValueError if an id, other than the image token's, is beyond the model's vocabulary."""
    beyond = [token for token in ids if token >= vocab and token != image]
    if beyond:
        raise ValueError(
            f"the tokenizer of {tokenizer_origin(tokenizer)} gives "
            f"{shown(tokenizer.decode(beyond[:1]))} the id {beyond[0]}, the model has {vocab} "
            "words: use the tokenizer of this model"
        )


def answer_ids(tokenizer: PreTrainedTokenizerFast, answer: str) -> list[int]:
    """Return the ids of an answer, which is plain text.

    Raises:
      ValueError: It holds the text of a special token, such as `<image>` or the end of a turn.
    """
    ids = encode(tokenizer, answer, add_special_tokens=False)["input_ids"]
    special = {token.content for token in tokenizer.added_tokens_decoder.values() if token.special}
    named = [token for token in sorted({*special, IMAGE}, key=len) if token in answer]
    if named:
        plain = encode(tokenizer, answer, add_special_tokens=False, split_special_tokens=True)
        if plain["input_ids"] != ids:
            raise ValueError(
                f"the answer {shown(answer)} contains the special token {named[-1]}: remove it "
                "(the end of a turn is added automatically)"
            )
    return ids


def read_tokenizer(directory: pathlib.Path) -> PreTrainedTokenizerFast:
    """Return the tokenizer saved in a directory; sentencepiece files are read as Llama's.

    Raises:
      FileNotFoundError: There is no tokenizer.
      ValueError: It cannot be read.
    """
    # Import only when needed: it takes a second.
    from transformers import LlamaTokenizer, PreTrainedTokenizerFast

    for name, kind in (
        ("tokenizer.json", PreTrainedTokenizerFast),
        ("tokenizer.model", LlamaTokenizer),
    ):
        path = directory / name
        if path.exists():
            return _load(path, kind)
    raise FileNotFoundError(
        f"{directory} has neither tokenizer.json nor tokenizer.model: save the tokenizer there "
        "with save_pretrained"
    )


def _load(path: pathlib.Path, kind: Any) -> PreTrainedTokenizerFast:
    """Return the tokenizer of a file, of this class of transformers."""
    if not 0 < files.regular(path).stat().st_size <= _TOKENIZER_BYTES:
        raise ValueError(
            f"{files.line(path, 200)}: {path.stat().st_size:,} bytes are too many for a tokenizer; "
            "fetch it again"
        )
    tokenizer = _guarded(
        functools.partial(kind.from_pretrained, path.parent, trust_remote_code=False),
        lambda: f"{files.line(path, 200)}: not readable as a tokenizer with the files beside it",
    )
    tokenizer.chat_template = _read_chat_template(path.parent) or tokenizer.chat_template
    return tokenizer


def tokenizer_content(tokenizer: PreTrainedTokenizerFast | None) -> list[Any] | None:
    """Return the content of a fast tokenizer, for fingerprints.

    The padding and truncation of its last call are left out.
    """
    if tokenizer is None:
        return None
    core = json.loads(tokenizer.backend_tokenizer.to_str())
    core |= {"padding": None, "truncation": None}
    return [core, tokenizer.chat_template, tokenizer.special_tokens_map]


def _read_chat_template(directory: pathlib.Path) -> Any:
    """Return the chat template of a processor, which takes precedence over that of its tokenizer.

    It is the first of: that in the processor's settings; one wrapped in JSON, as in older
    checkpoints; one in its own file. The tokenizer may be that of a text-only model.
    """
    for path in (directory / name for name in _WITH_TEMPLATES):
        source = files.read_json(path).get("chat_template") if path.exists() else None
        if source is not None and not isinstance(source, (str, dict)):
            raise ValueError(
                files.refusal(path, [f"chat_template is not a string: {shown(source)}"])
            )
        if source:
            return source
    plain = directory / "chat_template.jinja"
    if not plain.exists():
        return None
    try:
        return files.regular(plain).read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(files.refusal(plain, ["not readable as UTF-8"])) from error


def read_stop_ids(directory: pathlib.Path) -> list[int]:
    """Return the ids at which transformers stops, from generation_config.json or config.json."""
    path = directory / "generation_config.json"
    if not path.exists():
        path = directory / "config.json"
    fields = files.read_json(path) if path.exists() else {}
    ids, text = fields.get("eos_token_id"), fields.get("text_config")
    ids = text.get("eos_token_id") if ids is None and isinstance(text, dict) else ids
    ids = [] if ids is None else ids if isinstance(ids, list) else [ids]
    if not all(type(token) is int and 0 <= token < 2**31 for token in ids):
        problem = f"eos_token_id is {shown(ids)}, not one or several ids"
        raise ValueError(files.refusal(path, [problem]))
    return ids
