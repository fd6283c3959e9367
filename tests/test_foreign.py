"""Checkpoints of other programs, and what lies beside them: used as they are, or named."""

import argparse
import copy
import functools
import json
import re
import shlex
import shutil

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import embed
import export
import finetune
import linear
import main
import plot
import sweep
from hardneg import files, runs
from hardneg.runtime import UsageError, UserError
from model import IMAGENET, LAYERS, OURS, Model, load_model, renormalize

# Names of modules that hold an encoder; the first two are of wrappers, which no prefix tells
STEPS = 'module _orig_mod encoder_q backbone student online_network model net 0'.split()
# What lies beside an encoder
OTHERS = 'fc.weight fc.0.bias predictor.1.running_mean prototypes.weight queue queue_ptr'.split()
THEIRS = {ours: name for name, ours in LAYERS.items()}
STYLES = 'ours', 'torchvision'


@functools.cache
def small(seed=0, dtype=torch.float32):
    """A network with a sixteenth of ResNet-18's channels, whose weights are exact in the dtype."""
    torch.manual_seed(seed)
    net = Model(8, 'resnet18', 8, width=1 / 16).eval()
    net.f[1].running_mean.uniform_(-1, 1)
    for x in net.state_dict().values():
        if x.is_floating_point():
            x.copy_(x.to(dtype))
    return net


def named(net, style, prefix='', dtype=torch.float32):
    """The state_dict of f by our names or torchvision's, after a prefix."""
    state = {}
    for name, x in net.f.state_dict(prefix='f.').items():
        if style == 'torchvision':
            name = THEIRS[name[:3]] + name[3:]
        if x.is_floating_point():
            x = x.to(dtype)
        state[prefix + name] = x
    return state


def assert_loaded(found, net, style):
    """That f is the network's, changed to take our inputs if it had torchvision's names."""
    net = copy.deepcopy(net)
    if style == 'torchvision':
        renormalize(net, IMAGENET, OURS)
    state = found.f.state_dict()
    for name, x in net.f.state_dict().items():
        assert state[name].dtype == x.dtype
        assert torch.equal(state[name], x), name


def saved(content, path):
    torch.save(content, path)
    return path


def load_and_listen(path, **options):
    """The Model in a checkpoint, without its head, and the lines that were said of it."""
    said = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr('model.say', said.append)
        return load_model(path, head=False, **options), said


def visible(steps):
    """The prefix that a user sees."""
    return ''.join(f'{step}.' for step in steps if step not in STEPS[:2])


# One encoder


@given(
    style=st.sampled_from(STYLES),
    steps=st.lists(st.sampled_from(STEPS), max_size=3),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    others=st.sets(st.sampled_from(OTHERS)),
    inside=st.booleans(),
    keys=st.sampled_from([[], ['state_dict'], ['model'], ['model', 'state_dict']]),
)
@settings(max_examples=25, deadline=None, derandomize=True)
def test_one_encoder_loads_whatever_stands_before_and_beside_it(
    tmp_path_factory, style, steps, dtype, others, inside, keys
):
    """A line names the prefix and all that is left out. Nothing is said where both are usual."""
    net = small(dtype=dtype)
    prefix = ''.join(f'{step}.' for step in steps)
    content = named(net, style, prefix, dtype)
    for name in others:
        content[prefix * inside + name] = torch.zeros(3)
    for key in keys:
        content = {key: content, 'epoch': 3, 'optimizer': {'state': {0: torch.zeros(2)}}}
    path = saved(content, tmp_path_factory.getbasetemp() / 'foreign.pth')
    found, said = load_and_listen(path)
    assert found.g is None
    assert_loaded(found, net, style)

    shown = visible(steps)
    left = {shown * inside + name.partition('.')[0] for name in others}
    if not shown and left <= {'fc'}:
        assert said == []
    else:
        (line,) = said
        match = re.fullmatch(r'.*: took the resnet18( of prefix (\S+))??(, left out (.*))?', line)
        assert (match[2] or '') == shown
        assert set(re.findall(r'[^, ]+', match[4] or '')) == left


@pytest.mark.parametrize('kept', ['f', 'f and g', 'f and another g', 'f and fc'])
@pytest.mark.parametrize('prefix', ['', 'module.'])
def test_published_checkpoints_load_without_a_word(tmp_path, kept, prefix):
    """HCL's and DCL's have counters of a profiler, leftthomas's linear_model.pth has fc."""
    net = small()
    state = net.state_dict()
    if kept != 'f and g':
        state = net.f.state_dict(prefix='f.')
    if kept == 'f and another g':
        state |= {'g.0.weight': torch.zeros(3, 3), 'g.0.bias': torch.zeros(3)}
    if kept == 'f and fc':
        state |= {'fc.weight': torch.zeros(3, 32), 'fc.bias': torch.zeros(3)}
    state['f.0.total_ops'] = torch.zeros(1)
    content = {prefix + name: x for name, x in state.items()}
    found, said = load_and_listen(saved(content, tmp_path / 'model.pth'))
    assert_loaded(found, net, 'ours')
    assert (found.g is not None) == (kept == 'f and g')
    if kept == 'f and another g':
        assert said == [f'{tmp_path}/model.pth: took the resnet18, left out g']
    else:
        assert said == []


