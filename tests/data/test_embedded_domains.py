"""The rules by which each embedded domain finds its labels, on tiny stand-ins for the packages."""

from __future__ import annotations

import gzip
import io
import struct
import zipfile

import numpy as np
import PIL.Image
import pytest

from mllm_jax.data import packages
from mllm_jax.data.embedded import astronomy, objects


def png(color: str = "red") -> bytes:
    stream = io.BytesIO()
    PIL.Image.new("RGBA", (12, 8), color).save(stream, "PNG")
    return stream.getvalue()


def serve(monkeypatch, files: dict[str, dict[str, bytes]]):
    """Lets every Deb hold the files given for its name."""

    def members(self, wanted):
        return {path: data for path, data in files[self.name].items() if wanted(path)}

    monkeypatch.setattr(packages.Deb, "members", members)


def test_stamps_take_their_label_from_the_folder(monkeypatch):
    folder = objects.STAMP_FOLDER
    stamps = {
        f"{folder}{path}.{ending}": png() if ending == "png" else b"An owl.\nnext"
        for path in ("animals/birds/owl", "animals/birds/cartoon/tux", "animals/owl_mirror")
        for ending in ("png", "txt")
    }
    stamps[f"{folder}vehicles/wheel1.png"] = png()
    serve(monkeypatch, {"tuxpaint-stamps-default": stamps})
    (found,) = objects.stamps()
    assert found.label == "an animal"
    assert found.source == "tuxpaint-stamps-default: animals/birds/owl.png, An owl."
    assert found.image().size == (224, 224)


def test_furniture_takes_its_label_from_name_and_category(monkeypatch):
    stream = io.BytesIO()
    entries = [("Folding chair", "Exterior"), ("Hot dog", "Kitchen"), ("Wall spot", "Lights")]
    with zipfile.ZipFile(stream, "w") as archive:
        lines = []
        for number, (name, category) in enumerate(entries, 1):
            lines += [f"name#{number}={name}", f"category#{number}={category}"]
            lines += [f"icon#{number}=/scopia/{name.lower().replace(' ', '_')}{number}.png"]
            archive.writestr(lines[-1].split("=/")[1], png())
        archive.writestr("PluginFurnitureCatalog.properties", "\n".join(lines))
    serve(
        monkeypatch,
        {"sweethome3d-furniture": {objects.CATALOGUE_FOLDER + "Scopia.sh3f": stream.getvalue()}},
    )
    assert [(c.label, c.licence) for c in objects.furniture()] == [
        ("a chair or sofa", "CC-BY-3.0"),
        ("a lamp", "CC-BY-3.0"),
    ]


@pytest.mark.parametrize(
    ("name", "category", "label"),
    [
        ("Glass door cabinet", "Kitchen", "a cabinet"),
        ("Chair with cushion", "Living room", "a chair or sofa"),
        ("Double door with panes", "Doors and windows", "a door or window"),
        ("Pine under snow", "Exterior", "a plant"),
        ("Plate, glass and cutlery", "Kitchen", "tableware"),
        ("Medicine bottle", "Bathroom", None),
        ("Table fan", "Miscellaneous", None),
        ("Dog house", "Exterior", None),
        ("Mannequin male", "Characters", None),
        ("Sitting girl", "Characters", "a person"),
        ("Siamese cat", "Characters", "an animal"),
    ],
)
def test_furniture_labels(name, category, label):
    assert objects.furniture_label(name, category) == label


def test_variants_of_one_thing_share_a_stem():
    assert objects.stem("chair2_b") == objects.stem("chair") == objects.stem("Chair-3") == "chair"
    assert objects.stem("747") == "747"


