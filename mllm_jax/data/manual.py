"""Data sets in files that were downloaded by hand: what all TFDS builders share."""

from __future__ import annotations

import dataclasses
import io
import json
import os
import pathlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, ClassVar

import tensorflow_datasets as tfds

from mllm_jax import files
from mllm_jax.processors import pictures


@dataclasses.dataclass(frozen=True)
class Need:
    """A file or a folder that has to be there.

    Attributes:
        path: within the data set's folder; may hold a `*`.
        source: where it comes from.
    """

    path: str
    source: str


class ManualBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):
    """A data set in files that were downloaded by hand; examples keep their order.

    A subclass says what it needs, what a record holds, and which examples a split has.
    """

    VERSION = tfds.core.Version("1.0.0")
    NEEDS: ClassVar[tuple[Need, ...]] = ()
    SPLITS: ClassVar[tuple[str, ...]] = ("train", "val")
    HOMEPAGE = ""
    LICENCE = ""

    def __init_subclass__(cls, **options: Any):
        super().__init_subclass__(**options)
        head = f"Download from {cls.HOMEPAGE} into FOLDER/{cls.name}, where FOLDER is `manual`:"
        cls.MANUAL_DOWNLOAD_INSTRUCTIONS = _listed(head, cls.NEEDS)

    @classmethod
    def require(cls, folder: pathlib.Path) -> None:
        """Lists what is missing in the data set's folder, if anything is.

        Raises:
            FileNotFoundError: with the list.
        """
        missing = [need for need in cls.NEEDS if not any(folder.glob(need.path))]
        if missing:
            head = f"{cls.name}: missing in {folder}, to be downloaded from {cls.HOMEPAGE}:"
            raise FileNotFoundError(_listed(head, missing))

    @classmethod
    def build(
        cls, manual: str | os.PathLike, root: pathlib.Path, config: str | None = None
    ) -> pathlib.Path:
        """Builds the data set into array_record files under `root`, unless it is there.

        Args:
            manual: the folder that holds `<name>/` with the files as they were downloaded.

        Returns:
            The folder of what is built.
        """
        cls.require(pathlib.Path(manual) / cls.name)
        made = cls(data_dir=str(root), config=config, file_format="array_record")
        made.download_and_prepare(
            download_dir=str(root / "downloads"),
            download_config=tfds.download.DownloadConfig(
                manual_dir=str(manual), try_download_gcs=False
            ),
        )
        return pathlib.Path(made.data_dir)

    @classmethod
    def source(
        cls, root: pathlib.Path, split: str, config: str | None = None
    ) -> Sequence[Mapping] | None:
        """The records of a split; None if the data set is not built under `root`."""
        folder = root / cls.name / (config or "") / str(cls.VERSION)
        if not (folder / "dataset_info.json").is_file():
            return None
        return tfds.builder_from_directory(str(folder)).as_data_source(split)

    def record(self) -> dict[str, Any]:
        """The features of a record, by name."""
        raise NotImplementedError

    def examples(self, folder: pathlib.Path, split: str) -> Iterator[dict]:
        """The records of a split, in order."""
        raise NotImplementedError

    def _info(self) -> tfds.core.DatasetInfo:
        return tfds.core.DatasetInfo(
            builder=self,
            description=(self.__doc__ or "").partition("\n")[0],
            homepage=self.HOMEPAGE,
            license=self.LICENCE,
            disable_shuffling=True,
            features=tfds.features.FeaturesDict(self.record()),
        )

    def _split_generators(self, dl_manager):
        folder = pathlib.Path(dl_manager.manual_dir) / self.name
        self.require(folder)
        return {split: self._generate_examples(folder, split) for split in self.SPLITS}

    def _generate_examples(self, folder: pathlib.Path, split: str) -> Iterator[tuple[int, dict]]:
        yield from enumerate(self.examples(folder, split))


def read_json(path: pathlib.Path) -> Any:
    """A JSON file of a data set; an error names it."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from error


def encoded(name: str, file: pathlib.Path) -> bytes:
    """A picture's file, TIFF as PNG; an error names the data set `name`."""
    try:
        if file.suffix.lower() not in (".tif", ".tiff"):
            return file.read_bytes()
        out = io.BytesIO()
        pictures.read(file).save(out, "PNG")  # what every reader opens
        return out.getvalue()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: the picture {file} cannot be read ({files.reason(error)}); unpack the "
            "archive of pictures again"
        ) from error


def _listed(head: str, needs: Sequence[Need]) -> str:
    longest = max((len(need.path) for need in needs), default=0)
    return "\n".join([head, *(f"  {need.path:{longest}}  {need.source}" for need in needs)])