@given(
    style=st.sampled_from(STYLES),
    prefix=st.sampled_from(['', 'encoder.']),
    place=st.integers(0, 10**6),
    change=st.sampled_from(['lost', 'longer', 'nan', 'whole numbers']),
)
@settings(max_examples=15, deadline=None, derandomize=True)
def test_an_encoder_that_is_not_whole_is_refused(tmp_path_factory, style, prefix, place, change):
    state = named(small(), style, prefix)
    names = [name for name, x in state.items() if x.is_floating_point()]
    name = names[place % len(names)]
    x = state.pop(name)
    changed = dict(
        longer=torch.cat([x, x]),
        nan=x * torch.nan,
        **{'whole numbers': x.int()},
    )
    if change != 'lost':
        state[name] = changed[change]
    path = saved(state, tmp_path_factory.getbasetemp() / 'changed.pth')
    with pytest.raises(UserError, match=re.escape(str(path))) as error:
        load_model(path, head=False)
    assert '\n' not in str(error.value)


def deep_stem(state):
    state['conv1.0.weight'] = state.pop('conv1.weight')


def three_convolutions(state):
    for layer in '23':
        state[f'conv{layer}.weight'] = torch.zeros(4, 4, 3, 3)
        state[f'bn{layer}.weight'] = torch.zeros(4)


def wide(state):
    for name, x in list(state.items()):
        if name.startswith('layer') and 'conv1' in name:
            state[name] = torch.cat([x, x])


def shallow(state):
    for name in list(state):
        if name.startswith('layer4'):
            del state[name]


@pytest.mark.parametrize(
    'change, message',
    [
        (deep_stem, r'a ResNet whose stem is not one convolution: f\.0\.weight is missing'),
        (three_convolutions, r'not a resnet18: Unexpected key\(s\) in state_dict: "conv2\.weight"'),
        (wide, r'not a resnet18: size mismatch for f\.3\.0\.conv1\.weight'),
        (shallow, r'have \(2, 2, 2, 0\) blocks, which is none of'),
    ],
)
@pytest.mark.parametrize('prefix', ['', 'encoder.'])
def test_another_resnet_is_said_to_be_one(tmp_path, change, message, prefix):
    state = named(small(), 'torchvision')
    change(state)
    state = {prefix + name: x for name, x in state.items()}
    with pytest.raises(UserError, match=message):
        load_model(saved(state, tmp_path / 'other.pth'), head=False)


# Two encoders


@given(
    steps=st.lists(
        st.lists(st.sampled_from(STEPS), max_size=2), min_size=2, max_size=2, unique_by=visible
    ),
    styles=st.lists(st.sampled_from(STYLES), min_size=2, max_size=2),
)
@settings(max_examples=6, deadline=None, derandomize=True)
def test_of_several_encoders_a_prefix_takes_one(tmp_path_factory, steps, styles):
    """The error names all, and each is taken by what stands there."""
    content = {}
    for seed, (own, style) in enumerate(zip(steps, styles)):
        content |= named(small(seed), style, ''.join(f'{step}.' for step in own))
    path = saved(content, tmp_path_factory.getbasetemp() / 'several.pth')
    with pytest.raises(UserError, match='holds 2 encoders: choose one by') as error:
        load_model(path, head=False)
    _, *flags = str(error.value).split('--prefix ')
    told = [shlex.split(words)[0] for words in flags]
    assert set(told) == {visible(own) for own in steps}
    for seed, (own, style) in enumerate(zip(steps, styles)):
        for prefix in ''.join(f'{step}.' for step in own), visible(own).rstrip('.'):
            found, _ = load_and_listen(path, prefix=prefix)
            assert_loaded(found, small(seed), style)
    with pytest.raises(UserError, match="has no encoder of prefix 'nowhere': give --prefix"):
        load_model(path, prefix='nowhere')


