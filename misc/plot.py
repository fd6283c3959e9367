"""Pictures of what runs left, as PNG files.

    python misc/plot.py curves results/mine/*_?                      # loss and kNN accuracy of any number of runs
    python misc/plot.py similarity results/mine/*_0/model_4.pth      # cosines of pairs of the same and of other classes
    python misc/plot.py temperature results/mine/*_?                 # accuracy against the loss's temperature
    python misc/plot.py neighbours results/model_400.pth             # test images and their nearest training images
    python misc/plot.py negatives results/model_400.pth              # which negatives each objective pushes away
    python misc/plot.py graphs results/graphs                        # accuracies that misc/graphs.py found

Data set and sizes come from the config.json beside a checkpoint. Runs whose settings differ in the seed alone are
drawn as one line of means and a band of one standard deviation.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import pictures
from pictures import BATCH, COLOURS, MARKERS, colours, names, plt

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags
from hardneg import runtime
from hardneg.files import write
from hardneg.runs import PROBES, name_data, read_probe, read_run
from hardneg.runtime import UserError

GRAPHS = dict(infograph='InfoGraph, the paper\'s form', published='InfoGraph, the released code\'s', graphcl='GraphCL')
CURVES = [('train_loss', 'training loss (nats)'), ('test_acc@1', 'kNN accuracy on test images (%)'),
          ('alignment', 'alignment of z (0: views are equal)'), ('uniformity', 'uniformity of z (less: more even)'),
          ('rankme', 'RankMe of f (more is better)')]
def main(argv=None):
    parser = flags.Parser(prog='plot.py', description=__doc__.partition('\n')[0])
    commands = parser.add_subparsers(dest='what', required=True, metavar='PICTURE', prog='plot.py')
    for name, (function, what, plural) in PICTURES.items():
        command = commands.add_parser(name, help=function.__doc__.partition('\n')[0])
        command.add_argument('paths', nargs='+' if plural else 1, type=flags.path, help=what)
        command.add_argument('--out', type=flags.path, help=f'file to write (default: {name}.png in the first run)')
        if name not in WHOLE:
            flags.add(command, 'data (default: as in config.json)',
                      *((name, None, kind, text) for name, _, kind, text in flags.DATA))
            command.add_argument('--seed', default=0, type=flags.seed, help='of the images (default: %(default)s)')
        if name == 'negatives':
            command.add_argument('--query', default=0, type=flags.integer(0, BATCH - 1),
                                 help='which image of the batch is the query (default: %(default)s)')
        if name == 'similarity':
            command.add_argument('--images', default=2000, type=flags.integer(100, 5000),
                                 help='test images, at most, drawn at random (default: %(default)s)')
        if name == 'neighbours':
            command.add_argument('--query', nargs='+', type=flags.path, help='image files to search for (default: some '
                                 'test images)')
            command.add_argument('--memory', default=100_000, type=flags.integer(2, 10_000_000),
                                 help='images that are searched, at most, drawn at random (default: %(default)s)')
    args = parser.parse_args(argv)
    args.paths = [*map(Path, args.paths)]
    args.out = Path(args.out or (args.paths[0] if args.what in WHOLE else args.paths[0].parent) / f'{args.what}.png')
    if args.out.suffix != '.png':
        parser.error(f'--out {args.out}: pictures are PNG files, their names end in .png')
    figure, png = PICTURES[args.what][0](args), io.BytesIO()
    figure.savefig(png)
    plt.close(figure)
    write(args.out, png.getbuffer())
    print(args.out)


def curves(args):
    """Training loss and kNN accuracy against the epoch; without labels alignment, uniformity and RankMe."""
    groups, found = {}, [read_run(path) for path in args.paths]
    name_data(found)
    for run in found:
        groups.setdefault(repr(run['identity'] | {'seed': None}), []).append(run)
    groups = sorted(groups.values(), key=lambda runs: (runs[0]['settings']['tau_plus'], runs[0]['settings']['beta']))
    titles = names([runs[0] for runs in groups], but=['seed'])
    columns = max(1, min(3, 110 // (max(map(len, titles)) + 8)))  # of the legend, which 8 inches hold
    labelled = any(run['classes'] for runs in groups for run in runs)
    shown = CURVES[:2] if labelled else CURVES[:1] + CURVES[2:]  # two or four panels
    rows = len(shown) // 2
    figure, panels = plt.subplots(rows, 2, figsize=(8, 2.8 * rows + 0.2 * -(-len(titles) // columns)))
    for name, colour, marker, runs in zip(titles, colours(titles), 'os^DvP*X', groups):
        log = pd.concat(run['log'] for run in runs)
        for axes, (column, what) in zip(panels.flat, shown):
            by = log.dropna(subset=column).groupby('epoch')[column]
            mean, std = by.mean(), by.std().fillna(0)
            axes.plot(mean.index, mean, color=colour, marker=marker, markersize=4, label=pictures.shown(name))
            axes.fill_between(mean.index, mean - std, mean + std, color=colour, alpha=0.2, linewidth=0)
            axes.set(xlabel='epoch', ylabel=what)
            axes.xaxis.get_major_locator().set_params(integer=True)
    figure.legend(*panels.flat[0].get_legend_handles_labels(), loc='outside upper center', ncols=columns)
    return figure


def temperature(args):
    """Accuracy against the temperature of the loss, by objective: a dot for each run, and a line through the means."""
    found, rows = [read_run(path) for path in args.paths], []
    name_data(found)
    titles = names(found, but=['seed', 'temperature', 'knn_temperature'])
    for path, run, title in zip(args.paths, found, titles):
        settings = run['settings']
        probes = [(what, read_probe(path, settings['epochs'], probe, run.get('data_digest'))[1])
                  for probe, what in PROBES.items()]
        rows.append({'title': title, 't': settings['temperature'], 'kNN': run['log']['test_acc@1'].iloc[-1]}
                    | {what: row['test_acc@1'] for what, row in probes if row is not None})
    rows = pd.DataFrame(rows).dropna(axis=1, how='all')
    shown, titles = list(rows)[2:], list(rows['title'].unique())
    if not shown:
        raise UserError('no run there has measured an accuracy')
    figure, panels = plt.subplots(1, len(shown), figsize=(max(5, 4 * len(shown)), 3.4), squeeze=False)
    for title, colour, marker in zip(titles, colours(titles), 'os^DvP*X'):
        own = rows[rows['title'] == title]
        for axes, what in zip(panels[0], shown):
            mean = own.groupby('t')[what].mean()
            axes.plot(mean.index, mean, color=colour, marker=marker, markersize=7, markerfacecolor='none',
                      label=pictures.shown(title))
            axes.scatter(own['t'], own[what], s=14, color=colour, alpha=0.5, linewidths=0)
            axes.set(title=what, xlabel='temperature t of the loss', xticks=sorted({*rows['t']}))
    panels[0, 0].set_ylabel('accuracy on test images (%)')
    figure.legend(*panels[0, 0].get_legend_handles_labels(), loc='outside upper center', ncols=3)
    return figure


def graphs(args):
    """Accuracy on graphs by data set, objective and β: a dot for each repeat, their mean and standard deviation."""
    try:
        found = pd.concat(pd.read_csv(path, dtype={'data': str, 'digest': str})
                          for path in sorted(args.paths[0].glob('*.csv')))
        found = found.astype(dict.fromkeys(['beta', 'tau_plus', 'repeat', 'accuracy'], float))
        if found.index.dtype != int or not found['accuracy'].between(0, 100).all():
            raise ValueError
        found = found.drop_duplicates(['data', 'digest', 'objective', 'beta', 'tau_plus', 'repeat'])
        groups, drawn = found.groupby(['data', 'digest']), found[found['objective'] != 'untrained']
        series = sorted({*zip(drawn['objective'], drawn['tau_plus'])}, key=lambda s: ([*GRAPHS].index(s[0]), s[1]))
    except (ValueError, KeyError):
        raise UserError(f'{args.paths[0]} holds no CSV files of misc/graphs.py, or others beside them') from None
    sets, objectives = [data for data, _ in groups.groups], [objective for objective, _ in series]
    betas, span = sorted(drawn['beta'].unique()), groups['accuracy'].agg(np.ptp).max() + 2  # a point is as long in all
    figure, panels = plt.subplots(1, len(groups), figsize=(max(5, 4 * len(groups)), 4), squeeze=False)
    handles = {}
    for axes, ((data, digest), rows) in zip(panels[0], groups):
        untrained = rows.loc[rows['objective'] == 'untrained', 'accuracy']
        columns = [(-1, untrained, '#555555', 'o', 'untrained')]
        for i, (objective, tau_plus) in enumerate(series):
            label = GRAPHS[objective] + f', τ⁺ = {tau_plus:g}' * (objectives.count(objective) > 1)
            own = rows[(rows['objective'] == objective) & (rows['tau_plus'] == tau_plus)]
            columns += [(betas.index(beta) + 0.8 * ((i + 0.5) / len(series) - 0.5), a, COLOURS[i % len(COLOURS)],
                         MARKERS[i % len(MARKERS)], label) for beta, a in own.groupby('beta')['accuracy']]
        for x, a, colour, marker, label in columns:
            axes.scatter(np.full(len(a), x - 0.06), a, s=16, color=colour, alpha=0.4, linewidths=0)
            handles[label] = axes.errorbar(x + 0.06, a.mean(), a.std(), color=colour, marker=marker, capsize=2)
        axes.axhline(untrained.mean(), color='#555555', linestyle=':')
        bottom = (rows['accuracy'].max() + rows['accuracy'].min() - span) / 2
        axes.set(title=data if sets.count(data) == 1 else f'{data} {digest}', xlabel='β', ylim=(bottom, bottom + span),
                 xticks=range(-1, len(betas)), xticklabels=['untrained', *(f'{beta:g}' for beta in betas)])
        axes.xaxis.grid(False)
    panels[0, 0].set_ylabel('accuracy of an RBF SVM (%)')
    del handles['untrained']  # named on the axis
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3)
    return figure


PICTURES = {
    'curves': (curves, 'directories of runs', True),
    'temperature': (temperature, 'directories of runs', True),
    'similarity': (pictures.similarity, 'checkpoints', True),
    'neighbours': (pictures.neighbours, 'checkpoints', True),
    'negatives': (pictures.negatives, 'a checkpoint', False),
    'graphs': (graphs, 'a directory of misc/graphs.py', False),
}
WHOLE = 'curves', 'temperature', 'graphs'  # are of directories

if __name__ == '__main__':
    runtime.run(main)