@pytest.mark.parametrize(
    ("kind", "morphology", "label"),
    [
        (0, "SAB(rs)cd", "a spiral galaxy"),
        (1, "(R)SB(r)ab", "a spiral galaxy"),
        (0, "Sc", "a spiral galaxy"),
        (0, "4", "a spiral galaxy"),
        (0, "S0", None),
        (0, "SB0s", None),
        (0, "E2", None),
        (0, "dE/S0", None),
        (0, "dSph", None),
        (0, "Im", None),
        (0, "", None),
        (7, "IV", "a globular cluster"),
        (11, "", "a planetary nebula"),
        (17, "", "a diffuse nebula"),
        (28, "", None),
    ],
)
def test_astronomy_labels(kind, morphology, label):
    assert astronomy.label_of(kind, morphology) == label


def entry(number: int, kind: int, morphology: str, ascension: float, ngc: int) -> bytes:
    """One record of Stellarium's catalogue, as its QDataStream writes it."""
    text = morphology.encode("utf-16-be")
    return (
        struct.pack(">I4dI", number, ascension, 0.1, 99.0, 9.0, kind)
        + struct.pack(">I", len(text)) + text
        + struct.pack(">2dI6d", *[0] * 9)
        + struct.pack(">14I", ngc, *[0] * 13)
        + struct.pack(">I", 0xFFFFFFFF)
        + struct.pack(">2I", 0, 0)
        + struct.pack(">I", 0) * 7
        + struct.pack(">5I", *[0] * 5)
    )  # fmt: skip


def test_sky_pictures_are_matched_by_number_and_grouped_by_place(monkeypatch):
    texts = [text.encode("utf-16-be") for text in ("3.16", "standard")]
    data = b"".join(struct.pack(">I", len(text)) + text for text in texts)
    data += entry(1, 0, "Sb", 1.0, 31)
    data += entry(2, 11, "", 1.01, 32)  # half a degree from the first
    data += entry(3, 7, "II", 2.0, 33)
    files = {"n31": png(), "n32-dss": png(), "ngc33": png(), "n99": png(), "wilds": png()}
    files = {f"{astronomy.FOLDER}{name}.png": image for name, image in files.items()}
    files[astronomy.FOLDER + "catalog.dat"] = gzip.compress(data)
    serve(monkeypatch, {"stellarium-data": files})
    found = {c.name: (c.label, c.group) for c in astronomy.pictures()}
    assert {name: label for name, (label, _) in found.items()} == {
        "n31": "a spiral galaxy",
        "n32-dss": "a planetary nebula",
        "ngc33": "a globular cluster",
    }
    assert found["n31"][1] == found["n32-dss"][1] != found["ngc33"][1]


def test_sky_groups_are_chained():
    degrees = np.radians([[0, 0], [0.9, 0], [1.8, 0], [5, 0], [5, 89.9], [185, 89.9]])
    assert astronomy.sky_groups(degrees, 1.0) == [0, 0, 0, 3, 4, 4]


class TestMedical:
    medical = pytest.importorskip("mllm_jax.data.embedded.medical", reason="needs nibabel")

    @pytest.mark.parametrize("axis", [0, 1, 2])
    def test_depths_of_the_splits_keep_their_distance(self, axis):
        train, test = (np.array(self.medical.depths(axis, split)) for split in ("train", "test"))
        assert len(train) >= 40
        assert len(test) >= 9
        assert np.abs(train[:, None] - test).min() >= self.medical.GAP

    def test_no_sagittal_slice_has_its_mirror_image(self):
        both = self.medical.depths(0, "train") + self.medical.depths(0, "test")
        assert max(both) <= 0

    def test_slice_is_upright(self):
        volume = np.zeros((4, 5, 6), np.uint8)
        volume[:, :, 5] = 9  # the top of the head
        affine = np.diag([1.0, 1, 1, 1])
        affine[:3, 3] = -2
        assert (self.medical.slice_at(volume, affine, 0, -1)[0] == 9).all()
        assert self.medical.slice_at(volume, affine, 2, 3).tolist() == volume[:, :, 5].T.tolist()


