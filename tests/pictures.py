"""Small image folders, odd pictures and a TFDS dataset for the tests."""

from __future__ import annotations

import io
from pathlib import Path

import numpy as np
from PIL import Image


def pixels(seed: int, height: int = 40, width: int = 52) -> np.ndarray:
    """Smooth random colours, uint8 [height, width, 3]."""
    coarse = np.random.default_rng(seed).integers(0, 256, (5, 6, 3), np.uint8)
    return np.asarray(Image.fromarray(coarse).resize((width, height), Image.Resampling.BICUBIC))


def encoded(picture: Image.Image, kind: str, **options) -> bytes:
    file = io.BytesIO()
    picture.save(file, format=kind, **options)
    return file.getvalue()


def folder(root: Path, classes: int = 3, per_class: int = 4) -> Path:
    """JPEGs ROOT/class{c}/{i}.JPEG."""
    for c in range(classes):
        (root / f"class{c}").mkdir(parents=True)
        for i in range(per_class):
            picture = Image.fromarray(pixels(10 * c + i))
            (root / f"class{c}" / f"{i}.JPEG").write_bytes(encoded(picture, "jpeg", quality=95))
    return root


def tfds_dataset(data_dir: Path, files: list[Path], labels: list[int], classes: int) -> str:
    """A prepared dataset of the encoded files, in the order of its own shuffle; its folder."""
    import tensorflow_datasets as tfds
    from tensorflow_datasets.core import registered

    with registered.skip_registration():  # several tests of one process make it

        class Photographs(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("1.0.0")
            code_path = None  # it is looked up with a package that need not be there

            def _info(self):
                features = tfds.features.FeaturesDict(
                    {
                        "picture": tfds.features.Image(shape=(None, None, 3)),
                        "category": tfds.features.ClassLabel(num_classes=classes),
                        "file": tfds.features.Text(),
                    }
                )
                return tfds.core.DatasetInfo(builder=self, features=features)

            def _split_generators(self, _):
                return {"train": self._generate_examples()}

            def _generate_examples(self):
                for file, label in zip(files, labels):
                    example = {"picture": str(file), "category": label, "file": str(file)}
                    yield str(file), example

    builder = Photographs(data_dir=data_dir, file_format="array_record")
    builder.download_and_prepare()
    return str(builder.data_dir)
