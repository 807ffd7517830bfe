"""Every model of timm; `make test-all` runs this in half an hour or so, and writes docs/models.md."""

import time
from datetime import date
from importlib.metadata import version

import pytest
import timm
import torch
from conftest import ROOT
from timm.models import list_modules
from timm_models import check_feature_hook, check_manifold_mixup, create

from timm_synermix.features import find_classifier_leaves

pytestmark = pytest.mark.exhaustive

TEXT = """# timm models

The smallest model of each of the {modules} modules of timm {timm}, and what was tested of it:

- **features**: what enters its classifier for one image, one shape for each classifier.
- **FeatureHook**: the logits are the model's own, bit for bit; features in another order give the logits in that order;
  the gradients of a loss on them reach the first layer, and all are finite.
- **Manifold MixUp**: the default layers. With lam = 0 each of them gives the logits of the batch in reverse order.

`make test-all` made this table on {date} with torch {torch}, in {minutes:.0f} minutes on a CPU. It also looked
for the classifier of all {models} models. {found} have one; {refused} have none, and are refused with an error that
names them:

{refused_names}.

| module | model | image | features | FeatureHook | Manifold MixUp |
| --- | --- | --- | --- | --- | --- |
"""


@pytest.fixture(scope='module')
def table():
    """Collects the rows of docs/models.md, and writes it when every module has run."""
    rows, found, refused, start = {}, [], [], time.time()
    yield rows, found, refused
    if len(rows) == len(list_modules()):
        text = TEXT.format(
            modules=len(rows),
            timm=version('timm'),
            torch=version('torch').partition('+')[0],
            date=date.today(),
            minutes=(time.time() - start) / 60,
            models=len(found) + len(refused),
            found=len(found),
            refused=len(refused),
            refused_names=',\n'.join(f'`{name}`' for name in sorted(refused)),
        )
        (ROOT / 'docs' / 'models.md').write_text(text + ''.join(rows[module] for module in sorted(rows)))


def build_without_weights(name):
    try:
        with torch.device('meta'):
            return timm.create_model(name, num_classes=7)
    except (RuntimeError, NotImplementedError):  # a few compute while they are built
        return timm.create_model(name, num_classes=7)


@pytest.mark.parametrize('module', list_modules())
def test_module(module, table):
    rows, all_found, all_refused = table
    size, refused = {}, []
    for name in timm.list_models(module=module):
        model = build_without_weights(name)
        if name.endswith('_enc'):
            with pytest.raises(ValueError, match=f'{name} has no classifier'):
                find_classifier_leaves(model)
            refused.append(name)
        else:
            assert find_classifier_leaves(model)
            size[name] = sum(p.numel() for p in model.parameters())
    all_found.extend(size)
    all_refused.extend(refused)
    if not size:
        rows[module] = f'| {module} | {refused[0]} | | no classifier | refused | refused |\n'
        return
    name = min(size, key=size.get)
    model, x = create(name)
    rows[module] = f'| {module} | {name} | {x.shape[-1]} | | **fails** | |\n'
    features = check_feature_hook(model, x)
    shapes = ', '.join('x'.join(map(str, feature.shape[1:])) for feature in features)
    rows[module] = f'| {module} | {name} | {x.shape[-1]} | {shapes} | pass | **fails** |\n'
    layers = check_manifold_mixup(model, x)
    rows[module] = f'| {module} | {name} | {x.shape[-1]} | {shapes} | pass | {", ".join(layers)} |\n'
