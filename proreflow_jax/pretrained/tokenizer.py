"""CLIP's tokenizer from a diffusers folder, by the `tokenizers` library: prompts -> token ids.

Old folders hold vocab.json + merges.txt, new ones tokenizer.json; both give the same ids as transformers' CLIPTokenizer.
"""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Int
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from proreflow_jax import MissingFile, UserError
from proreflow_jax.pretrained import config_fields

log = logging.getLogger(__name__)
WORDS = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""
RULE = "--config.model.path"
LENGTH = 77  # tokens, of CLIP, where no file says it
CONFIG, TOKENIZER = "tokenizer_config.json", "tokenizer.json"
START, END = "<|startoftext|>", "<|endoftext|>"


class PromptTokenizer(NamedTuple):
    """Prompts to ids of one fixed length."""

    length: int
    encode: Callable[[Sequence[str]], Int[np.ndarray, "b s"]]
    last: tuple[str, int] = ("", 0)  # the token of the highest id, and that id
    end: int = 0  # id of the end token


def build(vocabulary: dict[str, int], merges: list[tuple[str, str]]) -> Tokenizer:
    """CLIP's byte-level BPE: lower case, whitespace collapsed, `</w>` at the end of words, start and end tokens around."""
    bpe = models.BPE(
        vocab=vocabulary, merges=merges, unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>", fuse_unk=False
    )
    tokenizer = Tokenizer(bpe)
    spaces = normalizers.Replace(Regex(r"\s+"), " ")
    tokenizer.normalizer = normalizers.Sequence([normalizers.NFC(), spaces, normalizers.Lowercase()])
    split = pre_tokenizers.Split(Regex(WORDS), behavior="removed", invert=True)
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([split, pre_tokenizers.ByteLevel(add_prefix_space=False)])
    around = (END, vocabulary[END]), (START, vocabulary[START])
    tokenizer.post_processor = processors.RobertaProcessing(*around, trim_offsets=False, add_prefix_space=False)
    tokenizer.add_special_tokens([START, END])
    return tokenizer


def _read(folder: Path, added: Mapping[str, tuple[int, AddedToken]]) -> Tokenizer:
    try:
        tokenizer = _built(folder, {word: number for word, (number, _) in added.items()})
        tokenizer.add_tokens([token for _, token in added.values()])
    except UserError:
        raise
    except Exception as error:  # the library raises Exception itself
        raise UserError(f"{folder} holds no readable tokenizer ({error}): fetch it again, or name another {RULE}") from None
    for word, (number, _) in added.items():
        if (actual := tokenizer.token_to_id(word)) != number:
            raise UserError(f"{folder}: the added token {word!r} has id {number} in one file, {actual} in another: {RULE}")
    return tokenizer


def _built(folder: Path, added: Mapping[str, int]) -> Tokenizer:
    """The tokenizer; added tokens are entries of its vocabulary where that is a file of its own, so they keep their ids."""
    if (folder / "vocab.json").is_file() and (folder / "merges.txt").is_file():
        lines = (folder / "merges.txt").read_text(encoding="utf-8").splitlines()
        merges = [tuple(line.split()) for line in lines if line and not line.startswith("#version")]
        vocabulary = config_fields.read_ids(folder / "vocab.json")
        _check_merges(vocabulary, merges)
        return build(dict(added) | vocabulary, merges)
    if (folder / TOKENIZER).is_file():
        return Tokenizer.from_file(str(folder / TOKENIZER))
    raise MissingFile(f"{folder} holds neither vocab.json + merges.txt nor {TOKENIZER}: name another {RULE}")


def _check_merges(vocabulary: dict[str, int], merges: Sequence[tuple[str, ...]]) -> None:
    """Raises ValueError if words of the vocabulary have no merge: prompts would fall into letters, and draw something else.

    One letter needs none, nor do words in angle brackets, which are special or were added.
    """
    merged = {"".join(pair) for pair in merges}
    longer = [word for word in vocabulary if len(word.removesuffix("</w>")) > 1 and not (word[0] == "<" and word[-1] == ">")]
    if lacking := [word for word in longer if word not in merged]:
        raise ValueError(f"merges.txt lacks {len(lacking)} of {len(longer)} merges, that of {lacking[0]!r} among them")


