"""Every command line is accepted, or refused at once in one line with exit code 2."""

import importlib
import math
import os
import pwd
import random

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardneg import flags
import linear
import main
import plot

VALUES = ['0', '1', 'a' * 300, '-1', '2', '0.1', '0.5', '1.5', '256', '99999999999', 'nan', 'inf', '1e-3', 'abc', '',
          'True', 'no', 'maybe', 'hard', 'easy', 'debiased', 'standard', 'down', 'none', 'eval', 'train', 'shapes',
          'stl10', 'folder', 'resnet18', 'vgg', 'bf16', 'pil', 'device', 'ü', '1_0', '0x10', '１']


def all_flags(script, monkeypatch):
    """Every flag of a script, from its own parser, with some values that it takes (None: without a value)."""
    seen = {}

    class Spy(flags.Parser):
        def parse_args(self, argv=None):
            for action in self._actions:
                values = [None] if action.nargs == 0 else list(map(str, action.choices or [action.default, 64]))
                seen.update({option: values for option in action.option_strings if 'help' not in option})
            return super().parse_args(argv)

    with monkeypatch.context() as patch:
        patch.setattr(flags, 'Parser', Spy)
        script.arguments([])
    seen.pop('-h', None)
    return seen


def refused(arguments, argv, capsys):
    with pytest.raises(SystemExit) as stop:
        arguments(argv)
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ''
    assert err.count('\n') == 1 and err.endswith('\n') and ': error: ' in err, err
    return err


@pytest.mark.parametrize('script', [main, linear], ids=['main', 'linear'])
def test_random_command_lines(script, capsys, monkeypatch):
    known, verdicts = all_flags(script, monkeypatch), {'accepted': 0, 'refused': 0}
    assert len(known) >= 11
    good = st.sampled_from(sorted(known)).flatmap(lambda flag: st.tuples(st.just(flag), st.sampled_from(known[flag])))
    any_pair = st.tuples(st.sampled_from(sorted(known)), st.sampled_from([None, *VALUES]))

    @settings(max_examples=400, deadline=None, derandomize=True)
    @given(st.lists(good | good | good | any_pair, max_size=4))
    def check(pairs):
        argv = [word for pair in pairs for word in pair if word is not None]
        try:
            script.arguments(argv)
            verdicts['accepted'] += 1
            capsys.readouterr()
        except SystemExit as stop:
            out, err = capsys.readouterr()
            assert stop.code == 2 and out == ''
            assert err.count('\n') == 1 and err.startswith(f'{script.__name__}.py: error: '), err
            verdicts['refused'] += 1

    check()
    assert min(verdicts.values()) > 40, verdicts


WRONG = ['inf', '-inf', 'nan', '-nan', '-0', '-0e0', '1e400', '9' * 30, '-' + '9' * 5000, '', ' ', '１', '²', '-5e-1',
         'a\0b', 'x' * 300, 'd/' * 2500, 'é' * 200, '\udcff', '\ud800', '5e-324', '-1e-320', '~', '~/x', '0x10', 'None']
COMMANDS = ['main', 'linear', 'finetune', 'embed', 'sweep', 'bench loss', 'graphs', 'export torchvision', 'export hcl',
            *(f'plot {what}' for what in plot.PICTURES)]


