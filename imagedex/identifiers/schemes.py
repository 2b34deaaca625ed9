"""How pictures (or documents) get their identifiers: four schemes, and new pictures afterwards where a scheme allows it.

atomic    one new token a picture
naive     a random number, as the string of digits that the tokenizer writes
semantic  the way down a tree of hierarchical k-means, then the position in the leaf, as digits (DSI, 2202.06991, section 3.2)
rq        residual quantisation: a new code token a level (2203.01941; TIGER, 2305.05065), then a suffix against collisions
"""

import logging
import math
from collections.abc import Sequence

import torch
from transformers import AddedToken

from imagedex.errors import UserError
from imagedex.identifiers.k_means import fit_k_means_tree, fit_residual_quantizer
from imagedex.modeling.identifiers import SCHEMES, Identifiers

logger = logging.getLogger(__name__)

VECTOR_SCHEMES = ("semantic", "rq")  # those that are made from vectors, and can take new pictures
LEAST_SUFFIXES = 8


class IdentifierError(UserError, ValueError):
    """Identifiers that cannot be made as asked."""


def assign_identifiers(
    scheme: str,
    image_ids: Sequence[str],
    tokenizer,
    vectors=None,
    seed: int = 0,
    branches: int = 10,
    leaf_size: int = 100,
    levels: int = 3,
    codes: int | None = None,
    source: dict | None = None,
) -> Identifiers:
    """Gives every picture an identifier of its own; the same arguments give the same identifiers.

    Args:
        scheme: "atomic", "naive", "semantic" or "rq".
        image_ids: (N,) all different.
        tokenizer: gets the new tokens that the scheme needs, so the model's embeddings must be resized afterwards.
        vectors: (N, D) float, for semantic and rq.
        branches, leaf_size: of semantic, see `fit_k_means_tree`.
        levels, codes: of rq; without `codes` a power of two near twice the square root of N, between 4 and 256.
        source: facts to keep in `Identifiers.source`, beside the options used.

    Raises:
        IdentifierError: an unknown scheme, no vectors where they are needed, vectors that do not fit, options out of range.
    """
    image_ids = list(image_ids)
    if scheme not in SCHEMES:
        raise IdentifierError(f"--identifier_scheme {scheme} is none of {', '.join(SCHEMES)}")
    if not image_ids:
        raise IdentifierError("there are no pictures to give identifiers to")
    facts = dict(source or {}) | {"seed": seed}
    if scheme == "atomic":
        tokens = add_tokens(tokenizer, [f"<image_{row}>" for row in range(len(image_ids))])
        sequences, fields = [[token] for token in tokens.values()], {"new_tokens": tokens}
    elif scheme == "naive":
        sequences, fields = _naive(len(image_ids), tokenizer, seed)
    elif vectors is None:
        raise IdentifierError(
            f"--identifier_scheme {scheme} is made from picture vectors: give --identifier_vectors_from an XMatchingModel, "
            "or a scheme without vectors (atomic, naive)"
        )
    elif scheme == "semantic":
        vectors = _checked(vectors, len(image_ids))
        sequences, fields, used = _semantic(vectors, tokenizer, seed, branches, leaf_size)
        facts |= used
    else:
        vectors = _checked(vectors, len(image_ids))
        sequences, fields, used = _residual(vectors, tokenizer, seed, levels, codes)
        facts |= used
    try:
        return Identifiers.from_sequences(scheme, image_ids, sequences, _eos(tokenizer), source=facts, **fields)
    except ValueError as error:
        raise IdentifierError(str(error)) from error