def _added_tokens(folder: Path, config: Mapping[str, Any], known: Sequence[str]) -> dict[str, tuple[int, AddedToken]]:
    """{token: (id, token with its rules)} that stand beside the vocabulary, without `known`: learned ones, for example.

    transformers 4 writes added_tokens.json and added_tokens_decoder, later ones tokenizer.json alone.
    """
    rows = [(word, number, {}) for word, number in _ids(folder / "added_tokens.json").items()]
    listed = config_fields.read_object(folder / TOKENIZER).get("added_tokens") if (folder / TOKENIZER).is_file() else None
    rows += [(entry["content"], entry["id"], entry) for entry in _entries(folder / TOKENIZER, listed or [])]
    decoder = [{**entry, "id": number} for number, entry in (config.get("added_tokens_decoder") or {}).items()]
    rows += [(entry["content"], entry["id"], entry) for entry in _entries(folder / CONFIG, decoder)]
    numbers: dict[str, int] = {}
    for word, number, _ in rows:
        if numbers.setdefault(word, number) != number:
            both = f"has id {numbers[word]} in one file, {number} in another"
            raise UserError(f"{folder}: the added token {word!r} {both}: name another {RULE}")
    return {word: (number, _with_rules(word, entry)) for word, number, entry in rows if word not in known}


def _ids(path: Path) -> dict[str, int]:
    return config_fields.read_ids(path) if path.is_file() else {}


def _entries(path: Path, entries: Any) -> list[dict[str, Any]]:
    """The entries of added tokens, checked; ids may be written as text."""
    try:
        return [{**entry, "id": int(entry["id"]), "content": str(entry["content"])} for entry in entries]
    except (TypeError, ValueError, KeyError):
        raise UserError(f"{path}: its added tokens must be objects with a number and a content: name another {RULE}") from None


def _with_rules(word: str, entry: Mapping[str, Any]) -> AddedToken:
    rules = {name: bool(entry[name]) for name in ("single_word", "lstrip", "rstrip", "normalized", "special") if name in entry}
    return AddedToken(word, **rules)


def _config(folder: Path, name: str) -> dict[str, Any]:
    """One of the tokenizer's config files, {} where it is not there."""
    path = folder / name
    return config_fields.check_fields("tokenizer", config_fields.read_object(path), path) if path.is_file() else {}


def load_tokenizer(*folders: Path, encoders: Sequence[Mapping[str, Any]] = ()) -> PromptTokenizer:
    """Reads the tokenizer of a diffusers folder, or SDXL's two. `encoders` are their text encoders' configs, to be compared.

    Returns a PromptTokenizer: `encode` gives ids (b, length) int32, padded as the folder says. Longer prompts are cut and
    keep the end token; the first one is named in a warning. Two tokenizers' ids lie side by side, `length` is the sum. Raises
    FileNotFoundError if a folder holds no tokenizer. Raises ValueError if the padding or end token has no id, if two
    tokenizers differ in length, or if one does not fit its text encoder.
    """
    warned: list[bool] = []
    each = [_load(folder, warned) for folder in folders]
    if len({one.length for one in each}) > 1:
        raise UserError(f"{folders[0].parent}: its tokenizers take {' and '.join(str(one.length) for one in each)} tokens")
    for folder, one, encoder in zip(folders, each, encoders, strict=False):
        check_encoder(folder, one, encoder)
    return each[0] if len(each) == 1 else side_by_side(each)


def side_by_side(tokenizers: Sequence[PromptTokenizer]) -> PromptTokenizer:
    """The ids of several tokenizers, one behind the other in each row."""
    together = lambda prompts: np.concatenate([one.encode(prompts) for one in tokenizers], axis=1)
    return PromptTokenizer(sum(one.length for one in tokenizers), together)


def check_encoder(folder: Path, tokenizer: PromptTokenizer, encoder: Mapping[str, Any]) -> None:
    """Raises ValueError, one line, for ids or lengths that a text encoder has no place for: a look-up there gives NaN.

    folder: the tokenizer's. encoder: config.json of its text encoder.
    """
    beside = f"{folder} and its text_encoder do not fit"
    positions, rows = encoder.get("max_position_embeddings", LENGTH), encoder["vocab_size"]
    if tokenizer.length > positions:
        raise UserError(
            f"{beside}: {CONFIG}'s model_max_length={tokenizer.length} is more than the encoder's {positions} positions: "
            f"write {positions} there, or name another {RULE}"
        )
    token, number = tokenizer.last
    if number >= rows:
        raise UserError(
            f"{beside}: token {token!r} has id {number}, the encoder's table has {rows} rows (vocab_size): name another {RULE}"
        )
    end = encoder.get("eos_token_id", 2)
    if "CLIPTextModelWithProjection" in (encoder.get("architectures") or ()) and end not in (2, tokenizer.end):
        raise UserError(
            f"{beside}: the end token's id is {tokenizer.end}, the encoder's config.json says eos_token_id={end}: "
            f"mend that, or name another {RULE}"
        )


