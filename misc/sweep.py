"""Compare the objectives: train and probe each with several seeds, and make one table of their accuracies.

    python misc/sweep.py --results_dir results/cifar10 --dataset_name cifar10 --epochs 100    # main.py's flags go there
    python misc/sweep.py --results_dir results/cifar10 --table_only       # the table again, from the logs alone

The runs are directories of --results_dir, and the same command continues a sweep that was stopped. It ends with
table.csv, which holds every row's settings and command, and table.md. Any finished run found below --results_dir is
counted, so add your own. On two CPU cores 15 runs of 80,000 views of 16 px (ResNet-18, bf16) and their probes take
about two hours.
"""

import hashlib
import json
import os
import shlex
import signal
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
OWN = ('--estimator', '--debiased', '--beta', '--seed')  # flags of main.py that the sweep sets
OBJECTIVE = ['estimator', 'tau_plus', 'beta', 'anneal']
SYMBOLS = ('tau_plus', 'τ⁺'), ('beta', 'β')
METRICS = ['knn', 'linear', 'linear_bn_train']
TITLES = dict(knn='kNN, %', linear='linear probe, %', linear_bn_train='probe, BatchNorm drifting, %',
              **{f'{name}_gain': 'against standard' for name in METRICS})
SHOWN = ['data', 'images', 'arch', 'image_size', 'batch_size', 'temperature', 'epochs', 'precision', 'linear_how',
         'device', 'versions']


def main(argv=None):
    parser = runtime.Parser(prog='sweep.py', description=__doc__.partition('\n')[0],
                            epilog='All other flags are those of main.py.')
    parser.add_argument('--results_dir', default='results/sweep', help='directory of the runs and of the table')
    parser.add_argument('--objectives', nargs='+', default=list(OBJECTIVES), choices=OBJECTIVES, help='what to compare')
    parser.add_argument('--tau_plus', help='of all objectives but the standard one (default: main.py\'s)')
    parser.add_argument('--seeds', default=3, type=runtime.positive_int, help='runs of each: seeds 0, 1, ...')
    parser.add_argument('--jobs', default=1, type=runtime.positive_int, help='runs at a time, which share the cores')
    parser.add_argument('--probe', default='', help='flags of linear.py, in quotes: --probe="--epochs 10"')
    parser.add_argument('--table_only', action='store_true', help='train nothing: make the table of what is there')
    args, flags = parser.parse_known_args(argv)
    results = Path(args.results_dir)
    if args.table_only and flags:
        parser.error(f'--table_only trains nothing and takes no flags of main.py, got {" ".join(flags)}')
    if not args.table_only:
        if own := [flag for flag in flags if flag.partition('=')[0] in OWN]:
            parser.error(f'{" ".join(own)}: the sweep sets {", ".join(OWN)} itself')
        try:
            probe = shlex.split(args.probe)
        except ValueError as error:
            parser.error(f'--probe {args.probe}: {error}')
        if '--model_path' in args.probe:
            parser.error('--probe: the sweep sets --model_path itself')
        linear.arguments(probe)  # wrong flags end here, before anything is trained
        runs = []
        for seed in range(args.seeds):
            for name in dict.fromkeys(args.objectives):
                tau_plus = ['--tau_plus', args.tau_plus] if args.tau_plus and name != 'standard' else []
                runs.append((results / f'{name}_{seed}', [*flags, *OBJECTIVES[name], *tau_plus, '--seed', str(seed)]))
        epochs = {train.arguments(flags)[0].epochs for _, flags in runs}.pop()
        run_all(runs, epochs, probe, args.jobs)
    with runtime.one_line_errors():
        table = make_table(results)
        runtime.write(results / 'table.csv', table.to_csv(index=False).encode())
        runtime.write(results / 'table.md', markdown(table).encode())
    print(f'\n{markdown(table)}\nfiles in {results}: table.csv, table.md')