class TestDocuments:
    documents = pytest.importorskip("mllm_jax.data.embedded.documents", reason="needs pypdfium2")

    @pytest.mark.parametrize(
        ("text", "fonts", "drawn", "label"),
        [
            ("word " * 400, {"CMR10": 1.0}, 0, "a page of text"),
            ("word " * 400, {"CMR10": 1.0}, 40, None),
            ("word " * 400, {"CMR10": 0.9, "Emmentaler-20": 0.1}, 40, None),
            ("word " * 50, {"CMR10": 0.5, "Emmentaler-20": 0.5}, 90, "sheet music"),
            ("code " * 100, {"LMMonoLt10": 0.9, "CMR10": 0.1}, 0, "a program listing"),
            ("Owls . . . . . . 12\n" * 40, {"CMMI10": 1.0}, 0, "a list of contents"),
            ("GNU Free Documentation License " + "w " * 999, {"CMR10": 1.0}, 0, None),
            ("few words", {"CMR10": 1.0}, 0, None),
        ],
    )
    def test_page_labels(self, text, fonts, drawn, label):
        assert self.documents.page_label(text, fonts, drawn) == label

    def test_no_manual_is_in_both_splits(self):
        assert not {*self.documents.MANUALS["train"]} & {*self.documents.MANUALS["test"]}

    def test_digits_are_dark_on_white(self):
        ink = np.zeros((8, 8), np.uint8)
        ink[3:5, 3:5] = 16
        image = np.asarray(self.documents._digit(ink))
        assert image[0, 0].tolist() == [255, 255, 255]
        assert image[112, 112].max() < 40


class TestSatellite:
    from mllm_jax.data.embedded import satellite

    @pytest.mark.parametrize(
        ("land", "value", "latitude", "label"),
        [
            (0.0, 0, 0.0, "open ocean"),
            (0.0, 0, -70.0, None),
            (0.5, 1, 10.0, "a sea coast"),
            (0.5, 7, -70.0, None),
            (1.0, 1, 0.0, "land in Africa"),
            (1.0, 7, -80.0, "ice in Antarctica"),
            (0.8, 1, 0.0, None),
            (1.0, -1, 70.0, None),
        ],
    )
    def test_tile_labels(self, land, value, latitude, label):
        tile = np.zeros((10, 10), np.int8)
        tile.reshape(-1)[: round(100 * land)] = value
        assert self.satellite.label_of(tile, latitude) == label

    def test_a_tile_on_two_continents_has_no_label(self):
        tile = np.ones((10, 10), np.int8)
        tile[:5] = 2
        assert self.satellite.label_of(tile, 30.0) is None

    def test_continents_are_drawn_and_russia_is_divided(self, tmp_path, monkeypatch):
        shapefile = pytest.importorskip("shapefile", reason="needs pyshp")
        path = tmp_path / "land.shp"
        with shapefile.Writer(str(path)) as writer:
            writer.field("continent", "C")
            writer.field("name", "C")
            for continent, name, west, east in [
                ("Europe", "Russia", 30, 120),
                ("Africa", "Owlland", 0, 20),
                ("North America", "Greenland", -60, -30),
                ("Seven seas (open ocean)", "Islands", -120, -100),
            ]:
                writer.poly([[[west, 0], [west, 60], [east, 60], [east, 0], [west, 0]]])
                writer.record(continent, name)
        monkeypatch.setattr(packages.Wheel, "file", lambda self, ending: path)
        grid = self.satellite.continent_map(360, 180)
        places = {name: 1 + i for i, name in enumerate(self.satellite.CONTINENTS)}
        row = grid[60]
        assert row[180 + 40] == places["Europe"]
        assert row[180 + 100] == places["Asia"]
        assert row[180 + 10] == places["Africa"]
        assert row[180 - 45] == -1
        assert row[180 - 110] == -1
        assert row[180 - 80] == 0
        assert not grid[120].any()
