"""The pages: every link, path and flag that they name is there."""

import re
import shlex

import pytest
from conftest import HOME

import main

PAGES = [
    'README.md',
    'results/README.md',
    *(f'docs/{p.name}' for p in (HOME / 'docs').glob('*.md')),
]


@pytest.mark.parametrize('page', PAGES)
def test_links_lead_somewhere(page):
    text = (HOME / page).read_text()
    links = re.findall(r'\]\(([^)#]+)', text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        if not link.startswith('http'):
            assert ((HOME / page).parent / link).exists(), link


def commands(page):
    """The words of every command line in the page's shell blocks, with continued lines joined."""
    text = (HOME / page).read_text()
    for block in re.findall(r'```bash\n(.*?)```', text, flags=re.DOTALL):
        for line in block.replace('\\\n', ' ').splitlines():
            yield shlex.split(line, comments=True)


@pytest.mark.parametrize('page', PAGES)
def test_scripts_in_commands_exist_and_know_the_flags(page):
    """main.py's flags may follow those of sweep.py and bench.py, too."""
    training = {
        option for action in main.make_parser()._actions for option in action.option_strings
    }
    for words in commands(page):
        scripts = [word for word in words if word.endswith('.py')]
        if not scripts:
            continue
        (script,) = scripts
        assert (HOME / script).is_file(), script
        source = (HOME / script).read_text() + (HOME / 'hardneg' / 'flags.py').read_text()
        source += (HOME / 'linear.py').read_text()
        given = words[words.index(script) + 1 :]
        for word in given:
            flag = word.partition('=')[0]
            if word.startswith('--'):
                known = f"'{flag}'" in source
                assert known or flag in training, (script, flag)
