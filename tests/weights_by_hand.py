"""What words say for items, by loops over the definition in imagedex/training/lexical_weights.py, and nothing shared with it."""

import math


def alike_by_hand(spellings, one, other):
    """How far `other` counts for `one`, both of them among the spellings."""

    def heavy(word):
        grams = [f"<{word}>"[at : at + 3] for at in range(len(word))]
        having = {gram: sum(gram in f"<{text}>" for text in spellings) for gram in grams}
        return {gram: grams.count(gram) * math.log((1 + len(spellings)) / having[gram]) for gram in grams}

    first, second = heavy(one), heavy(other)
    dot = sum(weight * second.get(gram, 0.0) for gram, weight in first.items())
    lengths = [math.sqrt(sum(weight**2 for weight in own.values())) for own in (first, second)]
    cosine = dot / (lengths[0] * lengths[1]) if all(lengths) else 0.0
    return 0.5 * cosine if cosine > 0.3 else 0.0


def weights_by_hand(documents, pairs, spelling):
    """word -> [N], by the formula with k1 1.5 and b 0.75."""
    known = sorted({word for text in [*documents, *(sentence for sentence, _ in pairs)] for word in text})
    spellings = [spelling[word] for word in known]
    share = {
        (w, o): 1.0 if w == o else alike_by_hand(spellings, spelling[w], spelling[o]) for w in known for o in known
    }

    def tf(word, text):
        return sum(share[word, other] for other in text if other in spelling)

    def again(word):
        """(sentences with it, how many of those find it in what else is said)"""
        having = [rest for sentence, rest in pairs if word in sentence]
        return len(having), sum(min(1.0, tf(word, rest)) for rest in having)

    counted = [again(word) for word in known]
    usual = (sum(found for _, found in counted) + 0.5) / (sum(asked for asked, _ in counted) + 1)
    mean_length, weights = sum(map(len, documents)) / len(documents), {}
    for word, (asked, found) in zip(known, counted, strict=True):
        q = (sum(min(1.0, tf(word, document)) for document in documents) + 0.5) / (len(documents) + 1)
        p = (found + 30 * usual) / (asked + 30)
        idf = math.log(1 + (1 - q) / q)
        relevance = max(0.2 * idf, math.log(p / (1 - p)) - math.log(q / (1 - q))) if pairs else idf
        weights[word] = []
        for document in documents:
            times = tf(word, document)
            weights[word].append(relevance * times * 2.5 / (times + 1.5 * (0.25 + 0.75 * len(document) / mean_length)))
    return weights