def _load(folder: Path, warned: list[bool]) -> PromptTokenizer:
    config = _config(folder, "special_tokens_map.json") | _config(folder, CONFIG)
    length, pad = config.get("model_max_length", LENGTH), config.get("pad_token") or END
    tokenizer = _read(folder, _added_tokens(folder, config, (START, END, pad)))
    tokenizer.no_truncation()
    tokenizer.no_padding()
    pad_id, end_id = tokenizer.token_to_id(pad), tokenizer.token_to_id(END)
    if pad_id is None or end_id is None:
        raise UserError(f"{folder}: {(pad if pad_id is None else END)!r} is no token of the vocabulary: --config.model.path")
    tokenizer.add_special_tokens([pad])  # SD 2.1 pads with "!": so "!" in a prompt is this token too

    last = max(tokenizer.get_vocab(with_added_tokens=True).items(), key=lambda entry: entry[1])
    return PromptTokenizer(length, rows_of_ids(tokenizer, length, pad_id, end_id, warned), last, end_id)


def rows_of_ids(
    tokenizer: Tokenizer, length: int, pad: int, end: int, warned: list[bool], limit: str = "the model's %d"
) -> Callable[[Sequence[str]], Int[np.ndarray, "b s"]]:
    """prompts -> ids (b, length) int32, filled up with `pad`; longer prompts are cut and keep `end`.

    The first one that is cut is named in a warning, unless `warned` holds something; limit: what it says of the length.
    """

    def encode(prompts: Sequence[str]) -> Int[np.ndarray, "b s"]:
        rows = np.full((len(prompts), length), pad, np.int32)
        for row, encoding in zip(rows, tokenizer.encode_batch(list(prompts)), strict=True):
            ids = encoding.ids
            if len(ids) > length:
                if not warned:
                    log.warning(f"a prompt of %d tokens is cut to {limit} (said once)", len(ids), length)
                    warned.append(True)
                ids = [*ids[: length - 1], end]
            row[: len(ids)] = ids
        return rows

    return encode


def learn(texts: Sequence[str], merges: int) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Byte-pair encoding in CLIP's form, learned from texts: (vocabulary, merges), at most `merges` of them.

    The vocabulary is CLIP's: 256 bytes, the same with `</w>`, one entry a merge, start token, end token; so every text
    has ids, seen or not.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    start = alphabet + [f"{letter}</w>" for letter in alphabet]
    tokenizer = build({word: i for i, word in enumerate([*start, START, END])}, [])
    trainer = trainers.BpeTrainer(
        vocab_size=2 * len(alphabet) + merges, initial_alphabet=alphabet, end_of_word_suffix="</w>", show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    learned = [tuple(pair) for pair in json.loads(tokenizer.to_str())["model"]["merges"]][:merges]
    words = [*start, *dict.fromkeys(a.removesuffix("</w>") + b for a, b in learned), START, END]
    return {word: i for i, word in enumerate(words)}, learned


def write_tokenizer(folder: Path, vocabulary: dict[str, int], merges: list[tuple[str, str]], length: int) -> None:
    """Writes the tokenizer folder that diffusers and transformers read: vocab.json, merges.txt and its configs."""
    folder.mkdir(parents=True, exist_ok=True)
    special = {"bos_token": START, "eos_token": END, "unk_token": END, "pad_token": END}
    config = {"tokenizer_class": "CLIPTokenizer", "model_max_length": length, "do_lower_case": True, **special}
    for name, value in (("vocab", vocabulary), ("tokenizer_config", config), ("special_tokens_map", special)):
        (folder / f"{name}.json").write_text(json.dumps(value, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges)]
    (folder / "merges.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")


def vocabulary_size(folder: Path) -> int:
    """Entries of a written vocabulary."""
    return len(json.loads((folder / "vocab.json").read_text(encoding="utf-8")))
