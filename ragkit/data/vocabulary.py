"""The one tokenizer of the embedded models: whole words, and names cut into their two pieces."""

import string

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from ragkit.data.worlds import SPEC, plain_words


def build_tokenizer() -> PreTrainedTokenizerFast:
    """A lower-casing WordPiece tokenizer over the worlds' vocabulary.

    Names become a start and an ending piece, years two pieces; letters are kept as a fallback, so
    that any other word can be written too.
    """
    special = {f"{name}_token": f"[{name.upper()}]" for name in ("pad", "unk", "bos", "eos")}
    tokens = [*special.values(), *string.punctuation]
    for letter in string.ascii_lowercase + string.digits:
        tokens += [letter, "##" + letter]
    tokens += sorted(plain_words())
    for kind in SPEC["names"].values():
        tokens += kind.get("starts", []) + ["##" + end for end in kind.get("ends", [])]
    tokens += [str(n) for n in range(10, 60)] + [f"##{n:02d}" for n in range(100)]
    vocabulary = {token: i for i, token in enumerate(dict.fromkeys(tokens))}
    tokenizer = Tokenizer(models.WordPiece(vocabulary, unk_token="[UNK]"))
    signs = [normalizers.NFD(), normalizers.StripAccents(), normalizers.Lowercase()]
    tokenizer.normalizer = normalizers.Sequence(signs)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    start = [("[BOS]", vocabulary["[BOS]"])]
    tokenizer.post_processor = processors.TemplateProcessing("[BOS] $A", special_tokens=start)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, model_max_length=1024, **special)
