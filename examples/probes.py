"""Whether classes can be read from latents: a linear layer and nearest neighbours, for compare_reals.py and evaluate.py.

Both see each number standardised by the pictures that they learn from, so a latent's scale does not matter to them.
"""

import numpy as np
from sklearn.linear_model import LogisticRegression
from sklearn.neighbors import KNeighborsClassifier
from sklearn.preprocessing import StandardScaler

NEIGHBOURS, STRENGTH, ITERATIONS = 20, 0.01, 2000
PROTOCOL = {
    "linear_probe": f"multinomial logistic regression (scikit-learn, C {STRENGTH}, at most {ITERATIONS} iterations)",
    "knn": f"vote of the {NEIGHBOURS} nearest neighbours by cosine (scikit-learn)",
}


def accuracies(known: np.ndarray, labels: np.ndarray, unknown: np.ndarray, answers: np.ndarray) -> dict[str, float]:
    """Of a probe that learns rows ``N F`` with their labels ``N``, on other rows: linear_probe and knn."""
    scaler = StandardScaler()
    known, unknown = scaler.fit_transform(known), scaler.transform(unknown)
    models = {
        "linear_probe": LogisticRegression(C=STRENGTH, max_iter=ITERATIONS),
        "knn": KNeighborsClassifier(NEIGHBOURS, metric="cosine"),
    }
    return {name: round(float(model.fit(known, labels).score(unknown, answers)), 4) for name, model in models.items()}
