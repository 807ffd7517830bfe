import csv
import math
import re
import shutil
import subprocess
from html.parser import HTMLParser
from types import SimpleNamespace

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg

from timm_synermix.engine.reporting import _which_checkpoint, _which_epoch, best_or_last, data_name
from timm_synermix.engine.run import ReportedEpoch
from timm_synermix.metrics.class_moments import ClassTable
from timm_synermix.report import Evaluated, plots, write_report
from timm_synermix.report.classes import most_confused, nearest_mean, share_of
from timm_synermix.report.feature_map import feature_map
from timm_synermix.report.page import format_number
from timm_synermix.report.report import comparison, main_result

CHROMIUM = next(filter(None, map(shutil.which, ('chromium', 'chromium-browser', 'google-chrome', 'chrome'))), None)
EVIL = '<script>alert("$x$")</script>'


def blobs(classes: int = 4, each: int = 6, dim: int = 5, spread: float = 0.3, seed: int = 0):
    """Features [classes * each, dim] around random class means, and their classes."""
    generator = torch.Generator().manual_seed(seed)
    target = torch.arange(classes).repeat(each)
    means = torch.randn(classes, dim, generator=generator)
    return means[target] + spread * torch.randn(len(target), dim, generator=generator), target


def drawn_points(axis):
    return torch.cat([torch.tensor(dots.get_offsets().data) for dots in axis.collections])


def make_evaluated(name='run', *, metrics=None, summary=None, args=None, model='', shown='', **kwargs):
    metrics = {'loss': 1.0, 'top1': 50.0, 'cosine_cohesion': 0.9} if metrics is None else metrics
    return Evaluated(name, metrics, *blobs(**kwargs), model=model, shown=shown, summary=summary, args=args or {})


def write_summary(path, rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows(rows)
    return str(path)


class Page(HTMLParser):
    """The text of a page, and its elements as (tag, attributes, text up to the next tag)."""

    def __init__(self, source):
        super().__init__()
        self.elements = []
        self.feed(source)

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs), []))

    def handle_data(self, data):
        if self.elements:
            self.elements[-1][2].append(data)

    def texts(self, tag, **attributes):
        return [
            ''.join(text).strip()
            for name, found, text in self.elements
            if name == tag and attributes.items() <= found.items()
        ]


def html(folder, *evaluated, **kwargs):
    with open(write_report(str(folder), evaluated, **kwargs), encoding='utf-8') as file:
        return file.read()


def page(folder, *evaluated, **kwargs):
    return Page(html(folder, *evaluated, **kwargs))