@pytest.fixture(scope='module')
def moco(tmp_path_factory):
    """A file as MoCo's, with two encoders of a quarter of ResNet-18's width."""
    torch.manual_seed(0)
    state = {'module.queue': torch.zeros(2, 3), 'module.queue_ptr': torch.zeros(1)}
    for name in 'encoder_q', 'encoder_k':
        net = Model(8, 'resnet18', 8, width=0.25)
        state |= named(net, 'torchvision', f'module.{name}.')
        state[f'module.{name}.fc.weight'] = torch.zeros(2, 2)
    content = {'epoch': 200, 'arch': 'resnet18', 'state_dict': state}
    return saved(content, tmp_path_factory.mktemp('moco') / 'moco.pth')


def commands(checkpoint, tree):
    """A command of each script that loads a checkpoint, by a name."""
    data = ['--dataset_name', 'folder', '--root', str(tree)]
    probe = ['--model_path', str(checkpoint), '--epochs', '1', '--precision', 'fp32']
    out = str(checkpoint.with_name('out'))
    plot_words = ['similarity', str(checkpoint), *data, '--out', f'{out}.png']
    return dict(
        linear=(linear.main, [*probe, '--cached', *data]),
        finetune=(finetune.main, [*probe, '--image_size', '8', *data]),
        embed=(
            embed.main,
            ['--model_path', str(checkpoint), '--root', str(tree), '--out', f'{out}.npz'],
        ),
        plot=(plot.main, plot_words),
        export=(export.main, ['torchvision', str(checkpoint), '--out', f'{out}.pth']),
        main=(main.arguments, ['--init', str(checkpoint), *SMALL]),
    )


SMALL = '--arch resnet18 --width 0.25'.split()
SCRIPTS = 'linear finetune embed plot export main'.split()


@pytest.mark.parametrize('name', SCRIPTS)
def test_every_script_takes_the_encoder_of_a_prefix(
    moco, tree, tmp_path, name, capsys, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    script, words = commands(shutil.copy(moco, tmp_path / 'moco.pth'), tree)[name]
    if name == 'export':
        monkeypatch.setattr(export, 'torchvision_weights', lambda net, path, fold: {})
    message = r'holds 2 encoders: choose one by --prefix encoder_q\. or --prefix encoder_k\.$'
    with pytest.raises(UserError, match=message):
        script(words)
    capsys.readouterr()
    script([*words, '--prefix', 'encoder_q.'])
    told = (
        'took the resnet18 of prefix encoder_q., left out queue, queue_ptr, encoder_q.fc, encoder_k'
    )
    assert f'moco.pth: {told}\n' in capsys.readouterr().out


def test_the_prefix_is_part_of_what_a_run_starts_from(moco):
    words = ['--init', str(moco), *SMALL]
    starts, settings = [], []
    for prefix in 'encoder_q.', 'encoder_k.':
        args, init, _ = main.arguments([*words, '--prefix', prefix])
        assert args.init.endswith(f', prefix {prefix}')
        assert not hasattr(args, 'prefix')
        starts.append(init.f[0].weight)
        settings.append(args.init)
    assert not torch.equal(*starts)
    assert settings[0] != settings[1]
    with pytest.raises(UsageError, match='--prefix tells which encoder of an --init FILE to take'):
        main.arguments(['--prefix', 'encoder_q.'])


# Pickles


class Whole(torch.nn.Module):
    def __init__(self, net):
        super().__init__()
        self.encoder = net


@pytest.mark.parametrize('form', ['arguments', 'numbers', 'two levels', 'module', 'module within'])
def test_the_command_told_for_a_pickle_saves_its_tensors(tmp_path, form):
    net = small()
    state = named(net, 'ours', 'encoder.f'[:-1])
    contents = {
        'arguments': {'state_dict': state, 'args': argparse.Namespace(lr=1), 'optimizer': {}},
        'numbers': {'model': state, 'best': np.float64(3)},
        'two levels': {'student': state, 'hyper_parameters': {'path': tmp_path}},
        'module': Whole(net),
        'module within': {'model': Whole(net), 'epoch': 3},
    }
    path = saved(contents[form], tmp_path / "the author's.pth")
    with pytest.raises(
        UserError, match='refused, and nothing in it was run. If you trust'
    ) as error:
        load_model(path, head=False)
    assert '\n' not in str(error.value)
    _, _, command = str(error.value).partition(
        'save its tensors alone in the clone of this project: '
    )
    python, flag, code = shlex.split(command)
    assert (python, flag) == ('python', '-c')
    exec(code, {})
    found, _ = load_and_listen(tmp_path / "the author's.tensors.pth")
    assert_loaded(found, net, 'ours')


# What lies beside a checkpoint


HUGGING_FACE = {
    'architectures': ['ResNetModel'],
    'model_type': 'resnet',
    'hidden_sizes': [256, 512, 1024, 2048],
    'torch_dtype': 'float32',
    'transformers_version': '4.18.0',
}
LOGS = ('epoch,loss,acc\n1,2.3,0.4\n1,2.2,0.4\n', 'step,train_loss\n10,2.3\n20,2.2\n', 'a b c\n')


@pytest.mark.parametrize(
    'name, log',
    [*(('linear', log) for log in LOGS), *((name, LOGS[0]) for name in SCRIPTS[1:4])],
)
def test_files_of_another_program_beside_its_checkpoint_are_not_read(
    moco, tree, tmp_path, name, log, capsys
):
    """The script says what it says without them."""
    outputs = []
    for place in 'alone', 'beside':
        (tmp_path / place).mkdir()
        path = shutil.copy(moco, tmp_path / place / 'moco.pth')
        if place == 'beside':
            path.with_name('config.json').write_text(json.dumps(HUGGING_FACE))
            path.with_name('log.csv').write_text(log)
        before = sorted(path.parent.glob('[cl]o*'))
        contents = [file.read_bytes() for file in before]
        script, words = commands(path, tree)[name]
        script([*words, '--prefix', 'encoder_q.'])
        outputs.append(capsys.readouterr().out.replace(str(path.parent), ''))
        assert [file.read_bytes() for file in before] == contents
    assert outputs[0] == outputs[1]


def test_a_log_of_another_program_beside_a_run_is_not_read(tmp_path):
    runs.write_config(
        tmp_path / 'config.json', {name: kind() for name, kind in runs.CONFIG.items()}
    )
    for log in (LOGS[0], LOGS[2]):
        (tmp_path / 'log.csv').write_text(log)
        assert runs.logged_accuracies(tmp_path / 'model_1.pth') == {}


values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=9), inner),
    max_leaves=6,
)