def extend_identifiers(identifiers: Identifiers, new_image_ids: Sequence[str], new_vectors, tokenizer) -> Identifiers:
    """The identifiers with new pictures behind the old ones, without training: the quantizer stays as it is.

    A new picture gets the next free position of its leaf (semantic; a leaf may grow past its size), the next free suffix of its
    code (rq), or a token of its own (atomic), which the tokenizer gets and whose rows in the model are still to be made. No old
    identifier changes. `source["first_pictures"]` says how many rows were there before, so that old and new can be told apart.

    Args:
        new_vectors: (M, D) from the encoder that gave the first ones; atomic needs none.

    Raises:
        IdentifierError: a scheme that cannot grow, a picture that is there already, vectors that do not fit, no suffix left,
            another tokenizer.
    """
    new_image_ids = list(new_image_ids)
    if identifiers.scheme == "naive":
        raise IdentifierError(
            "naive identifiers cannot take new pictures: a random number says nothing about a picture that the model "
            "could infer; train again with --identifier_scheme atomic, semantic or rq"
        )
    if identifiers.scheme != "atomic" and identifiers.quantizer is None:
        raise IdentifierError(f"these {identifiers.scheme} identifiers were saved without their quantizer; train again")
    known = [image_id for image_id in new_image_ids if image_id in identifiers]
    if known:
        raise IdentifierError(f"{len(known)} of the new pictures have an identifier already, the first is {known[0]!r}")
    if identifiers.scheme != "atomic":
        vectors = _checked(new_vectors, len(new_image_ids), identifiers.quantizer.width)
    try:
        identifiers.check_tokenizer(tokenizer)
        old, tokens = [identifiers.sequence(image_id) for image_id in identifiers.image_ids], identifiers.new_tokens
        if identifiers.scheme == "atomic":
            first = len(identifiers)
            added = add_tokens(tokenizer, [f"<image_{row}>" for row in range(first, first + len(new_image_ids))])
            tokens, grown = tokens | added, [[token] for token in added.values()]
        else:
            grow = _grow_semantic if identifiers.scheme == "semantic" else _grow_residual
            grown = grow(identifiers, old, vectors)
        return Identifiers.from_sequences(
            identifiers.scheme,
            identifiers.image_ids + new_image_ids,
            old + grown,
            identifiers.eos_token_id,
            new_tokens=tokens,
            known_tokens=identifiers.known_tokens,
            quantizer=identifiers.quantizer,
            source={"first_pictures": len(identifiers)} | identifiers.source,
        )
    except IdentifierError:
        raise
    except ValueError as error:
        raise IdentifierError(str(error)) from error


def add_tokens(tokenizer, texts: Sequence[str]) -> dict[str, int]:
    """Adds these texts as tokens that are never split, where they are not yet there: text -> id."""
    texts = list(texts)
    tokenizer.add_tokens([AddedToken(text, normalized=False, special=False) for text in texts])
    return dict(zip(texts, tokenizer.convert_tokens_to_ids(texts), strict=True))


def digit_tokens(tokenizer, base: int) -> tuple[dict[str, int], bool]:
    """The tokens of `base` digits in order, text -> id, and whether they are the tokenizer's own.

    With base 10 the tokenizer's single digits, if it has all of them ("7", else "▁7"); otherwise new tokens "<digit_7>".
    """
    if base == 10:
        vocabulary = tokenizer.get_vocab()
        for form in ("{}", "▁{}"):
            texts = [form.format(digit) for digit in range(base)]
            if all(text in vocabulary for text in texts):
                return {text: vocabulary[text] for text in texts}, True
    return add_tokens(tokenizer, [f"<digit_{digit}>" for digit in range(base)]), False


def _naive(count: int, tokenizer, seed: int) -> tuple[list[list[int]], dict]:
    """A random permutation of 0 .. count-1 as strings of digits.

    The tokens are those the tokenizer writes for the number as a text, pieces of several digits and the word-start marker
    inside a piece ("▁12") included. A marker that is a token of its own, before every number, is left out: it says nothing.
    A tokenizer without digits gets new digit tokens.
    """
    numbers = torch.randperm(count, generator=torch.Generator().manual_seed(seed)).tolist()
    texts = [str(number) for number in numbers]
    sequences = tokenizer(texts, add_special_tokens=False)["input_ids"]
    pieces = {token: tokenizer.convert_ids_to_tokens(token) for token in sorted({t for own in sequences for t in own})}
    if any(not any(sign.isdigit() for sign in piece) for piece in pieces.values()):
        first = {own[0] for own in sequences}
        marker = first.pop() if len(first) == 1 else None
        if marker is not None and not any(sign.isdigit() for sign in pieces[marker]):
            sequences = [own[1:] for own in sequences]
            pieces.pop(marker)
    written = ["".join(sign for token in own for sign in pieces[token] if sign.isdigit()) for own in sequences]
    if written != texts:
        digits = add_tokens(tokenizer, [f"<digit_{digit}>" for digit in range(10)])
        tokens = list(digits.values())
        return [[tokens[int(sign)] for sign in text] for text in texts], {"new_tokens": digits}
    return sequences, {"known_tokens": {piece: token for token, piece in pieces.items()}}


