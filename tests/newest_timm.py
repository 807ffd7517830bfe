"""Say what of timm has changed since the version whose flags train.py takes: make test-newest.

The arguments of the functions that the flags go to, and the names of its tasks and evaluators, against a stored list;
one line for each difference. --write stores the list anew.
"""

import importlib
import inspect
import json
import sys
from collections.abc import Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any

STORED = Path(__file__).parent / 'data' / 'timm_api.json'
FUNCTIONS = [
    'timm.data.create_dataset',
    'timm.data.create_loader',
    'timm.data.create_transform',
    'timm.loss.create_classification_loss',
    'timm.models.create_model',
    'timm.optim.create_optimizer_v2',
    'timm.scheduler.create_scheduler_v2',
]
KWARGS = ['timm.optim.optimizer_kwargs', 'timm.scheduler.scheduler_kwargs']  # of the flags
MODULES = ['timm.task', 'timm.loss']
EVALUATORS = ['timm.task.ClassificationEvaluator', 'timm.task.MultiLabelClassificationEvaluator']


class Asked:
    """Flags that note which of them are asked for."""

    def __init__(self) -> None:
        self.names: set[str] = set()

    def __getattr__(self, name: str) -> Any:
        self.names.add(name)
        return ''


def find(path: str) -> Any:
    module, _, name = path.rpartition('.')
    return getattr(importlib.import_module(module), name)


def api() -> dict[str, dict[str, str]]:
    """For each function, module or class the names that it has, and what they are by default."""
    found = {}
    for path in FUNCTIONS:
        parameters = inspect.signature(find(path)).parameters.values()
        found[path] = {p.name: '' if p.default is p.empty else repr(p.default) for p in parameters}
    for path in KWARGS:
        asked = Asked()
        find(path)(asked)
        found[path] = dict.fromkeys(sorted(asked.names), '')
    for path in MODULES:
        module = importlib.import_module(path)
        found[path] = dict.fromkeys((name for name in sorted(dir(module)) if name[0].isupper()), '')
    for path in EVALUATORS:
        found[path] = dict.fromkeys(find(path).metric_names, '') | {'default_metric': find(path).default_metric}
    return found


def differences(old: dict[str, dict[str, str]], new: dict[str, dict[str, str]]) -> Iterator[str]:
    """A line for each name that is new, gone, or something else by default."""
    for path in old.keys() | new.keys():
        before, now = old.get(path, {}), new.get(path, {})
        for name in sorted(before.keys() | now.keys()):
            if name not in before:
                yield f'{path}: {name} is new' + (f', by default {now[name]}' if now[name] else '')
            elif name not in now:
                yield f'{path}: {name} is gone'
            elif before[name] != now[name]:
                yield f'{path}: {name} was {before[name]} by default, and is {now[name]}'


def main() -> int:
    if '--write' in sys.argv:
        STORED.write_text(json.dumps(dict(timm=version('timm'), api=api()), indent=0) + '\n')
        return 0
    stored = json.loads(STORED.read_text())
    lines = sorted(differences(stored['api'], api()))
    print(*lines or [f'timm {version("timm")} has the arguments and names of {stored["timm"]}.'], sep='\n')
    return len(lines) > 0


if __name__ == '__main__':
    sys.exit(main())