class TestFeatureMap:
    def test_panels_share_the_plane_whatever_the_scale(self):
        feature, target = blobs()
        figure = feature_map([('a', feature, target), ('b', 3 * feature + 7, target), ('c', -feature, target)])
        one, scaled, mirrored = map(drawn_points, figure.axes)
        torch.testing.assert_close(one, scaled, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(one, -mirrored, atol=1e-5, rtol=1e-5)
        assert len({axis.get_xlim() for axis in figure.axes}) == 1
        assert [axis.get_title() for axis in figure.axes] == ['a', 'b', 'c']

    def test_plane_is_the_pca_of_the_class_means(self):
        from sklearn.decomposition import PCA

        feature, target = blobs(each=50, spread=0.1)
        centered = (feature - feature.mean(0)).double()
        centered /= centered.square().sum(1).mean().sqrt()
        pca = PCA(2).fit(torch.stack([centered[target == c].mean(0) for c in range(4)]).numpy())
        expected = torch.from_numpy(centered[target.argsort(stable=True)].numpy() @ pca.components_.T)
        points = drawn_points(feature_map([('a', feature, target)]).axes[0])
        torch.testing.assert_close(points.abs(), expected.abs(), atol=1e-5, rtol=1e-5)

    def test_lengths_that_differ_are_told(self):
        figure = feature_map([('a', *blobs(dim=5)), ('b', *blobs(dim=3))])
        assert 'own plane' in figure.get_suptitle()
        assert 'own plane' not in feature_map([('a', *blobs()), ('b', *blobs())]).get_suptitle()

    def test_classes_are_spread_and_have_a_colour_each(self):
        feature, target = blobs(classes=40)
        (axis,) = feature_map([('a', feature, target)], [f'class {c}' for c in range(40)], max_classes=4).axes
        assert [text.get_text() for text in axis.texts] == ['class 0', 'class 13', 'class 26', 'class 39']
        assert len({tuple(dots.get_facecolor()[0]) for dots in axis.collections}) == 4

    @pytest.mark.parametrize('classes', [1, 2, 12])
    @pytest.mark.parametrize('dim', [1, 2, 5])
    @pytest.mark.parametrize('spread', [0.0, 0.3])
    def test_small_sets(self, classes, dim, spread):
        feature, target = blobs(classes=classes, dim=dim, spread=spread)
        figure = feature_map([('a', feature, target), ('b', feature.half(), target)], max_classes=12)
        assert drawn_points(figure.axes[0]).isfinite().all()
        assert len(figure.axes[0].texts) == classes

    def test_two_classes_spread_in_both_directions(self):
        points = drawn_points(feature_map([('a', *blobs(classes=2, each=50))]).axes[0])
        assert (points.std(0) > 0.05).all()

    def test_what_is_not_finite_is_left_out(self):
        feature, target = blobs()
        feature[target == 1] = torch.nan
        feature[0] = torch.inf
        (axis,) = feature_map([('a', feature, target)]).axes
        assert len(drawn_points(axis)) == 24 - 6 - 1
        (axis,) = feature_map([('a', torch.full((2, 3), torch.nan), torch.tensor([0, 1]))]).axes
        assert axis.texts[0].get_text() == 'no features to draw'

    def test_without_images(self):
        figure = feature_map([('a', torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))])
        assert figure.axes[0].texts[0].get_text() == 'no features to draw'

    def test_nothing_to_draw_is_an_error(self):
        with pytest.raises(ValueError, match='got 0 sets'):
            feature_map([])

    def test_outliers_do_not_squeeze_the_others(self):
        feature, target = blobs(classes=5, each=40)
        (usual,) = feature_map([('a', feature, target)]).axes
        far = feature.clone()
        far[7] *= 1000
        (axis,) = feature_map([('a', far, target)]).axes
        low, high = axis.get_xlim()
        assert high - low < 1.3 * (usual.get_xlim()[1] - usual.get_xlim()[0])
        points = drawn_points(axis)
        assert len(points) == len(feature)  # the outlier too, at the frame
        assert points.min() >= min(axis.get_xlim()[0], axis.get_ylim()[0])
        assert points.max() <= max(axis.get_xlim()[1], axis.get_ylim()[1])

    @pytest.mark.parametrize(('classes', 'spread', 'outliers'), [(5, 0.3, 0), (100, 0.6, 3), (100, 3.0, 0)])
    def test_labels_lie_in_the_frame_and_cover_nothing(self, classes, spread, outliers):
        feature, target = blobs(classes=classes, each=30, dim=20, spread=spread)
        feature[:outliers] *= 30
        names = [f'North American number {c}' for c in range(classes)]
        figure = feature_map([('a', feature, target), ('b', feature.roll(1, 1), target)], names)
        canvas = FigureCanvasAgg(figure)
        canvas.draw()
        for axis in figure.axes:
            boxes = [text.get_window_extent(canvas.get_renderer()) for text in axis.texts]
            frame = axis.get_window_extent()
            points = axis.transData.transform(drawn_points(axis))
            assert len(boxes) == min(classes, 10)
            for i, box in enumerate(boxes):
                assert frame.x0 <= box.x0 < box.x1 <= frame.x1
                assert frame.y0 <= box.y0 < box.y1 <= frame.y1
                assert box.count_contains(points) == 0
                assert not box.count_overlaps(boxes[:i])


def test_pixels_are_those_of_the_figure():
    figure = feature_map([('a', *blobs())])
    picture = plots.to_array(figure, dpi=50)
    width, height = figure.get_size_inches()
    assert picture.dtype == 'uint8'
    assert picture.shape == pytest.approx((50 * height, 50 * width, 3))
    assert len(set(picture.reshape(-1, 3)[:, 0].tolist())) > 10


def test_bars_show_the_best_and_the_worst_classes():
    cohesion = torch.linspace(1, 0, 50, dtype=torch.float64)
    cohesion[0] = torch.nan
    (axis,) = plots.cohesion_bars('run', cohesion).axes
    assert [bar.get_width() for bar in axis.patches] == pytest.approx(
        [*cohesion[1:11].tolist(), *cohesion[-10:].tolist()]
    )
    names = [label.get_text() for label in axis.get_yticklabels()]
    assert names == [str(c) for c in range(1, 11)] + [''] + [str(c) for c in range(40, 50)]
    assert '29 classes between' in [text.get_text() for text in axis.texts]
    assert len(plots.cohesion_bars('run', cohesion[:20]).axes[0].patches) == 19
    assert not plots.cohesion_bars('run', torch.full((3,), torch.nan)).axes[0].patches


