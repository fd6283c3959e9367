"""Would alignment, uniformity or RankMe have chosen the objective with the best kNN accuracy?

    python results/label_free.py results/cifar10 results/cifar10_temperature

The finished runs below the directories count as one experiment. They should differ in the loss and
in the seed alone. Prints a table with a row for each measure:

losses  how many there are. Each counts once, by the mean over its seeds.
ρ       Spearman's rank correlation of the measure and kNN accuracy. It is 1 if the measure orders
        the losses as kNN does, from worse to better, and -1 if it reverses them.
chosen  the loss that the measure calls best: that of the lowest alignment or uniformity, or of the
        highest RankMe (Wang and Isola 2020, arXiv 2005.10242; Garrido et al. 2023,
        arXiv 2210.02885)
behind  points of kNN accuracy between the chosen loss and the best one
best    the loss of the highest kNN accuracy
"""

import sys
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / 'misc'))
import sweep
from hardneg import runs, runtime
from hardneg.runtime import UsageError

SIGNS = {'alignment': -1, 'uniformity': -1, 'rankme': 1}  # 1: more is better


def means_over_seeds(directories):
    """A DataFrame of kNN accuracy (percent) and the measures, with a row for each loss.

    Raises:
        UsageError: there are fewer than two losses, or one lacks a measure.
    """
    rows = []
    for directory in directories:
        for place, run in sweep.finished_runs(Path(directory)):
            row = sweep.measured(place, run)
            rows.append(row | dict(loss=f'{row["objective"]}, t = {row["temperature"]:g}'))
    if len({row['loss'] for row in rows}) < 2:
        raise UsageError('name directories that hold finished runs of two losses or more')
    means = pd.DataFrame(rows).groupby('loss')[['knn', *SIGNS]].mean()
    if means.isna().any(axis=None):
        raise UsageError('the logs of some runs hold no kNN accuracy, or no label-free measures')
    return means


def compare(means):
    """The rows of the table, the first of them its head, each a list of cells."""
    best = means['knn'].idxmax()
    table = [['measure', 'losses', 'ρ', 'chosen', 'behind', 'best']]
    for name, sign in SIGNS.items():
        quality = sign * means[name]
        correlation = quality.rank().corr(means['knn'].rank())
        chosen = quality.idxmax()
        behind = means['knn'][best] - means['knn'][chosen]
        title = sweep.title(name, against=None)
        table.append([title, len(means), f'{correlation:+.2f}', chosen, f'{behind:.1f}', best])
    return table


def main():
    print(runs.markdown(compare(means_over_seeds(sys.argv[1:]))), end='')


if __name__ == '__main__':
    runtime.run(main)
