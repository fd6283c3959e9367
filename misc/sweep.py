"""Compare the objectives: train and probe each with several seeds, and tabulate their accuracies.

    python misc/sweep.py --results_dir results/cifar10 --dataset_name cifar10 --epochs 100
    python misc/sweep.py --results_dir results/cifar10 --table_only    # from the logs alone

Flags that are not the sweep's own go to main.py, as in the first line. The runs are directories of
--results_dir, and the same command continues a sweep that was stopped. It ends with table.csv,
which holds every row's settings and command, and table.md. Any finished run found below
--results_dir is counted, so add your own, or a link to it. On two CPU cores the 15 runs of
results/README.md and their probes take about an hour.
"""

import os
import shlex
import signal
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

import pandas as pd

sys.path.insert(0, str(Path(__file__).parents[1]))
import linear
import main as training
from hardneg import flags, runs, runtime
from hardneg.files import write, write_table
from hardneg.folder import Listing
from hardneg.runtime import UsageError, UserError

ROOT = Path(__file__).parents[1]
OBJECTIVES = {
    'standard': ['--estimator', 'standard'],
    'debiased': ['--estimator', 'debiased'],
    'hard_b0.5': ['--estimator', 'hard', '--beta', '0.5'],
    'hard_b1': ['--estimator', 'hard', '--beta', '1'],
    'hard_b2': ['--estimator', 'hard', '--beta', '2'],
}
for name in training.OBJECTIVES:
    if name not in flags.PUBLISHED:  # a method of the user's own
        OBJECTIVES[name] = ['--estimator', name]
# Flags that the sweep sets
OWN = ('--estimator', '--debiased', '--beta', '--seed')
OWN_OF_PROBE = ('--model_path', '--dataset_name', '--root')
# Flags of linear.py that give a probe another name, which the table does not have
NOT_TABULATED = ('--label_fraction', '--holdout', '--store_size', '--fit')

METRICS = ['knn', *runs.PROBES]  # accuracies, percent
LABEL_FREE = ['alignment', 'uniformity', 'rankme']
COMMANDS = ['command'] + [f'{probe}_command' for probe in runs.PROBES]
# The seeds of a row may differ in these, and the row then tells all
TOLD = [f'{probe}_how' for probe in runs.PROBES] + ['device', 'versions']
# What is told below table.md if all rows share it
SHARED = ['data', 'images', 'arch', 'image_size', 'batch_size', 'temperature', 'epochs']
SHARED += ['precision', *TOLD]


def make_parser():
    parser = flags.Parser(
        prog='sweep.py',
        description=__doc__.partition('\n')[0],
        epilog='All other flags are those of main.py.',
    )
    parser.add_argument(
        '--objectives',
        nargs='+',
        choices=OBJECTIVES,
        default=list(OBJECTIVES),
        help='what to compare (all)',
    )
    parser.add_argument(
        '--results_dir',
        type=flags.path,
        default='results/sweep',
        help='directory of the runs and of the table (%(default)s)',
    )
    parser.add_argument(
        '--tau_plus',
        type=flags.fraction,
        help="prior probability of a false negative, of all but standard (main.py's)",
    )
    parser.add_argument(
        '--seeds',
        type=flags.integer(1, 1000),
        default=3,
        help='runs of each objective: seeds 0, 1, ... (%(default)s)',
    )
    parser.add_argument(
        '--jobs',
        type=flags.integer(1, 256),
        default=1,
        help='runs at a time, which share the cores (%(default)s)',
    )
    parser.add_argument(
        '--probe', default='', help='flags of linear.py, in quotes: --probe="--epochs 10" (none)'
    )
    parser.add_argument(
        '--against',
        type=flags.positive(100),
        help="temperature of the SimCLR runs that gains compare with (each run's own)",
    )
    parser.add_argument(
        '--table_only',
        action='store_true',
        help='train nothing: make the table of what is there',
    )
    return parser


