"""Every command line is accepted, or refused at once in one line with exit code 2."""

import importlib
import math
import os
import pwd
import random
from argparse import Namespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import linear
import main
import plot
from hardneg import flags
from hardneg.runtime import UsageError

VALUES = (
    '0 1 -1 2 0.1 0.5 1.5 256 99999999999 nan inf 1e-3 abc True no maybe hard easy debiased '
    'standard down none eval train shapes stl10 resnet18 vgg bf16 pil device ü 1_0 0x10 １'
).split()
VALUES += ['', 'a' * 300]
PARSES = {'main': main.parse, 'linear': linear.arguments}


def refusal(parse, argv, capsys):
    """The line with which a command line is refused."""
    with pytest.raises((SystemExit, UsageError)) as stop:
        parse(argv)
    out, err = capsys.readouterr()
    if stop.type is UsageError:
        err = f'{stop.value}\n'
    else:
        assert stop.value.code == 2
        assert ': error: ' in err
        assert out == ''
    assert err.count('\n') == 1
    assert err.endswith('\n')
    return err


def own_flags(parser):
    """The flags of a parser, with some values that each takes (None: without a value)."""
    known = {}
    for action in parser._actions:
        values = [action.default, 64]
        if action.choices:
            values = list(action.choices)
        if action.nargs == 0:
            values = [None]
        for option in action.option_strings:
            if option not in ('-h', '--help'):
                known[option] = [value if value is None else str(value) for value in values]
    return known


@pytest.mark.parametrize('script', PARSES)
def test_random_command_lines(script, capsys):
    module, parse = importlib.import_module(script), PARSES[script]
    known = own_flags(module.make_parser())
    names = st.sampled_from(sorted(known))
    good = names.flatmap(lambda name: st.tuples(st.just(name), st.sampled_from(known[name])))
    any_pair = st.tuples(names, st.sampled_from([None, *VALUES]))
    verdicts = {'accepted': 0, 'refused': 0}

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.lists(good | good | good | any_pair, max_size=4))
    def check(pairs):
        argv = []
        for name, value in pairs:
            argv.append(name)
            if value is not None:
                argv.append(value)
        try:
            parse(argv)
            verdicts['accepted'] += 1
        except UsageError as error:
            assert '\n' not in str(error)
            verdicts['refused'] += 1
        except SystemExit as stop:
            out, err = capsys.readouterr()
            assert stop.code == 2
            assert out == ''
            assert err.count('\n') == 1
            assert err.startswith(f'{script}.py: error: ')
            verdicts['refused'] += 1
        capsys.readouterr()

    check()
    assert min(verdicts.values()) > 40, verdicts


WRONG = (
    'inf -inf nan -nan -0 -0e0 1e400 １ ² -5e-1 5e-324 -1e-320 ~ ~/x 0x10 None \udcff \ud800'
).split()
WRONG += ['', ' ', 'a\0b', '9' * 30, '-' + '9' * 5000, 'x' * 300, 'd/' * 2500, 'é' * 200]
COMMANDS = 'main,linear,finetune,embed,sweep,bench loss,graphs,export torchvision,export hcl'
COMMANDS = [*COMMANDS.split(','), *(f'plot {picture}' for picture in plot.PICTURES)]


@pytest.mark.parametrize('command', COMMANDS)
def test_a_value_of_any_flag_is_refused_in_one_line_or_is_a_number_or_a_place(
    command, capsys, monkeypatch, tmp_path
):
    name, *words = command.split()
    dice = random.Random(command)
    monkeypatch.chdir(tmp_path)
    without_home(monkeypatch)
    parser = parser_of(name, words, monkeypatch)
    own = parser
    if parser._subparsers:
        own = parser._subparsers._group_actions[0].choices[words[0]]
    for action in own._actions:
        if action.nargs == 0 or action.dest == 'what':
            continue
        for value in dice.sample(WRONG, 8):
            line = value_of(action, value, dice)
            argv = [*words, *needed(own, action), *line]
            try:
                found = getattr(parser.parse_known_args(argv)[0], action.dest)
            except SystemExit as stop:
                out, err = capsys.readouterr()
                assert stop.code == 2
                assert out == ''
                assert len(err.splitlines()) == 1
                assert ': error: ' in err
                continue
            if not isinstance(found, list):
                found = [found]
            for x in found:
                check_accepted(x, value, action)
    assert not any(tmp_path.iterdir())


