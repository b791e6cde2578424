"""Locate the visual attributes of a domain after fine-tuning (Verma et al., ACL 2024).

    python -m experiments.projection --config=configs/embedded_projection.py --workdir=DIR

The model answers each classification task unchanged (Original), with its projector fine-tuned on
the task (FT-Proj), and with projector and language model fine-tuned (FT-E2E), each with several
seeds. CLIP's zero-shot answers are added if `config.clip` names a CLIP with both towers. Probes
read the classes from the features before and after the projection, and after every layer. The
factor runs change one setting of the recipe at a time. The neurons of the tasks' domains (MMNeuron,
Huo et al. 2024) are selected before and after each fine-tuning, and ablated. AurA's gains (Suau et
al. 2024) suppress one class.

The workdir receives `results.json` (its keys are in experiments/projection/report/page.py),
`tables/*.csv`, `figures/*.png`, `index.html` and `manifest.json`. A killed run continues and ends
with the same bytes.
"""

from experiments.running import command

if __name__ == "__main__":
    command.main(
        "experiments.projection.study", rows={"rows": 1, "proj.batch_size": 1, "e2e.batch_size": 1}
    )
