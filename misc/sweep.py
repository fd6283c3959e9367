"""Compare the objectives: train and probe each with several seeds, and make one table of their accuracies.

    python misc/sweep.py --results_dir results/cifar10 --dataset_name cifar10 --epochs 100    # main.py's flags go there
    python misc/sweep.py --results_dir results/cifar10 --table_only       # the table again, from the logs alone

The runs are directories of --results_dir, and the same command continues a sweep that was stopped. It ends with
table.csv, which holds every row's settings and command, and table.md. Any finished run found below --results_dir is
counted, so add your own. On two CPU cores the 15 runs of results/README.md and their probes take about an hour.
"""

import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
from hardneg import files
from hardneg import flags
from hardneg import runs
from hardneg import runtime
from hardneg.runtime import UserError

ROOT = Path(__file__).parents[1]
OBJECTIVES = {
    'standard': ['--estimator', 'standard'],
    'debiased': ['--estimator', 'debiased'],
    'hard_b0.5': ['--estimator', 'hard', '--beta', '0.5'],
    'hard_b1': ['--estimator', 'hard', '--beta', '1'],
    'hard_b2': ['--estimator', 'hard', '--beta', '2'],
}
OWN = ('--estimator', '--debiased', '--beta', '--seed')  # flags of main.py that the sweep sets
METRICS = ['knn', *runs.PROBES]
LABEL_FREE = ['alignment', 'uniformity', 'rankme']  # of evaluate.py, beside the accuracies
TITLES = dict(alignment='alignment', uniformity='uniformity', rankme='RankMe', knn='kNN, %',
              **{name: f'{what}, %' for name, what in runs.PROBES.items()},
              **{f'{name}_gain': 'against standard' for name in METRICS})
SHOWN = ['data', 'images', 'arch', 'image_size', 'batch_size', 'temperature', 'epochs', 'precision',
         *(f'{probe}_how' for probe in runs.PROBES), 'device', 'versions']


