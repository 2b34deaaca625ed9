"""The four schemes: what their identifiers look like, that they are unique and repeatable, and new pictures afterwards."""

import collections

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from imagedex.errors import UserError
from imagedex.identifiers.schemes import VECTOR_SCHEMES, assign_identifiers, extend_identifiers
from imagedex.modeling.identifiers import SCHEMES, Identifiers
from imagedex.training.tokenizer import train_tokenizer

COUNT = 700
NAMES = [f"{number}.jpg" for number in range(COUNT)]


def our_tokenizer():
    """The one that a run trains on its captions: digits are single tokens, the word-start marker stands alone."""
    return train_tokenizer(["a red circle left of 12 squares"] * 5, 80)


def t5_tokenizer():
    """Pieces as T5's: the word-start marker inside a piece, some numbers of two digits in one piece."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -9.0)]
    pieces += [(str(digit), -6.0) for digit in range(10)] + [(f"▁{digit}", -6.5) for digit in range(10)]
    pieces += [("▁12", -5.0), ("▁10", -5.0), ("50", -5.0), ("00", -5.0)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    special = {"pad_token": "<pad>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def digitless_tokenizer():
    tokenizer = Tokenizer(models.WordLevel({"<pad>": 0, "</s>": 1, "<unk>": 2, "dog": 3}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="</s>", unk_token="<unk>")


def vectors(count=COUNT, seed=0):
    """Unit vectors around forty centres."""
    generator = torch.Generator().manual_seed(seed)
    centres = torch.randn(40, 24, generator=torch.Generator().manual_seed(99))
    points = centres[torch.randint(40, (count,), generator=generator)] + 0.5 * torch.randn(
        count, 24, generator=generator
    )
    return torch.nn.functional.normalize(points, dim=1)


def pieces(tokenizer, identifiers, image_id):
    return tokenizer.convert_ids_to_tokens(identifiers.sequence(image_id))


def same(one, other):
    return one.image_ids == other.image_ids and np.array_equal(one.tokens, other.tokens)


@pytest.mark.parametrize("scheme", SCHEMES)
@pytest.mark.parametrize("make_tokenizer", [our_tokenizer, t5_tokenizer, digitless_tokenizer])
def test_every_picture_has_an_identifier_of_its_own_and_the_seed_decides(scheme, make_tokenizer, tmp_path):
    tokenizer = make_tokenizer()
    found = assign_identifiers(scheme, NAMES, tokenizer, vectors(), seed=3, source={"split_seed": 7})
    assert found.scheme == scheme and found.image_ids == NAMES and found.eos_token_id == tokenizer.eos_token_id
    assert len({tuple(found.sequence(name)) for name in NAMES}) == COUNT
    assert {found.image_id_of(found.labels(name)) for name in NAMES} == set(NAMES)
    assert tokenizer.unk_token_id not in found.tokens and tokenizer.pad_token_id not in found.tokens
    assert found.tokens.max() < len(tokenizer)
    assert set(found.tokens.tolist()) <= set((found.new_tokens | found.known_tokens).values())
    assert found.source["seed"] == 3 and found.source["split_seed"] == 7
    found.check_tokenizer(tokenizer)

    assert same(assign_identifiers(scheme, NAMES, make_tokenizer(), vectors(), seed=3), found)
    assert same(assign_identifiers(scheme, NAMES, tokenizer, vectors(), seed=3), found)  # tokens are added once
    if scheme != "atomic":
        assert not same(assign_identifiers(scheme, NAMES, make_tokenizer(), vectors(), seed=4), found)

    tokenizer.save_pretrained(tmp_path)
    found.save_pretrained(tmp_path)
    loaded = Identifiers.from_pretrained(tmp_path)
    assert same(loaded, found) and loaded.source == found.source
    loaded.check_tokenizer(PreTrainedTokenizerFast.from_pretrained(tmp_path))


def test_atomic_is_one_new_token_a_picture():
    tokenizer = our_tokenizer()
    before = len(tokenizer)
    found = assign_identifiers("atomic", NAMES, tokenizer)
    assert found.max_length == 2 and len(tokenizer) == before + COUNT == before + len(found.new_tokens)
    assert pieces(tokenizer, found, "17.jpg") == ["<image_17>"]
    assert tokenizer("a <image_17>")["input_ids"][-2] == found.sequence("17.jpg")[0]  # never split


def test_naive_is_a_random_number_as_the_tokenizer_writes_it():
    for tokenizer, marker in ((our_tokenizer(), True), (t5_tokenizer(), False)):
        before = len(tokenizer)
        found = assign_identifiers("naive", NAMES, tokenizer, seed=1)
        assert len(tokenizer) == before and not found.new_tokens
        written = [tokenizer.decode(found.sequence(name)).replace(" ", "") for name in NAMES]
        assert sorted(map(int, written)) == list(range(COUNT)) and all(str(int(text)) == text for text in written)
        assert written != [str(number) for number in range(COUNT)]
        for name, text in zip(NAMES, written, strict=True):
            as_text = tokenizer(text, add_special_tokens=False)["input_ids"]
            assert found.sequence(name) == (as_text[1:] if marker else as_text)
    assert found.max_length == 4  # three pieces at most, and the end
    assert any(pieces(tokenizer, found, name) == ["▁12", "7"] for name in NAMES)


def test_naive_without_digits_in_the_tokenizer_gets_new_ones():
    tokenizer = digitless_tokenizer()
    found = assign_identifiers("naive", NAMES, tokenizer)
    numbers = ["".join(piece[len("<digit_") : -1] for piece in pieces(tokenizer, found, name)) for name in NAMES]
    assert sorted(map(int, numbers)) == list(range(COUNT)) and len(found.new_tokens) == 10


def test_semantic_is_the_way_to_the_leaf_and_the_position_there():
    tokenizer = our_tokenizer()
    found = assign_identifiers("semantic", NAMES, tokenizer, vectors(), branches=5, leaf_size=30)
    assert not found.new_tokens and list(found.known_tokens) == [str(digit) for digit in range(10)]
    leaves = found.quantizer.encode(vectors()).tolist()
    ways = found.quantizer.digits()
    positions = collections.defaultdict(set)
    for name, leaf in zip(NAMES, leaves, strict=True):
        digits = [int(piece) for piece in pieces(tokenizer, found, name)]
        assert digits[: len(ways[leaf])] == ways[leaf] and len(digits) == len(ways[leaf]) + 2
        positions[leaf].add(10 * digits[-2] + digits[-1])
    assert all(own == set(range(len(own))) and len(own) <= 30 for own in positions.values())
    assert found.source["leaves"] == len(positions)
    assert found.source["largest_leaf"] == max(map(len, positions.values()))


def test_semantic_neighbours_share_digits():
    found = assign_identifiers("semantic", NAMES, our_tokenizer(), vectors())
    nearest = (vectors() @ vectors().T).fill_diagonal_(-1).argmax(1).tolist()

    def shared(one, other):  # how many first tokens agree
        pairs = zip(found.sequence(NAMES[one]), found.sequence(NAMES[other]), strict=False)
        return next((place for place, (a, b) in enumerate(pairs) if a != b), 9)

    near = sum(shared(row, nearest[row]) for row in range(COUNT)) / COUNT
    apart = sum(shared(row, (row * 31 + 7) % COUNT) for row in range(COUNT)) / COUNT
    assert near > 4 * apart


def test_semantic_with_more_branches_than_digits_has_digits_of_its_own():
    tokenizer = our_tokenizer()
    found = assign_identifiers("semantic", NAMES, tokenizer, vectors(), branches=16, leaf_size=20)
    assert list(found.new_tokens) == [f"<digit_{digit}>" for digit in range(16)] and not found.known_tokens
    assert found.source["position_width"] == 2  # 19 is 1 3 in base 16


def test_rq_is_a_code_a_level_and_always_a_suffix(caplog):
    tokenizer = our_tokenizer()
    with caplog.at_level("INFO"):
        found = assign_identifiers("rq", NAMES, tokenizer, vectors(), levels=2, codes=16)
    codes = [tuple(code) for code in found.quantizer.encode(vectors()).tolist()]
    sharing = collections.Counter(codes)
    seen = collections.Counter()
    for name, code in zip(NAMES, codes, strict=True):
        expected = [f"<code_0_{code[0]}>", f"<code_1_{code[1]}>", f"<suffix_{seen[code]}>"]
        assert pieces(tokenizer, found, name) == expected
        seen[code] += 1
    unique = sum(count == 1 for count in sharing.values()) / COUNT
    assert found.source["unique_share"] == pytest.approx(unique) and 0 < unique < 1
    assert f"{100 * unique:.1f} % of 700 pictures have a code of their own" in caplog.text
    assert found.source["distinct_codes"] == len(sharing)
    assert found.source["most_pictures_a_code"] == max(sharing.values())
    assert found.source["suffixes"] == max(8, 2 * max(sharing.values()))
    assert len(found.new_tokens) == 2 * 16 + found.source["suffixes"] and found.max_length == 4


def test_rq_codes_follow_the_size_of_the_gallery():
    assert assign_identifiers("rq", NAMES, our_tokenizer(), vectors()).source["codes"] == 64  # 2 * 26.5
    assert assign_identifiers("rq", NAMES[:10], our_tokenizer(), vectors(10)).source["codes"] == 8  # 2 * 3.2


@pytest.mark.parametrize("scheme", VECTOR_SCHEMES)
def test_equal_vectors_still_get_identifiers_of_their_own(scheme):
    points = vectors(10).repeat_interleave(20, dim=0)
    found = assign_identifiers(scheme, NAMES[:200], our_tokenizer(), points, leaf_size=5)
    assert len({tuple(found.sequence(name)) for name in NAMES[:200]}) == 200
    if scheme == "rq":
        assert found.source["unique_share"] == 0 and found.source["most_pictures_a_code"] >= 20


@pytest.mark.parametrize("scheme", SCHEMES)
def test_a_gallery_of_one(scheme):
    found = assign_identifiers(scheme, ["only.jpg"], our_tokenizer(), vectors(1))
    assert found.image_id_of(found.sequence("only.jpg")) == "only.jpg"


@pytest.mark.parametrize("scheme", VECTOR_SCHEMES)
def test_new_pictures_keep_the_old_identifiers_and_stand_with_their_neighbours(scheme, tmp_path):
    tokenizer = our_tokenizer()
    first = assign_identifiers(scheme, NAMES, tokenizer, vectors())
    first.save_pretrained(tmp_path)
    first = Identifiers.from_pretrained(tmp_path)
    size = len(tokenizer)
    new, new_vectors = [f"new {number}.jpg" for number in range(150)], vectors(150, seed=5)
    grown = extend_identifiers(first, new, new_vectors, tokenizer)
    assert grown.image_ids == NAMES + new and grown.added_image_ids == new and first.added_image_ids == []
    assert [grown.sequence(name) for name in NAMES] == [first.sequence(name) for name in NAMES]
    assert len({tuple(grown.sequence(name)) for name in grown.image_ids}) == COUNT + 150
    assert len(tokenizer) == size and set(grown.tokens.tolist()) <= set(
        (first.new_tokens | first.known_tokens).values()
    )
    assert len(first) == COUNT

    again = extend_identifiers(
        extend_identifiers(first, new[:70], new_vectors[:70], tokenizer), new[70:], new_vectors[70:], tokenizer
    )
    assert same(again, grown) and again.added_image_ids == new

    code = grown.quantizer.encode(new_vectors)
    code = [grown.quantizer.digits()[leaf] for leaf in code.tolist()] if scheme == "semantic" else code.tolist()
    for name, own in zip(new, code, strict=True):  # what the frozen quantizer says, then only what tells them apart
        numbers = [int(piece.strip("<>").split("_")[-1]) for piece in pieces(tokenizer, grown, name)]
        behind = (2, 3) if scheme == "semantic" else (1,)  # the hundredth of a leaf has a third digit
        assert numbers[: len(own)] == own and len(numbers) - len(own) in behind

    copies = extend_identifiers(first, ["copy.jpg"], vectors()[:1], tokenizer)  # a picture that looks like an old one
    assert copies.sequence("copy.jpg")[:-2] == copies.sequence("0.jpg")[:-2]
    grown.save_pretrained(tmp_path)
    assert same(Identifiers.from_pretrained(tmp_path), grown)


def test_a_leaf_grows_past_its_size():
    tokenizer = our_tokenizer()
    first = assign_identifiers("semantic", NAMES[:9], tokenizer, vectors(9), leaf_size=10)
    assert [pieces(tokenizer, first, name) for name in NAMES[:1]] and first.max_length == 2
    new = [f"new {number}.jpg" for number in range(110)]
    grown = extend_identifiers(first, new, vectors(110, seed=5), tokenizer)
    written = ["".join(pieces(tokenizer, grown, name)) for name in new]
    assert written == [str(number) for number in range(9, 119)]  # one digit, then two, then three: no two the same
    assert len(grown) == 119


def test_suffixes_run_out():
    tokenizer = our_tokenizer()
    first = assign_identifiers("rq", NAMES, tokenizer, vectors())
    spare = first.source["suffixes"]
    new = [f"new {number}.jpg" for number in range(spare)]
    with pytest.raises(ValueError, match="no suffix token is left for the next one; train again"):
        extend_identifiers(first, new, vectors()[:1].expand(spare, -1), tokenizer)


def test_schemes_that_cannot_grow_say_why():
    tokenizer = our_tokenizer()
    for scheme, reason in (("naive", "random number says nothing"),):
        first = assign_identifiers(scheme, NAMES, tokenizer)
        with pytest.raises(ValueError, match=reason):
            extend_identifiers(first, ["new.jpg"], vectors(1), tokenizer)


@pytest.mark.parametrize("scheme", VECTOR_SCHEMES)
def test_new_pictures_that_do_not_fit(scheme):
    tokenizer = our_tokenizer()
    first = assign_identifiers(scheme, NAMES, tokenizer, vectors())
    for names, points, with_tokenizer, message in [
        (["5.jpg", "new.jpg"], vectors(2), tokenizer, "1 of the new pictures have an identifier already.*'5.jpg'"),
        (["new.jpg"], vectors(2), tokenizer, "shape of the vectors for 1 pictures"),
        (["new.jpg"], vectors(1)[:, :20], tokenizer, "have 20 numbers each, .* had 24"),
        (["new.jpg"], vectors(1) / 0, tokenizer, "NaN or an infinite"),
        (["new.jpg"], vectors(1), t5_tokenizer(), "this tokenizer has"),
    ]:
        with pytest.raises(UserError, match=message):
            extend_identifiers(first, names, points, with_tokenizer)
    first.quantizer = None
    with pytest.raises(UserError, match="without their quantizer"):
        extend_identifiers(first, ["new.jpg"], vectors(1), tokenizer)


def test_what_is_refused():
    tokenizer = our_tokenizer()
    cases = [
        (("digits", NAMES), {}, "digits is none of atomic, naive, semantic, rq"),
        (("atomic", []), {}, "no pictures"),
        (("naive", ["a", "a"]), {}, "'a' is there twice"),
        (("semantic", NAMES), {}, "--identifier_vectors_from"),
        (("rq", NAMES), {}, "--identifier_vectors_from"),
        (("rq", NAMES, tokenizer, vectors(5)), {}, r"\(5, 24\) is the shape of the vectors for 700 pictures"),
        (("rq", ["a", "b"], tokenizer, [[1.0, 2.0], [1.0, float("nan")]]), {}, "vector of picture 1 holds a NaN"),
        (("semantic", NAMES, tokenizer, vectors()), {"branches": 1}, "branches must be 2 or more"),
        (("semantic", NAMES, tokenizer, vectors()), {"leaf_size": 0}, "leaf_size 1 or more"),
        (("rq", NAMES, tokenizer, vectors()), {"levels": 0}, "levels must be 1 or more"),
        (("rq", NAMES, tokenizer, vectors()), {"codes": 1}, "codes 2 or more"),
    ]
    for arguments, options, message in cases:
        scheme, names, own, points = (*arguments, tokenizer, None)[:4] if len(arguments) < 4 else arguments
        with pytest.raises(UserError, match=message):
            assign_identifiers(scheme, names, own, points, **options)
    tokenizer.eos_token = None
    with pytest.raises(UserError, match="no end-of-sequence token"):
        assign_identifiers("naive", NAMES, tokenizer)
