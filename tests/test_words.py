"""What a word is: in any script, with any sign beside it, in BM25, in the tokenizer that is trained, and in what is left out."""

import unicodedata

import numpy as np
import pytest
from datasets import Dataset

from imagedex.evaluation.baselines import BM25, baseline_rows
from imagedex.metrics.hits_at_k.hits_at_k import rank_from_scores
from imagedex.modeling.processing_retrieval import SentenceProcessor, clean
from imagedex.training.texts import token_table
from imagedex.training.tokenizer import LONGEST_WORD, train_tokenizer
from imagedex.words import joined, units, words

WORDS = {  # text -> its words, written out by hand
    "park.": ["park"],
    "park . PARK!": ["park", "park"],
    "dog's": ["dog", "s"],
    "dog ’s": ["dog", "s"],
    "(t-shirt)": ["t", "shirt"],
    "black–and—white": ["black", "and", "white"],
    "“stop”": ["stop"],
    "¿qué?": ["qué"],
    "que\u0301": ["qué"],
    "ÜBER u\u0308ber": ["über", "über"],
    "Việt Vie\u0302\u0323t": ["việt", "việt"],
    "йод и\u0306од": ["йод", "йод"],
    "άνθρωπος α\u0301νθρωπος": ["άνθρωπος", "άνθρωπος"],
    "हिन्दी में कुत्ता।": ["हिन्दी", "में", "कुत्ता"],
    "বাংলা, কুকুর": ["বাংলা", "কুকুর"],
    "தமிழ் நாய்": ["தமிழ்", "நாய்"],
    "كلب، يركض؟": ["كلب", "يركض"],
    "הַכֶּלֶב רָץ": [unicodedata.normalize("NFC", "הַכֶּלֶב"), unicodedata.normalize("NFC", "רָץ")],
    "می\u200cخواهم": ["میخواهم"],
    "soft\u00adhyphen": ["softhyphen"],
    "\ufefffirst": ["first"],
    "ｆｕｌｌ　ｗｉｄｔｈ！": ["full", "width"],
    "狗跑。": ["狗", "跑", "狗跑"],
    "狗": ["狗"],
    "犬が": ["犬", "が", "犬が"],
    "개가 뛴다": ["개", "가", "개가", "뛴", "다", "뛴다"],
    "สวนนี้": ["สวน", "วนน", "นนี", "นี้"],
    "ไป": ["ไป"],
    "park狗park": ["park", "狗", "park"],
    "🐶 ❤️": ["🐶", "❤"],
    "👩\u200d👧": ["👩", "👧"],
    "2 m, 10%": ["2", "m", "10"],
    "café_table": ["café_table"],
    "۱۲ ٣": ["۱۲", "٣"],
    " .,! ": [],
    "": [],
}


@pytest.mark.parametrize("text", WORDS)
def test_words_by_hand(text):
    assert words(text) == WORDS[text]


# Two ways to write one sentence; a third says something else in the same script.
SAME = {
    "signs": ("A dog's ball, in the park.", "a dog 's ball , in the park .", "a cat sleeps at home"),
    "quotes": ("“Stop” says the dog’s sign", '" stop " says the dog \'s sign', "a cat sleeps"),
    "hyphens": ("a black-and-white dog", "a black – and – white dog", "a green car"),
    "german": ("ein großer Hund übt", "ein großer Hund u\u0308bt", "eine Katze schläft"),
    "vietnamese": ("một con chó chạy", unicodedata.normalize("NFD", "một con chó chạy"), "hai con mèo ngủ"),
    "greek": ("ένας σκύλος τρέχει", unicodedata.normalize("NFD", "ένας σκύλος τρέχει"), "μια γάτα κοιμάται"),
    "russian": ("мой рыжий пёс.", unicodedata.normalize("NFD", "мой рыжий пёс") + " .", "кошка спит"),
    "hindi": ("एक कुत्ता दौड़ता है।", "एक कुत्ता दौड़ता है ।", "बिल्ली सोती है"),
    "arabic": ("كلب يركض، في الحديقة", "كلب يركض ، في الحديقة", "قطة تنام"),
    "hebrew": ("כלב רץ בפארק.", "כלב רץ בפארק .", "חתול ישן"),
    "chinese": ("一只狗在公园里。", "一只狗在公园里 。", "两只猫睡觉"),
    "japanese": ("犬が公園で走る。", "犬が公園で走る 。", "猫は家で寝る"),
    "thai": ("หมาวิ่งในสวน", "หมาวิ่งในสวน\ufeff", "แมวนอนหลับ"),
    "korean": ("개가 공원에서 뛴다.", unicodedata.normalize("NFD", "개가 공원에서 뛴다") + " .", "고양이가 잔다"),
    "emoji": ("🐶 in the park🌳", "🐶\ufe0f in the park 🌳", "🐱 asleep"),
    "full width": ("ａ　ｄｏｇ！", "a dog !", "ｔｗｏ　ｃａｔｓ"),
}


