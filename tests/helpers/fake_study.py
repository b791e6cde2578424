"""A study's results as they would be, made up from a seed."""

import pathlib

import numpy as np
from PIL import Image

from experiments.domain_neurons import claims

DOMAINS = ["objects", "medical", "satellite", "documents", "astronomy"]
MODULES = {
    "vision": {"site": "vision.mlp.act", "layers": 11, "width": 3072},
    "projector": {"site": "projector.act", "layers": 1, "width": 576},
    "lm": {"site": "lm.mlp.act", "layers": 30, "width": 1536},
}
# what a lens really brings up: pieces of words, signs, scripts no font of a figure has
WORDS = [
    " the", " galaxy", " brain", " red", "ing", " guitar", "\n", " $", "的", " stars", " animal",
    " coast", " page", "", " photograph", " Mediterranean", "<|im_end|>", " slice", " white", "_x_",
]  # fmt: skip


def picture(seed: int, size: int = 224) -> np.ndarray:
    """A round object on a ground of two colours: uint8[size, size, 3]."""
    rng = np.random.default_rng(seed)
    y, x = np.mgrid[:size, :size] / size
    sky, ground, body = rng.integers(40, 230, (3, 3))
    image = np.where(
        (y > 0.55 + 0.05 * np.sin(9 * x))[..., None], ground, sky * (1 - 0.4 * y)[..., None]
    )
    distance = np.hypot(x - 0.5, (y - 0.5) * 1.2)
    light = np.clip(1.25 - 2 * np.hypot(x - 0.42, y - 0.38), 0.2, 1)
    image = np.where((distance < 0.28)[..., None], body * light[..., None], image)
    return np.clip(image + rng.normal(0, 4, image.shape), 0, 255).astype(np.uint8)


def interval(value, half):
    return {"low": value - half, "high": value + half}


