"""Paper A's configs: what they ask for, and the whole study on tiny models and tiny data sets."""

from __future__ import annotations

import dataclasses
import json
import re
import sys

import numpy as np
import pytest

from mllm_jax.analysis import official
from mllm_jax.families.gemma3 import model as gemma3
from mllm_jax.families.instructblip import model as instructblip
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_next import model as llava_next
from mllm_jax.families.qwen2_5_vl import model as qwen
from mllm_jax.models import eva, qformer, rotary
from tests.helpers import vqa_trees
from tests.helpers.studies import LM, ROOT, write_checkpoint, write_tokenizer

CONFIGS = {
    "next": "configs/mmneuron_llava_next.py",
    "instructblip": "configs/mmneuron_instructblip.py",
    "gemma": "configs/mmneuron_gemma3_4b.py",
    "qwen": "configs/mmneuron_qwen2_5_vl.py",
}
MORE_FIELDS = {"qwen": {"max_pixels"}}
PAPER = {
    "next": llava_next.LlavaNextConfig.vicuna_7b(),
    "instructblip": instructblip.InstructBlipConfig.vicuna_7b(),
    "gemma": gemma3.Gemma3Config.it_4b(),
    "qwen": qwen.QwenVLConfig.qwen2_5_vl_7b(),
}
SMALL = (
    "--config.judge_fallback=True", "--config.batch_size=2", "--config.groups=2",
    "--config.splits=2", "--config.resamples=4", "--config.shuffles=19", "--config.controls=1", "--config.random_controls=1", "--config.entropy_controls=1",
    "--config.new_tokens=3", "--config.picture_layers=2", "--config.train_per_domain=4",
    "--config.test_per_domain=3", "--config.lens_per_domain=2", "--config.evidence_exact=1",
)  # fmt: skip


@pytest.mark.parametrize("family", CONFIGS)
def test_fields_are_those_of_the_study(family, config_of):
    own, paper = config_of("configs/embedded.py"), config_of(CONFIGS[family])
    more = {"vqa", "new_tokens", "judge", "judge_fallback"} | MORE_FIELDS.get(family, set())
    assert set(paper) - set(own) == more
    assert set(own) - set(paper) == {"paths"}
    changed = config_of(f"{CONFIGS[family]}:official")
    assert {field for field in paper if paper[field] != changed[field]} == {
        "compat", "prompts", "scope", "train_tokens", "groups", "new_tokens",
    }  # fmt: skip
    with pytest.raises(ValueError, match="small is not one of paper, official"):
        config_of(f"{CONFIGS[family]}:small")


@pytest.mark.parametrize("family", CONFIGS)
def test_expected_numbers_of_neurons_follow_from_the_model(family):
    """K by module, as the docstring tells it: 1 % of the neurons that are run."""
    config = PAPER[family]
    run = config.vision.layers - (family == "next")  # the last layer of CLIP reaches nothing
    shapes = {
        "lm": (config.lm.layers, config.lm.mlp),
        "vision": (run, config.vision.mlp),
    } | (
        dict.fromkeys(("qformer", "query"), (config.qformer.layers, config.qformer.mlp))
        if family == "instructblip"
        else {"projector": (1, config.projector.widths[1])}
    )
    if family == "gemma":  # one linear map has no neurons
        del shapes["projector"]
    text = (ROOT / CONFIGS[family]).read_text()
    table = re.findall(r"^    (\w+) +(\d+) \* +([\d,]+) +([\d,]+)", text, re.M)
    told = {name: [int(n.replace(",", "")) for n in numbers] for name, *numbers in table}
    assert told == {
        name: [layers, width, round(0.01 * layers * width)]
        for name, (layers, width) in shapes.items()
    }


@pytest.fixture(scope="module")
def manual(tmp_path_factory):
    root = tmp_path_factory.mktemp("manual")
    for name, tree in vqa_trees.TREES.items():
        tree(root / name)
    return root


@pytest.fixture(scope="module")
def checkpoints(tmp_path_factory):
    root = tmp_path_factory.mktemp("checkpoints")
    tiny = llava_next.LlavaNextConfig.tiny()
    side = tiny.vision.image_size
    square = {"height": side, "width": side}
    family = {
        "next": llava_next.LlavaNextConfig.of(
            llava.ClipConfig.tiny(), LM, image_token=257, pinpoints=tiny.pinpoints
        ),
        "instructblip": instructblip.InstructBlipConfig.of(
            eva.EvaConfig.tiny(),
            qformer.QFormerConfig(
                queries=5, vocab=272, positions=1024, width=24, layers=4, heads=4, mlp=40,
                vision_width=32,
            ),
            LM, image_token=257,
        ),
        "qwen": qwen.QwenVLConfig.of(
            qwen.QwenVisionConfig.tiny("2.5"),
            dataclasses.replace(LM, biases="qkv", rope_sections=rotary.RopeSections((2, 1, 1))),
            image_token=258,
        ),
    }  # fmt: skip
    write_checkpoint(
        root / "next", family["next"], image_processor_type="LlavaNextImageProcessor",
        size={"shortest_edge": side}, crop_size=square,
        image_grid_pinpoints=[list(size) for size in tiny.pinpoints],
    )  # fmt: skip
    write_checkpoint(
        root / "instructblip", family["instructblip"], image_processor_type="BlipImageProcessor",
        size=square,
    )  # fmt: skip
    write_tokenizer(root / "instructblip" / "qformer_tokenizer", family["instructblip"])
    lm = dataclasses.replace(gemma3.tiny_language_model(), vocab=LM.vocab)
    write_checkpoint(
        root / "gemma", dataclasses.replace(gemma3.Gemma3Config.tiny(), lm=lm, image_token=258),
        image_processor_type="Gemma3ImageProcessor", size=square,
    )  # fmt: skip
    write_checkpoint(
        root / "qwen", family["qwen"], image_processor_type="Qwen2VLImageProcessor",
        patch_size=4, size={"shortest_edge": 128, "longest_edge": 2048},
    )  # fmt: skip
    return root


