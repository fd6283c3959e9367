"""Compare the objectives: train and probe each with several seeds, and make one table of their accuracies.

    python misc/sweep.py --results_dir results/cifar10 --dataset_name cifar10 --epochs 100    # main.py's flags go there
    python misc/sweep.py --results_dir results/cifar10 --table_only       # the table again, from the logs alone

The runs are directories of --results_dir, and the same command continues a sweep that was stopped. It ends with
table.csv, which holds every row's settings and command, and table.md. Any run found there gets its row, so add your
own. On two CPU cores 15 runs of 80,000 views of 16 px (ResNet-18, bf16) and their probes take about 1.5 hours.
"""

import json
import os
import shlex
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
import linear
import main as train
import runtime

ROOT = Path(__file__).parents[1]
OBJECTIVES = {
    'standard': ['--estimator', 'standard'],
    'debiased': ['--estimator', 'debiased'],
    'hard_b0.5': ['--estimator', 'hard', '--beta', '0.5'],
    'hard_b1': ['--estimator', 'hard', '--beta', '1'],
    'hard_b2': ['--estimator', 'hard', '--beta', '2'],
}
OBJECTIVE = ['estimator', 'tau_plus', 'beta']
METRICS = ['knn', 'linear', 'linear_bn_train']
TITLES = dict(knn='kNN, %', linear='linear probe, %', linear_bn_train='probe, BatchNorm drifting, %',
              **{f'{name}_gain': 'to standard' for name in METRICS})
SHOWN = ['dataset_name', 'images', 'arch', 'image_size', 'batch_size', 'temperature', 'epochs', 'precision', 'device',
         'versions']


