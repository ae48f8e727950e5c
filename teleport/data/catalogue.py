"""Every data set by name: its files, and how they become inputs and targets."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

from teleport.data import builders
from teleport.data.dataset import DataKind, Parts
from teleport.data.download import SourceFile
from teleport.data.sources import FILES
from teleport.data.store import Checked

SAMPLE_NAME = "mnist-sample"


@dataclass(frozen=True)
class Source:
    """How a set is made of its files.

    Attributes:
        files: Its files, in the order in which ``build`` expects them.
        folder: Folder of the files inside the root; empty for a set embedded in the package.
        build: Makes the parts of the checked files.
        note: How the files are read and split, in one sentence.
        recipe: The same as a short key, which is part of the checksum.
        classes: Number of classes; 0 where ``build`` finds it or there are none.
        resize: Side in pixels to which images are resized when a batch is prepared; 0 for never.
    """

    what: str
    kind: DataKind
    files: tuple[SourceFile, ...]
    folder: str
    build: Callable[[Sequence[Checked]], Parts]
    note: str
    recipe: str
    classes: int = 0
    resize: int = 0

    @property
    def origin(self) -> str:
        """Where the content officially comes from."""
        urls = self.files[0].urls
        if not self.folder:
            return "embedded MNIST test images"
        return urls[0].rsplit("/", 1)[0] + "/" if urls else "no public source"


def _mnist(what: str, folder: str, files: tuple[SourceFile, ...], train: int) -> dict[str, Source]:
    """A set of 28 x 28 images, flat and as two kinds of sequence."""

    def source(kind: DataKind, how: str, shape: tuple[int, ...]) -> Source:
        build = partial(builders.idx_images, train=train, shape=shape)
        note = f"first {train:,} images for training, rest for test; pixels / 255; {how}"
        recipe = f"{train}" if kind == "images" else f"{train} {shape}"
        return Source(f"{what}, {how}", kind, files, folder, build, note, recipe, classes=10)

    return {
        "": source("images", "flat 784", (784,)),
        "-rows": source("sequences", "sequence of 28 rows of 28", (28, 28)),
        "-sequence": source("sequences", "sequence of 784 pixels", (784, 1)),
    }


def _cifar(classes: int, lists: str, label_bytes: int) -> Source:
    build = partial(builders.cifar, classes=classes, label_bytes=label_bytes, lists=lists)
    name, note = f"cifar{classes}", "official parts; pixels / 255 when prepared"
    what = f"50,000 + 10,000 colour images, 32 x 32, {classes} classes"
    return Source(what, "images", FILES[name], name, build, note, "official", classes)


def _tiny_imagenet(what: str, recipe: str, resize: int = 0) -> Source:
    name, build = "tiny-imagenet", builders.tiny_imagenet
    note = "official training part, official validation part as test; pixels / 255 when prepared"
    note += f", then resized to {resize} x {resize}, bilinear" if resize else ""
    return Source(what, "images", FILES[name], name, build, note, recipe, 200, resize)


def _series(what: str, folder: str, variables: int, unit: str, **how: Any) -> Source:
    note = (
        f"168 {unit}s in, the value 24 {unit}s after the last one out; 60 % of the {unit}s for "
        "training, the next 20 % for validation, the last 20 % for test, no window across a "
        "border; every variable normalised by mean and deviation of the training part"
    )
    build = partial(builders.table, variables=variables, **how)
    what, files = f"{what}, {variables} variables", FILES[folder.replace("_", "-")]
    return Source(what, "windows", files, folder, build, note, "168 24 60-20-20")


def _ptb(how: str, *, treebank: bool) -> Source:
    note = (
        f"words split {how}, <eos> after each line, vocabulary of the training text, sequences of "
        "256 one after the other, target is the next token; official parts"
    )
    build = partial(builders.penn_treebank, treebank=treebank)
    recipe = f"{'treebank' if treebank else 'spaces'} 256"
    return Source(f"Penn Treebank, {how}", "tokens", FILES["ptb"], "ptb", build, note, recipe)


_SAMPLE = _mnist("8,000 + 2,000 digits", "", FILES["mnist-test"], 8_000)
_DIGITS = FILES["mnist-train"] + FILES["mnist-test"]
_MNIST = _mnist("60,000 + 10,000 digits", "mnist", _DIGITS, 60_000)
_FASHION = _mnist("60,000 + 10,000 clothes", "fashion-mnist", FILES["fashion-mnist"], 60_000)

SOURCES: dict[str, Source] = {
    **{f"{SAMPLE_NAME}{ending}": source for ending, source in _SAMPLE.items()},
    **{f"mnist{ending}": source for ending, source in _MNIST.items()},
    "fashion-mnist": _FASHION[""],
    "cifar10": _cifar(10, "batches.meta.txt", label_bytes=1),
    "cifar10-jpeg": Source(
        "CIFAR-10 with JPEG loss (quality 75), 10 classes",
        "images",
        FILES["cifar10-jpeg"],
        "cifar10",
        partial(builders.packed_jpegs, key="cifar10-jpeg", side=32),
        "official parts in another order, JPEG re-encoded; pixels / 255 when prepared",
        "packed",
        classes=10,
    ),
    "cifar100": _cifar(100, "fine_label_names.txt", label_bytes=2),
    "tiny-imagenet": _tiny_imagenet("100,000 + 10,000 colour images, 64 x 64, 200 classes", "64"),
    "tiny-imagenet-224": _tiny_imagenet(
        "Tiny-ImageNet resized to 224 x 224 as in the paper", "224", resize=224
    ),
    "tiny-imagenet-32": Source(
        "16,000 + 4,000 of Tiny-ImageNet, 32 x 32, JPEG loss, 200 classes",
        "images",
        FILES["tiny-imagenet-32"],
        "tiny-imagenet",
        partial(builders.packed_jpegs, key="tiny-imagenet-32", side=32),
        "80 training images per class, 20 official validation images per class as test, 32 x 32, "
        "JPEG re-encoded; pixels / 255 when prepared",
        "packed",
        classes=200,
    ),
    "electricity": _series("electricity use, 26,304 hours", "electricity", 321, "hour"),
    "traffic": _series("road occupancy, 17,544 hours", "traffic", 862, "hour"),
    "exchange_rate": _series("exchange rates, 7,588 days", "exchange_rate", 8, "day"),
    "etth1": _series(
        "transformer loads and oil temperature, 17,420 hours",
        "etth1",
        7,
        "hour",
        header=True,
        skip=1,
    ),
    "ptb": _ptb("at spaces", treebank=False),
    # It splits the text's <unk> into three tokens. The paper does not say what it did about that.
    "ptb-treebank": _ptb("by NLTK's TreebankWordTokenizer", treebank=True),
}
