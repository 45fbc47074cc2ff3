"""Is GatedABMIL the real thing? Musk1, by cross-validation.

MIXMAG_REAL=folder python tests/mil_benchmark.py     prints the figures; it asserts nothing
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.model_selection import StratifiedKFold
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mixmag import GatedABMIL


class BagClassifier(nn.Module):
    """Embedding of the instances (as in Ilse et al.), gated attention, a linear unit."""

    def __init__(self, dim):
        super().__init__()
        self.embed = nn.Sequential(nn.Linear(dim, 128), nn.ReLU(), nn.Dropout(0.2))
        self.pool = GatedABMIL(128, hidden=64)
        self.head = nn.Linear(128, 1)

    def forward(self, x, lengths):
        pooled, _ = self.pool(self.embed(x), lengths)
        return self.head(pooled).squeeze(1)


def fit_and_score(bags, labels, train, test, seed):
    """Scores of the test bags, by which nothing is chosen. The training bags set mean and std."""
    torch.manual_seed(seed)
    order = np.random.default_rng(seed)
    instances = torch.cat([bags[i] for i in train])
    mean = instances.mean(0)
    std = instances.std(0).clamp(min=1e-6)
    model = BagClassifier(bags[0].shape[1])
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-4, weight_decay=1e-2)

    def forward(chosen):
        lengths = torch.tensor([len(bags[i]) for i in chosen])
        return model((torch.cat([bags[i] for i in chosen]) - mean) / std, lengths)

    for _ in range(60):
        for chosen in np.split(order.permutation(train), range(8, len(train), 8)):
            target = torch.tensor(labels[chosen], dtype=torch.float32)
            loss = F.binary_cross_entropy_with_logits(forward(chosen), target)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
    model.eval()
    with torch.no_grad():
        return forward(test).numpy()


def musk(folder):
    z = np.load(folder / "mil" / "musk1.npz")
    bags = [torch.tensor(z["X"][z["bag"] == b], dtype=torch.float32) for b in np.unique(z["bag"])]
    labels = (z["y"] > 0).astype(int)
    accuracy = []
    for repeat in range(5):
        right = 0
        folds = StratifiedKFold(10, shuffle=True, random_state=repeat)
        for train, test in folds.split(labels, labels):
            scores = fit_and_score(bags, labels, train, test, repeat)
            right += ((scores > 0) == labels[test]).sum()
        accuracy.append(right / len(labels))
        print(f"musk1, repeat {repeat + 1}: accuracy {accuracy[-1]:.3f}", flush=True)
    print(
        f"musk1, 5 x 10 folds: accuracy {np.mean(accuracy):.3f} +- {np.std(accuracy):.3f} "
        "over repeats (Ilse et al. 2018: 0.900 +- 0.050)"
    )


if __name__ == "__main__":
    real = os.environ.get("MIXMAG_REAL")
    if not real:
        sys.exit("MIXMAG_REAL is not set: the folder of mil/musk1.npz")
    musk(Path(real))
