"""The references: networks of HF transformers, their weights, and their tensors at our sites."""

from __future__ import annotations

import collections
import re
from collections.abc import Callable, Iterable, Mapping

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from mllm_jax import families, sites, tokens
from mllm_jax.batch import Batch
from mllm_jax.checkpoints import keys
from mllm_jax.families.instructblip import model as instructblip
from mllm_jax.families.llava import keys as llava_keys
from mllm_jax.families.llava import model as llava
from mllm_jax.families.llava_onevision import model as llava_onevision
from mllm_jax.interventions import captures
from mllm_jax.models import siglip, vit
from mllm_jax.passes import run

torch = pytest.importorskip("torch")
transformers = pytest.importorskip("transformers")
modeling_llama = pytest.importorskip("transformers.models.llama.modeling_llama")
modeling_llava = pytest.importorskip("transformers.models.llava.modeling_llava")

ATTENTION = {"attn_implementation": "eager"}  # the others have no attention weights
ACTIVATIONS = {"gelu_tanh": "gelu_pytorch_tanh"}  # what they call ours, where it differs
SELECT = {"patch": "default", "full": "full"}


def llama_config(config: llava.DecoderConfig, kind=transformers.LlamaConfig, **fields):
    """Of a Llama, or of a `kind` that has its fields."""
    return kind(
        vocab_size=config.vocab,
        hidden_size=config.width,
        num_hidden_layers=config.layers,
        num_attention_heads=config.heads,
        num_key_value_heads=config.kv_heads,
        head_dim=config.head_width,
        intermediate_size=config.mlp,
        rope_parameters={"rope_type": "default", "rope_theta": config.rope_theta},
        rms_norm_eps=config.eps,
        tie_word_embeddings=config.tied,
        pad_token_id=None,
        **fields,
        **ATTENTION,
    )


def _square(config: vit.VitConfig) -> dict:
    """The fields of a tower of square pictures."""
    return {
        "hidden_size": config.width,
        "num_hidden_layers": config.layers,
        "num_attention_heads": config.heads,
        "intermediate_size": config.mlp,
        "image_size": config.image_size,
        "patch_size": config.patch,
        "hidden_act": ACTIVATIONS.get(config.act, config.act),
        "layer_norm_eps": config.eps,
        **ATTENTION,
    }


def clip_config(config: llava.ClipConfig) -> transformers.CLIPVisionConfig:
    return transformers.CLIPVisionConfig(**_square(config))


def siglip_config(config: siglip.SiglipConfig) -> transformers.SiglipVisionConfig:
    return transformers.SiglipVisionConfig(**_square(config), vision_use_head=False)


def tower_config(config: llava.ClipConfig | siglip.SiglipConfig) -> transformers.PreTrainedConfig:
    is_siglip = isinstance(config, siglip.SiglipConfig)
    return siglip_config(config) if is_siglip else clip_config(config)


def llava_config(config: llava.LlavaConfig, text=None) -> transformers.PreTrainedConfig:
    """Of a LLaVA or a LLaVA-NeXT; `text` is of its LM, where that is no Llama."""
    kind, fields = transformers.LlavaConfig, {}
    if config.pinpoints:
        kind = transformers.LlavaNextConfig
        fields = {"image_grid_pinpoints": [list(size) for size in config.pinpoints]}
    if isinstance(config, llava_onevision.LlavaOneVisionConfig):
        kind = transformers.LlavaOnevisionConfig
        fields["vision_aspect_ratio"] = f"anyres_max_{config.max_tiles}"
    return kind(
        vision_config=tower_config(config.vision),
        text_config=text or llama_config(config.lm),
        image_token_index=config.image_token,
        projector_hidden_act=ACTIVATIONS.get(config.projector.act, config.projector.act),
        multimodal_projector_bias=config.projector.bias,
        vision_feature_layer=config.vision.feature_layer,
        vision_feature_select_strategy=SELECT[getattr(config.vision, "select", "full")],
        tie_word_embeddings=config.lm.tied,
        **fields,
        **ATTENTION,
    )