class TestCurves:
    def test_runs_differ_in_colour_and_quantities_in_style(self):
        lines = [plots.Line(i, j, [0, 1], [1.0, math.inf]) for i in range(3) for j in range(2)]
        (axis,) = plots.curve('loss', ['training', 'evaluation'], lines, num_runs=3).axes
        colours = [line.get_color() for line in axis.lines]
        assert colours == [colour for colour in plots.run_colours(3) for _ in range(2)]
        assert len(set(colours)) == 3
        assert [line.get_linestyle() for line in axis.lines] == ['-', '--'] * 3
        assert [text.get_text() for text in axis.get_legend().get_texts()] == ['training', 'evaluation']

    def test_quantities_of_one_run_differ_in_colour(self):
        lines = [plots.Line(0, j, [0, 1], [1.0, 2.0]) for j in range(2)]
        (axis,) = plots.curve('loss', ['training', 'evaluation'], lines).axes
        assert len({line.get_color() for line in axis.lines}) == 2
        assert plots.curve('lr', ['lr'], lines[:1]).axes[0].get_legend() is None

    def test_colours_do_not_repeat(self):
        assert len(set(plots.run_colours(25))) == 25

    def test_columns_that_belong_together_share_a_picture(self, tmp_path):
        rows = [['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'eval_top5', 'lr'], [0, 3, 2, 50, 80, 0.1]]
        html(tmp_path, make_evaluated(summary=write_summary(tmp_path / 'summary.csv', rows)))
        pictures = {path.stem for path in tmp_path.glob('curve_*.png')}
        assert pictures == {'curve_Loss', 'curve_Accuracy', 'curve_lr'}

    def test_incomplete_files(self, tmp_path):
        rows = [['epoch', 'train_loss', 'eval_nc1', 'lr', 'extra'], [0, 1.5, '', 0.1], [1, 'nan', '', 'x', 1, 2, 3], []]
        one = make_evaluated('a', summary=write_summary(tmp_path / 'a.csv', rows))
        two = make_evaluated('b', summary=write_summary(tmp_path / 'b.csv', [['train_loss'], [1]]))
        empty = make_evaluated('c', summary=write_summary(tmp_path / 'c.csv', []))
        lost = make_evaluated('d', summary=str(tmp_path / 'none.csv'))
        html(tmp_path, one, two, empty, lost)
        curves = {path.stem for path in tmp_path.glob('curve_*.png')}
        assert curves == {'curve_Loss', 'curve_lr', 'curve_extra'}

    def test_one_legend_for_all_curves(self, tmp_path):
        summary = write_summary(tmp_path / 'summary.csv', [['epoch', 'train_loss', 'lr'], [0, 1, 0.1]])
        other = write_summary(tmp_path / 'other.csv', [['epoch', 'train_loss', 'lr'], [0, 2, 0.1]])
        runs = [make_evaluated('a', summary=summary), make_evaluated('b', summary=other)]
        source = html(tmp_path, *runs)
        legend = re.findall(r'background: (#\w+)"></span>(\w+)</li>', source)
        assert legend == list(zip(plots.run_colours(2), ['a', 'b'], strict=True))
        assert 'class="legend"' not in html(tmp_path, runs[0])


@pytest.mark.parametrize('channels', [1, 3, 4])
def test_images_keep_their_pixels(channels):
    images = torch.rand(3, channels, 4, 5)
    (axis,) = plots.image_rows({'clean': images}).axes
    drawn = torch.from_numpy(axis.images[0].get_array().data)
    assert drawn.shape == (4, 3 * 6, 4)
    expected = images[1].permute(1, 2, 0) if channels == 3 else images[1, :1].permute(1, 2, 0).expand(4, 5, 3)
    torch.testing.assert_close(drawn[:, 6:11, :3], expected)
    assert drawn[:, 5, 3].eq(0).all()


class TestConfusion:
    def test_nearest_mean_is_that_of_a_loop(self):
        feature, target = blobs(spread=1.5)
        target = 2 * target + 3  # classes without images
        means = {c: feature[target == c].double().mean(0) for c in target.tolist()}
        expected = [min(means, key=lambda c: (means[c] - f.double()).norm()) for f in feature]
        assert nearest_mean(feature, target)[1].tolist() == expected
        feature[0] = torch.nan
        assert len(nearest_mean(feature, target)[0]) == len(target) - 1

    def test_pairs_by_frequency(self):
        target, nearest = torch.tensor([[0, 1], [0, 0], [2, 1], [2, 1], [2, 2], [1, 1]]).T
        assert most_confused(target, nearest) == [(2, 1), (0, 1)]
        assert share_of(2, 1, target, nearest) == pytest.approx(2 / 3)
        assert share_of(0, 1, target, nearest) == 0.5


@pytest.mark.parametrize(
    ('value', 'text'),
    [
        (None, '–'),
        (math.nan, '–'),
        (math.inf, '∞'),
        (-math.inf, '−∞'),
        (0.0, '0'),
        (77.825, '77.83'),
        (-0.5, '−0.5000'),
        (12345.6, '12,346'),
        (3e-7, '3.00e−07'),
        (2.5e9, '2.50e+09'),
    ],
)
def test_numbers(value, text):
    assert format_number(value) == text


class TestComparison:
    def test_best_values_are_marked(self):
        a = make_evaluated('a', metrics={'loss': 1.0, 'top1': 50.0, 'intra_class_distance': 1.0, 'nc1': math.nan})
        b = make_evaluated('b', metrics={'loss': 2.0, 'top1': 60.0, 'intra_class_distance': 2.0, 'nc1': 1.0})
        table = comparison([a, b])
        best = {row[0].text: [cell.best for cell in row[1:]] for row in table.rows}
        assert list(best.values()) == [[True, False], [False, True], [False, False], [False, False]]
        assert table.rows[3][1].text == '–'
        assert not any(cell.best for row in comparison([a]).rows for cell in row)

    def test_what_has_no_direction_bears_no_arrow(self):
        names = ['loss', 'top1', 'intra_class_distance', 'inter_class_distance', 'min_inter_class_distance', 'nc1']
        rows = comparison([make_evaluated(metrics=dict.fromkeys(names, 1.0))]).rows
        arrows = [''.join(sign for sign in row[0].text if sign in '↑↓') for row in rows]
        assert arrows == ['↓', '↑', '', '', '', '↓']


class TestHead:
    def test_main_result(self):
        a, b, c = (make_evaluated(name, metrics={'top1': top1}) for name, top1 in [('a', 50.0), ('b', 60.5), ('c', 60)])
        assert main_result([a]) == 'a classifies 50.00 % of 24 images right.'
        text = main_result([a, b, c])
        assert text.startswith('b is the most accurate, with 60.50 % of 24 images right')
        assert '0.50 points more than c' in text
        assert '10.50 points more than a' in text
        assert main_result([make_evaluated(metrics={'loss': 1.0})]) == ''

    def test_equal_results(self):
        a, b = make_evaluated('a'), make_evaluated('b')
        assert main_result([a, b]) == 'a and b are the most accurate, with 50.00 % of 24 images right.'

    def test_facts(self, tmp_path):
        a = make_evaluated('a', model='resnet18', shown='epoch 3, the best')
        b = make_evaluated('b', model='resnet18', shown='epoch 7, the last')
        found = page(tmp_path, a, b, data='flowers, validation')
        assert found.texts('dt') == ['Data set', 'Model', 'Shown', 'Images', 'Date']
        lines = found.texts('div')
        for text in ('flowers, validation', 'resnet18', 'a: epoch 3, the best', 'b: epoch 7, the last'):
            assert text in lines
        assert '24 of 4 classes' in lines

    def test_which_epoch_is_shown(self, tmp_path):
        best, later = (ReportedEpoch(epoch, {}, None) for epoch in (3, 4))
        assert best_or_last(None, best, 3) is best
        assert best_or_last(best, later, 3) is best
        assert best_or_last(best, later, 4) is later
        assert best_or_last(best, later, 1) is later  # of a run that was resumed after its best epoch
        assert _which_epoch(3, 3, 'top1') == 'epoch 3, the best by top1'
        assert 'the best, epoch 1, was before' in _which_epoch(4, 1, 'top1')
        torch.save({'epoch': 5}, tmp_path / 'model_best.pth.tar')
        torch.save({'weight': torch.zeros(1)}, tmp_path / 'own.pth')
        assert _which_checkpoint(str(tmp_path / 'model_best.pth.tar')) == 'epoch 5, the best (model_best.pth.tar)'
        assert _which_checkpoint(str(tmp_path / 'own.pth')) == 'own.pth'
        assert _which_checkpoint('run/last.safetensors') == 'the last (last.safetensors)'

    @pytest.mark.parametrize(
        ('args', 'name'),
        [
            ({'data_dir': '/data/flowers/', 'data': None, 'dataset': ''}, 'flowers, test'),
            ({'data_dir': None, 'data': 'flowers', 'dataset': ''}, 'flowers, test'),
            ({'data_dir': '/data', 'data': None, 'dataset': 'torch/cifar10'}, 'torch/cifar10, test'),
        ],
    )
    def test_name_of_the_data(self, args, name):
        assert data_name(SimpleNamespace(**args), 'test') == name


class TestReport:
    def test_is_one_file_and_its_pictures(self, tmp_path):
        rows = [['epoch', 'train_loss', 'eval_top1'], [0, 1, 50], [1, 2, 60]]
        summary = write_summary(tmp_path / 'summary.csv', rows)
        images = {'clean': torch.rand(2, 3, 8, 8), 'mixed': torch.rand(2, 3, 8, 8)}
        folder = tmp_path / 'new' / 'folder'
        found = page(folder, make_evaluated(summary=summary, spread=2.0), examples=images)
        pictures = {path.stem for path in folder.glob('*.png')}
        assert {'curve_Loss', 'curve_Accuracy', 'feature_maps', 'cohesion_0', 'confusion_0', 'examples'} == pictures
        shown = [attributes for tag, attributes, _ in found.elements if tag == 'img']
        assert len(shown) == len(pictures)
        assert all(image['alt'] and image['src'].startswith('data:image/png;base64,') for image in shown)
        links = [found.get('src') or found.get('href') for _, found, _ in found.elements]
        assert all(link.startswith(('data:', '#')) for link in links if link)
        assert 'script' not in {tag for tag, _, _ in found.elements}

    def test_sections_in_order(self, tmp_path):
        summary = write_summary(tmp_path / 'summary.csv', [['epoch', 'train_loss'], [0, 1]])
        one = make_evaluated(summary=summary, args={'lr': 1})
        found = page(tmp_path, one, examples={'clean': torch.rand(2, 3, 8, 8)})
        headings = found.texts('h2')
        assert headings.index('Feature maps') < headings.index('Examples') < headings.index('Training curves')
        targets = [attributes['href'][1:] for tag, attributes, _ in found.elements if tag == 'a']
        assert targets == [attributes['id'] for tag, attributes, _ in found.elements if tag == 'section']
        assert found.texts('a') == headings

    def test_sections_without_content_are_left_out(self, tmp_path):
        found = page(tmp_path, make_evaluated())
        assert not {'Examples', 'Training curves', 'Arguments'} & set(found.texts('h2'))
        assert found.texts('a') == found.texts('h2')

    def test_arguments_that_differ_come_first(self, tmp_path):
        a, b = (make_evaluated(name, args={'lr': lr, 'model': 'm', **more}) for name, lr, more in
                [('a', 0.1, {}), ('b', 0.2, {'beta': 0.5})])  # fmt: skip
        first, folded = html(tmp_path, a, b).split('id="arguments"')[1].split('<details>')
        assert Page(first).texts('th', scope='row') == ['beta', 'lr']
        assert Page(first).texts('td')[:2] == ['–', '0.5']
        assert Page(folded).texts('th', scope='row') == ['model']

    def test_what_comes_from_outside_is_escaped(self, tmp_path):
        summary = write_summary(tmp_path / 'summary.csv', [['epoch', f'eval_{EVIL}'], [0, 1]])
        source = html(
            tmp_path,
            make_evaluated(EVIL, metrics={EVIL: 1.0, 'top1': 1.0}, model=EVIL, summary=summary, args={EVIL: EVIL}),
            make_evaluated(f'"{EVIL}', metrics={'top1': 2.0}, shown=EVIL, args={EVIL: 1}, spread=2.0),
            class_names=[EVIL, '語', '$\\frac$', '_'],
            examples={EVIL: torch.rand(1, 1, 4, 4)},
            data=EVIL,
            title=EVIL,
        )
        found = Page(source)
        assert 'script' not in {tag for tag, _, _ in found.elements}
        assert not any(name.startswith('on') for _, attributes, _ in found.elements for name in attributes)
        assert found.texts('title') == found.texts('h1') == [EVIL]
        assert f'{EVIL}: cohesion' in found.texts('th')

    @pytest.mark.parametrize('classes', [1, 2])
    @pytest.mark.parametrize('each', [1, 3])
    def test_few_classes_and_images(self, tmp_path, classes, each):
        metrics = {'loss': math.inf, 'top1': math.nan}
        found = page(tmp_path, make_evaluated(metrics=metrics, classes=classes, each=each, dim=1), class_names=['one'])
        assert found.texts('td')[:2] == ['∞', '–']

    def test_no_images_and_broken_features(self, tmp_path):
        none = Evaluated('none', {}, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        broken = Evaluated('broken', {}, torch.full((3, 6), torch.nan), torch.tensor([0, 5, 5]))
        assert page(tmp_path, none).texts('h1')
        assert page(tmp_path, none, broken, examples={'clean': torch.zeros(0, 3, 4, 4)}).texts('h3') == [
            'none',
            'broken',
        ]

    def test_names_the_nearest_class(self, tmp_path):
        one = make_evaluated()
        table = ClassTable(num_classes=4, feature_dim=5)
        table.update(one.features, one.targets)
        names = ['ant', 'bee', 'cat', 'dog']
        rows = Page(
            html(tmp_path, one, class_names=names).split('id="cohesion-of-the-classes"')[1].split('</table>')[0]
        )
        assert rows.texts('th', scope='row') == names
        assert rows.texts('td')[1::2] == [names[n] for n in table.compute()['nearest_class'].tolist()]

    def test_no_checkpoint_is_an_error(self, tmp_path):
        with pytest.raises(ValueError, match='at least one'):
            write_report(str(tmp_path), [])


def open_in_chromium(url, folder, *flags):
    """The page as the browser has built it, and what it logged."""
    quiet = ['--disable-gpu', '--disable-quic', '--no-first-run', '--disable-background-networking']
    quiet += ['--disable-component-update', '--disable-sync', '--no-sandbox', f'--user-data-dir={folder / "profile"}']
    command = [CHROMIUM, '--headless', *quiet, '--enable-logging=stderr', '--v=0', '--virtual-time-budget=5000', *flags]
    process = subprocess.run([*command, '--dump-dom', url], capture_output=True, text=True, timeout=120, check=True)
    return process.stdout, process.stderr


@pytest.fixture(scope='module')
def report(tmp_path_factory):
    folder = tmp_path_factory.mktemp('report')
    rows = [['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'lr'], [0, 3, 2, 50, 0.1], [1, 2, 1, 60, 0.05]]
    summary = write_summary(folder / 'summary.csv', rows)
    names = [EVIL, *(f'A_class_with_a_name_that_is_long_and_has_no_space_{c}' for c in range(29))]
    args = {'model': 'resnet18', 'output': '/a/long/path' * 20}
    evaluated = [
        make_evaluated(
            f'run {i} ' + 'with_a_long_name' * 4, summary=summary, classes=30, spread=i, args={**args, 'i': i}
        )
        for i in (1, 2, 3)
    ]
    return write_report(str(folder), evaluated, class_names=names, examples={'clean': torch.rand(8, 3, 8, 8)})


@pytest.mark.slow
@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium, to open the page in it')
class TestInBrowser:
    def test_opens_without_an_error(self, report, tmp_path):
        dom, log = open_in_chromium(f'file://{report}', tmp_path)
        assert 'Arguments that differ' in dom
        assert 'CONSOLE' not in log

    @pytest.mark.parametrize('width', [360, 1200])
    def test_is_not_wider_than_the_window(self, report, tmp_path, width):
        # A browser window cannot be as narrow as a phone, a frame in it can.
        measure = 'document.documentElement.scrollWidth + " " + [...document.images].every(i => i.naturalWidth > 0)'
        with open(report, encoding='utf-8') as file:
            source = re.sub('<meta http-equiv[^>]*>', '', file.read())  # which forbids the script
        script = f'<script>onload = () => parent.postMessage({measure}, "*")</script>'
        source = source.replace('</body>', f'{script}</body>').replace('<details>', '<details open>')
        (tmp_path / 'copy.html').write_text(source, encoding='utf-8')
        frame = f'<iframe src="copy.html" width="{width}" height="800"></iframe>'
        script = '<script>onmessage = event => document.body.dataset.measured = event.data</script>'
        (tmp_path / 'frame.html').write_text(f'<!DOCTYPE html><body>{script}{frame}</body>')
        dom, log = open_in_chromium(f'file://{tmp_path}/frame.html', tmp_path, '--window-size=1400,900')
        measured = re.search(r'data-measured="(\d+) (\w+)"', dom)
        assert measured is not None, log
        assert 300 < int(measured[1]) <= width
        assert measured[2] == 'true'