@given(values)
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_json_without_a_digest_is_another_programs(tmp_path_factory, value):
    file = tmp_path_factory.getbasetemp() / 'config.json'
    file.write_text(json.dumps(value))
    assert runs.read_config(file) is None
    assert runs.find_run(file.parent) is None


def test_a_config_that_is_cut_anywhere_is_damaged(tmp_path):
    config = {name: kind() for name, kind in runs.CONFIG.items()}
    file = tmp_path / 'config.json'
    runs.write_config(file, config)
    content = file.read_bytes()
    assert runs.read_config(file) == config
    for end in range(len(content) - 2):
        file.write_bytes(content[:end])
        with pytest.raises(UserError, match='config.json is damaged or not of a run'):
            runs.read_config(file)


@pytest.mark.parametrize('name', [name for name in runs.CONFIG if name != 'data_digest'])
def test_a_config_that_lacks_an_entry_is_damaged(tmp_path, name):
    config = {name: kind() for name, kind in runs.CONFIG.items()}
    del config[name]
    files.write_json(tmp_path / 'config.json', config)
    with pytest.raises(UserError, match=f'{name} is missing or wrong'):
        runs.read_config(tmp_path / 'config.json')


def test_a_run_does_not_replace_another_programs_config(tiny, tmp_path):
    (tmp_path / 'config.json').write_text(json.dumps(HUGGING_FACE))
    with pytest.raises(UserError, match=r"config\.json is damaged or another program's: choose a"):
        main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path)])
    assert json.loads((tmp_path / 'config.json').read_text()) == HUGGING_FACE
    assert list(tmp_path.iterdir()) == [tmp_path / 'config.json']


def test_a_table_counts_runs_alone(tiny, tmp_path, capsys):
    main.main([*tiny, '--epochs', '1', '--results_dir', str(tmp_path / 'run')])
    (tmp_path / 'a').mkdir()
    (tmp_path / 'a' / 'config.json').write_text(json.dumps(HUGGING_FACE))
    (tmp_path / 'a' / 'log.csv').write_text(LOGS[0])
    assert len(sweep.make_table(tmp_path)) == 1
    assert "a: config.json is another program's, left out" in capsys.readouterr().err
    assert sweep.precision_of(main.parse([]), tmp_path) == 'fp32'


@given(st.lists(st.text('abcxyz_ ', min_size=1), min_size=1, unique=True))
@settings(max_examples=40, deadline=None, derandomize=True)
def test_any_table_without_a_column_of_ours_is_another_programs(tmp_path_factory, columns):
    file = tmp_path_factory.getbasetemp() / 'log.csv'
    pd.DataFrame([[1] * len(columns)], columns=columns).assign(epoch=1).to_csv(file, index=False)
    assert files.read_table(file, runs.LOG, runs.LOG[2:]) is None
    file.write_text(f'{file.read_text()}1\n'.replace('epoch', 'epoch,train_loss'))
    with pytest.raises(UserError, match='log.csv is damaged'):
        files.read_table(file, runs.LOG, runs.LOG[2:])
