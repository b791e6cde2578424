"""Describe a model without loading its weights: sites, parameters, bytes, neurons.

    python -m experiments.describe --model=llava-1.5-7b
    python -m experiments.describe --model=DIR --json=FILE

The model is a released one by name, a checkpoint directory, or a hub id, of which only the settings
are downloaded. An adapter (LoRA) is described by the model that it changes, which `--base` gives if
the adapter's config does not. Sites have the shapes of a batch of one row: one picture of the
largest size, and 32 more tokens.
"""

from __future__ import annotations

from absl import flags

from experiments.running import cli

MODEL = flags.DEFINE_string("model", None, "A released model, a checkpoint directory, or a hub id.")
BASE = flags.DEFINE_string(
    "base", None, "The model that an adapter changes; by default the one that the adapter names."
)
JSON = flags.DEFINE_string("json", None, "A file to write the description to, as JSON.")


def check() -> None:
    """Check the flags."""
    if not MODEL.value:
        raise ValueError("--model is missing: --model=NAME, --model=DIR or a hub id")
    cli.require_checkpoint("--model", MODEL.value, released=True)
    if BASE.value:
        cli.require_checkpoint("--base", BASE.value)
    cli.refuse_folder("--json", JSON.value)


def main() -> None:
    """Print the description, and write it if --json is given."""
    from experiments.describe import description

    description.run(MODEL.value or "", BASE.value, JSON.value)


if __name__ == "__main__":
    cli.run(main, check)
