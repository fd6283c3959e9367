"""Compare the objectives on sequences: 20 kinds of Markov chain, told apart without labels.

    python misc/sequences.py

The kinds are 5 groups of 4. Two views of a sequence are two windows of it in which a fifth of the
symbols are replaced. It prints the kNN accuracy of each objective, mean and standard deviation over
seeds, and takes some minutes on a CPU.
"""

import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from sklearn.neighbors import KNeighborsClassifier
from torch import nn

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags
from hardneg.losses import contrastive_loss

SYMBOLS, LENGTH, WINDOW = 8, 128, 48
OBJECTIVES = {
    'SimCLR': dict(tau_plus=0, beta=0),
    'DCL': dict(tau_plus=0.05, beta=0),
    'untrained': dict(steps=0),
    'HCL, β = 1': dict(tau_plus=0.05, beta=1),
    'HCL, β = 2': dict(tau_plus=0.05, beta=2),
    'SimCLR, t = 0.1': dict(tau_plus=0, beta=0, temperature=0.1),
    'HCL, β = 1, t = 0.1': dict(tau_plus=0.05, beta=1, temperature=0.1),
}


def sequences(transitions, n):
    """n one-hot sequences (n, SYMBOLS, LENGTH), each of a random kind (n,).

    transitions (kinds, SYMBOLS, SYMBOLS) are those of each kind.
    """
    kind = torch.randint(len(transitions), (n,))
    x = [torch.randint(SYMBOLS, (n,))]
    while len(x) < LENGTH:
        x.append(torch.multinomial(transitions[kind, x[-1]], 1)[:, 0])  # (n, 1) -> (n,)
    return one_hot(torch.stack(x, 1)), kind  # LENGTH x (n,) -> (n, LENGTH)


def one_hot(x):
    return F.one_hot(x, SYMBOLS).mT.float()  # (n, L) -> (n, SYMBOLS, L)


def view(x):
    """A random window of each sequence, with noise: (n, SYMBOLS, L) -> (n, SYMBOLS, WINDOW)."""
    start = torch.randint(LENGTH - WINDOW + 1, (len(x), 1, 1))
    place = (start + torch.arange(WINDOW)).expand(-1, SYMBOLS, -1)  # (n, SYMBOLS, WINDOW)
    noise = one_hot(torch.randint(SYMBOLS, (len(x), WINDOW)))
    replaced = torch.rand(len(x), 1, WINDOW) < 0.2
    return torch.where(replaced, noise, x.gather(2, place))


def accuracy(seed, steps=400, **objective):
    """kNN accuracy (percent) on 1,000 sequences of an encoder trained on 4,000 others."""
    torch.manual_seed(seed)
    group = torch.randn(5, 1, SYMBOLS, SYMBOLS)
    own = torch.randn(5, 4, SYMBOLS, SYMBOLS)
    transitions = (group + 0.5 * own).flatten(0, 1).softmax(-1)  # (5, 4, S, S) -> (20, S, S)
    train, labels = sequences(transitions, 4000)
    test, test_labels = sequences(transitions, 1000)
    f = nn.Sequential(nn.Conv1d(SYMBOLS, 64, 3), nn.ReLU(), nn.Conv1d(64, 64, 3), nn.ReLU())
    g = nn.Sequential(nn.Linear(64, 64), nn.ReLU(), nn.Linear(64, 32))
    optimizer = torch.optim.Adam([*f.parameters(), *g.parameters()], 3e-3)
    for _ in range(steps):
        batch = train[torch.randint(len(train), (128,))]
        z1, z2 = (g(f(view(batch)).mean(2)) for _ in range(2))  # (B, 64, L) -> (B, 64) -> (B, 32)
        optimizer.zero_grad()
        contrastive_loss(z1, z2, **objective).backward()
        optimizer.step()
    with torch.no_grad():
        knn = KNeighborsClassifier(20, metric='cosine').fit(f(train).mean(2), labels)
        return 100 * knn.score(f(test).mean(2), test_labels)


if __name__ == '__main__':
    parser = flags.Parser(description=__doc__.partition('\n')[0])
    flags.add_seeds(parser)
    seeds = parser.parse_args().seeds
    simclr = None
    for name, objective in OBJECTIVES.items():
        found = torch.tensor([accuracy(seed, **objective) for seed in range(seeds)])
        if simclr is None:
            simclr = found
        gain = found - simclr
        print(
            f'{name}: kNN {found.mean():.1f} ± {found.std():.1f} %, '
            f'over SimCLR {gain.mean():+.1f} ± {gain.std():.1f}'
        )
