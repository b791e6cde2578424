"""DermNet: photographs of skin diseases, about 15,500 to train on and 4,000 to test on."""

from __future__ import annotations

from mllm_jax.data.classification import builder
from mllm_jax.data.manual import Need

LABELS = (
    "Acne and Rosacea Photos",
    "Actinic Keratosis Basal Cell Carcinoma and other Malignant Lesions",
    "Atopic Dermatitis Photos",
    "Bullous Disease Photos",
    "Cellulitis Impetigo and other Bacterial Infections",
    "Eczema Photos",
    "Exanthems and Drug Eruptions",
    "Hair Loss Photos Alopecia and other Hair Diseases",
    "Herpes HPV and other STDs Photos",
    "Light Diseases and Disorders of Pigmentation",
    "Lupus and other Connective Tissue diseases",
    "Melanoma Skin Cancer Nevi and Moles",
    "Nail Fungus and other Nail Disease",
    "Poison Ivy Photos and other Contact Dermatitis",
    "Psoriasis pictures Lichen Planus and related diseases",
    "Scabies Lyme Disease and other Infestations and Bites",
    "Seborrheic Keratoses and other Benign Tumors",
    "Systemic Disease",
    "Tinea Ringworm Candidiasis and other Fungal Infections",
    "Urticaria Hives",
    "Vascular Tumors",
    "Vasculitis Photos",
    "Warts Molluscum and other Viral Infections",
)


class Dermnet(builder.ClassificationBuilder):
    """Photographs of skin diseases in 23 groups."""

    HOMEPAGE = "https://www.kaggle.com/datasets/shubhamgoel27/dermnet"
    LICENCE = "see http://www.dermnet.com"
    SPLITS = ("train", "test")
    NEEDS = tuple(
        Need(f"{split}/*/*.jpg", f"the folder {split} of the archive, unpacked") for split in SPLITS
    )
    LABELS = LABELS
    CLASSES = builder.plain(LABELS)
    TOPIC = "skin diseases"


Builder = Dermnet