def run_all(runs, epochs, probe, jobs):
    """Train and probe every (directory, flags), some at a time. Signals that end it let those that run save first."""
    running, stopped = set(), []

    def stop(signum, frame):
        stopped.append(signum)
        for process in list(running):
            process.terminate()

    def call(script, *arguments):
        command = [os.path.relpath(ROOT / script), *arguments]
        # In a session of its own a run does not get the terminal's Ctrl-C as well, which would be its second signal.
        with subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, 'OMP_NUM_THREADS': str(max(1, os.cpu_count() // jobs))},
                              start_new_session=True) as process:
            running.add(process)
            if stopped:
                process.terminate()
            lines = process.communicate()[0].splitlines() or ['no output']
            running.remove(process)
        if stopped:
            raise runtime.Stopped(stopped[0])
        if process.returncode:
            raise SystemExit(f'error: {shlex.join(command)} ended with {process.returncode}: {lines[-1]}. '
                             'The same command continues the sweep')
        return lines[-1]

    def train_and_probe(run):
        directory, flags = run
        checkpoint = directory / f'model_{epochs}.pth'
        wanted = ['--model_path', str(checkpoint), *probe]
        call('main.py', *flags, '--results_dir', str(directory))
        for name in METRICS[1:]:
            settings, _ = read_probe(directory, epochs, name)
            if settings and shlex.split(settings['command'])[1:] == wanted:
                return f'{directory}: probed before'
        return f'{directory}: ' + call('linear.py', *wanted)

    before = {signum: signal.signal(signum, stop) for signum in runtime.stop_signals()}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for line in pool.map(train_and_probe, runs):
                print(line, flush=True)
    except runtime.Stopped as error:
        print('Stopped; the same command continues the sweep', file=sys.stderr)
        sys.exit(128 + error.signum)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def read_run(directory):
    """The config.json of a run, its log (a DataFrame), and the objective's and the data set's names for people.

    Raises:
        ValueError: naming what is missing or not of a run.
    """
    for name in ('config.json', 'log.csv'):
        if not (directory / name).is_file():
            raise ValueError(f'{directory} is not the directory of a run: {name} is missing')
    run = runtime.read_config(directory / 'config.json')
    try:
        run['log'] = pd.read_csv(directory / 'log.csv')[list(train.COLUMNS)].astype(float)
        settings = run['settings']
        run['objective'] = settings['estimator'] + ''.join(
            f', {symbol} = {settings[name]:g}' for name, symbol in SYMBOLS if settings[name])
        run['objective'] += ', annealed' * (settings['anneal'] == 'down') + ', oracle' * settings['oracle']
        folder = settings['dataset_name'] == 'folder'
        run['data'] = Path(settings['root']).absolute().name if folder else settings['dataset_name']
        run['identity'] = {name: value for name, value in settings.items() if name not in train.FREE}
        run['identity'] |= dict(objective=run['objective'], data=run['data'], ranks=run['ranks'],
                                images='{train} + {test}'.format(**run['images']))
    except (ValueError, KeyError, TypeError) as error:
        raise ValueError(f'{directory}: config.json or log.csv is not of a run ({error!r})') from None
    return run


def read_probe(directory, epochs, name):
    """Settings and last row of a finished probe of the run's last encoder, or None and None.

    A probe of an encoder that was there before does not count; where the encoder is gone, its probe does.
    """
    file, checkpoint = directory / f'model_{epochs}_{name}.csv', directory / f'model_{epochs}.pth'
    try:
        about = json.loads(file.with_suffix('.json').read_text())
        row, settings = pd.read_csv(file).iloc[-1], about['settings'] | {'command': about['command']}
        probed = not checkpoint.exists() or about['encoder'] == hashlib.sha256(checkpoint.read_bytes()).hexdigest()
        if probed and row['epoch'] == settings['epochs']:
            return settings, row
    except (OSError, ValueError, KeyError, IndexError):
        pass
    return None, None


def make_table(results):
    """A row for every group of finished runs in the directory that differ in the seed alone.

    Of each accuracy (percent): the mean over seeds, the standard deviation, and mean and standard deviation of its
    difference, seed by seed, to the standard objective's at the same settings.

    Raises:
        ValueError: no finished run there, or two of the same settings and seed.
    """
    rows = []
    for directory in sorted(path.parent for path in results.rglob('config.json')):
        if not (directory / 'log.csv').exists():
            print(f'{directory}: no log.csv, left out', file=sys.stderr)
            continue
        run = read_run(directory)
        epochs, log = run['settings']['epochs'], run['log']
        if len(log) < epochs:
            print(f'{directory}: not finished, left out', file=sys.stderr)
            continue
        row = run['identity'] | dict(minutes=log['seconds'].sum() / 60, knn=log['test_acc@1'].iloc[-1],
                                     command=run['command'], device=run['device'],
                                     versions=', '.join(map(' '.join, run['versions'].items())))
        for probe in METRICS[1:]:
            settings, last = read_probe(directory, epochs, probe)
            row |= {probe: None if last is None else last['test_acc@1'], f'{probe}_command': None, f'{probe}_how': None}
            if settings:
                row[f'{probe}_command'] = settings.pop('command')
                row[f'{probe}_how'] = ', '.join(f'{name} {value}' for name, value in sorted(settings.items())
                                                if name not in ('model_path', 'root'))
        rows.append(row)
    if not rows:
        raise ValueError(f'{results} holds no finished run')
    runs = pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))
    commands = ['command', *(f'{probe}_command' for probe in METRICS[1:])]
    told = [*(f'{probe}_how' for probe in METRICS[1:]), 'device', 'versions']  # rows may mix these, and then say so
    same = [name for name in runs if name not in ['seed', 'minutes', *METRICS, *commands, *told]]
    if (twice := runs.duplicated([*same, 'seed'])).any():
        raise ValueError(f'{results} holds the same run twice: {runs.loc[twice, "command"].iloc[0]}')
    pair = ['seed', *(name for name in same if name not in ('objective', *OBJECTIVE))]
    standard = runs.loc[runs['objective'] == 'standard', [*pair, *METRICS]]
    base = runs[pair].merge(standard, 'left', pair, validate='m:1')[METRICS].where(runs['objective'] != 'standard')
    runs[[f'{name}_gain' for name in METRICS]] = runs[METRICS] - base
    columns = dict(seeds=('seed', 'size'), minutes=('minutes', 'mean'))
    for name in METRICS + [f'{name}_gain' for name in METRICS]:
        columns |= {name: (name, 'mean'), f'{name}_std': (name, 'std'), f'{name}_seeds': (name, 'count')}
    columns |= {name: (name, 'last') for name in commands}
    columns |= {name: (name, lambda values: '; '.join(dict.fromkeys(values.dropna()))) for name in told}
    table = runs.groupby(same, dropna=False, as_index=False).agg(**columns)
    numbers = [name for name in columns if table[name].dtype == float]
    table[numbers] = table[numbers].round(2)
    order = ['objective', *OBJECTIVE, *columns, *pair[1:]]
    return table.sort_values([*pair[1:], 'tau_plus', 'beta'], ignore_index=True)[order]