def main(argv=None):
    parser = runtime.Parser(prog='sweep.py', description=__doc__.partition('\n')[0],
                            epilog='All other flags are those of main.py.')
    parser.add_argument('--results_dir', default='results/sweep', help='directory of the runs and of the table')
    parser.add_argument('--objectives', nargs='+', default=list(OBJECTIVES), choices=OBJECTIVES, help='what to compare')
    parser.add_argument('--seeds', default=3, type=runtime.positive_int, help='runs of each: seeds 0, 1, ...')
    parser.add_argument('--jobs', default=1, type=runtime.positive_int, help='runs at a time, which share the cores')
    parser.add_argument('--probe', default='', help='flags of linear.py, in quotes: --probe="--epochs 10"')
    parser.add_argument('--table_only', action='store_true', help='train nothing: make the table of what is there')
    args, flags = parser.parse_known_args(argv)
    results = Path(args.results_dir)
    if not args.table_only:
        probe = shlex.split(args.probe)
        linear.arguments(probe)  # wrong flags end here, before anything is trained
        runs = [(results / f'{name}_{seed}', [*flags, *OBJECTIVES[name], '--seed', str(seed)])
                for seed in range(args.seeds) for name in args.objectives]
        epochs = {train.arguments(flags)[0].epochs for _, flags in runs}.pop()
        with ThreadPoolExecutor(args.jobs) as pool:
            threads = str(max(1, os.cpu_count() // args.jobs))
            for line in pool.map(lambda run: train_and_probe(*run, epochs, probe, threads), runs):
                print(line, flush=True)
    with runtime.one_line_errors():
        table = make_table(results)
        runtime.write(results / 'table.csv', table.to_csv(index=False).encode())
        runtime.write(results / 'table.md', markdown(table).encode())
    print(f'\n{markdown(table)}\nfiles in {results}: table.csv, table.md')


def train_and_probe(directory, flags, epochs, probe, threads):
    """Run main.py and linear.py, or what is left of them; returns the probe's last line."""
    def call(script, *arguments):
        command = [os.path.relpath(ROOT / script), *arguments]
        done = subprocess.run([sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, 'OMP_NUM_THREADS': threads})
        last = (done.stdout.splitlines() or ['no output'])[-1]
        if done.returncode:
            raise SystemExit(f'error: {shlex.join(command)} ended with {done.returncode}: {last}. '
                             'The same command continues the sweep')
        return last

    call('main.py', *flags, '--results_dir', str(directory))
    return f'{directory}: ' + call('linear.py', '--model_path', str(directory / f'model_{epochs}.pth'), *probe)


def read_run(directory):
    """The config.json of a run, with its log (a DataFrame) and a name of its objective for people.

    Raises:
        ValueError: naming what is missing or not of a run.
    """
    for name in ('config.json', 'log.csv'):
        if not (directory / name).is_file():
            raise ValueError(f'{directory} is not the directory of a run: {name} is missing')
    run = runtime.read_config(directory / 'config.json')
    try:
        run['log'] = pd.read_csv(directory / 'log.csv')[list(train.COLUMNS)]
    except (ValueError, KeyError):
        raise ValueError(f'{directory / "log.csv"} is not the log of a run') from None
    settings = run['settings']
    run['objective'] = settings['estimator'] + ''.join(
        f', {symbol} = {settings[name]:g}' for symbol, name in (('τ⁺', 'tau_plus'), ('β', 'beta')) if settings[name])
    return run


def make_table(results):
    """A row for every group of finished runs in the directory that differ in the seed alone.

    Of each accuracy (percent): the mean over seeds, the standard deviation, and mean and standard deviation of its
    difference, seed by seed, to the standard objective's at the same settings.
    """
    rows = []
    for directory in sorted(path.parent for path in results.glob('*/config.json')):
        run = read_run(directory)
        settings, log = run['settings'], run['log']
        if len(log) < settings['epochs']:
            print(f'{directory}: not finished, left out', file=sys.stderr)
            continue
        row = {name: value for name, value in settings.items() if name not in train.FREE}
        row |= dict(objective=run['objective'], images='{train} + {test}'.format(**run['images']), device=run['device'],
                    versions=', '.join(map(' '.join, run['versions'].items())), minutes=log['seconds'].sum() / 60,
                    command=run['command'], knn=log['test_acc@1'].iloc[-1])
        for probe in METRICS[1:]:
            file = directory / f'model_{settings["epochs"]}_{probe}.csv'
            row[probe], row[f'{probe}_command'] = None, ''
            if file.exists():
                row[probe] = pd.read_csv(file)['test_acc@1'].iloc[-1]
                row[f'{probe}_command'] = json.loads(file.with_suffix('.json').read_text())['command']
        rows.append(row)
    if not rows:
        raise ValueError(f'{results} holds no finished run')
    runs = pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))
    commands = [name for name in runs if name.endswith('command')]
    same = [name for name in runs if name not in ['seed', 'minutes', *METRICS, *commands]]
    pair = ['seed', *(name for name in same if name not in ('objective', *OBJECTIVE))]
    standard = runs.loc[runs['estimator'] == 'standard', [*pair, *METRICS]]
    base = runs[pair].merge(standard, 'left', pair)[METRICS].where(runs['estimator'] != 'standard')
    runs[[f'{name}_gain' for name in METRICS]] = runs[METRICS] - base
    columns = dict(seeds=('seed', 'size'), minutes=('minutes', 'mean'))
    for name in METRICS + [f'{name}_gain' for name in METRICS]:
        columns |= {name: (name, 'mean'), f'{name}_std': (name, 'std')}
    columns |= {name: (name, 'last') for name in commands}
    table = runs.groupby(same, dropna=False, as_index=False).agg(**columns)
    table = table.round({name: 2 for name in columns if name not in ('seeds', *commands)})
    return table.sort_values([*pair[1:], 'tau_plus', 'beta'], ignore_index=True)[
        ['objective', *OBJECTIVE, *columns, *pair[1:]]]


def markdown(table):
    """The table for people: accuracies as mean ± standard deviation, and below it what its rows share."""
    def cell(row, name):
        spread = '' if pd.isna(row[f'{name}_std']) else f' ± {row[f"{name}_std"]:.2f}'
        return '' if pd.isna(row[name]) else f'{row[name]:{"+" if "gain" in name else ""}.2f}{spread}'

    shown = [name for metric in METRICS if table[metric].notna().any() for name in (metric, f'{metric}_gain')]
    shared = [name for name in SHOWN if table[name].nunique(dropna=False) == 1]
    differ = [name for name in SHOWN if name not in shared]
    heads = ['objective', *differ, 'seeds', *(TITLES[name] for name in shown), 'minutes']
    lines = [heads, ['---'] * len(heads)]
    for _, row in table.iterrows():
        lines.append([row['objective'], *(row[name] for name in differ), row['seeds'],
                      *(cell(row, name) for name in shown), f'{row["minutes"]:.1f}'])
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines) + (
        '\n± is the standard deviation over seeds, minutes are those of training. All rows: '
        + ', '.join(f'{name} {table[name].iloc[0]}' for name in shared) + '.\n')


if __name__ == '__main__':
    runtime.run(main)