@pytest.mark.parametrize('command', COMMANDS)
def test_a_wrong_value_of_any_flag_is_one_line_and_a_right_one_is_a_number_or_a_place(
        command, capsys, monkeypatch, tmp_path):
    name, *words = command.split()
    script, parsers, dice = importlib.import_module(name), [], random.Random(command)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv('HOME', '')
    monkeypatch.delenv('HOME')
    monkeypatch.setattr(pwd, 'getpwuid', lambda uid: {}[uid])  # as in a container that runs as any user

    def stop(parser, *args):
        parsers.append(parser)
        raise StopIteration

    with monkeypatch.context() as patch, pytest.raises(StopIteration):
        patch.setattr(flags.Parser, 'parse_known_args', stop)
        script.main(words)
    parser, = parsers
    own = parser._subparsers._group_actions[0].choices[words[0]] if parser._subparsers else parser
    for action in own._actions:
        if action.nargs == 0 or action.dest == 'what':
            continue
        for value in dice.sample(WRONG, 8):
            option = action.option_strings[-1:]
            line = dice.choice([[*option, value], [f'{option[0]}={value}']]) if option else [value]
            others = [a for a in own._actions if a.required and a is not action and own is not parser]
            needed = [word for a in others for word in (*a.option_strings[-1:], 'x')]
            try:
                found = getattr(parser.parse_known_args([*words, *needed, *line])[0], action.dest)
            except SystemExit as stop:
                out, err = capsys.readouterr()
                assert stop.code == 2 and not out and len(err.splitlines()) == 1 and ': error: ' in err, (line, err)
                continue
            for x in found if isinstance(found, list) else [found]:
                if isinstance(x, (int, float)):
                    assert math.isfinite(x) and math.copysign(1, x) == 1 or action.dest == 'betas', (line, x)
                    assert x == float(value), (line, x)
                elif action.type is not str:
                    assert 0 < len(os.fsencode(x)) < 4096 and '\0' not in x and x[:1] != '~', (line, x)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize('line, message', [
    ('--tau_plus 1', 'argument --tau_plus: must be in [0, 1), got \'1\''),
    ('--beta -1e-1', 'argument --beta: must be a number from 0 to 1000, got \' -1e-1\''),
    ('--temperature 0', 'argument --temperature: must be a number from 1e-30 to 100'),
    ('--batch_size 1', 'must be an integer from 2 to 1000000'),
    ('--debiased maybe', 'must be True/False, yes/no or 1/0, got \'maybe\''),
    ('--debiased False --estimator hard', '--debiased False contradicts --estimator hard'),
    ('--debiased True --estimator easy', '--debiased True contradicts --estimator easy'),
    ('--oracle --estimator debiased', '--oracle leaves no false negatives'),
    ('--oracle --debiased True', '--oracle leaves no false negatives'),
    ('--warmup 400', '--warmup 400 must be less than --epochs 400'),
    ('--width 3', 'invalid choice'),
    ('--temp 1', 'unrecognized arguments: --temp 1'),
    ('--sync_bn', 'needs CUDA'),
    ('--micro_batch 3', '--micro_batch 3 does not divide a rank\'s 256 images'),
    (f'--root {"a" * 256}', 'must be the name of a file or directory'),
])
def test_wrong_flags_of_main(line, message, capsys, monkeypatch):
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert message in refused(main.arguments, line.split(), capsys)


@pytest.mark.parametrize('line, resolved', [
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
])
def test_objective_that_flags_name(line, resolved):
    args, _ = main.arguments(line.split())
    assert (args.estimator, args.tau_plus, args.beta) == resolved


@pytest.mark.parametrize('line, resolved, told', [
    ('--estimator easy --tau_plus 0.1 --beta 1.0', ('standard', 0.0, 0.0),
     ['--tau_plus 0.1 has no effect on the standard objective', '--beta 1.0 has no effect on the standard objective']),
    ('--debiased False --tau_plus 0.1', ('standard', 0.0, 0.0),
     ['--tau_plus 0.1 has no effect on the standard objective']),
    ('--estimator debiased --beta 1', ('debiased', 0.1, 0.0), ['--beta 1.0 has no effect on the debiased objective']),
    ('--estimator debiased --anneal down', ('debiased', 0.1, 0.0),
     ['--anneal down has no effect on the debiased objective']),
    ('--oracle --tau_plus 0.1', ('standard', 0.0, 0.0),
     ['--tau_plus 0.1 has no effect on the standard objective with --oracle']),
    ('--tau_plus 0.1 --beta 1.0', ('hard', 0.1, 1.0), [])])
def test_flags_without_effect_are_told_and_do_not_act(line, resolved, told, capsys):
    args, _ = main.arguments(line.split())
    assert (args.estimator, args.tau_plus, args.beta) == resolved and args.anneal == 'none'
    assert capsys.readouterr().out.splitlines() == told


