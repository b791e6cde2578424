"""A tiny checkpoint for studies that run as processes, and the environment of these processes."""

from __future__ import annotations

import json
import pathlib
import sys

import pytest
import tokenizers

from mllm_jax import families
from mllm_jax.families.llava import model as llava
from mllm_jax.loading import save
from tests.helpers import random_inputs

ROOT = pathlib.Path(__file__).parents[2]
TEMPLATE = (
    "{% for m in messages %}user {{ m['content'] }} {% endfor %}"
    "{% if add_generation_prompt %}assistant {% endif %}"
)
EVALUATE = "configs/embedded_evaluate.py"
LABELS = ("a circle", "a square", "a stripe", "a dot")
# Every study on two tiny domains: its config, and the fields that make it small.
PICTURES = {"train_per_domain": 4, "test_per_domain": 4, "batch_size": 2}
TASK = {"train_per_task": 8, "held_per_task": 4, "test_per_task": 4, "tasks": ()}
CIRCUIT = {
    "styles": ("category",), "partner": "class", "keep": "apart", "batch_size": 2, "sizes": (2, 8),
    "circuit": 3, "exact_nodes": 4, "train_per_domain": 12, "test_per_domain": 12,
}  # fmt: skip
STUDIES = {
    "evaluate": ("configs/embedded_evaluate.py", {"styles": ("choice",), **PICTURES}),
    "sweep": ("configs/embedded_sweep.py:strengths", {"pairs_per_domain": 2, "batch_size": 2}),
    "train": ("configs/embedded_projector.py", {"questions": 2, "steps": 3, **PICTURES}),
    "domain_neurons": (
        "configs/embedded.py:quick",
        {"lens_per_domain": 2, "groups": 2, **PICTURES},
    ),
    "projection": (
        "configs/embedded_projection.py:quick",
        {"proj.steps": 2, "e2e.steps": 2, "probe.epochs": 2, "neurons.pictures": 2, **TASK},
    ),
    "attribution": ("configs/embedded_attribution.py:quick", {"styles": ("category",), **PICTURES}),
    "mask": ("configs/embedded_mask.py:quick", {"styles": ("category",), **PICTURES}),
    "circuit": ("configs/embedded_circuit.py:quick", CIRCUIT),
    "lens": (
        "configs/embedded_lens.py:quick",
        {
            "styles": ("category",),
            "layers": (4, 8),
            "word_layers": (4,),
            "steps": 2,
            "tokens": 8,
            "jacobian_per_domain": 1,
            **PICTURES,
        },
    ),
    "das": ("configs/embedded_das.py:quick", {"style": "category", "layers": (4,), **PICTURES}),
    "dictionary": (
        "configs/embedded_dictionary.py:quick",
        {
            "styles": ("category",),
            "layer": 1,
            "steps": 6,
            "vectors": 16,
            "shown": 2,
            "recipe.latents": 24,
            "recipe.k": 4,
            "recipe.every": 2,
            **PICTURES,
        },
    ),
}
ENVIRONMENT = {
    "PYTHONPATH": str(ROOT),
    "JAX_PLATFORMS": "cpu",
    "JAX_DISABLE_MOST_OPTIMIZATIONS": "1",  # tiny programs take longer to compile than to run
}
LM = llava.DecoderConfig(
    vocab=272, width=32, layers=9, heads=4, kv_heads=2, head_width=8, mlp=48, tied=True
)


def write_checkpoint(folder: pathlib.Path, config, **pictures) -> pathlib.Path:
    """A random model in the form of the hub, a tokenizer of bytes, and its image processor."""
    save.save_hf(random_inputs.random_model(config), None, folder)
    write_tokenizer(folder, config)
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    write_json(folder / "preprocessor_config.json", pictures)
    return folder


def write_tokenizer(folder: pathlib.Path, config) -> None:
    """A tokenizer of bytes, with the tokens of pictures that the family of a config reads."""
    kind = families.of(config).processor
    folder.mkdir(exist_ok=True)
    letters = sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet())
    vocab = {letter: i for i, letter in enumerate(letters)} | {"<eos>": 256}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.BPE(vocab, []))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = tokenizers.decoders.ByteLevel()
    tokenizer.add_special_tokens(
        ["<eos>", "<image>", *filter(None, (kind.image_text, *kind.markers))]
    )
    tokenizer.save(str(folder / "tokenizer.json"))
    write_json(
        folder / "tokenizer_config.json",
        {"tokenizer_class": "PreTrainedTokenizerFast", "eos_token": "<eos>"},
    )


def write_json(path: pathlib.Path, value) -> None:
    path.write_text(json.dumps(value))


def several(command: list[str], count: int = 2) -> list[str]:
    return [sys.executable, "-m", "experiments.launch", f"--processes={count}", "--", *command]


def assert_close(one, two) -> None:
    """The same JSON; floats as near as sums in another order are."""
    if isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_close(one[key], two[key])
    elif isinstance(one, list):
        assert len(one) == len(two)
        for a, b in zip(one, two, strict=True):
            assert_close(a, b)
    elif isinstance(one, float):
        assert two == pytest.approx(one, rel=1e-4, abs=1e-5)
    else:
        assert one == two