def without_home(monkeypatch):
    """As in a container that runs as any user."""
    monkeypatch.setenv('HOME', '')
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[uid])


def parser_of(name, words, monkeypatch):
    """The parser of a script's main()."""
    parsers = []

    def stop(parser, *args):
        parsers.append(parser)
        raise StopIteration

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(flags.Parser, 'parse_known_args', stop)
        importlib.import_module(name).main(words)
    (parser,) = parsers
    return parser


def value_of(action, value, dice):
    """The words that give a flag, or a positional argument, this value."""
    if not action.option_strings:
        return [value]
    option = action.option_strings[-1]
    return dice.choice([[option, value], [f'{option}={value}']])


def needed(parser, but):
    """The words that a subcommand needs besides."""
    words = []
    for action in parser._actions:
        if action.required and action is not but and action.dest != 'what':
            words += [*action.option_strings[-1:], 'x']
    return words


def check_accepted(x, value, action):
    """A number is finite, has no sign of zero, and is what was written; a name is one."""
    if isinstance(x, bool):
        return
    if isinstance(x, (int, float)):
        assert math.isfinite(x)
        assert action.dest == 'betas' or math.copysign(1, x) == 1
        assert x == float(value)
    elif action.type is flags.path:
        assert 0 < len(os.fsencode(x)) < 4096
        assert '\0' not in x
        assert not x.startswith('~')


