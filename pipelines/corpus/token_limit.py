"""A limit of texts in tokens, where ``prepare.tokenizer`` names a tokenizer.

Tables serve models of several tokenizers, so ``crem prepare`` counts no tokens by itself: ``crem train --dry-run`` says
what share of the texts a model would cut. This limit is for those who want such rows out of the tables. It needs
neither torch nor transformers.
"""

from __future__ import annotations

from functools import lru_cache

from tokenizers import Tokenizer

from crem.config import PrepareConfig
from crem.errors import ConfigError, ItemError
from crem.fetch import local_copy
from pipelines.formats.raw_rows import RawRow

__all__ = ["check_tokens", "open_tokenizer"]


def check_tokens(row: RawRow, config: PrepareConfig) -> None:
    """Refuse a row with a text of more tokens than ``prepare.max_text_tokens``; instructions and answers are texts.

    Raises:
        ItemError: ``text_too_long``. ConfigError, CheckpointError: as ``open_tokenizer``.
    """
    limit = config.max_text_tokens
    if limit is None or config.tokenizer is None:
        return
    sides = [("query", row.query), ("target", row.target), *(("negative", n) for n in row.negatives)]
    texts = [(f"{name}_{kind}", getattr(side, kind)) for name, side in sides for kind in ("text", "instruction")]
    for where, text in [*texts, ("question", row.question), ("answer", row.answer)]:
        if text is None or len(text.encode()) <= limit:  # a token of a byte-level vocabulary has a byte at least
            continue
        count = len(open_tokenizer(config.tokenizer).encode(text, add_special_tokens=False).ids)
        if count > limit:
            raise ItemError(
                "text_too_long",
                f"{where} has {count} tokens of {config.tokenizer}; the limit is {limit}; cut it or raise "
                "prepare.max_text_tokens",
            )


@lru_cache(maxsize=1)
def open_tokenizer(name: str) -> Tokenizer:
    """The tokenizer of a checkpoint folder, URI or hub name; special tokens in a text count as text.

    Raises:
        ConfigError: it has no ``tokenizer.json``. CheckpointError: there is no checkpoint, or it cannot be downloaded.
    """
    file = local_copy(name) / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(file))
    except Exception as error:  # tokenizers raises nothing more special
        raise ConfigError(f"prepare.tokenizer={name!r}: {file} cannot be read as a tokenizer ({error})") from error
    tokenizer.no_truncation()
    tokenizer.encode_special_tokens = True
    return tokenizer