def main(argv=None):
    args, rest = make_parser().parse_known_args(argv)  # main.py checks the rest
    results = Path(args.results_dir)
    if args.table_only and rest:
        raise UsageError(
            f'--table_only trains nothing and takes no flags of main.py, got {" ".join(rest)}'
        )
    if not args.table_only:
        check_own(rest)
        probe = probe_flags(args.probe)
        precision = precision_of(training.make_parser().parse_args(rest), results)
        rest = with_precision(rest, precision)
        probe = with_precision(probe, precision)
        planned = plan(args, rest)
        check_flags(planned[: len(planned) // args.seeds], probe)  # those of one seed
        print(
            f'{len(planned)} runs. A line tells of each that ends; see log.csv until then',
            flush=True,
        )
        train_all(planned, probe, args.jobs)
    table = make_table(results, args.against)
    text = markdown(table, args.against)
    write_table(results / 'table.csv', table, list(table))
    write(results / 'table.md', text.encode(errors='replace'))
    print(f'\n{text}\nfiles in {results}: table.csv, table.md')


# Training


def check_own(words):
    own = [word for word in words if word.partition('=')[0] in OWN]
    if own:
        raise UsageError(f'{" ".join(own)}: the sweep sets {", ".join(OWN)} itself')


def probe_flags(text):
    """The flags of linear.py in the text of --probe."""
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise UsageError(f'--probe {text}: {error}') from None
    for word in words:
        flag = word.partition('=')[0]
        if flag in OWN_OF_PROBE:
            raise UsageError(f'--probe: the sweep sets {flag} itself')
        if flag in NOT_TABULATED:
            raise UsageError(f'--probe: the table has no column for {flag}: use linear.py')
    return words


def precision_of(settings, results):
    """The precision of all runs and probes: as given, as of the first run, or this machine's.

    Another machine, on which the sweep may go on, would choose otherwise.
    """
    if settings.precision:
        return settings.precision
    for file in sorted(results.glob('*/config.json')):
        config = runs.read_config(file)
        if config:
            return config['settings']['precision']
    return flags.default_precision(settings.arch)


def with_precision(words, precision):
    """The flags, with a --precision if they have none."""
    if any(word.partition('=')[0] == '--precision' for word in words):
        return words
    return [*words, '--precision', precision]


def plan(args, rest):
    """The directory of every run, and its flags of main.py: seed by seed."""
    planned = []
    for seed in range(args.seeds):
        for name in dict.fromkeys(args.objectives):
            words = [*rest, *OBJECTIVES[name]]
            if args.tau_plus is not None and name != 'standard':
                words += ['--tau_plus', str(args.tau_plus)]
            directory = Path(args.results_dir, f'{name}_{seed}')
            planned.append((directory, [*words, '--seed', str(seed)]))
    return planned


def check_flags(planned, probe):
    """Raise UsageError if main.py or linear.py would."""
    linear.arguments(probe)
    for _, words in planned:
        training.parse(words)


def train_all(planned, probe, jobs):
    """Train and probe every planned run, some at a time.

    A stop signal ends it after the running jobs have saved.
    """
    sweep = Sweep(probe, jobs)
    before = {signum: signal.signal(signum, sweep.stop) for signum in runtime.stop_signals()}
    try:
        with ThreadPoolExecutor(jobs) as pool:
            futures = [pool.submit(sweep.train_and_probe, *run) for run in planned]
            try:
                for future in as_completed(futures):
                    print(future.result(), flush=True)
            finally:
                pool.shutdown(cancel_futures=True)  # after an error, what has not begun
    except runtime.Stopped as stopped:
        print('Stopped; the same command continues the sweep', file=sys.stderr)
        sys.exit(128 + stopped.signum)
    finally:
        for signum, handler in before.items():
            signal.signal(signum, handler)


class Sweep:
    """Runs main.py and linear.py in processes, from threads.

    Args:
        probe: flags of linear.py.
        jobs: threads, which share the cores.
    """

    def __init__(self, probe, jobs):
        self.probe = probe
        threads = max(1, runtime.cores() // jobs)
        self.environment = {'OMP_NUM_THREADS': str(threads), **os.environ}
        self.running = set()
        self.signum = None

    def stop(self, signum, frame):
        self.signum = signum
        for process in list(self.running):
            process.terminate()

    def train_and_probe(self, directory, words):
        """Train a run and probe its last encoder, unless that is done. Returns what happened."""
        self.call('main.py', [*words, '--results_dir', str(directory)])
        epochs = runs.read_config(directory / 'config.json')['settings']['epochs']
        for name in runs.PROBES:
            settings, _ = runs.read_probe(directory, epochs, name)
            # After linear.py --model_path FILE, which has another name in another directory
            if settings and shlex.split(settings['command'])[3:] == self.probe:
                return f'{directory}: probed before'
        encoder = str(directory / f'model_{epochs}.pth')
        words = ['--model_path', encoder, *self.probe]
        return f'{directory}: {self.call("linear.py", words)}'

    def call(self, script, words):
        """Run a script to its end and return the last line that it printed."""
        command = [os.path.relpath(ROOT / script), *words]
        # In a session of its own a run gets no Ctrl-C of the terminal, which would be its second.
        with subprocess.Popen(
            [sys.executable, *command],
            env=self.environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            start_new_session=True,
            text=True,
        ) as process:
            self.running.add(process)
            if self.signum:
                process.terminate()
            output, _ = process.communicate()
            self.running.remove(process)
        if self.signum:
            raise runtime.Stopped(self.signum)
        last = (output.splitlines() or ['no output'])[-1]
        if process.returncode:
            what = f'{shlex.join(command)} ended with {process.returncode}: {last}'
            if process.returncode != 2:
                what += '. The same command continues the sweep'
            raise UserError(what)
        return last


# The table


def finished_runs(results):
    """The directories below results of finished runs, and the runs, each once if links lead to it.

    Raises:
        UserError: a directory cannot be read, or a run is damaged.
    """
    listing = Listing(results)
    directories = []
    for place, _, names in listing.directories(results):
        if 'config.json' in names:
            directories.append(Path(place))
    listing.report()
    found = []
    for directory in sorted(directories):
        if runs.read_config(directory / 'config.json') is None:
            print(f"{directory}: config.json is another program's, left out", file=sys.stderr)
            continue
        if not (directory / 'log.csv').exists():
            print(f'{directory}: no log.csv, left out', file=sys.stderr)
            continue
        run = runs.read_run(directory, training.defaults())
        if run['log']['epoch'].max() != run['settings']['epochs']:
            print(f'{directory}: not finished, left out', file=sys.stderr)
            continue
        found.append((directory, run))
    runs.name_data([run for _, run in found])
    versions = {run['code'] for _, run in found if run.get('code')}
    if len(versions) > 1:
        print(
            f'{results}: its runs were trained by {len(versions)} versions of the code',
            file=sys.stderr,
        )
    return found


def measured(directory, run):
    """A run as a dict: the settings that decide its results, and its results."""
    log = run['log']
    row = dict(run['identity'])
    row['minutes'] = log['seconds'].sum() / 60
    row['command'] = run['command']
    row['device'] = run['device']
    row['versions'] = ', '.join(f'{name} {version}' for name, version in run['versions'].items())
    row['knn'] = log['test_acc@1'].iloc[-1]
    for name in LABEL_FREE:
        row[name] = log[name].iloc[-1]
    for probe in runs.PROBES:
        epochs = run['settings']['epochs']
        settings, last = runs.read_probe(directory, epochs, probe, run['data_digest'])
        row |= {probe: None, f'{probe}_command': None, f'{probe}_how': None}
        if settings:
            row[probe] = last['test_acc@1']
            row[f'{probe}_command'] = settings.pop('command')
            row[f'{probe}_how'] = how(settings)
    return row


def how(settings):
    """The settings that decide a probe's results, as text."""
    defaults = vars(linear.make_parser().parse_args([])) | flags.DATA
    values = runs.deciding(defaults | settings)
    texts = []
    for name in sorted(values):
        if name not in linear.ENCODER:
            texts.append(f'{name} {values[name]}')
    return ', '.join(texts)


def make_table(results, against=None):
    """A DataFrame with a row for every group of finished runs that differ in the seed alone.

    It has the mean over seeds and the standard deviation of each accuracy (percent) and of its
    gain. The gain is the difference, seed by seed, to SimCLR (standard) with the same other
    settings or, given `against`, at that temperature.

    Raises:
        UserError: no finished run is there, or two of the same settings and seed.
    """
    rows = [measured(directory, run) for directory, run in finished_runs(results)]
    if not rows:
        raise UserError(f'{results} holds no finished run')
    found = pd.DataFrame(rows).astype(dict.fromkeys(METRICS, float))
    results_of_runs = ['seed', 'minutes', *METRICS, *LABEL_FREE, *COMMANDS, *TOLD]
    same = [name for name in found if name not in results_of_runs]
    twice = found.duplicated([*same, 'seed'])
    if twice.any():
        raise UserError(
            f'{results} holds the same run twice: {found.loc[twice, "command"].iloc[0]}'
        )

    gains = [f'{name}_gain' for name in METRICS]
    others = [name for name in same if name not in ('objective', *runs.OBJECTIVE)]
    found[gains] = found[METRICS] - standard_accuracies(found, ['seed', *others], against)
    columns = dict(seeds=('seed', 'size'), minutes=('minutes', 'mean'))
    for name in [*METRICS, *gains, *LABEL_FREE]:
        columns[name] = (name, 'mean')
        columns[f'{name}_std'] = (name, 'std')
        columns[f'{name}_seeds'] = (name, 'count')
    for name in COMMANDS:
        columns[name] = (name, 'last')
    for name in TOLD:
        columns[name] = (name, lambda values: '; '.join(dict.fromkeys(values.dropna())))
    table = found.groupby(same, dropna=False, as_index=False).agg(**columns)
    numbers = [name for name in columns if table[name].dtype == float]
    table[numbers] = table[numbers].round(2)
    table = table.sort_values([*others, 'tau_plus', 'beta'], ignore_index=True)
    return table[['objective', *runs.OBJECTIVE, *columns, *others]]


def standard_accuracies(found, pair, against):
    """For each row of found, the METRICS of the SimCLR run of equal values of the columns pair.

    They are NaN if there is none, or if the row itself is one. With `against`, they are those of
    the SimCLR run at that temperature.
    """
    is_standard = found['estimator'] == 'standard'
    if against:
        is_standard &= found['temperature'] == against
        pair = [name for name in pair if name not in ('temperature', 'knn_temperature')]
    standard = found.loc[is_standard, [*pair, *METRICS]]
    if standard.duplicated(pair).any():
        raise UserError(
            f'--against {against}: its SimCLR runs differ in --knn_temperature alone: keep one kind'
        )
    merged = found[pair].merge(standard, 'left', pair, validate='m:1')
    return merged[METRICS].where(~is_standard)


def markdown(table, against=None):
    """The table for people: mean ± standard deviation, and below it what the rows share."""
    settings = list(table)[list(table).index(TOLD[0]) :]
    values = {name: table[name] for name in settings}
    for name in TOLD:
        values[name] = table[name][table[name] != '']  # rows without this probe tell nothing of it
    differ = [name for name in settings if values[name].nunique(dropna=False) > 1]
    shown = []
    for metric in METRICS:
        if table[metric].notna().any():
            shown += [metric, f'{metric}_gain']
    shown += [name for name in LABEL_FREE if table[name].notna().any()]
    heads = [title(name, against) for name in shown]
    lines = [['objective', *differ, 'seeds', *heads]]
    for _, row in table.iterrows():
        cells = [cell(row, name) for name in shown]
        lines.append([row['objective'], *row[differ], row['seeds'], *cells])

    least, most = f'{table["minutes"].min():.0f}', f'{table["minutes"].max():.0f}'
    minutes = least if least == most else f'{least} to {most}'
    shared = []
    for name in SHARED:
        if name not in differ and len(values[name]):
            shared.append(f'{name} {values[name].iloc[0]}')
    return (
        f'{runs.markdown(lines)}\n± is the standard deviation over seeds. Training took {minutes} '
        f'minutes a run, on average. All rows: {", ".join(shared)}.\n'
    )


def title(name, against):
    """The head of a column of accuracies or measures."""
    if name.endswith('_gain'):
        return f'gain over SimCLR, t = {against:g}' if against else 'gain over SimCLR'
    if name in runs.PROBES:
        return f'{runs.PROBES[name]}, %'
    return dict(knn='kNN, %', rankme='RankMe').get(name, name)


def cell(row, name):
    """A mean with its standard deviation, and with the number of seeds that have it, if not all."""
    mean, std, seeds = row[name], row[f'{name}_std'], row[f'{name}_seeds']
    if pd.isna(mean):
        return ''
    text = f'{mean:+.2f}' if name.endswith('_gain') else f'{mean:.2f}'
    if not pd.isna(std):
        text += f' ± {std:.2f}'
    if seeds < row['seeds']:
        text += f' ({seeds} of {row["seeds"]} seeds)'
    return text


if __name__ == '__main__':
    runtime.run(main)