@pytest.mark.parametrize(
    'line, message',
    [
        ('--tau_plus 1', "argument --tau_plus: must be in [0, 1), got '1'"),
        ('--beta -1e-1', "argument --beta: must be a number from 0 to 1000, got '-1e-1'"),
        ('--temperature 0', 'argument --temperature: must be a number from 1e-30 to 100'),
        ('--batch_size 1', 'must be an integer from 2 to 1000000'),
        ('--debiased maybe', "must be True/False, yes/no or 1/0, got 'maybe'"),
        ('--debiased False --estimator hard', '--debiased False contradicts --estimator hard'),
        ('--debiased True --estimator easy', '--debiased True contradicts --estimator easy'),
        ('--oracle --estimator debiased', '--oracle leaves no false negatives'),
        ('--oracle --debiased True', '--oracle leaves no false negatives'),
        ('--warmup 400', '--warmup 400 must be less than --epochs 400'),
        ('--width 3', 'invalid choice'),
        ('--temp 1', 'unrecognized arguments: --temp 1. Did you mean --temperature?'),
        ('--batch-size=8', '--batch-size=8. Did you mean --batch_size?'),
        ('--sync_bn', 'needs CUDA'),
        ('--micro_batch 3', "--micro_batch 3 does not divide a rank's 256 images"),
        (f'--root {"a" * 256}', 'must be the name of a file or directory'),
    ],
)
def test_wrong_flags_of_main(line, message, capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert message in refusal(main.parse, line.split(), capsys)


@pytest.mark.parametrize(
    'line, message',
    [
        ('--bn train --cached', '--bn train needs random views: cached features cannot drift'),
        ('--bn train --probe logistic', '--bn train needs random views'),
        ('--bn train --batch_size 1', 'leaves a rank less than it needs: 1 image, 2 with --bn'),
        ('--label_fraction 0', 'must be in (0, 1]'),
    ],
)
def test_wrong_flags_of_linear(line, message, capsys):
    assert message in refusal(linear.arguments, line.split(), capsys)


def objective(line):
    args = main.parse(line.split())
    assert not hasattr(args, 'debiased')
    return args.estimator, args.tau_plus, args.beta


@pytest.mark.parametrize(
    'line, resolved',
    [
        ('', ('hard', 0.1, 1.0)),
        ('--tau_plus 0.05 --beta 2', ('hard', 0.05, 2.0)),
        ('--tau_plus = 0.1', ('hard', 0.1, 1.0)),
        ('--debiased True', ('debiased', 0.1, 0.0)),
        ('--debiased True --tau_plus = 0.2', ('debiased', 0.2, 0.0)),
        ('--debiased True --beta 1.0', ('hard', 0.1, 1.0)),
        ('--debiased True --estimator hard', ('hard', 0.1, 1.0)),
        ('--oracle --beta 1', ('hard', 0.0, 1.0)),
        ('--debiased no', ('standard', 0.0, 0.0)),
        ('--estimator easy', ('standard', 0.0, 0.0)),
        ('--debiased False --estimator standard --tau_plus 0 --beta 0', ('standard', 0.0, 0.0)),
        ('--estimator debiased', ('debiased', 0.1, 0.0)),
        ('--oracle', ('standard', 0.0, 0.0)),
        ('--oracle --estimator hard --beta 0.5', ('hard', 0.0, 0.5)),
    ],
)
def test_objective_that_flags_name(line, resolved, capsys):
    assert objective(line) == resolved
    assert capsys.readouterr().out == ''


@pytest.mark.parametrize(
    'line, resolved, told',
    [
        (
            '--estimator easy --tau_plus 0.1 --beta 1.0',
            ('standard', 0.0, 0.0),
            ['--tau_plus 0.1', '--beta 1.0'],
        ),
        ('--debiased False --tau_plus 0.1', ('standard', 0.0, 0.0), ['--tau_plus 0.1']),
        ('--estimator debiased --beta 1', ('debiased', 0.1, 0.0), ['--beta 1.0']),
        ('--estimator debiased --anneal down', ('debiased', 0.1, 0.0), ['--anneal down']),
    ],
)
def test_flags_without_effect_are_told_and_do_not_act(line, resolved, told, capsys):
    assert objective(line) == resolved
    expected = [f'{flag} has no effect on the {resolved[0]} objective' for flag in told]
    assert capsys.readouterr().out.splitlines() == expected


def test_tau_plus_has_no_effect_with_the_oracle(capsys):
    assert objective('--oracle --tau_plus 0.1') == ('standard', 0.0, 0.0)
    said = '--tau_plus 0.1 has no effect on the standard objective with --oracle\n'
    assert capsys.readouterr().out == said


@pytest.mark.parametrize('line, value', [('', 0.2), ('--knn_temperature 0.5', 0.5)])
def test_votes_have_the_training_temperature_unless_told_otherwise(line, value):
    assert main.parse(['--temperature', '0.2', *line.split()]).knn_temperature == value


def test_the_learning_rate_warms_up_and_falls_as_half_a_cosine():
    args = Namespace(lr=0.8, warmup=2, epochs=10, schedule='cosine')
    rates = [main.learning_rate(args, epochs) for epochs in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.4, 0.8, 0.4, 0])
    args = Namespace(lr=0.8, warmup=0, epochs=10, schedule='constant')
    assert [main.learning_rate(args, epochs) for epochs in (0, 5.5, 10)] == [0.8] * 3


RECIPE = dict(
    dataset_name='stl10',
    arch='resnet50',
    feature_dim=128,
    temperature=0.5,
    tau_plus=0.1,
    beta=1.0,
    batch_size=256,
    epochs=400,
    lr=1e-3,
    weight_decay=1e-6,
    k=200,
    image_size=32,
    test_size=0,
    store_size=0,
    views=2,
    anneal='none',
    joint_views=False,
    width=1,
    stem='cifar',
    hidden_dim=512,
    optimizer='adam',
    schedule='constant',
    warmup=0,
    blur='published',
    crop_min=0.08,
    jitter=1.0,
    grayscale=0.2,
    horizontal_flip=0.5,
    vertical_flip=0,
    micro_batch=None,
    fit='crop',
    holdout=0,
    skip_damaged=False,
    cache_dir=None,
    positives='view',
    knn_temperature=0.5,
)