def test_knn_weights_use_the_training_temperature_unless_told_otherwise():
    assert main.arguments(['--temperature', '0.2'])[0].knn_temperature == 0.2
    assert main.arguments(['--temperature', '0.2', '--knn_temperature', '0.5'])[0].knn_temperature == 0.5


def test_learning_rate_warms_up_and_falls_as_half_a_cosine():
    args, _ = main.arguments(['--lr', '0.8', '--warmup', '2', '--epochs', '10', '--schedule', 'cosine'])
    rates = [main.learning_rate(args, epochs) for epochs in (0, 1, 2, 6, 10)]
    assert rates == pytest.approx([0, 0.4, 0.8, 0.4, 0])
    args, _ = main.arguments(['--lr', '0.8', '--epochs', '10'])
    assert [main.learning_rate(args, epochs) for epochs in (0, 5.5, 10)] == [0.8] * 3


def test_defaults_are_the_published_recipe():
    args, _ = main.arguments([])
    flags.choose_sizes(args, None, {})
    recipe = {'dataset_name': 'stl10', 'arch': 'resnet50', 'feature_dim': 128, 'temperature': 0.5, 'tau_plus': 0.1,
              'beta': 1.0, 'batch_size': 256, 'epochs': 400, 'lr': 1e-3, 'weight_decay': 1e-6, 'k': 200,
              'image_size': 32, 'test_size': 0, 'views': 2, 'anneal': 'none', 'joint_views': False, 'width': 1,
              'stem': 'cifar', 'hidden_dim': 512, 'optimizer': 'adam', 'schedule': 'constant', 'warmup': 0,
              'blur': 'published', 'crop_min': 0.08, 'jitter': 1.0, 'grayscale': 0.2, 'vertical_flip': False,
              'micro_batch': None, 'fit': 'crop', 'holdout': 0, 'positives': 'view', 'knn_temperature': 0.5}
    assert {name: getattr(args, name) for name in recipe} == recipe
    probe = linear.arguments([])
    assert (probe.batch_size, probe.epochs, probe.lr, probe.weight_decay, probe.bn) == (512, 100, 1e-3, 1e-6, 'eval')


def test_views_of_a_run_without_the_later_flags_are_as_published():
    expected = dict(blur=True, crop_min=0.08, jitter=1.0, grayscale=0.2, vertical_flip=False)
    assert flags.recipe({}) == expected and flags.recipe({'blur': 'none', 'jitter': 2.0}) == {
        **expected, 'blur': False, 'jitter': 2.0}


def test_beta_is_annealed_as_published():
    """400 epochs: the next of linspace(beta, 0, 9) after every 44th epoch, the first of them beta itself."""
    betas = [main.annealed(1.0, epoch, 400) for epoch in range(1, 401)]
    assert betas[:88] == [1.0] * 88 and betas[88] == 1 - 1 / 8 and betas[395] == 1 / 8 and betas[396:] == [0.0] * 4
    for epochs in (2, 4, 5, 10, 17, 50, 100, 399):
        betas_here = [main.annealed(2.0, epoch, epochs) for epoch in range(1, epochs + 1)]
        assert betas_here == sorted(betas_here, reverse=True) and betas_here[0] == 2 and betas_here[-1] == 0
        assert sum(betas_here) / epochs == pytest.approx(1, abs=0.25)  # half the time below the middle, about
    assert [8 * main.annealed(1.0, epoch, 17) for epoch in range(1, 18)] == [8, *(i // 2 for i in range(15, -1, -1))]
    # at multiples of 9 the published code does not crash, and does not train at 0
    assert [8 * main.annealed(1.0, epoch, 18) for epoch in range(1, 19)] == [8, 8, *(i // 2 for i in range(17, 1, -1))]
    assert main.annealed(1.0, 1, 1) == 1
    assert sum(betas) == 242  # 88 + 44 (7/8 + ... + 1/8)
