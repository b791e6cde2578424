"""Objects: stamps of Tux Paint and rendered furniture of Sweet Home 3D, by folder and by name."""

from __future__ import annotations

import functools
import io
import re
import zipfile
from collections.abc import Iterator

import PIL.Image

from mllm_jax.data import packages
from mllm_jax.data.embedded import recipe

STAMPS = packages.Deb(
    "tuxpaint-stamps-default",
    "2022.06.04-1",
    "6db6c1bfc870a47f1499d6203b083522eacb57c5f9c87d468f2e92eb6d9d5f34",
    "GPL-2",
    "https://tuxpaint.org",
)
FURNITURE = packages.Deb(
    "sweethome3d-furniture",
    "1.8-1",
    "3ccb90c63f9525e887a767b9cd5c8b6933b8b6b2973a615a5359ee68a2118668",
    "CC0 or CC-BY-3.0, by catalogue",
    "https://www.sweethome3d.com",
)
STAMP_FOLDER = "usr/share/tuxpaint/stamps/"
CATALOGUE_FOLDER = "usr/share/sweethome3d/furniture/"
LICENCES = {
    "BlendSwap-CC-0": "CC0",
    "BlendSwap-CC-BY": "CC-BY-3.0",
    "KatorLegaz": "CC-BY-3.0-US",
    "Reallusion": "CC-BY-3.0-US",
    "Scopia": "CC-BY-3.0",
}

# The label for each folder of stamps, and for each last word of a catalogue entry's name.
FOLDERS = {
    "animals": "an animal",
    "food/fruit": "a fruit or vegetable",
    "food/vegetables": "a fruit or vegetable",
    "plants/flowers": "a plant",
    "plants/trees": "a plant",
    "clothes": "a piece of clothing",
    "vehicles": "a vehicle",
    "military/vehicles": "a vehicle",
    "household/dishes": "tableware",
}
WORDS = {
    "an animal": "bulldog cat dog horse rabbit",
    "a plant": "plant ficus tree bonsai cactus bamboo orchids tulips lily yucca spathiphyllum "
    "flowers hedge pine bush acacia beech cypress maple poplar blossom",
    "a piece of clothing": "bootie cap clothes dress glove hat jacket mocassin short skirt "
    "slippers sneakers suit trousers shoes",
    "a chair or sofa": "chair armchair stool sofa couch bench seat",
    "a table": "table desk",
    "a cabinet": "cabinet wardrobe bookcase shelves cupboard drawers dresser",
    "a door or window": "door window panes",
}
DISHES = "cup glass mug plate bowl bottle knife fork spoon cutlery teapot creamer tray pan"
# Whole categories of the catalogues that mean one thing.
CATEGORIES = {"Vehicles": "a vehicle", "Characters": "a person", "Lights": "a lamp"}
# Names whose last word misleads.
NOT_WHAT_THEY_SAY = {
    "clothes horse", "rocking horse", "hot dog", "abdominal bench", "bowl with fruits",
    "bowl with salad", "mannequin female", "mannequin male", "chicken",
}  # fmt: skip
# Words in the path or description of stamps that are drawn, mirrored, or show only a part.
NOT_PICTURES = re.compile(
    r"cartoon|_mirror|/toys|/plastic|wheel|emblem|balloon|wings|clothespin|hanger|button|nutcracker",
    re.IGNORECASE,
)


def furniture_label(name: str, category: str) -> str | None:
    """Return the label of a catalogue entry: by the last word of its name, else its category."""
    name = name.lower()
    if name in NOT_WHAT_THEY_SAY:
        return None
    last = re.split(r" with | on | under |,", name)[0].split()[-1]
    if category == "Kitchen" and last in DISHES.split():
        return "tableware"
    named = (label for label, words in WORDS.items() if last in words.split())
    return next(named, CATEGORIES.get(category))


def stamp_label(path: str, description: str) -> str | None:
    """Return the label of a stamp, by its folder."""
    if NOT_PICTURES.search(path) or NOT_PICTURES.search(description):
        return None
    return next((label for folder, label in FOLDERS.items() if path.startswith(folder + "/")), None)


def stem(name: str) -> str:
    """Return a file's name without the number of its variant: `chair2_b` is `chair`."""
    name = name.lower().removeprefix("t_")
    return re.sub(r"[\d_\-].*$", "", name) or name


def stamps() -> Iterator[recipe.Candidate]:
    """Yield the stamps that have a label."""
    files = STAMPS.members(
        lambda name: name.startswith(STAMP_FOLDER) and name.endswith((".png", ".txt"))
    )
    for path in sorted(path for path in files if path.endswith(".png")):
        text = files.get(path.removesuffix(".png") + ".txt", b"").decode("utf-8", "replace")
        description = text.split("\n", 1)[0].strip()
        encoded, path = files[path], path.removeprefix(STAMP_FOLDER)
        if label := stamp_label(path, description):
            name = path.removesuffix(".png")
            yield recipe.Candidate(
                name=f"stamp-{name.replace('/', '-')}",
                label=label,
                group=f"stamp {stem(name.rsplit('/', 1)[-1])}",
                source=f"{STAMPS.name}: {path}, {description}",
                licence=STAMPS.licence,
                image=functools.partial(_picture, encoded),
            )


def furniture() -> Iterator[recipe.Candidate]:
    """Yield the icons of furniture that have a label."""
    files = FURNITURE.members(lambda name: name.endswith(".sh3f"))
    for path, packed in sorted(files.items()):
        catalogue = path.removeprefix(CATALOGUE_FOLDER).removesuffix(".sh3f")
        archive = zipfile.ZipFile(io.BytesIO(packed))
        text = archive.read("PluginFurnitureCatalog.properties").decode("latin-1")
        fields = {
            key: dict(re.findall(rf"^{key}#(\d+)\s*=\s*(.*?)\s*$", text, re.MULTILINE))
            for key in ("name", "category", "icon")
        }
        for number, name in fields["name"].items():
            label = furniture_label(name, fields["category"][number])
            if not label:
                continue
            icon = fields["icon"][number].lstrip("/")
            file = icon.rsplit("/", 1)[-1].removesuffix(".png")
            yield recipe.Candidate(
                name=f"furniture-{catalogue}-{file}",
                label=label,
                group=f"furniture {catalogue} {stem(file)}",
                source=f"{FURNITURE.name}: {catalogue}.sh3f, {name}",
                licence=LICENCES[catalogue],
                image=functools.partial(_picture, archive.read(icon)),
            )


def _picture(encoded: bytes) -> PIL.Image.Image:
    return recipe.squared(PIL.Image.open(io.BytesIO(encoded)), margin=0.04)


RECIPE = recipe.Recipe(
    name="objects",
    families=(
        recipe.Family(
            (
                "an animal",
                "a fruit or vegetable",
                "a plant",
                "a piece of clothing",
                "a vehicle",
                "a person",
                "a chair or sofa",
                "a table",
                "a cabinet",
                "a lamp",
                "a door or window",
                "tableware",
            ),
            test=7,
            train=50,
        ),
    ),
    sources=(STAMPS, FURNITURE),
    parts=(stamps, furniture),
    note="label from the folder of the stamp, or from name and category in the furniture catalogue",
)
