"""Build the embedded visual domains, and print their pictures, sources and licences.

    python -m experiments.domains
    python -m experiments.domains --licences=mllm_jax/data/LICENCES.md

The first run takes about two minutes and downloads 600 MB; it does not need root. The images stay
in the user's cache (`MLLM_JAX_CACHE`).
"""

from __future__ import annotations

from absl import flags

from experiments.running import cli

ROOT = flags.DEFINE_string("root", None, "The folder of the domains; the user's cache by default.")
DOMAINS = flags.DEFINE_list("domains", None, "Domains to build; all by default.")
LICENCES = flags.DEFINE_string("licences", None, "A Markdown file to write the tables to.")


def check() -> None:
    """Check the flags."""
    cli.refuse_file("--root", ROOT.value)
    cli.refuse_folder("--licences", LICENCES.value)


def main() -> None:
    """Build the domains and print the tables."""
    from experiments.domains import tables

    tables.run(DOMAINS.value, ROOT.value, LICENCES.value)


if __name__ == "__main__":
    cli.run(main, check)