def main(argv=None):
    parser = flags.Parser(prog='sweep.py', description=__doc__.partition('\n')[0],
                          epilog='All other flags are those of main.py.')
    parser.add_argument('--objectives', nargs='+', default=list(OBJECTIVES), choices=OBJECTIVES,
                        help='what to compare (default: all)')
    flags.add(parser, 'runs',
              ('--results_dir', 'results/sweep', flags.path, 'directory of the runs and of the table'),
              ('--tau_plus', None, flags.fraction, 'tau_plus of the corrected objectives (default: main.py\'s)'),
              ('--seeds', 3, flags.integer(1, 1000), 'runs of each: seeds 0, 1, ...'),
              ('--jobs', 1, flags.integer(1, 256), 'runs at a time, which share the cores'),
              ('--probe', '', str, 'flags of linear.py, in quotes: --probe="--epochs 10" (default: none)'),
              ('--against', None, flags.positive(100), 'temperature of the standard runs over which gains are told '
               '(default: each run\'s own)'),
              ('--table_only', False, bool, 'train nothing: make the table of what is there'))
    args, rest = parser.parse_known_args(argv)  # the rest is main.py's, which checks it
    results = Path(args.results_dir)
    if args.table_only and rest:
        parser.error(f'--table_only trains nothing and takes no flags of main.py, got {" ".join(rest)}')
    if not args.table_only:
        own = [flag for flag in rest if flag.partition('=')[0] in OWN]
        if own:
            parser.error(f'{" ".join(own)}: the sweep sets {", ".join(OWN)} itself')
        try:
            probe = shlex.split(args.probe)
        except ValueError as error:
            parser.error(f'--probe {args.probe}: {error}')
        for flag in '--model_path', '--dataset_name', '--root':
            if flag in args.probe:
                parser.error(f'--probe: the sweep sets {flag} itself')
        planned = []
        for seed in range(args.seeds):
            for name in dict.fromkeys(args.objectives):
                tau_plus = [] if args.tau_plus is None or name == 'standard' else ['--tau_plus', str(args.tau_plus)]
                planned.append((results / f'{name}_{seed}', [*rest, *OBJECTIVES[name], *tau_plus, '--seed', str(seed)]))
        check('linear.py', *probe, '--model_path', os.devnull)
        for _, wanted in planned[:len(planned) // args.seeds]:
            check('main.py', *wanted, '--dataset_name', 'folder', '--root', os.devnull)
        run_all(planned, probe, args.jobs)
    table = make_table(results, args.against)
    text = markdown(table)
    if args.against:
        text = text.replace(' against standard ', f' against standard, t = {args.against:g} ')
    files.write_table(results / 'table.csv', table, list(table))
    files.write(results / 'table.md', text.encode(errors='replace'))
    print(f'\n{text}\nfiles in {results}: table.csv, table.md')


def check(script, *arguments):
    """End as the script does if it finds a flag wrong. It checks them first; what comes next must make it fail."""
    done = subprocess.run([sys.executable, ROOT / script, *arguments], capture_output=True, text=True)
    if done.returncode == 2:
        sys.stderr.write(done.stderr)
        sys.exit(2)


def run_all(planned, probe, jobs):
    """Train and probe every (directory, flags), some at a time. A signal ends it after the running jobs have saved."""
    running, stopped = set(), []

    def stop(signum, frame):
        stopped.append(signum)
        for process in list(running):
            process.terminate()

    def call(script, *arguments):
        command = [os.path.relpath(ROOT / script), *arguments]
        # In a session of its own a run does not get the terminal's Ctrl-C as well, which would be its second signal.
        with subprocess.Popen([sys.executable, *command], text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                              env={**os.environ, 'OMP_NUM_THREADS': str(max(1, runtime.cores() // jobs))},
                              start_new_session=True) as process:
            running.add(process)
            if stopped:
                process.terminate()
            lines = process.communicate()[0].splitlines() or ['no output']
            running.remove(process)
        if stopped:
            raise runtime.Stopped(stopped[0])
        if process.returncode:
            advice = '' if process.returncode == 2 else '. The same command continues the sweep'
            raise UserError(f'{shlex.join(command)} ended with {process.returncode}: {lines[-1]}{advice}')
        return lines[-1]

    def train_and_probe(run):
        directory, words = run
        call('main.py', *words, '--results_dir', str(directory))
        epochs = files.read_json(directory / 'config.json')['settings']['epochs']
        wanted = ['--model_path', str(directory / f'model_{epochs}.pth'), *probe]
        for name in runs.PROBES:
            settings, _ = runs.read_probe(directory, epochs, name)
            if settings and shlex.split(settings['command'])[1:] == wanted:
                return f'{directory}: probed before'
        return f'{directory}: ' + call('linear.py', *wanted)

    before = {signum: signal.signal(signum, stop) for signum in runtime.stop_signals()}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            for line in pool.map(train_and_probe, planned):
                print(line, flush=True)
    except runtime.Stopped as error:
        print('Stopped; the same command continues the sweep', file=sys.stderr)
        sys.exit(128 + error.signum)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


def make_table(results, against=None):
    """A row for every group of finished runs in the directory that differ in the seed alone.

    Of each accuracy (percent): the mean over seeds, the standard deviation, and mean and standard deviation of its
    difference, seed by seed, to the standard objective's at the same settings, or at the temperature `against`.

    Raises:
        UserError: no finished run there, or two of the same settings and seed.
    """
    found = []
    for directory in sorted(path.parent for path in results.rglob('config.json')):
        if not (directory / 'log.csv').exists():
            print(f'{directory}: no log.csv, left out', file=sys.stderr)
            continue
        run = runs.read_run(directory)
        if run['log']['epoch'].max() != run['settings']['epochs']:
            print(f'{directory}: not finished, left out', file=sys.stderr)
            continue
        found.append((directory, run))
    runs.name_data([run for _, run in found])
    rows = []
    for directory, run in found:
        epochs, log = run['settings']['epochs'], run['log']
        row = run['identity'] | dict(minutes=log['seconds'].sum() / 60, knn=log['test_acc@1'].iloc[-1],
                                     **log[LABEL_FREE].iloc[-1], command=run['command'], device=run['device'],
                                     versions=', '.join(map(' '.join, run['versions'].items())))
        for probe in runs.PROBES:
            settings, last = runs.read_probe(directory, epochs, probe, run.get('data_digest'))
            row |= {probe: None if last is None else last['test_acc@1'], f'{probe}_command': None, f'{probe}_how': None}
            if settings:
                row[f'{probe}_command'] = settings.pop('command')
                how = sorted(runs.deciding(settings).items())
                row[f'{probe}_how'] = ', '.join(f'{name} {value}' for name, value in how
                                                if name not in ('model_path', 'data', 'data_digest'))
        rows.append(row)
    if not rows:
        raise UserError(f'{results} holds no finished run')
    found = pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))
    commands = ['command', *(f'{probe}_command' for probe in runs.PROBES)]
    told = [*(f'{probe}_how' for probe in runs.PROBES), 'device', 'versions']  # rows may mix these, and then say so
    same = [name for name in found if name not in ['seed', 'minutes', *METRICS, *LABEL_FREE, *commands, *told]]
    twice = found.duplicated([*same, 'seed'])
    if twice.any():
        raise UserError(f'{results} holds the same run twice: {found.loc[twice, "command"].iloc[0]}')
    pair = ['seed', *(name for name in same if name not in ('objective', *runs.OBJECTIVE))]
    is_base, on = found['estimator'] == 'standard', pair
    if against:
        is_base &= found['temperature'] == against
        on = [name for name in pair if name not in ('temperature', 'knn_temperature')]
    base = found[on].merge(found.loc[is_base, [*on, *METRICS]], 'left', on, validate='m:1')[METRICS].where(~is_base)
    found[[f'{name}_gain' for name in METRICS]] = found[METRICS] - base
    columns = dict(seeds=('seed', 'size'), minutes=('minutes', 'mean'))
    for name in METRICS + [f'{name}_gain' for name in METRICS] + LABEL_FREE:
        columns |= {name: (name, 'mean'), f'{name}_std': (name, 'std'), f'{name}_seeds': (name, 'count')}
    columns |= {name: (name, 'last') for name in commands}
    columns |= {name: (name, lambda values: '; '.join(dict.fromkeys(values.dropna()))) for name in told}
    table = found.groupby(same, dropna=False, as_index=False).agg(**columns)
    numbers = [name for name in columns if table[name].dtype == float]
    table[numbers] = table[numbers].round(2)
    order = ['objective', *runs.OBJECTIVE, *columns, *pair[1:]]
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
    shown += [name for name in LABEL_FREE if table[name].notna().any()]
    differ = [name for name in settings if table[name].nunique(dropna=False) > 1]
    shared = [name for name in SHOWN if name not in differ and table[name].iloc[0] != '']
    minutes = ' to '.join(dict.fromkeys(f'{x:.0f}' for x in (table['minutes'].min(), table['minutes'].max())))
    heads = ['objective', *differ, 'seeds', *(TITLES[name] for name in shown)]
    lines = [heads]
    for _, row in table.iterrows():
        lines.append([row['objective'], *(row[name] for name in differ), row['seeds'],
                      *(cell(row, name) for name in shown)])
    return runs.markdown(lines) + (
        f'\n± is the standard deviation over seeds. Training took {minutes} minutes a run, on average. All rows: '
        + ', '.join(f'{name} {table[name].iloc[0]}' for name in shared) + '.\n')


if __name__ == '__main__':
    runtime.run(main)
