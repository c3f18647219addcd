"""The judge of the digits: a small network of scikit-learn's, trained on the real ones, and its hidden features."""

from typing import NamedTuple

import numpy as np
from jaxtyping import Float, Int

NAME = "digits-mlp64"  # named beside every Frechet distance: 64 hidden units on 8x8 pixels in [0, 16]
HIDDEN = 64
INK = 16.0


class Classifier(NamedTuple):
    """Weights of a network with one hidden layer: (64, 64), (64,), (64, 10), (10,)."""

    w1: np.ndarray
    b1: np.ndarray
    w2: np.ndarray
    b2: np.ndarray


def fit(pixels: Float[np.ndarray, "n 64"], labels: Int[np.ndarray, " n"]) -> Classifier:
    """Trains on real digits, the same network every time (seed 0). Raises ValueError if scikit-learn is missing."""
    try:
        from sklearn.neural_network import MLPClassifier
    except ImportError:
        raise ValueError("the digits' classifier needs scikit-learn: pip install 'proreflow_jax[demo]'") from None
    model = MLPClassifier((HIDDEN,), alpha=1e-2, max_iter=150, random_state=0, early_stopping=False, tol=1e-6)
    model.fit(pixels / INK, labels)
    return Classifier(model.coefs_[0], model.intercepts_[0], model.coefs_[1], model.intercepts_[1])


def features(judge: Classifier, pixels: Float[np.ndarray, "n 64"]) -> Float[np.ndarray, "n 64"]:
    """Hidden activations after the ReLU: the feature space of the Frechet distance."""
    return np.maximum(pixels / INK @ judge.w1 + judge.b1, 0.0)


def predict(judge: Classifier, pixels: Float[np.ndarray, "n 64"]) -> Int[np.ndarray, " n"]:
    """The digit each image is taken for."""
    return np.argmax(features(judge, pixels) @ judge.w2 + judge.b2, axis=1)
