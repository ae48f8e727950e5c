"""Data sets as tensors in memory, checked against the digests of the official files.

``load(name)`` gives a `Dataset`. ``mnist-sample`` is embedded in the package and needs no network;
the other sets lie in a data folder and are downloaded when they are absent. Every file is checked
each time it is read, so that an experiment never runs on damaged data, and no pickle is ever
loaded. From `dataset` to `sets`, each module imports only from those before it.
"""

from teleport.data.catalogue import SAMPLE_NAME, SOURCES, Source
from teleport.data.dataset import DataKind, Dataset, LossKind, Parts, batches, take
from teleport.data.download import SourceFile
from teleport.data.images import read_idx
from teleport.data.sets import FileStatus, SetInfo, available, fetch, load, verify
from teleport.data.store import ROOT_VARIABLE

__all__ = [
    "ROOT_VARIABLE",
    "SAMPLE_NAME",
    "SOURCES",
    "DataKind",
    "Dataset",
    "FileStatus",
    "LossKind",
    "Parts",
    "SetInfo",
    "Source",
    "SourceFile",
    "available",
    "batches",
    "fetch",
    "load",
    "read_idx",
    "take",
    "verify",
]
