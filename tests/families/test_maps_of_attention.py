"""Maps of attention are the kept pattern at each patch, in every family: tiles, windows, grids."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import mllm_jax as mj
from mllm_jax import sites as S
from mllm_jax import tokens as tok
from mllm_jax.report import heat_maps
from tests.helpers import random_inputs, tiers, tiny, tiny_families

NAMES = sorted(set(tiny_families.CONFIGS) - {"gemma3_text", "instructblip"})
QUICK = {"qwen2_5_vl"}  # windows, and a grid for each picture


@pytest.mark.parametrize("name", tiers.slow_except(QUICK, NAMES))
def test_a_map_is_the_kept_pattern(name):
    model = random_inputs.random_model(tiny_families.CONFIGS[name])
    processor = tiny_families.processor(name)
    batch = processor(
        [[tiny.picture(0, 40, 60)], [tiny.picture(1, 90, 30), tiny.picture(2, 30, 30)]],
        ["<image> what is it ?", "<image> a <image> cat or dog ?"],
    )
    sites = {"lm": S.lm.attn.pattern, "vision": S.vision.attn.pattern}
    out = mj.run(model, batch, None, {
        "map lm": mj.attention_map(sites["lm"], to=tok.last),
        "map vision": mj.attention_map(sites["vision"], heads="mean", to=tok.every),
        **{name: mj.keep(site) for name, site in sites.items()},
    }, logits="none")  # fmt: skip
    maps = jax.tree.map(np.asarray, model.token_maps(batch))
    for module in sites:
        pattern, map_ = np.asarray(out[module]), maps[module]
        rows = np.eye(2, dtype=bool) if map_.readers is None else map_.readers
        for row in range(2):
            got, seen = out[f"map {module}"].maps(row), 0
            for entry in np.flatnonzero(rows[row]):
                real = map_.kind[entry] != tok.CODE["pad"]
                queries = map_.last[entry] if module == "lm" else real
                mean = pattern[:, entry][:, :, queries].mean(2)  # [L, N, S]
                mean = mean if module == "lm" else mean.mean(1)
                for s in np.flatnonzero(map_.kind[entry] == tok.CODE["image"]):
                    at = map_.tile[entry, s], map_.row[entry, s], map_.column[entry, s]
                    if at[1] < 0:
                        continue
                    cell = got[int(at[0])][..., at[1], at[2]]
                    np.testing.assert_allclose(cell, mean[..., s], rtol=0, atol=1e-6)
                    seen += 1
            finite = sum(np.isfinite(m.reshape(-1, *m.shape[-2:])[0]).sum() for m in got.values())
            assert seen == finite > 0
            shown = heat_maps.overlays(
                batch, {t: m.reshape(-1, *m.shape[-2:])[0] for t, m in got.items()}, row
            )
            for number, picture in shown.items():
                at = np.flatnonzero(processor.config.readers(batch)[row] & (batch.tile == number))[
                    0
                ]
                seen_by_tower = processor.tile_picture(batch, int(at))
                ratio = picture.width / seen_by_tower.width
                assert picture.height == ratio * seen_by_tower.height


def test_windows_are_windows():
    """Of Qwen2.5-VL: outside its window no patch is seen, but in the layers that see all."""
    config = tiny_families.CONFIGS["qwen2_5_vl"]
    model = random_inputs.random_model(config)
    processor = tiny_families.processor("qwen2_5_vl")
    batch = processor([tiny.picture(0, 64, 96)], ["<image> what ?"])
    corner = tok.row(0) & tok.column(0)
    out = mj.run(
        model, batch, None, {"x": mj.attention_map(S.vision.attn.pattern, to=corner)}, logits="none"
    )
    (seen,) = out["x"].maps(0).values()
    away = jnp.asarray(seen)[..., -1, -1]
    full = np.isin(np.arange(config.vision.layers), config.vision.full_layers)
    np.testing.assert_array_equal((np.asarray(away) > 0).all(-1), full)
    np.testing.assert_allclose(seen.sum((-1, -2)), 1, rtol=0, atol=1e-5)