def _semantic(vectors: torch.Tensor, tokenizer, seed: int, branches: int, leaf_size: int):
    """Sequences, fields and facts of the semantic scheme.

    DSI numbers the members of a leaf arbitrarily; here they are numbered along the leaf's principal axis, so that near
    numbers are near pictures, and written with as many digits as the last of a full leaf has.
    """
    if branches < 2 or leaf_size < 1:
        raise IdentifierError(f"branches must be 2 or more and leaf_size 1 or more, got {branches} and {leaf_size}")
    tree, leaf = fit_k_means_tree(vectors, branches, leaf_size, seed)
    base = max(10, branches)
    digits, own = digit_tokens(tokenizer, base)
    tokens, width = list(digits.values()), len(_in_base(leaf_size - 1, base))
    sequences: list[list[int]] = [[]] * len(vectors)
    ways = tree.digits()
    order = leaf.argsort(stable=True)
    leaves, counts = leaf.unique(return_counts=True)
    for node, members in zip(leaves.tolist(), order.split(counts.tolist()), strict=True):
        for position, row in enumerate(members[_along_axis(vectors[members])].tolist()):
            number = [*ways[node], *_in_base(position, base, width)]
            sequences[row] = [tokens[digit] for digit in number]
    facts = {"branches": branches, "leaf_size": leaf_size, "digits": list(digits), "position_width": width}
    facts |= {"leaves": len(leaves), "largest_leaf": int(counts.max())}
    logger.info("semantic identifiers: %d leaves, the largest holds %d", facts["leaves"], facts["largest_leaf"])
    fields = {"known_tokens" if own else "new_tokens": digits, "quantizer": tree}
    return sequences, fields, facts


def _grow_semantic(identifiers: Identifiers, old: list[list[int]], vectors: torch.Tensor) -> list[list[int]]:
    tree, facts = identifiers.quantizer, identifiers.source
    by_text = identifiers.known_tokens | identifiers.new_tokens
    tokens = [by_text[text] for text in facts["digits"]]
    digit_of, base = {token: digit for digit, token in enumerate(tokens)}, len(tokens)
    free: dict[int, int] = {}  # leaf -> its next free position
    for sequence in old:
        digits = [digit_of[token] for token in sequence]
        leaf, used = tree.leaf_of(digits)
        position = sum(digit * base**power for power, digit in enumerate(reversed(digits[used:])))
        free[leaf] = max(free.get(leaf, 0), position + 1)
    sequences, ways = [], tree.digits()
    for leaf in tree.encode(vectors).tolist():
        position = free.get(leaf, 0)
        free[leaf] = position + 1
        number = [*ways[leaf], *_in_base(position, base, facts["position_width"])]
        sequences.append([tokens[digit] for digit in number])
    return sequences


