import csv
import math
import re
import shutil
import subprocess

import pytest
import torch

from timm_synermix.metrics.class_moments import ClassTable
from timm_synermix.report import plots
from timm_synermix.report.html import format_number
from timm_synermix.report.report import Evaluated, _confused_pairs, _most_confused, _nearest_mean, write_report

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


def make_evaluated(name='run', *, metrics=None, summary=None, args=None, **kwargs):
    metrics = {'loss': 1.0, 'top1': 50.0, 'cosine_cohesion': 0.9} if metrics is None else metrics
    return Evaluated(name, metrics, *blobs(**kwargs), summary=summary, args=args or {})


def write_summary(path, rows):
    with open(path, 'w', newline='') as file:
        csv.writer(file).writerows(rows)
    return str(path)


def page(folder, *evaluated, **kwargs):
    with open(write_report(str(folder), evaluated, **kwargs), encoding='utf-8') as file:
        return file.read()


class TestFeatureMap:
    def test_panels_share_the_plane_whatever_the_scale(self):
        feature, target = blobs()
        figure = plots.feature_map([('a', feature, target), ('b', 3 * feature + 7, target), ('c', -feature, target)])
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
        points = drawn_points(plots.feature_map([('a', feature, target)]).axes[0])
        torch.testing.assert_close(points.abs(), expected.abs(), atol=1e-5, rtol=1e-5)

    def test_lengths_that_differ_are_told(self):
        figure = plots.feature_map([('a', *blobs(dim=5)), ('b', *blobs(dim=3))])
        assert 'own plane' in figure.get_suptitle()
        assert 'own plane' not in plots.feature_map([('a', *blobs()), ('b', *blobs())]).get_suptitle()

    def test_classes_are_spread_and_have_a_colour_each(self):
        feature, target = blobs(classes=40)
        (axis,) = plots.feature_map([('a', feature, target)], [f'class {c}' for c in range(40)], max_classes=4).axes
        assert [text.get_text() for text in axis.texts] == ['class 0', 'class 13', 'class 26', 'class 39']
        assert len({tuple(dots.get_facecolor()[0]) for dots in axis.collections}) == 4

    @pytest.mark.parametrize('classes', [1, 2, 12])
    @pytest.mark.parametrize('dim', [1, 2, 5])
    @pytest.mark.parametrize('spread', [0.0, 0.3])
    def test_small_sets(self, classes, dim, spread):
        feature, target = blobs(classes=classes, dim=dim, spread=spread)
        figure = plots.feature_map([('a', feature, target), ('b', feature.half(), target)], max_classes=12)
        assert drawn_points(figure.axes[0]).isfinite().all()
        plots.to_array(figure)

    def test_two_classes_spread_in_both_directions(self):
        points = drawn_points(plots.feature_map([('a', *blobs(classes=2, each=50))]).axes[0])
        assert (points.std(0) > 0.05).all()

    def test_what_is_not_finite_is_left_out(self):
        feature, target = blobs()
        feature[target == 1] = torch.nan
        feature[0] = torch.inf
        (axis,) = plots.feature_map([('a', feature, target)]).axes
        assert len(drawn_points(axis)) == 24 - 6 - 1
        (axis,) = plots.feature_map([('a', torch.full((2, 3), torch.nan), torch.tensor([0, 1]))]).axes
        assert axis.texts[0].get_text() == 'no features to draw'

    def test_without_images(self):
        figure = plots.feature_map([('a', torch.zeros(0, 3), torch.zeros(0, dtype=torch.int64))])
        assert figure.axes[0].texts[0].get_text() == 'no features to draw'

    def test_nothing_to_draw_is_an_error(self):
        with pytest.raises(ValueError, match='got 0 sets'):
            plots.feature_map([])

    def test_labels_do_not_overlap(self):
        places = plots._apart([[0.0, 0.0]] * 3 + [[50.0, 0.0]], ['abc'] * 4, 100.0)
        heights = sorted(y for _, y in places[:3])
        assert heights == pytest.approx([0, 4.2, 8.4])
        assert places[3] == [50.0, 0.0]


def test_pixels_are_those_of_the_figure():
    picture = plots.to_array(plots.feature_map([('a', *blobs())]), dpi=50)
    assert picture.dtype == 'uint8'
    assert picture.shape == (225, 200, 3)
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


