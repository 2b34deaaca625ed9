"""The teacher's targets against naive loops, its temperature against hand arithmetic, and a run that it pays off in."""

import math
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset, Features, Value
from datasets import Image as ImageFeature
from PIL import Image
from tiny_models import tiny_tokenizer
from torch.nn import functional as F
from transformers import BertConfig, BertModel

from imagedex.bounds import check_bounds
from imagedex.corpora.indexed import IndexedSplits
from imagedex.errors import UserError
from imagedex.evaluation.baselines import TextEncoder
from imagedex.modeling.identifiers import Identifiers
from imagedex.modeling.modeling_xmatching import XMatchingModel
from imagedex.modeling.processing_retrieval import RetrievalProcessor
from imagedex.training.generative import data
from imagedex.training.generative.arguments import TeacherArguments
from imagedex.training.generative.caption_augmentation import CaptionAugmentationArguments
from imagedex.training.generative.data import DSICollator, Sentences
from imagedex.training.generative.teacher import TEMPERATURE, Teacher, best_temperature, check_teacher, open_teacher

EOS = 1
PICTURES = Features({"image_id": Value("string"), "image": ImageFeature()})
SEQUENCES = {
    "atomic": [[10], [11], [12], [13], [14]],
    "rq": [[10, 13], [10, 14], [11, 13, 15], [11, 13, 16], [12, 14]],
    "naive": [[3, 4], [3, 5], [4], [5, 3, 3], [4, 4]],
}
DIRECTIONS = {"north": [0.0, 1.0], "east": [1.0, 0.0], "south": [0.0, -1.0], "west": [-1.0, 0.0], "up": [0.6, 0.8]}
ITEMS = torch.tensor([[1.0, 0.0], [0.8, 0.6], [0.0, 1.0], [-0.6, 0.8], [0.6, -0.8]])


def encode(sentences):
    return torch.tensor([DIRECTIONS[sentence] for sentence in sentences])


def teacher_of(scheme, items=ITEMS, temperature=0.4, weight=2.0):
    names = [f"{row}.jpg" for row in range(len(items))]
    identifiers = Identifiers.from_sequences(scheme, names, SEQUENCES[scheme], EOS)
    return Teacher(encode, items, temperature, identifiers.padded(), weight)


def batch(scheme, targets, vocabulary=20):
    """Logits and labels of rows that have these items as targets."""
    rows = [torch.tensor([*SEQUENCES[scheme][target], EOS]) for target in targets]
    labels = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-100)
    logits = torch.randn(*labels.shape, vocabulary, generator=torch.Generator().manual_seed(0))
    return logits, labels


def naive_divergence(logits, target, vector, scheme, temperature, known):
    """Place by place and token by token."""
    sequences = [[*sequence, EOS] for sequence in SEQUENCES[scheme]]
    own, total = sequences[target], 0.0
    for place in range(len(own)):
        alive = [
            i for i, other in enumerate(sequences) if known[i] and other[:place] == own[:place] and len(other) > place
        ]
        weights = {i: math.exp((vector @ ITEMS[i]).item() / temperature) for i in alive}
        log_probs = logits[place].log_softmax(-1)
        for token in {sequences[i][place] for i in alive}:
            share = sum(weights[i] for i in alive if sequences[i][place] == token) / sum(weights.values())
            total += share * (math.log(share) - log_probs[token].item())
    return total


@pytest.mark.parametrize("scheme", SEQUENCES)
@pytest.mark.parametrize("unknown", [None, 3])
def test_the_loss_is_that_of_a_naive_loop(scheme, unknown):
    """The last two rows are pictures: they count among the labels, and the teacher says nothing of them."""
    items = ITEMS.clone()
    if unknown is not None:
        items[unknown] = torch.nan
    sentences, targets = ["north", "up", "west"], [2, 1, 3]
    logits, labels = batch(scheme, [*targets, 4, 0])
    known = [row != unknown for row in range(5)]
    expected = sum(
        naive_divergence(logits[row], target, encode([sentence])[0], scheme, 0.4, known)
        for row, (sentence, target) in enumerate(zip(sentences, targets, strict=True))
    )
    found = teacher_of(scheme, items).loss(logits, labels, sentences)
    assert found.item() == pytest.approx(2.0 * expected / (labels != -100).sum().item(), rel=1e-5)


