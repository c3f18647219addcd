"""Two judges of digits, both trained on the real digits: a support vector machine as classifier, and a network for features.

Accuracy on held-out writers (scikit-learn's last 397 digits after the first 1,400): 96.7 % for the machine, trained also on
copies moved by a pixel (as the model's training data are), 96.2 % without the copies, 92.2 % for the network. The network's
hidden features serve the Frechet distance.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from proreflow_jax import UserError

FEATURES = "digits-mlp64"  # named beside every Frechet distance: 64 hidden units on 8x8 pixels
READER = "digits-svm"  # named beside every recognition rate: RBF kernel on 8x8 pixels
REAL = "1,797 real digits, each in nine places a pixel apart as in training"  # what the Frechet distance is to
HIDDEN = 64
INK = 16.0


class Judges(NamedTuple):
    """A fitted reader (scikit-learn's SVC), and the first layer of the feature network, (64, 64) and (64,)."""

    reader: Any
    weight: np.ndarray
    bias: np.ndarray


def fit(
    pixels: Float[np.ndarray, "n 64"],
    labels: Int[np.ndarray, " n"],
    moved: Float[np.ndarray, "m 64"] | None = None,
    moved_labels: Int[np.ndarray, " m"] | None = None,
) -> Judges:
    """Trains both on real digits, deterministically; the reader also on moved copies, if any.

    Raises ValueError if scikit-learn is missing.
    """
    try:
        from sklearn.neural_network import MLPClassifier
        from sklearn.svm import SVC
    except ImportError:
        raise UserError("the digits' judges need scikit-learn: pip install scikit-learn (the extra `demo`)") from None
    network = MLPClassifier((HIDDEN,), alpha=1e-2, max_iter=400, random_state=0).fit(pixels / INK, labels)
    examples, answers = (
        (pixels, labels) if moved is None else (np.concatenate([pixels, moved]), np.concatenate([labels, moved_labels]))
    )
    return Judges(SVC(C=10.0, gamma=0.25).fit(examples / INK, answers), network.coefs_[0], network.intercepts_[0])


def features(judges: Judges, pixels: Float[np.ndarray, "n 64"]) -> Float[np.ndarray, "n 64"]:
    """Hidden activations after the ReLU: the feature space of the Frechet distance."""
    return np.maximum(pixels / INK @ judges.weight + judges.bias, 0.0)


def read_classifier(judges: Judges, pixels: Float[np.ndarray, "n 64"]) -> Int[np.ndarray, " n"]:
    """The reader's digit of each image."""
    return judges.reader.predict(pixels / INK)