def fake_results(
    seed: int = 0, domains: list[str] = DOMAINS, grids: tuple[int, ...] = (7, 14)
) -> dict:
    """A results.json: vision 11 x 3072, projector 1 x 576, lm 30 x 1536, a picture a grid."""
    rng = np.random.default_rng(seed)
    count = len(domains)

    selection = {}
    for module, shape in MODULES.items():
        layers, size = shape["layers"], shape["layers"] * shape["width"]
        k = round(0.01 * size)
        depth = np.linspace(0, 1, layers)
        profiles = 0.2 + np.stack(
            [
                a * np.exp(-8 * depth) + b * np.exp(-(((depth - c) / 0.12) ** 2)) + d * depth**3
                for a, b, c, d in rng.uniform(0.1, 1, (count, 4))
            ]
        )
        weights = profiles / profiles.sum() * rng.uniform(0.5, 1.5, (count, 1))
        per_layer = rng.poisson(1.25 * k * weights)
        members = per_layer.sum(axis=1)
        members_of = rng.multinomial(k, [0.02, 0.74, 0.24, *[0.0] * (count - 2)])
        overlap = rng.uniform(0, 0.18, (count, count))
        overlap = np.triu(overlap, 1) + np.triu(overlap, 1).T + np.eye(count)
        selection[module] = {
            "k": k, "threshold": 0.61, "bar": 0.61, "selected": k, "share": k / size,
            "neurons_per_domain": dict(zip(domains, members.tolist(), strict=True)),
            "domains_per_neuron": {str(i): int(n) for i, n in enumerate(members_of)},
            "per_layer": dict(zip(domains, per_layer.tolist(), strict=True)),
            "overlap": overlap.tolist(),
        }  # fmt: skip

    released = {
        "own": {"prompts": "neutral", "scope": "image"}, "prompts": "released", "scope": "all",
        "modules": {
            module: {**found, "jaccard": rng.uniform(0.2, 0.5, count).tolist(), "chance": [0.01] * count}
            for module, found in selection.items()
        },
    }  # fmt: skip

    effect = {"vision": 0.09, "projector": 0.015, "lm": 0.05, "all": 0.14}
    stability = {
        module: {
            "examples": [15, 30, 60],
            "halves": [(np.array([0.3, 0.45, 0.6])[i] + rng.uniform(0, 0.2, count)).tolist() for i in range(3)],
            "bootstrap": {key: rng.uniform(0.5, 0.8, count).tolist() for key in ("value", "low", "high")},
            "stable": found["k"] // 3, "lowest_entropy": 0.41, "shuffled_entropy": 1.32, "beyond_chance": found["k"] // 2,
            "beyond_chance_per_domain": dict.fromkeys(domains, found["k"] // 9),
            "level": 0.05,
        }
        for module, found in selection.items()
    }  # fmt: skip
    selectors = ["entropy", "auroc", "difference", "random"]
    shared = np.array(
        [[1, 0.3, 0.25, 0.01], [0.3, 1, 0.5, 0.01], [0.25, 0.5, 1, 0.01], [0.01, 0.01, 0.01, 1]]
    )
    comparison = {
        "selectors": selectors,
        "modules": {
            module: {
                "jaccard": [shared.tolist()] * count,
                "chance": [np.full((4, 4), 0.005).tolist()] * count,
                "selectors_per_neuron": [[9000, 700, 120, 30, 1]] * count,
            }
            for module in MODULES
        },
        "settings": [
            {"field": field, "value": value, "jaccard": dict.fromkeys(MODULES, share), "selected": dict.fromkeys(MODULES, 90)}
            for field, value, share in (("prompts", "released", 0.7), ("scope", "text", 0.2), ("assign", "single", 0.8))
        ],
    }  # fmt: skip

    ablation = []
    for module, size in effect.items():
        for i, mask in enumerate(domains):
            neurons = sum(
                s["neurons_per_domain"][mask] for m, s in selection.items() if module in (m, "all")
            )
            for j, data in enumerate(domains):
                draws = [("rate", 0), ("rate", 1), ("layer", 0), ("layer", 1)] if i == j else []
                for control, draw in [(None, None), *draws]:
                    scale = (2.0 if i == j else 0.5) if control is None else 0.15
                    difference = round(240 * -size * scale * rng.uniform(0.2, 1.2)) / 240
                    moved = (
                        size
                        * (1.6 if i == j else 0.9)
                        * {None: 1, "rate": 0.7, "layer": 0.35}[control]
                    )
                    ablation.append({
                        "module": module, "mask": mask, "data": data, "neurons": neurons,
                        "control": control, "draw": draw, "accuracy": 0.7 + difference, "difference": difference,
                        **interval(difference, 0.025 + 0.15 * abs(difference)),
                        "p": 0.001 if difference < -0.06 else 0.4,
                        "deviation": {
                            kind: {
                                f"{measure}{end}": size * scale
                                for measure, size in (
                                    ("relative_l2", float(moved * k * rng.uniform(0.7, 1.3))),
                                    ("cosine", float(moved**2 * k / 2 * rng.uniform(0.7, 1.3))),
                                )
                                for end, scale in (("", 1.0), ("_low", 0.9), ("_high", 1.1))
                            }
                            for kind, k in {"image": 2.0, "text": 1.2, "last": 0.8}.items()
                        },
                    })  # fmt: skip

    for run in ablation:
        if run["control"] is None:
            run["p_holm"] = min(1.0, 20 * run["p"])
            run["family"] = "own" if run["mask"] == run["data"] else "other"
            run["changes"] = 3
            run["changed"] = [
                {"question": 1, "before": "a ball", "after": "a <cat> & $x$", "scores": [1.0, 0.0]}
            ]
    asked = {"id": "cats/0001", "question": "What is <shown>?", "answer": "a ball"}
    questions = {data: [asked] * 8 for data in domains}
    power = [
        {"family": family, "data": data, "tests": tests, "n": 240, "possible": share, "likely": 1.4 * share}
        for family, tests, share in (("own", 4 * count, 0.042), ("other", 4 * count * (count - 1), 0.046))
        for data in domains
    ]  # fmt: skip
    controls = [
        {"module": module, "data": data, "control": control, "draws": 2, "neurons": 40, "rate": 0.94,
         "drawn_rate": rate, "mean": 0.31, "drawn_mean": rate / 3, "layers": 9, "unmatched": missed}
        for module in MODULES
        for data in domains
        for control, rate, missed in (
            ("rate", 0.93, [{"layer": 3, "difference": -0.11, "missing": 0}] if module == "lm" else []),
            ("layer", 0.44, [{"layer": 0, "difference": -0.5, "missing": 0}]),
        )
    ]  # fmt: skip
    effects = [
        {"module": module, "data": data, "control": control, "draws": 2, "n": 240, "measure": measure,
         "tokens": tokens, "own": -0.07, "drawn": -0.02, "difference": -0.05, "low": -0.1,
         "high": 0.0, "p": p, "p_holm": min(1.0, 5 * p), "possible": 0.06, "likely": 0.08, "margin": 0.05,
         "p_equal": 0.4, "verdict": "effect" if 5 * p <= 0.05 else "undecided"}
        for module in effect
        for data, p in zip(domains, [0.001, 0.004, 0.2, 0.6, 0.009], strict=False)
        for control in ("rate", "layer")
        for measure, tokens in (("accuracy", None), ("relative_l2", "image"), ("cosine", "image"))
    ]  # fmt: skip

    lens_words = [
        {"data": data, "tokens": kind, "layer": layer, "n": 64, "words": [" the", "<b>", "\n"],
         "probabilities": [0.25, 0.125, 0.0625]}
        for data in domains
        for kind in ("image", "question")
        for layer in (0, 29)
    ]  # fmt: skip
    deviation_layers = [0, 4, 9, 14, 19, 24, 29]
    rising = np.linspace(0.01, 0.2, len(deviation_layers))
    deviation_by_layer: list[dict] = []
    for module in effect:
        for data in domains:
            for measure in ("relative_l2", "cosine"):
                named = {"module": module, "data": data, "measure": measure, "tokens": "image"}
                own = {"value": rising, "low": 0.9 * rising, "high": 1.1 * rising}
                matched = {"value": 0.6 * rising, "difference": 0.4 * rising - 0.01,
                           "difference_low": 0.3 * rising - 0.01, "difference_high": 0.5 * rising - 0.01}  # fmt: skip
                single = {"value": 0.3 * rising, "difference": 0.7 * rising}
                for control, values in ((None, own), ("rate", matched), ("layer", single)):
                    row = {"control": control, **named} | {k: v.tolist() for k, v in values.items()}
                    if control == "layer":
                        row |= {"difference_low": None, "difference_high": None}
                    deviation_by_layer.append(row)

    x = np.arange(30)
    lens = {}
    for i, domain in enumerate(domains):
        image = np.select(
            [x < 7, x < 23], [8.6 - 0.03 * x, 8.4 - 0.22 * (x - 7)], 4.9 + 0.12 * (x - 23)
        )
        curves = {
            "image": image + 0.25 * np.sin(x / 4 + i) + 0.3 * (i - 2),
            "text": 8.2
            - 5.5 / (1 + np.exp(-(x - 14) / 3))
            + 0.15 * (i - 2)
            + 0.1 * np.cos(x / 3 + i),
        }
        lens[domain] = {
            kind: {"mean": mean.tolist(), "low": (mean - w).tolist(), "high": (mean + w).tolist()}
            for kind, mean in curves.items()
            for w in [0.08 + 0.12 * rng.random() * (1 + np.sin(x / 5))]
        }
    by_domain = {
        domain: {
            "boundaries": [7 + int(a), 22 + int(b)],
            "low": [6 + int(a), 21 + int(b)],
            "high": [8 + int(a) + i % 2, 24 + int(b)],
            "verdict": "three stages as claimed (flat, falling, rising)",
            "bends": [6, 23],
            "confirmed": [True, True],
            "claimed": True,
        }
        for i, (domain, (a, b)) in enumerate(
            zip(domains, rng.integers(-1, 2, (count, 2)), strict=True)
        )
    }
    by_domain[domains[-1]] = {
        "boundaries": None, "low": [4, 14], "high": [12, 26],
        "verdict": "undecided: the boundaries run into each other (up to 15, from 14)",
        "bends": [], "confirmed": None, "claimed": False,
    }  # fmt: skip
    stages = {
        "rule": "least-squares fit of three free straight segments to the mean entropy",
        "by_domain": by_domain,
        "all": {
            "boundaries": [7, 22], "low": [6, 21], "high": [8, 24],
            "verdict": "three stages as claimed (flat, falling, rising)",
            "bends": [23], "confirmed": [False, True], "claimed": True,
        },
        "agreement": [False, True],
    }  # fmt: skip

    stages |= {name: dict(stages["all"]) for name in ("text", "neurons")}
    features = {
        module: {
            "points": {d: rng.normal(3 * np.array([np.cos(i), np.sin(i)]), 1.0, (32, 2)).tolist() for i, d in enumerate(domains)},
            "share": [0.4, 0.2], "between": 0.6,
        }
        for module in ("vision", "projector")
    }  # fmt: skip

    pictures = []
    for i, grid in enumerate(grids):
        layers = [4, 14, 29]
        y, x = np.mgrid[:grid, :grid] / grid
        centre = np.exp(-8 * ((x - 0.45) ** 2 + (y - 0.45) ** 2))
        entropy = [
            9 - 2 * layer / 15 - 3 * centre * layer / 30 + rng.normal(0, 0.3, (grid, grid))
            for layer in layers
        ]
        pictures.append({
            "domain": domains[i], "id": f"{domains[i]}/{i:04d}", "question": "What is shown?",
            "answer": "a ball <round>", "generated": "A ball & its shadow.",
            "image": f"figures/picture-{i}.png", "original": f"figures/picture-{i}.png",
            "layers": layers, "parts": None,
            "words": rng.choice(WORDS, (len(layers), grid, grid)).tolist(),
            "entropy": [e.tolist() for e in entropy],
            "by_layer": {
                "layers": layers, "vocabulary": WORDS, "words": rng.integers(0, len(WORDS), (3, grid**2, 2)).tolist(),
                "entropy": [e.ravel().tolist() for e in entropy], "attention": rng.random((3, grid**2)).tolist(),
                "attribution": rng.normal(size=(1, grid**2)).tolist(),
            },
        })  # fmt: skip

    evidence = {
        "edges": [-1.0, 0.0, 1.0],
        "pictures": [{"image": "figures/evidence-0.jpg", "domain": domains[0], "example": 0, "tile": 0,
                      "id": "a/<b>0", "question": "What?"}],
        "neurons": [
            {
                "module": module, "layer": layer, "index": 12, "domains": [domains[layer % 2]], "entropy": 0.25 * layer,
                "rates": {d: {"all": 0.1 + 0.8 * (i == layer % 2), "image": 0.5} for i, d in enumerate(domains)},
                "values": {d: [0, 90, 9, 1] for d in domains},
                "top": {
                    "image": [{"value": 3.5, "domain": domains[0], "picture": 0, "row": 1, "column": 2, "rows": 4, "columns": 8}],
                    "text": [{"value": -0.5, "domain": domains[1], "before": "Is it <b>", "word": "\u00a0"}],
                },
                "words": {"raised": ["<i>sky", " "], "lowered": ["sea"]} if module == "lm" else None,
                "effects": {d: -0.01 * i for i, d in enumerate(domains)},
                "exact": {d: -0.01 * i - 0.001 * layer for i, d in enumerate(domains[:2])}, "p": 0.005 * layer,
            }
            for module, layer in (("vision", 3), ("lm", 2), ("lm", 5))
        ],
    }  # fmt: skip
    accuracy = [0.74, 0.61, 0.69, 0.43, 0.82]
    results = {
        "format": 2, "study": "domain_neurons", "model": "embedded: CLIP ViT-B/16 + SmolLM2-135M",
        "domains": domains, "modules": MODULES,
        "tokens": {m: {d: int(rng.integers(20_000, 60_000)) for d in domains} for m in MODULES},
        "selection": selection, "selector": "entropy",
        "stability": stability, "comparison": comparison, "released": released, "controls": controls, "effects": effects,
        "deviation_layers": deviation_layers, "deviation_by_layer": deviation_by_layer, "ablated": "selected", "power": power,
        "baseline": {
            d: {"accuracy": a, **interval(a, 0.06), "n": 240, "chance": c, "metric": "accuracy over options"}
            for d, a, c in zip(domains, accuracy, [0.25, 0.3, 0.3, 0.35, 0.25], strict=False)
        },
        "ablation": ablation, "questions": questions, "lens": lens, "lens_top": lens, "lens_words": lens_words, "lens_sites": {"attn_out": lens},
        "sparsity": [
            {"data": data, "measure": measure, "n": 32, "bound": bound, "claimed": sign, "value": 0.3,
             "low": 0.2, "high": 0.38, "p": 0.001, "p_holm": 0.005, "verdict": "holds"}
            for data in domains
            for measure, bound, sign in (("entropy", 0.0, 1), ("most likely word", 0.4, -1))
        ],
        "stages": stages, "features": features,
        "pictures": pictures, "evidence": evidence,
    }  # fmt: skip
    return results | {"claims": claims.judge(results)}


def write_pictures(workdir: pathlib.Path, results: dict) -> None:
    """The pictures that the study itself leaves in its folder."""
    for i, shown in enumerate((*results["pictures"], *results["evidence"]["pictures"])):
        path = workdir / shown["image"]
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(picture(i)).save(path)