def test_who_says_what_the_teacher_says_has_no_loss_and_no_gradient():
    teacher = teacher_of("atomic")
    logits, labels = batch("atomic", [0, 2])
    shares = torch.softmax(encode(["east", "north"]) @ ITEMS.T / 0.4, dim=1)
    logits[:] = -1e4
    logits[:, 0, 10:15] = shares.log()
    logits[:, 1, EOS] = 0
    loss = teacher.loss(logits.requires_grad_(), labels, ["east", "north"])
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-5) and logits.grad.abs().max() < 1e-5


def test_the_temperature_is_the_likeliest():
    """Two items, the right one ahead by a tenth in three of four questions: log(3) = 0.1 / temperature."""
    cosines = torch.tensor([[0.1, 0.0], [0.1, 0.0], [0.1, 0.0], [0.0, 0.1]])
    best = 0.1 / math.log(3)
    assert best_temperature(cosines, torch.tensor([0, 0, 0, 0])) == pytest.approx(best, rel=0.12)


class Words:
    """Stands in for T5's tokenizer."""

    def pad(self, rows, return_tensors):
        return {
            name: torch.nn.utils.rnn.pad_sequence([torch.tensor(row[name]) for row in rows], True) for name in rows[0]
        }


def test_rows_that_are_taught_stand_first():
    text = {"input_ids": [7, 1], "attention_mask": [1, 1]}
    rows = [
        {"pixel_values": torch.ones(1), "labels": [5, 1]},
        text | {"labels": [6, 1]},
        text | {"labels": [8, 1], "sentence": "east"},
        text | {"labels": [9, 1], "sentence": "west"},
    ]
    found = DSICollator(Words())(rows)
    assert found["sentences"] == ["east", "west"]
    assert found["labels"].tolist() == [[8, 1], [9, 1], [6, 1], [5, 1]]
    assert "sentences" not in DSICollator(Words())(rows[:2])


@pytest.mark.parametrize("scheme", SEQUENCES)
def test_of_an_invented_sentence_the_first_token_alone_is_taught(scheme):
    """The share of each first token among all items; the sentence counts among no labels."""
    sentences, targets = ["north", "west"], [2, 3]
    logits, labels = batch(scheme, [targets[0], targets[1], 4])
    labels[1] = -100
    expected = naive_divergence(logits[0], 2, encode(["north"])[0], scheme, 0.4, [True] * 5)
    shares = torch.softmax(encode(["west"])[0] @ ITEMS.T / 0.4, dim=0).tolist()
    firsts = [sequence[0] for sequence in SEQUENCES[scheme]]
    for token in set(firsts):
        share = sum(own for own, first in zip(shares, firsts, strict=True) if first == token)
        expected += share * (math.log(share) - logits[1, 0].log_softmax(-1)[token].item())
    found = teacher_of(scheme).loss(logits, labels, sentences)
    assert found.item() == pytest.approx(2.0 * expected / (labels != -100).sum().item(), rel=1e-5)