def test_a_run_has_the_same_colour_in_every_curve():
    runs = [('a', [], []), ('_b', [0, 1], [1.0, math.inf]), ('c', [0], [2.0])]
    figure = plots.curve('loss', runs)
    assert [line.get_color() for line in figure.axes[0].lines] == ['C1', 'C2']
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ['_b', 'c']


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
        assert _nearest_mean(feature, target)[1].tolist() == expected
        feature[0] = torch.nan
        assert len(_nearest_mean(feature, target)[0]) == len(target) - 1

    def test_pairs_by_frequency(self):
        target, nearest = torch.tensor([[0, 1], [0, 0], [2, 1], [2, 1], [2, 2], [1, 1]]).T
        pairs = _most_confused(target, nearest)
        assert pairs == [(2, 1), (0, 1)]
        assert (
            _confused_pairs(pairs, target, nearest, ['a', 'b']) == '<ul><li>2 → b: 67 %</li><li>a → b: 50 %</li></ul>'
        )


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


class TestReport:
    def test_best_values_are_marked(self, tmp_path):
        a = make_evaluated('a', metrics={'loss': 1.0, 'top1': 50.0, 'intra_class_distance': 1.0, 'nc1': math.nan})
        b = make_evaluated('b', metrics={'loss': 2.0, 'top1': 60.0, 'intra_class_distance': 2.0, 'nc1': 1.0})
        html = page(tmp_path, a, b)
        assert re.findall(r'class="best">([^<]*)<', html) == ['1.000', '60.00']
        assert re.search(r'NC1\s↓</th><td>–</td><td>1.000</td>', html)
        assert 'class="best"' not in page(tmp_path, a)

    def test_is_one_file_and_its_pictures(self, tmp_path):
        summary = write_summary(
            tmp_path / 'summary.csv', [['epoch', 'train_loss', 'eval_top1'], [0, 1, 50], [1, 2, 60]]
        )
        images = {'clean': torch.rand(2, 3, 8, 8), 'mixed': torch.rand(2, 3, 8, 8)}
        html = page(tmp_path / 'new' / 'folder', make_evaluated(summary=summary, spread=2.0), examples=images)
        pictures = {path.name for path in (tmp_path / 'new' / 'folder').glob('*.png')}
        expected = ['curve_train_loss', 'curve_eval_top1', 'feature_maps', 'cohesion_0', 'confusion_0', 'examples']
        assert {f'{name}.png' for name in expected} == pictures
        assert html.count('src="data:image/png;base64,') == len(pictures) == html.count('alt="')
        assert not re.findall(r'(?:src|href)="(?!data:|#)', html)
        assert '<script' not in html

    def test_curves_of_incomplete_files(self, tmp_path):
        rows = [['epoch', 'train_loss', 'eval_nc1', 'lr', 'extra'], [0, 1.5, '', 0.1], [1, 'nan', '', 'x', 1, 2, 3], []]
        one = make_evaluated('a', summary=write_summary(tmp_path / 'a.csv', rows))
        two = make_evaluated('b', summary=write_summary(tmp_path / 'b.csv', [['train_loss'], [1]]))
        empty = make_evaluated('c', summary=write_summary(tmp_path / 'c.csv', []))
        lost = make_evaluated('d', summary=str(tmp_path / 'none.csv'))
        page(tmp_path, one, two, empty, lost)
        curves = {path.name for path in tmp_path.glob('curve_*.png')}
        assert curves == {'curve_train_loss.png', 'curve_lr.png', 'curve_extra.png'}

    def test_sections_without_content_are_left_out(self, tmp_path):
        html = page(tmp_path, make_evaluated())
        assert re.findall('<h2>(.*)</h2>', html) == [
            'Comparison',
            'Feature maps',
            'Cohesion of the classes',
            'Confusion of nearest classes',
        ]

    def test_arguments_that_differ_come_first(self, tmp_path):
        a, b = (make_evaluated(name, args={'lr': lr, 'model': 'm', **more}) for name, lr, more in
                [('a', 0.1, {}), ('b', 0.2, {'beta': 0.5})])  # fmt: skip
        first, folded = page(tmp_path, a, b).split('id="arguments"')[1].split('<details>')
        assert re.findall('<th scope="row">(.*?)</th>', first) == ['beta', 'lr']
        assert '<td>–</td><td>0.5</td>' in first
        assert re.findall('<th scope="row">(.*?)</th>', folded) == ['model']

    def test_what_comes_from_outside_is_escaped(self, tmp_path):
        summary = write_summary(tmp_path / 'summary.csv', [['epoch', f'eval_{EVIL}'], [0, 1]])
        html = page(
            tmp_path,
            make_evaluated(EVIL, metrics={EVIL: 1.0}, summary=summary, args={EVIL: EVIL}, spread=2.0),
            make_evaluated(f'"{EVIL}', args={EVIL: 1}),
            class_names=[EVIL, '語', '$\\frac$', '_'],
            examples={EVIL: torch.rand(1, 1, 4, 4)},
            title=EVIL,
        )
        assert '<script' not in html.lower()
        assert html.count('&lt;script&gt;') > 10

    @pytest.mark.parametrize('classes', [1, 2])
    @pytest.mark.parametrize('each', [1, 3])
    def test_few_classes_and_images(self, tmp_path, classes, each):
        metrics = {'loss': math.inf, 'top1': math.nan}
        html = page(tmp_path, make_evaluated(metrics=metrics, classes=classes, each=each, dim=1), class_names=['one'])
        assert '>∞</td>' in html

    def test_no_images_and_broken_features(self, tmp_path):
        none = Evaluated('none', {}, torch.zeros(0, 4), torch.zeros(0, dtype=torch.int64))
        broken = Evaluated('broken', {}, torch.full((3, 6), torch.nan), torch.tensor([0, 5, 5]))
        page(tmp_path, none)
        page(tmp_path, none, broken, examples={'clean': torch.zeros(0, 3, 4, 4)})

    def test_names_the_nearest_class(self, tmp_path):
        one = make_evaluated()
        table = ClassTable(num_classes=4, feature_dim=5)
        table.update(one.features, one.targets)
        names = ['ant', 'bee', 'cat', 'dog']
        rows = re.findall(
            r'<th scope="row">(\w+)</th><td>[\d.]+</td><td>(\w+)</td>', page(tmp_path, one, class_names=names)
        )
        assert rows == [(names[c], names[n]) for c, n in enumerate(table.compute()['nearest_class'].tolist())]

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


