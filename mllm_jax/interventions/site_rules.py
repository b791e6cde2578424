"""The sites to which each kind of edit and form of capture applies; imports no JAX."""

from __future__ import annotations

from mllm_jax import sites
from mllm_jax.sites import Site

_OF_PATTERNS = ("mass", "attention", "attention_map", "rollout")


def check_edit(kind: str, site: Site) -> None:
    """Check that a kind of edit applies to a site.

    Raises:
      ValueError: It does not apply to the site.
    """
    if (kind == "knockout") != (site in sites.MASKS):
        raise ValueError(
            f"{kind} does not apply to {site}: only lm.attn and vision.attn take knockout"
        )
    if kind == "splice" and not site.has_latents:
        raise ValueError(
            f"splice does not apply to {site}: a dictionary reads one vector for each token, but "
            f"the site is [{site.shape}]"
        )
    if kind == "patch" and site in sites.PATTERNS:
        raise ValueError(
            f"patch does not apply to {site}: the keys of two rows do not correspond; "
            f"patch {site.module}.attn.heads"
        )


def check_capture(form: str, site: Site, all_units: bool) -> None:
    """Check that a form of capture reads a site.

    Args:
      form: The name of the form.
      site: The site.
      all_units: Whether all units of the site are read.

    Raises:
      ValueError: It does not read the site, or does not read only some of its units.
    """
    if form in ("mean", "stats") and site.token_axis != 1:
        raise ValueError(
            f"{form} does not read {site}, which is [{site.shape}]; mass reads lm.attn.pattern "
            "and vision.attn.pattern, and keep reads every site"
        )
    if form in ("top", "bottom", "sample", "histogram", "sparse") and len(site.axes) != 3:
        raise ValueError(
            f"{form} does not read {site}, which is [{site.shape}]: it reads sites with one value "
            "for each token and unit"
        )
    if form in _OF_PATTERNS and site not in sites.PATTERNS:
        known = ", ".join(pattern.name for pattern in reversed(sites.PATTERNS))
        raise ValueError(f"{form} does not read {site}; {form} reads {known}")
    if form == "rollout" and site.keys:
        raise ValueError(
            f"a rollout multiplies attention among the same tokens, but {site} is of queries on "
            f"{site.keys} tokens: use attention_map"
        )
    if form in ("lens", "entropy", "distribution"):
        if site.axes[-1] != "D":
            raise ValueError(f"a lens reads tensors of the LM's width D; {site} is [{site.shape}]")
        if not all_units:
            raise ValueError(f"a lens reads all units of {site}: its address is [layers]")
        if site == sites.lm.norm:
            raise ValueError(
                "a lens normalises what it reads, and lm.norm is already normalised: read logits"
            )