def _residual(vectors: torch.Tensor, tokenizer, seed: int, levels: int, codes: int | None):
    """Sequences, fields and facts of the rq scheme. The suffix is always there, so that all identifiers have one length."""
    if codes is None:
        codes = max(4, min(256, 2 ** round(1 + 0.5 * math.log2(len(vectors)))))
    if levels < 1 or codes < 2:
        raise IdentifierError(f"levels must be 1 or more and codes 2 or more, got {levels} and {codes}")
    quantizer = fit_residual_quantizer(vectors, levels, codes, seed)
    found = quantizer.encode(vectors)
    counts = found.unique(dim=0, return_counts=True)[1]
    largest = int(counts.max())
    facts = {
        "levels": levels,
        "codes": codes,
        "suffixes": max(LEAST_SUFFIXES, 2 * largest),  # half of them spare, for new pictures
        "unique_share": int((counts == 1).sum()) / len(vectors),  # pictures whose code nobody else has
        "distinct_codes": len(counts),
        "most_pictures_a_code": largest,
    }
    logger.info(
        "rq identifiers: %.1f %% of %d pictures have a code of their own before the suffix; %d codes, at most %d pictures each",
        100 * facts["unique_share"],
        len(vectors),
        len(counts),
        largest,
    )
    texts = [f"<code_{level}_{code}>" for level in range(levels) for code in range(codes)]
    texts += [f"<suffix_{number}>" for number in range(facts["suffixes"])]
    new_tokens = add_tokens(tokenizer, texts)
    sequences = _with_suffixes(found, {}, new_tokens)
    return sequences, {"new_tokens": new_tokens, "quantizer": quantizer}, facts


def _with_suffixes(found: torch.Tensor, used: dict[tuple, int], new_tokens: dict[str, int]) -> list[list[int]]:
    """Codes (M, levels) -> token sequences, each with the next free suffix of its code; `used` is counted on."""
    sequences = []
    for code in map(tuple, found.tolist()):
        suffix = used.get(code, 0)
        used[code] = suffix + 1
        texts = [f"<code_{level}_{number}>" for level, number in enumerate(code)]
        if f"<suffix_{suffix}>" not in new_tokens:
            raise IdentifierError(
                f"{suffix} pictures have the code {' '.join(texts)} and no suffix token is left for the next one; train "
                "again with more --identifier_levels or --identifier_codes"
            )
        sequences.append([new_tokens[text] for text in [*texts, f"<suffix_{suffix}>"]])
    return sequences


def _grow_residual(identifiers: Identifiers, old: list[list[int]], vectors: torch.Tensor) -> list[list[int]]:
    text_of = {token: text for text, token in identifiers.new_tokens.items()}
    used: dict[tuple, int] = {}
    for sequence in old:
        *code, suffix = (int(text_of[token].rstrip(">").rsplit("_", 1)[1]) for token in sequence)
        used[tuple(code)] = max(used.get(tuple(code), 0), suffix + 1)
    return _with_suffixes(identifiers.quantizer.encode(vectors), used, identifiers.new_tokens)


def _along_axis(points: torch.Tensor) -> torch.Tensor:
    """The order of the points along their principal axis, turned so that the first point is not behind the mean."""
    if len(points) < 3 or (points == points[0]).all():
        return torch.arange(len(points))
    centred = (points - points.mean(0)).double()
    coordinates = torch.linalg.eigh(centred @ centred.T)[1][:, -1]
    return (coordinates if coordinates[0] <= 0 else -coordinates).argsort(stable=True)


def _in_base(number: int, base: int, width: int = 1) -> list[int]:
    """The digits of a number, filled up with zeros to at least `width` of them."""
    digits = []
    while number or len(digits) < width:
        number, digit = divmod(number, base)
        digits.append(digit)
    return digits[::-1]


def _checked(vectors, count: int, width: int | None = None) -> torch.Tensor:
    """(count, D) float32 on the CPU, finite, or `IdentifierError`."""
    vectors = torch.as_tensor(vectors).detach().float().cpu()
    if vectors.ndim != 2 or len(vectors) != count:
        raise IdentifierError(f"{tuple(vectors.shape)} is the shape of the vectors for {count} pictures")
    if width is not None and vectors.shape[1] != width:
        raise IdentifierError(
            f"the new vectors have {vectors.shape[1]} numbers each, those the identifiers were made from had {width}; encode "
            "the new pictures with the same model"
        )
    if not vectors.isfinite().all():
        row = int((~vectors.isfinite().all(1)).nonzero()[0])
        raise IdentifierError(f"the vector of picture {row} holds a NaN or an infinite number")
    return vectors.contiguous()


def _eos(tokenizer) -> int:
    if tokenizer.eos_token_id is None:
        raise IdentifierError("the tokenizer has no end-of-sequence token, which ends every identifier")
    return tokenizer.eos_token_id