def test_defaults_are_the_published_recipe():
    args, init, found = main.arguments([])
    assert init is None
    assert found is None
    assert {name: getattr(args, name) for name in RECIPE} == RECIPE
    probe = linear.arguments([])
    recipe = probe.batch_size, probe.epochs, probe.lr, probe.weight_decay, probe.bn
    assert recipe == (512, 100, 1e-3, 1e-6, 'eval')


def test_every_setting_has_its_default_in_a_run_without_flags():
    """What a config.json without a setting is compared with."""
    args, _, _ = main.arguments([])
    for name, value in main.defaults().items():
        assert getattr(args, name) == value, name


def test_a_method_of_ones_own_gets_the_objectives_flags_as_given(monkeypatch, capsys):
    monkeypatch.setitem(main.OBJECTIVES, 'mine', main.contrastive)
    values = []
    for words in ('', '--tau_plus 0.2 --beta 3 --anneal down', '--oracle --beta 2'):
        args = main.parse(['--estimator', 'mine', *words.split()])
        values.append((args.estimator, args.tau_plus, args.beta, args.anneal))
    assert values == [('mine', 0, 0, 'none'), ('mine', 0.2, 3, 'down'), ('mine', 0, 2, 'none')]
    assert capsys.readouterr().out == ''
    with pytest.raises(UsageError, match='--debiased has no meaning for --estimator mine'):
        main.parse(['--estimator', 'mine', '--debiased', 'True'])


def test_views_of_a_run_without_the_views_flags_are_as_published():
    published = dict(blur=True, crop_min=0.08, jitter=1.0, grayscale=0.2)
    published |= dict(horizontal_flip=0.5, vertical_flip=0)
    assert flags.recipe({}) == published
    changed = {**published, 'blur': False, 'jitter': 2.0}
    assert flags.recipe({'blur': 'none', 'jitter': 2.0}) == changed


def test_beta_is_annealed_as_published():
    """400 epochs: the next of linspace(beta, 0, 9) after every 44th; the first is beta."""
    betas = [main.annealed(1.0, epoch, 400) for epoch in range(1, 401)]
    assert betas[:88] == [1.0] * 88
    assert betas[88] == 1 - 1 / 8
    assert betas[395] == 1 / 8
    assert betas[396:] == [0.0] * 4
    assert sum(betas) == 242  # 88 + 44 (7/8 + ... + 1/8)


@pytest.mark.parametrize('epochs', [2, 4, 5, 10, 17, 50, 100, 399])
def test_beta_is_annealed_over_any_number_of_epochs(epochs):
    betas = [main.annealed(2.0, epoch, epochs) for epoch in range(1, epochs + 1)]
    assert betas == sorted(betas, reverse=True)
    assert betas[0] == 2
    assert betas[-1] == 0
    assert sum(betas) / epochs == pytest.approx(1, abs=0.25)  # half the time below the middle


@pytest.mark.parametrize(
    'epochs, expected',
    [
        (1, [8]),
        (17, [8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1, 0, 0]),
        # The published code does not crash at multiples of 9, and does not train at 0.
        (18, [8, 8, 8, 8, 7, 7, 6, 6, 5, 5, 4, 4, 3, 3, 2, 2, 1, 1]),
    ],
)
def test_beta_falls_in_steps_of_an_eighth(epochs, expected):
    eighths = [8 * main.annealed(1.0, epoch, epochs) for epoch in range(1, epochs + 1)]
    assert eighths == expected
