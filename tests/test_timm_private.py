import inspect

import timm
import torch
from timm.data.readers.reader import Reader
from timm.optim import Lookahead
from timm.utils import ModelEmaV3

from timm_synermix.engine.checkpoint import RunSaver
from timm_synermix.utils import timm_private

# What timm 1.0.31 has: name, and arguments.
EXPECTED = {
    'worker_init': "(worker_id, worker_seeding='all')",
    'search_split': '(root, split)',
    'save_config_for_hf': '(model, config_path, model_config=None, model_args=None, data_config=None)',
    'generate_readme': "(model_card, model_name, task_name='image-classification')",
    '_checkpoint_path': '(self, epoch)',
    '_cleanup_checkpoints': '(self, trim=0)',
    '_duplicate': '(self, src, dst)',
    '_replace': '(self, src, dst)',
    '_save': '(self, save_path, epoch, metric=None)',
    '_track_checkpoint': '(self, save_path, epoch, metric=None, update_best_file=True)',
    '_filename': '(self, index, basename=False, absolute=False)',
}


def untyped(part):
    """The signature of a function, without annotations."""
    signature = inspect.signature(part)
    parameters = [value.replace(annotation=inspect.Parameter.empty) for value in signature.parameters.values()]
    return str(signature.replace(parameters=parameters, return_annotation=inspect.Signature.empty))


def test_timm_has_the_private_parts_that_are_used():
    """A failure names the version of timm, and what it has changed."""
    found = {name: getattr(timm_private, name) for name in timm_private.__all__ if name in EXPECTED}
    found |= {name: getattr(timm_private.CheckpointSaver, name, None) for name in timm_private.SAVER_METHODS}
    found['_filename'] = getattr(Reader, '_filename', None)
    changed = {
        name: f'timm {timm.__version__} has {part and inspect.signature(part)}, not {EXPECTED[name]}'
        for name, part in found.items()
        if part is None or untyped(part) != EXPECTED[name]
    }
    assert not changed
    assert found.keys() == EXPECTED.keys()


def test_no_other_private_method_of_the_saver_is_used():
    private = {name for name in vars(timm_private.CheckpointSaver) if name.startswith('_') and not name.endswith('__')}
    used = {
        name for method in vars(RunSaver).values() for name in getattr(getattr(method, '__code__', 0), 'co_names', ())
    }
    assert used & private <= set(timm_private.SAVER_METHODS)


def test_what_a_resume_reads_of_timms_parts_is_there():
    model = torch.nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    assert timm_private.base_optimizer(Lookahead(optimizer)) is timm_private.base_optimizer(optimizer) is optimizer
    assert isinstance(timm_private.rounding_generator(ModelEmaV3(model)), torch.Generator)
    assert timm_private.rounding_generator(model) is None
