"""Our classifiers and metrics beside those of scikit-learn, where it has the same: both numbers and how they differ.

    python benchmarks/scikit_agreement.py

On the 1797 handwritten digits that come with scikit-learn, 64 pixels each, every third one for testing; maps of classes
are drawn at random. What is not here either is scikit-learn's own code (`svm`, `few_shot`, average precision, the
`logreg` of small data), or is not in it.
"""

from __future__ import annotations

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from sklearn.linear_model import LogisticRegression, Ridge
from sklearn.metrics import balanced_accuracy_score, f1_score, jaccard_score, top_k_accuracy_score
from sklearn.neighbors import KNeighborsClassifier

from evaluation.metrics import (
    confusion_matrix,
    dice_per_class,
    mean_class_accuracy,
    mean_iou,
    top_k_accuracy,
)
from evaluation.protocols.knn.score import vote
from evaluation.protocols.logreg.score import on_device
from evaluation.protocols.ridge.score import ridge_path
from evaluation.registry import protocol

C = 1.0  # of the logistic regression
PENALTY = 0.1  # of the ridge regression


def main() -> None:
    digits, labels = load_digits(return_X_y=True)
    digits /= 16
    is_test = np.arange(len(labels)) % 3 == 2
    x, y, queries, truth = digits[~is_test], labels[~is_test], digits[is_test], labels[is_test]
    x_t, y_t, queries_t, truth_t = (torch.from_numpy(one) for one in (x, y, queries, truth))
    print(f"{len(x)} digits for training, {len(truth)} for testing")
    print(f"{'':34}{'ours':>12}{'scikit-learn':>14}   predictions that differ")

    def told(name: str, ours: float, theirs: float, differing: int | str = "") -> None:
        print(f"{name:34}{ours:12.6f}{theirs:14.6f}   {differing}", flush=True)

    def compared(name: str, ours: np.ndarray, theirs: np.ndarray) -> None:  # type: ignore[type-arg]
        told(name, float((ours == truth).mean()), float((theirs == truth).mean()), int((ours != theirs).sum()))

    k, temperature = protocol("knn").params["k"], protocol("knn").params["temperature"]
    shares = vote(x_t, y_t, queries_t, num_classes=10, ks=[k], temperature=temperature)[k]
    neighbors = KNeighborsClassifier(
        k, metric="cosine", weights=lambda distances: np.exp((1 - distances) / temperature)
    )
    compared(f"knn, top-1 of {k} nearest", shares.argmax(1).numpy(), neighbors.fit(x, y).predict(queries))

    scores = ridge_path(x_t, F.one_hot(y_t).double(), [PENALTY]).scores(queries_t, 0)
    theirs = Ridge(PENALTY).fit(x, np.eye(10)[y]).predict(queries)
    compared("ridge, top-1", scores.argmax(1).numpy(), theirs.argmax(1))
    told("ridge, greatest score", float(scores.max()), float(theirs.max()))

    (classifier,) = on_device(x_t, y_t, [C], tol=1e-7, max_iter=1000)
    regression = LogisticRegression(C=C, tol=1e-7, max_iter=1000).fit(x, y)
    logits = classifier.logits(queries_t, 10)
    compared("logreg of large data, top-1", logits.argmax(1).numpy(), regression.predict(queries))
    loss = -regression.predict_log_proba(queries)[np.arange(len(truth)), truth].mean()
    told("the same, top-3", top_k_accuracy(logits, truth_t, 3), top_k_accuracy_score(truth, logits.numpy(), k=3))
    told("the same, loss", float(F.cross_entropy(logits, truth_t)), float(loss))

    guess = torch.from_numpy(np.random.default_rng(0).integers(0, 10, len(truth)))
    guess = torch.where(torch.arange(len(truth)) % 4 > 0, truth_t, guess)
    confusion = confusion_matrix(guess, truth_t, 10)
    told("mean accuracy of classes", mean_class_accuracy(guess, truth_t, 10), balanced_accuracy_score(truth, guess))
    told("mIoU", mean_iou(confusion), jaccard_score(truth, guess, average="macro"))
    told("Dice, mean of classes", float(dice_per_class(confusion).mean()), f1_score(truth, guess, average="macro"))


if __name__ == "__main__":
    main()
