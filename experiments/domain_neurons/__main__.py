"""Find the domain-specific neurons of a multimodal LLM (MMNeuron, Huo et al., EMNLP 2024).

    python -m experiments.domain_neurons --config=configs/embedded.py --workdir=DIR

One pass per batch counts the activations of the vision tower, the projector (or the Q-Former) and
the language model in every domain: under neutral prompts, and again under the domain's own
questions, as released. The entropy over domains selects the neurons; they can also come from
another selector, or from a file (`config.masks`). The neurons of each domain are ablated on the
questions of each domain, and compared with equally many other neurons of the same layers. The logit
lens follows image and text tokens through the layers and tests the three-stage hypothesis.
`config.compat="official"` follows the released code, see docs/official.md.

`--edits` change the model under study. `--captures` (statistics, entropies) are read during the
count, and written to `captures/DOMAIN.npz`.

The workdir receives `results.json`, `tables/*.csv`, `figures/*.png`, `index.html`, `manifest.json`,
and the neurons as `masks.npz` and `masks/MODULE.pth`. Those beyond chance are in `masks_tested.npz`
and `masks_tested/MODULE.pth`; `config.ablate="tested"` ablates these. A killed run continues and
ends with the same bytes.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main(
        "experiments.domain_neurons.study", takes=("edits", "captures"), rows={"batch_size": 1}
    )
