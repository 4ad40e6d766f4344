"""The pictures that the examples learn, handwritten digits, and those that they draw."""

import numpy as np

IMAGES, HELD_OUT = 1437, 360  # of scikit-learn's 1,797


def digits(*shape, seed=0):
    """``(x, y)`` to learn from and ``(x, y)`` held out: images of a shape, from 0 to 1, and labels.

    Every digit has the same part of its images held out; which ones, the seed draws.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    x, y = load_digits(return_X_y=True)
    x, y = (x / 16).astype(np.float32).reshape(-1, *shape), y.astype(np.int32)
    x, x_test, y, y_test = train_test_split(x, y, train_size=IMAGES, stratify=y, random_state=seed)
    return (x, y), (x_test, y_test)


def save(figure, path):
    figure.savefig(path, dpi=150)
    print(f"wrote {path}")
