"""A wrong value for each flag, drawn by its type: one line and exit code 2 with nothing written, or it does no harm."""

import pytest
from accelerate.state import AcceleratorState

import train
import validate
from timm_synermix.cli.checks import UsageError
from timm_synermix.cli.common_args import ParseKwargs
from timm_synermix.cli.rules import RULES, Range
from timm_synermix.cli.validate_args import check_args

HUGE = '1' + '0' * 30
WRONG = {int: ['x', '1.5', '-1', HUGE], float: ['x', '-1', 'nan', 'inf', '1e300']}
WRONG_TEXT = ['no-such-thing', '']
NEVER = {'x', 'nan', 'inf', '1e300', HUGE}  # no number, or none that a tensor or a counter holds


def wrong_values(action):
    """What to give to a flag; one that takes no value is given one."""
    if isinstance(action, ParseKwargs):
        return [['x'], ['no_such_thing=1']]
    if action.nargs == 0:
        return [['no-such-thing', 'either']]
    one = WRONG.get(action.type, WRONG_TEXT)
    if action.nargs == '+' or isinstance(action.nargs, int):
        return [[], *([value] * number for value in one for number in (1, 3, 5))]
    return [[value] for value in one]


def cases(parser):
    actions = [action for action in parser._actions if action.option_strings and action.dest != 'help']
    return [(action, values) for action in actions for values in wrong_values(action)]


def refusal(call, capsys):
    """What is said if the arguments are refused, None if they are not; anything else that is raised is a failure."""
    try:
        call()
    except SystemExit as error:
        *before, text = capsys.readouterr().err.splitlines()  # what was logged, and the line
        told = error.code == 2 and ': error: ' in text and not any('Traceback' in line for line in before)
        assert told, text  # all other exceptions go on
        return text
    except UsageError as error:
        return str(error)
    return None


def validate_checks():
    try:
        check_args(validate.parser.parse_args())
    except ValueError as error:
        raise UsageError(str(error)) from error


@pytest.mark.parametrize(
    ('parser', 'check'),
    [(train.parser, train._parse_args), (validate.parser, validate_checks)],
    ids=['train', 'validate'],
)
def test_wrong_values_are_refused_in_one_line_that_names_the_flag(parser, check, monkeypatch, capsys, tmp_path):
    monkeypatch.chdir(tmp_path)
    refused = 0
    for action, values in cases(parser):
        monkeypatch.setattr('sys.argv', ['script', action.option_strings[-1], *values])
        text, allowed = refusal(check, capsys), RULES[action.dest].values
        if action.type in WRONG and (NEVER & {*values} or (values == ['-1'] and isinstance(allowed, Range))):
            assert (text is None) == (values == ['-1'] and allowed.low < 0), (action.dest, values)
        if text is not None and 'unrecognized arguments' not in text:
            refused += 1
            assert any(name in text for name in action.option_strings), text
    assert refused > 100
    assert not [*tmp_path.iterdir()]


def elsewhere(parser):
    """The values that are right for themselves, and show to be wrong only where they are used."""
    for action, values in cases(parser):
        allowed = RULES[action.dest].values
        wrong = WRONG_TEXT if action.type not in WRONG else ['-1'] if allowed is not None and allowed.low < 0 else []
        if action.nargs != 0 and not action.choices and len(values) in (1, 3) and values[0] in wrong:
            yield action.option_strings[-1], values


@pytest.mark.slow
@pytest.mark.parametrize(('flag', 'values'), list(elsewhere(train.parser)))
def test_a_run_with_a_wrong_value_is_refused_or_runs(run_train, capsys, monkeypatch, tmp_path, flag, values):
    monkeypatch.chdir(tmp_path)
    if refusal(lambda: run_train(flag, *values), capsys) is not None:
        assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_an_evaluation_with_a_wrong_value_is_refused_or_runs(run_train, image_folder, capsys, monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    checkpoint = run_train().folder / 'last.pth.tar'
    given = ['--data-dir', image_folder, '--checkpoint', checkpoint, '--device', 'cpu', '-j', '0']
    for flag, values in elsewhere(validate.parser):
        monkeypatch.setattr('sys.argv', ['validate.py', *map(str, given), flag, *values])
        if (flag, values) != ('--checkpoint', ['']):  # a pretrained model, which would be downloaded
            AcceleratorState._reset_state(reset_partial_state=True)
            refusal(validate.main, capsys)