class Reader:
    """Stands in for a processor: a word is its length."""

    def tokens(self, sentences):
        rows = [[len(word) for word in sentence.split()] for sentence in sentences]
        return {"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]}, None


@pytest.mark.parametrize("augmented", [False, True])
def test_invented_sentences_are_words_of_two_items_in_their_order(augmented, splits, monkeypatch):
    monkeypatch.setattr(data, "text_rows", lambda flat, column, processor, _: processor_rows(flat[column], processor))
    labels = {name: [10 + row, EOS] for row, name in enumerate(splits.item_ids)}
    drawn = CaptionAugmentationArguments(caption_word_dropout=0.5) if augmented else None
    torch.manual_seed(0)
    sentences = Sentences(splits.train, labels, Reader(), drawn, None, True, 0.5)
    rows = [sentences[row % len(sentences)] for row in range(600)]
    invented = [(number % len(sentences), row["invented"]) for number, row in enumerate(rows) if "invented" in row]
    assert 240 < len(invented) < 360
    owners = [item for item, own in enumerate(CAPTIONS) for _ in own]
    partners = set()
    for row, own in invented:
        words = own["sentence"].split()
        assert len(words) == len([text for texts in CAPTIONS for text in texts][row].split())
        assert own["input_ids"] == [len(word) for word in words] and own["labels"] == [-100]
        fitting = {
            other
            for other in set(range(3)) - {owners[row]}
            if is_within(words, " ".join([*CAPTIONS[owners[row]], *CAPTIONS[other]]).split())
        }
        assert fitting, "its words stand in this order in the sentences of its item and of another"
        partners |= fitting if len(fitting) == 1 else set()
    assert partners == {0, 1, 2}
    batch = DSICollator(Words())(rows[:20])
    extra = sum("invented" in row for row in rows[:20])
    assert len(batch["sentences"]) == len(batch["labels"]) == 20 + extra
    assert (batch["labels"] == -100).all(1).sum() == extra
    plain = Sentences(splits.train, labels, Reader(), drawn, None, True)
    assert all("invented" not in plain[row] for row in range(len(plain)))


def processor_rows(texts, processor):
    columns, _ = processor.tokens(texts[:])
    return Dataset.from_dict(columns)


def is_within(words, others) -> bool:
    """Whether `others` has these words in this order, with any between them."""
    rest = iter(others)
    return all(word in rest for word in words)


@pytest.fixture(scope="module")
def bert(tmp_path_factory):
    """A folder with a tiny sentence encoder."""
    folder, tokenizer = tmp_path_factory.mktemp("bert"), tiny_tokenizer(24)
    torch.manual_seed(0)
    fields = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4, "intermediate_size": 64}
    tokenizer.save_pretrained(folder)
    BertModel(BertConfig(**fields, vocab_size=len(tokenizer), max_position_embeddings=24)).save_pretrained(folder)
    return folder


ARGS = SimpleNamespace(device="cpu", disable_tqdm=True)
CAPTIONS = [["a red dog", "the dog is red", "one dog"], ["two boats", "boats on a lake"], ["a cat"], []]


@pytest.fixture
def splits():
    names = [f"{row}.jpg" for row in range(4)]
    train = Dataset.from_dict({"image_id": names[:3], "captions": CAPTIONS[:3]})
    return IndexedSplits(train, Dataset.from_dict({"image_id": names}), None)


def test_a_sentence_encoder_knows_items_by_what_is_said_of_them(bert, splits):
    """Items are means of vectors; for the temperature each sentence is left out of its own item's mean."""
    identifiers = Identifiers.from_sequences("atomic", splits.item_ids[::-1], [[10], [11], [12], [13]], EOS)
    wanted = TeacherArguments(teacher_model_name_or_path=str(bert))
    teacher = open_teacher(wanted, splits, identifiers, ARGS)
    assert teacher.sequences[:, 0].tolist() == [13, 12, 11, 10], "in the gallery's order, not the identifiers'"
    encoder = TextEncoder(bert)
    means = [F.normalize(encoder.encode(own).mean(0), dim=0) for own in CAPTIONS[:3]]
    scores = teacher.scores(["a dog on a boat"])[0]
    expected = (torch.stack(means) @ encoder.encode(["a dog on a boat"])[0]) / teacher.temperature
    torch.testing.assert_close(scores[:3], expected, rtol=1e-4, atol=1e-4)
    assert scores[3] == -torch.inf, "nothing is said of it"

    cosines, owners = [], []
    for item, own in enumerate(CAPTIONS[:2]):  # the third has one sentence: left out, nothing is left
        for place, sentence in enumerate(own):
            rest = F.normalize(encoder.encode(own[:place] + own[place + 1 :]).mean(0), dim=0)
            rows = [rest if other == item else means[other] for other in range(3)]
            cosines.append(torch.stack(rows) @ encoder.encode([sentence])[0])
            owners.append(item)
    assert teacher.temperature == best_temperature(torch.stack(cosines), torch.tensor(owners))