@pytest.mark.skipif(CHROMIUM is None, reason='needs Chromium')
class TestInBrowser:
    @pytest.fixture
    def report(self, tmp_path):
        rows = [['epoch', 'train_loss', 'eval_loss', 'eval_top1', 'lr'], [0, 3, 2, 50, 0.1], [1, 2, 1, 60, 0.05]]
        summary = write_summary(tmp_path / 'summary.csv', rows)
        names = [EVIL, *(f'A_class_with_a_name_that_is_long_and_has_no_space_{c}' for c in range(29))]
        args = {'model': 'resnet18', 'output': '/a/long/path' * 20}
        evaluated = [
            make_evaluated(
                f'run {i} ' + 'with_a_long_name' * 4, summary=summary, classes=30, spread=i, args={**args, 'i': i}
            )
            for i in (1, 2, 3)
        ]
        return write_report(str(tmp_path), evaluated, class_names=names, examples={'clean': torch.rand(8, 3, 8, 8)})

    def test_opens_without_an_error(self, report, tmp_path):
        dom, log = open_in_chromium(f'file://{report}', tmp_path)
        assert 'Arguments that differ' in dom
        assert 'CONSOLE' not in log

    @pytest.mark.parametrize('width', [360, 1200])
    def test_is_not_wider_than_the_window(self, report, tmp_path, width):
        # A browser window cannot be as narrow as a phone, a frame in it can.
        measure = 'document.documentElement.scrollWidth + " " + [...document.images].every(i => i.naturalWidth > 0)'
        with open(report, encoding='utf-8') as file:
            html = re.sub('<meta http-equiv[^>]*>', '', file.read())  # which forbids the script
        html = html.replace('</body>', f'<script>onload = () => parent.postMessage({measure}, "*")</script></body>')
        (tmp_path / 'copy.html').write_text(html.replace('<details>', '<details open>'), encoding='utf-8')
        frame = f'<iframe src="copy.html" width="{width}" height="800"></iframe>'
        script = '<script>onmessage = event => document.body.dataset.measured = event.data</script>'
        (tmp_path / 'frame.html').write_text(f'<!DOCTYPE html><body>{script}{frame}</body>')
        dom, log = open_in_chromium(f'file://{tmp_path}/frame.html', tmp_path, '--window-size=1400,900')
        measured = re.search(r'data-measured="(\d+) (\w+)"', dom)
        assert measured is not None, log
        assert 300 < int(measured[1]) <= width
        assert measured[2] == 'true'