def instructblip_config(config: instructblip.InstructBlipConfig) -> transformers.InstructBlipConfig:
    vision, qformer = config.vision, config.qformer
    return transformers.InstructBlipConfig(
        vision_config=transformers.InstructBlipVisionConfig(**_square(vision)),
        qformer_config=transformers.InstructBlipQFormerConfig(
            vocab_size=qformer.vocab,
            max_position_embeddings=qformer.positions,
            hidden_size=qformer.width,
            num_hidden_layers=qformer.layers,
            num_attention_heads=qformer.heads,
            intermediate_size=qformer.mlp,
            cross_attention_frequency=qformer.look_every,
            hidden_act=ACTIVATIONS.get(qformer.act, qformer.act),
            layer_norm_eps=qformer.eps,
            **ATTENTION,
        ),
        text_config=llama_config(config.lm),
        num_query_tokens=qformer.queries,
        image_token_index=config.image_token,
        **ATTENTION,
    )


def random(network: torch.nn.Module, seed: int = 0) -> torch.nn.Module:
    """The network with weights that keep its tensors of order 1; no scale is 1 and no bias 0."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, weight in network.named_parameters():
            weight.normal_(generator=generator)
            if "norm" in name.lower():
                weight.mul_(0.2).add_(name.endswith("weight"))
            elif name.endswith("bias"):
                weight.mul_(0.2)
            elif "embed_tokens" in name:
                weight.mul_(0.3)  # when it is the head too, logits are of order 1
            elif weight.ndim > 1:
                weight.mul_(0.7 * weight[0].numel() ** -0.5)
    return network.eval()


def count(config) -> int:
    """The number of parameters of a model of ours."""
    state = nnx.state(nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0))), nnx.Param)
    return sum(leaf.size for leaf in jax.tree.leaves(state))


def transfer(config: llava.LlavaConfig, network: torch.nn.Module, prefix: str = "") -> llava.Llava:
    """Our model with the weights of a network; parts that the network does not have are zero.

    Args:
      config: Ours.
      network: Theirs, a LLaVA or a part of one. prefix: of its keys within a LLaVA.
    """
    abstract = nnx.eval_shape(lambda: config.build(rngs=nnx.Rngs(0)))

    def name(path) -> str:
        return jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value")

    shapes = {name(path): leaf.shape for path, leaf in jax.tree.leaves_with_path(abstract)}
    theirs = {
        llava_keys.canonical_key(prefix + k): v.numpy() for k, v in network.state_dict().items()
    }
    parts = {key.split(".")[0] for key in theirs}
    table = families.of(config).key_table(config)
    slots = [slot for slot in keys.slots(shapes, table) if slot.key.split(".")[0] in parts]
    keys.check(
        {key: array.shape for key, array in theirs.items()},
        slots,
        lambda key: families.of(config).is_unused(key, config),
    )
    arrays = {path: np.zeros(shape, np.float32) for path, shape in shapes.items()}
    for slot in slots:
        place = ... if slot.layer is None else slot.layer
        arrays[slot.path][place] = slot.ours(theirs[slot.key])
    return jax.tree.map_with_path(lambda path, _: jnp.asarray(arrays[name(path)]), abstract)


# What the `hf` column of the site table says of a module: how a hook gets the tensor.
READ: dict[str, Callable] = {
    "input": lambda args, kwargs, out: args[0] if args else kwargs["hidden_states"],
    "inputs_embeds": lambda args, kwargs, out: kwargs["inputs_embeds"],
    "output": lambda args, kwargs, out: out[0] if isinstance(out, tuple) else out,
    "weights": lambda args, kwargs, out: out[1],
}


# Where the outputs of attention and MLP are normed before they are added.
POST_NORMS = {
    "lm.attn_out": "language_model.model.layers.{i}.post_attention_layernorm (output)",
    "lm.resid_mid": "language_model.model.layers.{i}.pre_feedforward_layernorm (input)",
    "lm.mlp.out": "language_model.model.layers.{i}.post_feedforward_layernorm (output)",
}


def tensors(
    network: torch.nn.Module, names: Iterable[str], prefix: str = "",
    where: Mapping[str, str] | None = None, **inputs,
) -> dict[str, np.ndarray]:  # fmt: skip
    """What the network computes at our sites, found by the `hf` column of the site table.

    Args:
      network: Theirs. prefix: of its module names within a LLaVA.
      names: Of the sites.
      where: What stands in the `hf` column of some sites, with the names of this network.
      inputs: Of the network.

    Returns:
      By name of the site, [L, ...] where it is per layer.
    """
    found = collections.defaultdict(list)

    def watch(module, name, read):
        def hook(module, args, kwargs, out):
            found[name].append(READ[read](args, kwargs, out).numpy())

        return module.register_forward_hook(hook, with_kwargs=True)

    named = ((f"{prefix}{name}".removesuffix("."), m) for name, m in network.named_modules())
    modules = {
        key: module for name, module in named
        for key in (f"{name}.", llava_keys.canonical_key(f"{name}."))
    }  # fmt: skip
    hooks = []
    for name in set(names) - {"logits"}:
        for path, read in re.findall(
            r"(\S+) \((\w+)\)", (where or {}).get(name, sites.get(name).hf)
        ):
            path = re.escape(path).replace(r"\{i\}", r"\d+")
            path = re.compile(rf"(vision_tower\.)?{path}\.")
            there = {m: None for key, m in modules.items() if path.fullmatch(key)}
            hooks += [watch(module, name, read) for module in there]
            if there:  # of two names, the second is for networks without the first
                break
    inputs = {key: torch.from_numpy(np.asarray(value)) for key, value in inputs.items()}
    with torch.no_grad():
        out = network(**inputs)
    for hook in hooks:
        hook.remove()
    if "logits" in names:
        found["logits"].append(out.logits.numpy())
    return {n: np.stack(found[n]) if sites.get(n).stacked else found[n][0] for n in names}


def assert_equal(
    model: llava.Llava, batch: Batch, want: dict[str, np.ndarray], atol: float = 1e-5
) -> None:
    """Our sites are theirs at every token that is not padding.

    Args:
      want: By name of the site, as `tensors` gives them.
      atol: Absolute bound.
    """
    asked = {name: captures.keep(sites.get(name)) for name in want}
    got = run.run(model, batch, None, asked, logits="all" if "logits" in want else "none").captures
    maps = model.token_maps(batch)
    far = {name: d for name, d in worst(got, want, maps).items() if not d <= atol}
    assert not far, f"further from HF than {atol}: {far}"


def worst(got: dict, want: dict, maps: dict[str, tokens.TokenMap]) -> dict[str, float]:
    """By name of the site, the largest difference."""

    def one(name):
        site, theirs = sites.get(name), want[name]
        ours = np.asarray(got[name]).reshape(theirs.shape)  # theirs has all heads in one axis
        axis = site.token_axis + site.stacked
        real = np.asarray(site.entry(maps).kind) != tokens.CODE["pad"]
        ours, theirs = (np.moveaxis(a, (axis - site.token_axis, axis), (0, 1))[real]
                        for a in (ours, theirs))  # fmt: skip
        assert np.abs(theirs).max() > 0.1, f"{name}: a reference of zeros proves nothing"
        return float(np.abs(ours - theirs).max())

    return {name: one(name) for name in want}


def distance(logits, reference) -> tuple[float, float]:
    """How far logits [n, V] are from others: mean KL divergence in nats, and share of other tops."""
    p, q = (torch.log_softmax(torch.as_tensor(np.asarray(x, np.float64)), -1)
            for x in (reference, logits))  # fmt: skip
    divergence = (p.exp() * (p - q)).sum(-1).mean()
    return float(divergence), float((p.argmax(-1) != q.argmax(-1)).double().mean())
