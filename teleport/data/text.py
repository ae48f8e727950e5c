"""Text as numbers: words, a vocabulary, and sequences for predicting the next token."""

from collections import Counter
from collections.abc import Callable, Iterable, Sequence

import numpy as np
import numpy.typing as npt
import torch

from teleport.data.dataset import Pair
from teleport.errors import DataError

END = "<eos>"  # closes every line
UNKNOWN = "<unk>"  # stands for words that the training text does not have
LENGTH = 256  # tokens in a sequence (paper, section 4.3)

Tokenizer = Callable[[str], list[str]]


def treebank_tokenizer() -> Tokenizer:
    """NLTK's ``TreebankWordTokenizer``, the paper's, to split one line; DataError without NLTK."""
    try:
        from nltk.tokenize import TreebankWordTokenizer
    except ImportError as error:
        raise DataError(
            "splitting text as the paper does needs NLTK: pip install 'nullspace-teleport[text]', "
            "or use the set that is split at spaces"
        ) from error
    tokenize: Tokenizer = TreebankWordTokenizer().tokenize
    return tokenize


def words(content: bytes, where: str, tokenizer: Tokenizer = str.split) -> list[str]:
    """Split a text in UTF-8, line by line; every line is closed by ``<eos>``.

    Raises:
        DataError: The text is empty or not UTF-8; the message gives the file and the offset.
    """
    try:
        text = content.decode()
    except UnicodeDecodeError as error:
        raise DataError(
            f"{where}: expected UTF-8 text, found byte {content[error.start]:#04x} "
            f"at offset {error.start}"
        ) from error
    if not text.strip():
        raise DataError(f"{where}: expected text, found {len(content)} bytes without a word")
    return [word for line in text.splitlines() for word in (*tokenizer(line), END)]


def vocabulary(training_words: Iterable[str]) -> tuple[str, ...]:
    """List the distinct words of the training text, the most frequent first.

    Among equally frequent ones the order is that of the alphabet. ``<unk>`` comes last if the text
    does not have it.
    """
    counts = Counter(training_words)
    if UNKNOWN not in counts:
        counts[UNKNOWN] = 0
    return tuple(sorted(counts, key=lambda word: (-counts[word], word)))


def encode(text_words: Sequence[str], names: Sequence[str]) -> npt.NDArray[np.int32]:
    """Replace words by their numbers in the vocabulary, those outside of it by that of ``<unk>``.

    Returns:
        int32 ``[len(text_words)]``.
    """
    number = {word: i for i, word in enumerate(names)}
    unknown = number[UNKNOWN]
    return np.fromiter((number.get(word, unknown) for word in text_words), np.int32)


def sequences(stream: npt.NDArray[np.int32], length: int = LENGTH) -> Pair:
    """Cut a stream of tokens ``[n]`` into sequences, with the next tokens as targets.

    Returns:
        Inputs and targets int64 ``[(n - 1) // length, length]``, both views of one tensor; the
        target of a token is the token after it. The incomplete rest at the end is left out.

    Raises:
        ValueError: The stream is too short for one sequence.
    """
    count = (len(stream) - 1) // length
    if count < 1:
        raise ValueError(
            f"{len(stream)} tokens are too few for one sequence of {length} and the token after it"
        )
    tokens = torch.from_numpy(stream.astype(np.int64))
    kept = count * length
    return tokens[:kept].view(count, length), tokens[1 : kept + 1].view(count, length)
