"""T5's tokenizer from a diffusers folder, by the `tokenizers` library: prompts -> token ids, with the end token and filled up.

Only tokenizer.json is read (transformers' T5TokenizerFast, pieces of a unigram model). SentencePiece's own spiece.model would
need another library.
"""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from tokenizers import Tokenizer

from proreflow_jax import MissingFile, UserError
from proreflow_jax.pretrained import config_fields
from proreflow_jax.pretrained.tokenizer import CONFIG, RULE, TOKENIZER, PromptTokenizer, rows_of_ids

LENGTH = 256  # tokens of a prompt, as diffusers' StableDiffusion3Pipeline takes unless told otherwise (max_sequence_length)
END, PAD = "</s>", "<pad>"
SENTENCEPIECE = "spiece.model"
CONVERT = """python -c "from transformers import AutoTokenizer as T; T.from_pretrained({0!r}).save_pretrained({0!r})\""""


def load_t5_tokenizer(folder: Path, encoder: Mapping[str, Any]) -> PromptTokenizer:
    """Reads tokenizer_3 of a diffusers folder; `encoder` is config.json of its text_encoder_3.

    `encode` gives ids (b, LENGTH) int32; longer prompts are cut and keep the end token, the first one is named in a warning.
    Raises FileNotFoundError or ValueError, one line: no tokenizer.json, a damaged one, or ids that the encoder's table lacks.
    """
    tokenizer = _read(folder)
    path = folder / CONFIG
    config = config_fields.check_fields("tokenizer", config_fields.read_object(path), path) if path.is_file() else {}
    pad = config.get("pad_token") or PAD
    pad_id, end_id = tokenizer.token_to_id(pad), tokenizer.token_to_id(END)
    if pad_id is None or end_id is None:
        raise UserError(f"{folder}: {(pad if pad_id is None else END)!r} is no token of the vocabulary: {RULE}")
    token, number = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1])
    if number >= (rows := encoder["vocab_size"]):
        raise UserError(
            f"{folder} and its text_encoder_3 do not fit: token {token!r} has id {number}, the encoder's table has {rows} rows "
            f"(vocab_size): name another {RULE}"
        )
    encode = rows_of_ids(tokenizer, LENGTH, pad_id, end_id, [], "the %d that T5 is given")
    return PromptTokenizer(LENGTH, encode, (token, number), end_id)


def _read(folder: Path) -> Tokenizer:
    path = folder / TOKENIZER
    if not path.is_file():
        if (folder / SENTENCEPIECE).is_file():
            how = CONVERT.format(str(folder))
            raise UserError(
                f"{folder} holds {SENTENCEPIECE} but no {TOKENIZER}, which alone is read: make it where you trust it: {how}"
            )
        raise MissingFile(f"{folder} holds no {TOKENIZER}: name another {RULE}")
    try:
        tokenizer = Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{folder} holds no readable tokenizer ({error}): fetch it again, or name another {RULE}") from None
    tokenizer.no_truncation()
    tokenizer.no_padding()
    return tokenizer
