"""Pictures of what runs left, as PNG files.

    python misc/plot.py curves results/mine/*_?                  # loss and kNN accuracy of runs
    python misc/plot.py temperature results/mine/*_?             # accuracy against temperature
    python misc/plot.py similarity results/mine/*_0/model_4.pth  # cosines of pairs, by class
    python misc/plot.py neighbours results/model_400.pth         # images and their nearest others
    python misc/plot.py negatives results/model_400.pth          # which negatives are pushed away
    python misc/plot.py graphs results/graphs                    # accuracies of misc/graphs.py
    python misc/plot.py circle --out circle.png                  # the idea of hard negatives

Data set and sizes come from the config.json beside a checkpoint unless a flag says otherwise. Runs
whose settings differ in the seed alone are drawn as one line of means and a band of one standard
deviation. The picture is written to --out, or beside the first run or checkpoint. On a CPU,
neighbours takes minutes for large data sets, the others seconds.
"""

import io
import sys
from pathlib import Path

import numpy as np
import pandas as pd

import pictures
from pictures import COLOURS, GREY, MARKERS, colours, names, plt

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import flags, runtime, timm_models
from hardneg.files import write
from hardneg.runs import PROBES, name_data, read_probe, read_run
from hardneg.runtime import UserError
from main import defaults

# Columns of log.csv, and what stands on their axes
CURVES = (
    ('train_loss', 'training loss (nats)'),
    ('test_acc@1', 'kNN accuracy on test images (%)'),
    ('alignment', 'alignment of z (0: views are equal)'),
    ('uniformity', 'uniformity of z (less: more even)'),
    ('rankme', 'RankMe of f (more is better)'),
)
GRAPHS = dict(
    infograph="InfoGraph, the paper's form",
    published="InfoGraph, the released code's",
    graphcl='GraphCL',
)
OF_DIRECTORIES = ('curves', 'temperature', 'graphs')


def make_parser():
    parser = flags.Parser(prog='plot.py', description=__doc__.partition('\n')[0])
    commands = parser.add_subparsers(dest='what', required=True, metavar='PICTURE', prog='plot.py')

    def add(function, paths, nargs='+'):
        name, text = function.__name__, function.__doc__.partition('\n')[0]
        command = commands.add_parser(name, help=text, description=text)
        command.add_argument('paths', nargs=nargs, type=flags.path, help=paths)
        where = 'directory' if name in OF_DIRECTORIES else "checkpoint's directory"
        command.add_argument(
            '--out', type=flags.path, help=f'file to write ({name}.png in the first {where})'
        )
        if name not in OF_DIRECTORIES:
            flags.add_encoder(command)
            command.add_argument(
                '--results_dir',
                type=flags.path,
                help='directory of a picture of timm/NAME (results/NAME)',
            )
            flags.add_data_flags(command, 'data set (default: as in config.json)')
            command.add_argument(
                '--seed',
                type=flags.seed,
                default=0,
                help='seed that draws the images (%(default)s)',
            )
        return command

    add(curves, 'directories of runs')
    add(temperature, 'directories of runs')
    similarity = add(pictures.similarity, 'checkpoints, or timm/NAME')
    similarity.add_argument(
        '--images',
        type=flags.integer(100, 5000),
        default=2000,
        help='test images, at most, drawn at random (%(default)s)',
    )
    neighbours = add(pictures.neighbours, 'checkpoints, or timm/NAME')
    neighbours.add_argument(
        '--memory',
        type=flags.integer(2, 10_000_000),
        default=100_000,
        help='images without labels that are searched, at most, drawn at random (%(default)s)',
    )
    negatives = add(pictures.negatives, 'a checkpoint', nargs=1)
    negatives.add_argument(
        '--query',
        type=flags.integer(0, pictures.BATCH - 1),
        default=0,
        help='which image of the batch is the query (%(default)s)',
    )
    add(graphs, 'a directory of misc/graphs.py', nargs=1)
    text = pictures.circle.__doc__
    command = commands.add_parser('circle', help=text, description=text)
    command.add_argument(
        '--out', type=flags.path, default='circle.png', help='file to write (%(default)s)'
    )
    command.set_defaults(paths=[])
    return parser