@pytest.mark.parametrize("script", SAME)
def test_one_sentence_written_in_two_ways_is_one(script):
    one, other, different = SAME[script]
    tokenizer = train_tokenizer([one, different] * 3, 200)
    assert words(one) == words(other) != words(different)
    assert tokenizer(one)["input_ids"] == tokenizer(other)["input_ids"] != tokenizer(different)["input_ids"]
    assert tokenizer.unk_token_id not in tokenizer(one)["input_ids"]


@pytest.mark.parametrize("first, letters", [(0x0E01, 40), (0x4E00, 400), (0x3041, 80)])
def test_a_script_without_blanks_is_not_chance(first, letters):
    """Words of three letters, written one after the other in another order each time: what was said of a picture finds it."""
    rng = np.random.default_rng(0)
    lexicon = ["".join(chr(first + letter) for letter in rng.integers(letters, size=3)) for _ in range(150)]
    pictures = [rng.choice(lexicon, 8, replace=False) for _ in range(60)]
    captions = {f"{row}.jpg": ["".join(rng.permutation(own)) for _ in range(3)] for row, own in enumerate(pictures)}
    queries = [("".join(rng.permutation(own)[:5]), f"{row}.jpg") for row, own in enumerate(pictures)]
    assert baseline_rows(captions, queries)["BM25"]["hits@1"] > 0.9

    tokenizer = train_tokenizer([caption for own in captions.values() for caption in own], 4000)

    def pieces(text):
        return tokenizer(text, add_special_tokens=False)["input_ids"]

    scores = BM25(pieces(" ".join(own)) for own in captions.values()).scores([pieces(query) for query, _ in queries])
    assert (rank_from_scores(scores, np.arange(60)) == 1).mean() > 0.7


def test_no_blank_is_written_where_the_script_has_none():
    tokenizer = train_tokenizer(["狗在公园里。a dog", "หมาวิ่งในสวน"] * 3, 100)
    decoded = tokenizer.decode(tokenizer("狗在公园 a dog หมาวิ่ง")["input_ids"], skip_special_tokens=True)
    assert decoded.replace("dog ", "dog") == "狗在公园 a dogหมาวิ่ง"


def test_a_long_word_is_read_in_parts():
    tokenizer = train_tokenizer(["ab" * 5_000] * 3, 100)
    assert max(map(len, tokenizer.get_vocab())) <= LONGEST_WORD + 1
    assert tokenizer.decode(tokenizer("ab" * 300)["input_ids"], skip_special_tokens=True).replace(" ", "") == "ab" * 300


def test_what_is_left_out_by_itself():
    assert units("a dog's  park.") == ["a", "dog's", "park."]
    assert units("狗在 park里") == ["狗", "在", "park", "里"]
    assert units("หมาวิ่งในสวน") == ["หมาวิ่", "งในสวน"]
    for text in ("a dog's park.", "狗在公园里", "犬が公園で", "หมาวิ่งในสวน", "कुत्ता है", "park 狗在"):
        assert joined(units(text)) == text


@pytest.mark.parametrize("text, cleaned", [
    ("A Dog! (big)", "a dog big"),
    ("Ёлка: снег.", "ёлка снег"),
    ("狗在公园里。一只!", "狗在公园里。一只"),
    ("हिन्दी में कुत्ता। #1", "हिन्दी में कुत्ता। 1"),
    ("كلب؟ نعم*", "كلب؟ نعم"),
    ("หมาวิ่ง~", "หมาวิ่ง"),
    ("🐶 dog’s; re\u0301sume\u0301", "🐶 dog’s re\u0301sume\u0301"),
])  # fmt: skip
def test_cleaning_takes_signs_alone(text, cleaned):
    assert clean(text) == cleaned


def test_what_cleaning_leaves_empty_and_what_nobody_knows_is_counted(caplog):
    tokenizer = train_tokenizer(["a dog"] * 3, 60)
    texts = Dataset.from_dict({"caption": ["a dog", "!!!", "собака", "***"]})
    token_table(texts, "caption", SentenceProcessor(tokenizer, clean_text=True))
    assert "2 of 4 texts are empty once they are cleaned" in caplog.text
    assert "1 of 4 texts have words or signs that the tokenizer does not know" in caplog.text
