"""A byte-level tokenizer made here, and the words that a WordPiece tokenizer's tokens make up."""

import string

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from tokenizers.trainers import BpeTrainer

SPECIAL = ["<unk>", "<s>", "</s>"]
LETTERS = " ".join(string.ascii_letters + string.digits + string.punctuation)
TEXT = [LETTERS, *(f"The mayor of Velmar is Tilda Brann, born in {y}." for y in range(1900, 1990))]


def byte_level():
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    letters = pre_tokenizers.ByteLevel.alphabet()
    trainer = BpeTrainer(vocab_size=600, special_tokens=SPECIAL, initial_alphabet=letters)
    made.train_from_iterator(TEXT, trainer)
    return made


def pieced(reader, ids):
    """The words that WordPiece tokens make up, as tuples of ids, one a token."""
    groups = []
    for token, spelt in zip(ids, reader.tokenizer.convert_ids_to_tokens(ids), strict=True):
        groups = [*groups[:-1], [*groups[-1], token]] if spelt[:2] == "##" else [*groups, [token]]
    return [tuple(group) for group in groups for _ in group]