def main(argv=None):
    parser = make_parser()
    args = parser.parse_args(argv)
    args.paths = [Path(path) for path in args.paths]
    beside_paths = args.out is None
    if beside_paths:
        if args.what in OF_DIRECTORIES:
            directory = args.paths[0]
        else:
            source = str(args.paths[0])
            timm_models.check_results_dir(source, args.results_dir)
            directory = timm_models.place(source, args.results_dir).parent
        args.out = directory / f'{args.what}.png'
    if Path(args.out).suffix != '.png':
        parser.error(f'--out {args.out}: pictures are PNG files, their names end in .png')
    figure = PICTURES[args.what](args)
    png = io.BytesIO()
    figure.savefig(png)
    plt.close(figure)
    if beside_paths:  # what is about timm's weights has a directory of its own
        Path(args.out).parent.mkdir(parents=True, exist_ok=True)
    write(args.out, png.getbuffer())
    print(args.out)


# Runs


def curves(args):
    """Training loss and kNN accuracy, or label-free measures, against the epoch."""
    found = [read_run(path, defaults()) for path in args.paths]
    groups = of_equal_settings(found)
    titles = names([runs[0] for runs in groups], but=['seed'])
    panels = CURVES[:1] + CURVES[2:]
    if any(run['classes'] for run in found):
        panels = CURVES[:2]
    rows = len(panels) // 2
    longest = max(len(title) for title in titles)
    columns = max(1, min(3, 110 // (longest + 8)))  # of the legend, which 8 inches hold
    lines = -(-len(titles) // columns)
    figure, axes = plt.subplots(rows, 2, figsize=(8, 2.8 * rows + 0.2 * lines))
    for title, colour, marker, runs in zip(titles, colours(titles), MARKERS, groups):
        log = pd.concat(run['log'] for run in runs)
        look = dict(color=colour, marker=marker, markersize=4, label=pictures.shown(title))
        for panel, (column, what) in zip(axes.flat, panels):
            by_epoch = log.dropna(subset=column).groupby('epoch')[column]
            mean, std = by_epoch.mean(), by_epoch.std().fillna(0)
            panel.plot(mean.index, mean, **look)
            band = dict(color=colour, alpha=0.2, linewidth=0)
            panel.fill_between(mean.index, mean - std, mean + std, **band)
            panel.set(xlabel='epoch', ylabel=what)
            panel.xaxis.get_major_locator().set_params(integer=True)
    handles, texts = axes.flat[0].get_legend_handles_labels()
    figure.legend(handles, texts, loc='outside upper center', ncols=columns)
    return figure


def of_equal_settings(found):
    """Lists of the runs whose settings differ in the seed alone, by tau_plus and beta."""
    name_data(found)
    groups = {}
    for run in found:
        settings = dict(run['identity'], seed=None)
        groups.setdefault(repr(sorted(settings.items())), []).append(run)

    def strength(runs):
        settings = runs[0]['settings']
        return settings['tau_plus'], settings['beta']

    return sorted(groups.values(), key=strength)


def temperature(args):
    """Accuracy against the temperature of the loss: dots of runs, lines through their means."""
    found = [read_run(path, defaults()) for path in args.paths]
    name_data(found)
    titles = names(found, but=['seed', 'temperature', 'knn_temperature'])
    rows = []
    for path, run, title in zip(args.paths, found, titles):
        settings = run['settings']
        row = {'title': title, 't': settings['temperature']}
        row['kNN'] = run['log']['test_acc@1'].iloc[-1]
        for probe, what in PROBES.items():
            _, last = read_probe(path, settings['epochs'], probe, run['data_digest'])
            if last is not None:
                row[what] = last['test_acc@1']
        rows.append(row)
    rows = pd.DataFrame(rows).dropna(axis=1, how='all')
    measured = list(rows)[2:]
    if not measured:
        raise UserError('no run there has measured an accuracy')
    size = max(5, 4 * len(measured)), 3.4
    figure, panels = plt.subplots(1, len(measured), figsize=size, sharey=True, squeeze=False)
    different = list(rows['title'].unique())
    for title, colour, marker in zip(different, colours(different), MARKERS):
        own = rows[rows['title'] == title]
        look = dict(color=colour, marker=marker, markersize=7, markerfacecolor='none')
        for panel, what in zip(panels[0], measured):
            mean = own.groupby('t')[what].mean()
            panel.plot(mean.index, mean, label=pictures.shown(title), **look)
            panel.scatter(own['t'], own[what], s=14, color=colour, alpha=0.5, linewidths=0)
            ticks = sorted(rows['t'].unique())
            panel.set(title=what, xlabel='temperature t of the loss', xticks=ticks)
    panels[0, 0].set_ylabel('accuracy on test images (%)')
    handles, texts = panels[0, 0].get_legend_handles_labels()
    figure.legend(handles, texts, loc='outside upper center', ncols=3)
    return figure


# Graphs


def graphs(args):
    """Accuracy on graphs by data set, objective and β: repeats, their mean and deviation."""
    found = read_graphs(args.paths[0])
    groups = found.groupby(['data', 'digest'])
    sets = [data for data, _ in groups.groups]
    trained = found[found['objective'] != 'untrained']
    betas = sorted(trained['beta'].unique())
    series = series_of(trained)
    span = groups['accuracy'].agg(np.ptp).max() + 2  # a point is as long in all panels
    size = max(5, 4 * len(groups)), 4
    figure, panels = plt.subplots(1, len(groups), figsize=size, squeeze=False)
    handles = {}
    for axes, ((data, digest), rows) in zip(panels[0], groups):
        untrained = rows.loc[rows['objective'] == 'untrained', 'accuracy']
        draw_accuracies(axes, -1, untrained, color=GREY, marker='o')
        axes.axhline(untrained.mean(), color=GREY, linestyle=':')
        for i, (label, objective, tau_plus) in enumerate(series):
            own = rows[(rows['objective'] == objective) & (rows['tau_plus'] == tau_plus)]
            aside = 0.8 * ((i + 0.5) / len(series) - 0.5)  # beside the others of the same beta
            look = dict(color=COLOURS[i % len(COLOURS)], marker=MARKERS[i % len(MARKERS)])
            for beta, values in own.groupby('beta')['accuracy']:
                handles[label] = draw_accuracies(axes, betas.index(beta) + aside, values, **look)
        middle = (rows['accuracy'].max() + rows['accuracy'].min()) / 2
        axes.set_ylim(middle - span / 2, middle + span / 2)
        texts = ['untrained'] + [f'{beta:g}' for beta in betas]
        axes.set_xticks(range(-1, len(betas)), texts)
        axes.set_xlabel('β')
        name = data
        if sets.count(data) > 1:
            name = f'{data} {digest}'
        axes.set_title(name)
        axes.xaxis.grid(False)
    panels[0, 0].set_ylabel('accuracy of an RBF SVM (%)')
    figure.legend(handles.values(), handles, loc='outside lower center', ncols=3)
    return figure


def read_graphs(directory):
    """The rows of all CSV files of misc/graphs.py in the directory, each once.

    Raises:
        UserError: there are none, or there are others.
    """
    try:
        tables = []
        for path in sorted(directory.glob('*.csv')):
            tables.append(pd.read_csv(path, dtype={'data': str, 'digest': str}))
        rows = pd.concat(tables)
        numbers = ['beta', 'tau_plus', 'repeat', 'accuracy']
        rows = rows.astype(dict.fromkeys(numbers, float))
        if rows.index.dtype != int or not rows['accuracy'].between(0, 100).all():
            raise ValueError
        key = ['data', 'digest', 'objective', 'beta', 'tau_plus', 'repeat']
        rows = rows.drop_duplicates(key)
        if not rows['objective'].isin(['untrained', *GRAPHS]).all():
            raise ValueError
    except (ValueError, KeyError):
        raise UserError(
            f'{directory} holds no CSV files of misc/graphs.py, or others beside them'
        ) from None
    return rows


def series_of(rows):
    """(label, objective, tau_plus) of all that the rows have, in the order of GRAPHS."""
    pairs = rows[['objective', 'tau_plus']].drop_duplicates().sort_values('tau_plus')
    found = []
    for objective, label in GRAPHS.items():
        own = pairs.loc[pairs['objective'] == objective, 'tau_plus']
        for tau_plus in own:
            told = f'{label}, τ⁺ = {tau_plus:g}' if len(own) > 1 else label
            found.append((told, objective, tau_plus))
    return found


def draw_accuracies(axes, x, values, color, marker):
    """Dots of the values and, beside them, their mean and standard deviation, which it returns."""
    axes.scatter(np.full(len(values), x - 0.06), values, s=16, color=color, alpha=0.4, linewidths=0)
    look = dict(color=color, marker=marker, capsize=2)
    return axes.errorbar(x + 0.06, values.mean(), values.std(), **look)


PICTURES = dict(
    curves=curves,
    temperature=temperature,
    similarity=pictures.similarity,
    neighbours=pictures.neighbours,
    negatives=pictures.negatives,
    graphs=graphs,
    circle=pictures.circle,
)

if __name__ == '__main__':
    runtime.run(main)