@pytest.fixture(scope="module")
def study(tmp_path_factory, checkpoints, manual, execute):
    """Runs a config on the tiny checkpoint of its family: its workdir."""
    root = tmp_path_factory.mktemp("built")

    def run(family: str, procedure: str, *more: str):
        workdir = root / f"{family}-{procedure}"
        done = execute(
            [
                sys.executable, "-m", "experiments.domain_neurons",
                f"--config={ROOT / CONFIGS[family]}:{procedure}", f"--workdir={workdir}",
                f"--config.model={checkpoints / family}", f"--config.vqa.manual={manual}",
                f"--config.vqa.root={root / 'vqa'}", *SMALL, *more,
            ]
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:]
        return workdir

    return run


@pytest.mark.slow
def test_instructblip_to_its_page(study):
    workdir = study("instructblip", "paper", "--config.modules=('qformer+query',)")
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["modules"]) == {"vision", "qformer", "query", "lm"}
    assert results["tokens"]["query"] == dict.fromkeys(results["domains"], 4 * 5)
    assert results["baseline"]["vqav2"]["metric"] == "VQA accuracy"
    assert "NOT Lingo-Judge" in results["baseline"]["lingoqa"]["metric"]
    cells = [row for row in results["ablation"] if row["module"] == "qformer+query"]
    assert len(cells) == 5 * (5 + 1 + 1 + 1)
    assert any(row["deviation"]["image"]["relative_l2"] > 0 for row in cells)
    assert results["pictures"] == []  # queries are on no grid
    assert (workdir / "index.html").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.long
def test_qwen_to_its_page(study):
    """Pictures keep their shape, within the limit of the config."""
    workdir = study(
        "qwen", "paper", "--config.modules=('projector', 'vision')", "--config.max_pixels=512"
    )
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["modules"]) == {"vision", "projector", "lm"}
    for name, tokens in results["tokens"]["vision"].items():
        assert tokens == 4 * results["tokens"]["projector"][name] <= 4 * 512 // 16, name
    shapes = {(len(p["words"][0]), len(p["words"][0][0])) for p in results["pictures"]}
    assert shapes and all(rows * columns <= 8 for rows, columns in shapes)
    assert (workdir / "index.html").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.long
def test_gemma_to_its_page(study):
    workdir = study("gemma", "paper", "--config.modules=('lm+vision',)")
    results = json.loads((workdir / "results.json").read_text())
    assert set(results["modules"]) == {"vision", "lm"}
    assert results["tokens"]["vision"] == dict.fromkeys(results["domains"], 4 * 16)
    cells = [row for row in results["ablation"] if row["module"] == "lm+vision"]
    assert any(row["deviation"]["image"]["relative_l2"] > 0 for row in cells)
    assert (workdir / "index.html").stat().st_size > 1000


@pytest.mark.slow
@pytest.mark.long
def test_llava_next_as_released(study):
    """Neurons as the transcription of the procedure finds them in what was counted."""
    published = pytest.importorskip("tests.helpers.published")
    workdir = study(
        "next", "official", "--config.modules=('projector', 'vision')",
        "--config.train_tokens=80", "--config.top_rate=0.1",
    )  # fmt: skip
    results = json.loads((workdir / "results.json").read_text())
    # Two pictures of three tiles or one of four, of 17 tokens each, reach 80 tokens.
    for name, tokens in results["tokens"]["vision"].items():
        assert 80 <= tokens < 160, name
    from mllm_jax.checkpoints import masks

    for module, shape in results["modules"].items():
        counts, tokens = [], []
        for name in results["domains"]:
            parts = [
                np.load(path) for path in (workdir / "steps/counts/released").glob(f"{name}-*.npz")
            ]
            counts.append(sum(part[f"{module}/positive"].sum(-1) for part in parts))
            tokens.append(sum(int(part[f"{module}/tokens"].sum()) for part in parts))
        expected, gap = published.select(np.stack(counts), np.array(tokens), top=0.1)
        mask = masks.read_pth(workdir / "masks" / f"{module}.pth", shape["width"], domains=5)
        if gap > 1e-6:  # else nobody's rule decides
            found = [[layer.tolist() for layer in layers] for layers in official.lists(mask)]
            assert found == expected, module
    # "mmproj" alone cuts nothing, "vision" cuts the projector too.
    rows = [row for row in results["ablation"] if row["module"] == "projector"]
    assert rows and all(row["neurons"] == 0 and row["difference"] == 0 for row in rows)
    named = results["selection"]
    row = next(r for r in results["ablation"] if r["module"] == "vision" and r["control"] is None)
    assert row["neurons"] == sum(
        named[m]["neurons_per_domain"][row["mask"]] for m in ("vision", "projector")
    )
    for shown in results["pictures"]:
        assert np.shape(shown["entropy"]) == (2, 4, 4)  # the base tile
        wide = shown["domain"] == "lingoqa"  # 30 x 4 pixels, others 6 x 4
        # two tiles side by side are 4 x 8 places; the rows or columns of padding are cut
        assert np.shape(shown["parts"]["entropy"])[1:] == ((2, 8) if wide else (4, 6))
    assert (workdir / "index.html").stat().st_size > 1000
