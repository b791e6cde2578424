"""TFDS builders of data sets whose files are downloaded manually."""

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
    """A file or a folder that a data set needs.

    Attributes:
      path: Its path within the data set's folder; may hold a `*`.
      source: Where it comes from.
    """

    path: str
    source: str


class ManualBuilder(tfds.core.GeneratorBasedBuilder, skip_registration=True):  # type: ignore[call-arg]  # untyped
    """A data set of manually downloaded files; examples keep their order.

    A subclass defines the files it needs, the features of a record, and the examples of a split.
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
        """Check that the data set's folder has the files it needs.

        Raises:
          FileNotFoundError: Files are missing; the message lists them.
        """
        missing = [need for need in cls.NEEDS if not any(folder.glob(need.path))]
        if missing:
            head = f"{cls.name}: missing in {folder}, to be downloaded from {cls.HOMEPAGE}:"
            raise FileNotFoundError(_listed(head, missing))

    @classmethod
    def build(
        cls, manual: str | os.PathLike, root: pathlib.Path, config: str | None = None
    ) -> pathlib.Path:
        """Build the data set into array_record files under `root`, unless it exists.

        Args:
          manual: The folder that holds `<name>/` with the files as they were downloaded.
          root: The folder where data sets are kept.
          config: The name of the builder's config.

        Returns:
          The folder of the built data set.
        """
        cls.require(pathlib.Path(manual) / cls.name)
        builder = cls(data_dir=str(root), config=config, file_format="array_record")
        builder.download_and_prepare(
            download_dir=str(root / "downloads"),
            download_config=tfds.download.DownloadConfig(
                manual_dir=str(manual), try_download_gcs=False
            ),
        )
        return pathlib.Path(builder.data_dir)

    @classmethod
    def source(
        cls, root: pathlib.Path, split: str, config: str | None = None
    ) -> Sequence[Mapping] | None:
        """Return the records of a split, or None if the data set is not built under `root`."""
        folder = root / cls.name / (config or "") / str(cls.VERSION)
        if not (folder / "dataset_info.json").is_file():
            return None
        return tfds.builder_from_directory(str(folder)).as_data_source(split)

    def record(self) -> dict[str, Any]:
        """Return the TFDS features of a record, by name."""
        raise NotImplementedError

    def examples(self, folder: pathlib.Path, split: str) -> Iterator[dict]:
        """Yield the records of a split, in order."""
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
    """Return the content of a JSON file of a data set; an error names the file."""
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: not JSON ({error}); download it again") from error


def encoded(name: str, file: pathlib.Path) -> bytes:
    """Return the bytes of a picture's file, TIFF as PNG; an error names the data set `name`."""
    try:
        if file.suffix.lower() not in (".tif", ".tiff"):
            return file.read_bytes()
        out = io.BytesIO()
        pictures.read(file).save(out, "PNG")  # every reader opens PNG
        return out.getvalue()
    except (OSError, ValueError) as error:
        raise FileNotFoundError(
            f"{name}: the picture {file} cannot be read ({files.reason(error)}); unpack the "
            "archive of pictures again"
        ) from error


def _listed(head: str, needs: Sequence[Need]) -> str:
    longest = max((len(need.path) for need in needs), default=0)
    return "\n".join([head, *(f"  {need.path:{longest}}  {need.source}" for need in needs)])
