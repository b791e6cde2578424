"""PlantDoc (Singh et al. 2020): leaves from the web, healthy or with a disease.

2,342 pictures of 28 classes to train on and 236 of 27 to test on, at commit 5467f60 of its
repository. The projection paper counts 2,598 pictures and 17 classes, the number of diseases; its
random baseline fits 27 or 28. Spider mites, the class without a test picture, has two to train on.
"""

from __future__ import annotations

from mllm_jax.data.classification import builder
from mllm_jax.data.manual import Need

LABELS = (
    "Apple Scab Leaf", "Apple leaf", "Apple rust leaf", "Bell_pepper leaf",
    "Bell_pepper leaf spot", "Blueberry leaf", "Cherry leaf", "Corn Gray leaf spot",
    "Corn leaf blight", "Corn rust leaf", "Peach leaf", "Potato leaf early blight",
    "Potato leaf late blight", "Raspberry leaf", "Soyabean leaf", "Squash Powdery mildew leaf",
    "Strawberry leaf", "Tomato Early blight leaf", "Tomato Septoria leaf spot", "Tomato leaf",
    "Tomato leaf bacterial spot", "Tomato leaf late blight", "Tomato leaf mosaic virus",
    "Tomato leaf yellow virus", "Tomato mold leaf", "Tomato two spotted spider mites leaf",
    "grape leaf", "grape leaf black rot",
)  # fmt: skip


class Plantdoc(builder.ClassificationBuilder):
    """Leaves of 13 plants, healthy or with one of 17 diseases."""

    HOMEPAGE = "https://github.com/pratikkayal/PlantDoc-Dataset"
    LICENCE = "CC BY 4.0"
    SPLITS = ("train", "test")
    NEEDS = tuple(
        Need(f"{split}/*/*.jpg", f"the folder {split} of the repository") for split in SPLITS
    )
    LABELS = LABELS
    CLASSES = builder.plain(LABELS)
    TOPIC = "plant leaf diseases"  # of the released code


Builder = Plantdoc
