"""Would something far simpler do? A constant answer and naive Bayes, on the same test records.

In: prompts and labels of the train, val and test records. Out: each control's predictions. Multinomial
naive Bayes over counts of words (1-2) and of characters within words (1-4), which also serve Chinese;
its smoothing is chosen on val, so that the control is a fair opponent.

Limits: a control for labels only; open answers have none.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

SMOOTHING = (1.0, 0.1, 0.01)

Example = tuple[str, str]


def majority_class(train: Sequence[Example], prompts: Sequence[str]) -> list[str]:
    """The most frequent train label (the first by name among equals) for every prompt."""
    counts = Counter(label for _, label in train)
    return [min(counts, key=lambda label: (-counts[label], label))] * len(prompts)


def naive_bayes(train: Sequence[Example], val: Sequence[Example], prompts: Sequence[str]) -> list[str]:
    """What multinomial naive Bayes, trained on (prompt, label) pairs, answers to `prompts`."""
    from sklearn.feature_extraction.text import CountVectorizer
    from sklearn.naive_bayes import MultinomialNB
    from sklearn.pipeline import make_union

    features = make_union(
        CountVectorizer(ngram_range=(1, 2), token_pattern=r"(?u)\b\w+\b"),
        CountVectorizer(ngram_range=(1, 4), analyzer="char_wb"),
    )
    labels = [label for _, label in train]
    counts = features.fit_transform([text for text, _ in train])
    models = [MultinomialNB(alpha=alpha).fit(counts, labels) for alpha in SMOOTHING]
    if val:
        texts, truth = features.transform([text for text, _ in val]), [label for _, label in val]
        scores = [float(model.score(texts, truth)) for model in models]
        model = models[scores.index(max(scores))]
    else:
        model = models[0]
    return [str(label) for label in model.predict(features.transform(list(prompts)))]