def markdown(table):
    """The table for people: accuracies as mean ± standard deviation, and below it what its rows share."""
    def cell(row, name):
        if pd.isna(row[name]):
            return ''
        spread = '' if pd.isna(row[f'{name}_std']) else f' ± {row[f"{name}_std"]:.2f}'
        fewer = f' ({row[f"{name}_seeds"]} of {row["seeds"]} seeds)' if row[f'{name}_seeds'] < row['seeds'] else ''
        return f'{row[name]:{"+" if "gain" in name else ""}.2f}{spread}{fewer}'

    settings = list(table)[list(table).index('linear_how'):]
    shown = [name for metric in METRICS if table[metric].notna().any() for name in (metric, f'{metric}_gain')]
    differ = [name for name in settings if table[name].nunique(dropna=False) > 1]
    shared = [name for name in SHOWN if name not in differ]
    minutes = ' to '.join(dict.fromkeys(f'{x:.0f}' for x in (table['minutes'].min(), table['minutes'].max())))
    heads = ['objective', *differ, 'seeds', *(TITLES[name] for name in shown)]
    lines = [heads, ['---'] * len(heads)]
    for _, row in table.iterrows():
        lines.append([row['objective'], *(row[name] for name in differ), row['seeds'],
                      *(cell(row, name) for name in shown)])
    return ''.join(f'| {" | ".join(map(str, line))} |\n' for line in lines) + (
        f'\n± is the standard deviation over seeds. Training took {minutes} minutes a run, on average. All rows: '
        + ', '.join(f'{name} {table[name].iloc[0]}' for name in shared) + '.\n')


if __name__ == '__main__':
    runtime.run(main)
