"""Is GatedABMIL the real thing? Musk1 (Ilse et al. 2018: 0.900 +- 0.050) and HIPT kidney regions, by cross-validation.

MIXMAG_REAL=folder python tests/mil_benchmark.py          prints the figures; a benchmark, not an assertion
"""

import os
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.metrics import roc_auc_score
from sklearn.model_selection import StratifiedGroupKFold, StratifiedKFold
from torch import nn

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from mixmag import GatedABMIL  # noqa: E402


class BagClassifier(nn.Module):
    """Instance embedding (Ilse et al. use such layers before the attention), gated attention, a linear unit."""

    def __init__(self, dim, widths, hidden, dropout):
        super().__init__()
        layers = []
        for a, b in zip((dim, *widths), widths):
            layers += [nn.Linear(a, b), nn.ReLU(), nn.Dropout(dropout)]
        self.embed = nn.Sequential(*layers)
        width = widths[-1] if widths else dim
        self.pool, self.head = GatedABMIL(width, hidden), nn.Linear(width, 1)

    def forward(self, x, lengths):
        return self.head(self.pool(self.embed(x), lengths)[0]).squeeze(1)


def fit_and_score(
    bags, labels, train, test, seed, widths, hidden, dropout, lr, decay, epochs, batch
):
    """Standardise on the training bags, train for a fixed number of epochs, score the test bags. Nothing is chosen by them."""
    torch.manual_seed(seed)
    together = torch.cat([bags[i] for i in train])
    mean, std = together.mean(0), together.std(0).clamp(min=1e-6)
    model = BagClassifier(bags[0].shape[1], widths, hidden, dropout)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr, weight_decay=decay)

    def forward(chosen):
        return model(
            (torch.cat([bags[i] for i in chosen]) - mean) / std,
            torch.tensor([len(bags[i]) for i in chosen]),
        )

    order = np.random.default_rng(seed)
    for _ in range(epochs):
        shuffled = order.permutation(train)
        for i in range(0, len(shuffled), batch):
            chosen = shuffled[i : i + batch]
            loss = F.binary_cross_entropy_with_logits(
                forward(chosen), torch.tensor(labels[chosen], dtype=torch.float32)
            )
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
        for train, test in StratifiedKFold(10, shuffle=True, random_state=repeat).split(
            labels, labels
        ):
            scores = fit_and_score(
                bags, labels, train, test, repeat, (128,), 64, 0.2, 5e-4, 1e-2, 60, 8
            )
            right += ((scores > 0).astype(int) == labels[test]).sum()
        accuracy.append(right / len(labels))
        print(f"musk1, repeat {repeat + 1}: accuracy {accuracy[-1]:.3f}", flush=True)
    print(
        f"musk1, 5 x 10 folds: accuracy {np.mean(accuracy):.3f} +- {np.std(accuracy):.3f} over repeats (Ilse et al. 2018: 0.900 +- 0.050)"
    )


def kidney(folder):
    """The settings were chosen among some ten on another division of the cases (random_state=1)."""
    z = np.load(folder / "feats" / "hipt_kidney.npz")
    offsets = z["offsets"]
    bags = [
        torch.tensor(z["X"][a:b], dtype=torch.float32) for a, b in zip(offsets[:-1], offsets[1:])
    ]
    labels = (z["label"] == "CCRCC").astype(int)
    areas = []
    for fold, (train, test) in enumerate(
        StratifiedGroupKFold(5, shuffle=True, random_state=0).split(labels, labels, z["case_id"])
    ):
        scores = fit_and_score(bags, labels, train, test, fold, (64,), 64, 0.5, 1e-3, 1e-1, 30, 16)
        areas.append(roc_auc_score(labels[test], scores))
        print(f"hipt kidney, fold {fold + 1}: AUROC {areas[-1]:.4f}", flush=True)
    print(
        f"hipt kidney, CCRCC against the rest, 5 folds by case: AUROC {np.mean(areas):.4f} +- {np.std(areas):.4f} (mean pooling + logistic regression: 0.983 +- 0.007)"
    )


if __name__ == "__main__":
    if not os.environ.get("MIXMAG_REAL"):
        sys.exit(
            "MIXMAG_REAL is not set: it names the folder that holds mil/musk1.npz and feats/hipt_kidney.npz"
        )
    musk(Path(os.environ["MIXMAG_REAL"]))
    kidney(Path(os.environ["MIXMAG_REAL"]))