def test_a_dual_encoder_knows_items_by_their_pictures_and_by_what_is_said_of_them(tiny_xmatching, splits, tmp_path):
    """Both added; for the temperature a sentence is left out of its item. Of whom nothing is said, the mean of all is."""
    colours = {"0.jpg": "red", "1.jpg": "blue", "2.jpg": "grey", "3.jpg": "white"}
    pictures = [Image.new("RGB", (40, 30), colour) for colour in colours.values()]
    gallery = Dataset.from_dict({"image_id": list(colours), "image": pictures}, features=PICTURES)
    identifiers = Identifiers.from_sequences("atomic", list(colours), [[10], [11], [12], [13]], EOS)
    args = SimpleNamespace(
        device="cpu", disable_tqdm=True, per_device_eval_batch_size=3, dataloader_num_workers=0
    )  # fmt: skip
    model, processor = (
        XMatchingModel.from_pretrained(tiny_xmatching).eval(),
        RetrievalProcessor.from_pretrained(tiny_xmatching),
    )
    with torch.no_grad():
        seen = F.normalize(
            model.get_image_features(**processor(images=pictures, return_tensors="pt")).pooler_output, dim=1
        )

        def said(sentences):
            read = processor(text=sentences, return_tensors="pt", padding=True)
            return F.normalize(model.get_text_features(**read).pooler_output, dim=1)

        usual = said([text for own in CAPTIONS for text in own]).mean(0)

        def item(row, sentences):
            return F.normalize(seen[row] + (said(sentences).mean(0) if sentences else usual), dim=0)

        items = torch.stack([item(row, own) for row, own in enumerate(CAPTIONS)])
        cosines, owners = [], []
        for row, own in enumerate(CAPTIONS[:2]):  # the third has one sentence
            for place, sentence in enumerate(own):
                others = items.clone()
                others[row] = item(row, own[:place] + own[place + 1 :])
                cosines.append(others @ said([sentence])[0])
                owners.append(row)
        asked = said(["a dog on a boat"])[0]
    wanted = TeacherArguments(teacher_model_name_or_path=str(tiny_xmatching))
    teacher = open_teacher(wanted, IndexedSplits(splits.train, gallery, None), identifiers, args)
    assert teacher.temperature == best_temperature(torch.stack(cosines), torch.tensor(owners))
    torch.testing.assert_close(
        teacher.scores(["a dog on a boat"])[0], items @ asked / teacher.temperature, rtol=1e-4, atol=1e-4
    )
    silent = IndexedSplits(splits.train.select([]), gallery, None)
    teacher = open_teacher(wanted, silent, identifiers, args)
    assert teacher.temperature == TEMPERATURE
    torch.testing.assert_close(teacher.items, seen, rtol=1e-4, atol=1e-4)


def test_items_with_one_sentence_each_are_taught_at_the_usual_temperature(bert, splits):
    train = splits.train.map(lambda row: {"captions": row["captions"][:1]})
    single = IndexedSplits(train, splits.gallery, None)
    identifiers = Identifiers.from_sequences("atomic", splits.item_ids, [[10], [11], [12], [13]], EOS)
    assert open_teacher(TeacherArguments(str(bert)), single, identifiers, ARGS).temperature == TEMPERATURE


def test_documents_that_are_written_beside_are_longer_than_identifiers():
    logits, labels = batch("atomic", [0, 2])
    longer = F.pad(labels, (0, 3), value=-100)
    teacher = teacher_of("atomic")
    expected = teacher.loss(logits, labels, ["east", "north"])
    assert teacher.loss(F.pad(logits, (0, 0, 0, 3)), longer, ["east", "north"]).item() == pytest.approx(expected.item())


def test_a_teacher_that_cannot_be_had_is_one_line(tmp_path, splits, bert):
    with pytest.raises(UserError, match=r"--teacher_model_name_or_path .*missing is not a folder"):
        check_teacher(TeacherArguments(str(tmp_path / "missing")), splits, {})
    with pytest.raises(UserError, match="--teacher_invented_share 0.5: .*give --teacher_model_name_or_path"):
        check_teacher(TeacherArguments(teacher_invented_share=0.5), splits, {})
    silent = IndexedSplits(splits.train.select([]), splits.gallery, None)
    with pytest.raises(UserError, match="no item has a trained sentence"):
        check_teacher(TeacherArguments(str(bert)), silent, {})
    BertModel.from_pretrained(bert).save_pretrained(tmp_path / "bare")
    with pytest.raises(UserError, match=r"--teacher_model_name_or_path: .* brings no tokenizer"):
        open_teacher(TeacherArguments(str(tmp_path / "bare")), splits, None, ARGS)
    with pytest.raises(ValueError, match="--teacher_weight 0"):
        check_bounds(TeacherArguments, {"teacher_weight": 0})
    assert open_teacher(TeacherArguments(), splits, None, ARGS) is None
