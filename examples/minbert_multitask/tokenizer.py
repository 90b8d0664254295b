"""The tokenizer of a BERT checkpoint, from its folder."""

import json
from pathlib import Path

from tokenizers import Tokenizer
from tokenizers.decoders import WordPiece as WordPieceDecoder
from tokenizers.models import WordPiece
from tokenizers.normalizers import BertNormalizer
from tokenizers.pre_tokenizers import BertPreTokenizer

SPECIAL = ("[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]")


def load_tokenizer(folder: str | Path) -> Tokenizer:
    """WordPiece tokenizer of `folder`, from tokenizer.json or else from vocab.txt.

    Truncation and padding are off: `collate` does both. A sentence that spells "[SEP]" is read as text, not as the
    special token. From vocab.txt, letters' case is kept if tokenizer_config.json says `do_lower_case: false`, and
    `strip_accents` and `tokenize_chinese_chars` are followed too; the defaults are the uncased models'.

    Raises:
        FileNotFoundError: the folder has neither file.
        ValueError: a file that cannot be read as one, or a vocabulary without BERT's special tokens.
    """
    folder = Path(folder)
    if (folder / "tokenizer.json").is_file():
        try:
            tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:  # tokenizers raises bare Exception for a file that it cannot parse
            raise ValueError(f"{folder / 'tokenizer.json'} is not a tokenizer file: {error}") from error
    elif (folder / "vocab.txt").is_file():
        tokenizer = _from_vocabulary(folder)
    else:
        raise FileNotFoundError(f"{folder} has neither tokenizer.json nor vocab.txt; copy one from the checkpoint")
    if missing := [token for token in SPECIAL if tokenizer.token_to_id(token) is None]:
        raise ValueError(f"the vocabulary in {folder} lacks {', '.join(missing)}; it is not a BERT vocabulary")
    tokenizer.no_truncation()
    tokenizer.no_padding()
    tokenizer.encode_special_tokens = True
    return tokenizer


def _from_vocabulary(folder: Path) -> Tokenizer:
    """BERT's tokenizer (Devlin et al. 2018, arXiv:1810.04805, §A.2) over the words of vocab.txt, one a line."""
    words = (folder / "vocab.txt").read_text(encoding="utf-8").removesuffix("\n").split("\n")
    vocabulary = {word.removesuffix("\r"): i for i, word in enumerate(words)}
    config = {}
    if (folder / "tokenizer_config.json").is_file():
        try:
            config = json.loads((folder / "tokenizer_config.json").read_text(encoding="utf-8"))
        except ValueError as error:
            raise ValueError(f"{folder / 'tokenizer_config.json'} is not valid JSON: {error}") from error
    tokenizer = Tokenizer(WordPiece(vocabulary, unk_token="[UNK]", max_input_chars_per_word=100))
    tokenizer.normalizer = BertNormalizer(
        clean_text=True,
        handle_chinese_chars=config.get("tokenize_chinese_chars", True),
        strip_accents=config.get("strip_accents"),  # None: as lowercase says
        lowercase=config.get("do_lower_case", True),
    )
    tokenizer.pre_tokenizer = BertPreTokenizer()
    tokenizer.decoder = WordPieceDecoder()
    tokenizer.add_special_tokens([token for token in SPECIAL if token in vocabulary])
    return tokenizer
