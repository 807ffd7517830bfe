"""train.py under the launchers people use, in processes of its own."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import timm
import torch
from conftest import ROOT, SMALL
from processes import run_ranks, run_script, start
from timm.data import create_dataset, create_loader, resolve_data_config

from timm_synermix import FeatureHook
from timm_synermix.engine.accelerator import take_slurm_ranks
from timm_synermix.metrics.collection import CohesionMeter

TORCHRUN = ['-m', 'torch.distributed.run', '--nproc_per_node', '2', '--master_port', '0', '--standalone']
# Runs train.py and has every rank write its weights and what its evaluation counted.
SPY = """
import sys, torch, torch.distributed as dist, train
original = train.evaluate_task
def evaluate_task(run):
    metrics = original(run)
    state = {**run.trained.task.get_checkpoint_state(), **run.trained.task.get_checkpoint_state(ema=True)}
    path = f'{sys.argv[sys.argv.index("--output") + 1]}/rank{run.args.rank}.pt'
    torch.save({**state, 'metrics': metrics, 'cohesion': run.evaluation.cohesion.metrics, 'steps': steps}, path)
    return metrics
train.evaluate_task = evaluate_task
from timm_synermix.engine.progress import LossMeter
steps, update = 0, LossMeter.update
def count(self, *args):
    global steps
    steps += 1
    update(self, *args)
LossMeter.update = count
train.main()
"""


def launch(command, timeout=180, **env):
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1', **env}
    return subprocess.run(
        [sys.executable, *map(str, command)], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout
    )


def flags(image_folder, output):
    return [
        *SMALL, '--data-dir', image_folder, '--num-classes', '4', '--output', output, '--experiment', 'run',
        '--val-split', 'train', '--synermix',
    ]  # fmt: skip


def cohesion_in_one_process(state_dict, image_folder):
    """Of the training images, each once: a padded sampler's extra image would count as a twentieth."""
    model = timm.create_model('test_efficientnet', num_classes=4).eval()
    model.load_state_dict(state_dict)
    dataset = create_dataset('', root=str(image_folder), split='train')
    config = resolve_data_config(model=model)
    names = ('mean', 'std', 'interpolation', 'crop_pct')
    loader = create_loader(
        dataset, (3, 32, 32), 8, num_workers=0, use_prefetcher=False, **{name: config[name] for name in names}
    )
    meter, hook = CohesionMeter(4), FeatureHook(model)
    with torch.no_grad():
        for x, y in loader:
            meter.update(hook(x)[1], y)
    return meter.compute().metrics


TRAINED = [
    ['--mixup', '0.5', '--model-ema', '--report'],
    ['--grad-accum-steps', '2', '--synermix-gather'],
    pytest.param(
        ['--manifold-mixup', '1', '--torchcompile', 'eager', '--synermix-batch', 'fixed', '--model-ema'],
        marks=pytest.mark.slow,
    ),
    ['--cutmix', '1', '--synermix-singletons', 'bank', '--grad-accum-steps', '2'],
]


def train_two_processes(image_folder, tmp_path, extra, torchrun=False):
    """The two are one run: they share weights, averages, metrics and files."""
    (tmp_path / 'spy.py').write_text(SPY)
    command = [tmp_path / 'spy.py', *flags(image_folder, tmp_path), *extra, '-b', '4']
    if torchrun:
        process = launch([*TORCHRUN, *command])
        assert process.returncode == 0, process.stderr[-3000:]
        output = process.stdout
    else:
        run_ranks(run_script, *command, folder=tmp_path)
        output = ''.join(path.read_text() for path in tmp_path.glob('rank*.log'))
    assert output.count('--result') == 1
    ranks = [torch.load(tmp_path / f'rank{rank}.pt', weights_only=False) for rank in (0, 1)]
    assert ranks[0]['steps'] == ranks[1]['steps'] == 3  # 10 images of 19 on each rank, in batches of 4
    for key in {'state_dict', 'state_dict_ema'} & ranks[0].keys():
        for name, value in ranks[0][key].items():
            assert torch.equal(value, ranks[1][key][name]), name  # BatchNorm statistics are averaged too
    assert ('state_dict_ema' in ranks[0]) == ('--model-ema' in extra)
    assert ranks[0]['metrics'] == ranks[1]['metrics']
    assert ranks[0]['cohesion'] == pytest.approx(ranks[1]['cohesion'], nan_ok=True)
    if 'state_dict_ema' not in ranks[0]:
        assert ranks[0]['cohesion'] == pytest.approx(
            cohesion_in_one_process(ranks[0]['state_dict'], image_folder), 1e-3
        )
    correct = ranks[0]['metrics']['top1'] * 19 / 100
    assert correct == pytest.approx(round(correct), abs=1e-6)  # 19 images are counted, the sampler's 20th is not
    assert {path.name for path in (tmp_path / 'run').iterdir()} >= {'summary.csv', 'last.pth.tar'}
    assert (tmp_path / 'run' / 'report' / 'report.html').exists() == ('--report' in extra)


@pytest.mark.parametrize('extra', TRAINED, ids=lambda extra: extra[0])
def test_two_processes_train_one_model(image_folder, tmp_path, extra):
    train_two_processes(image_folder, tmp_path, extra)


@pytest.mark.slow
@pytest.mark.parametrize('extra', [TRAINED[0], [*TRAINED[3], '--torchcompile', 'eager']], ids=lambda extra: extra[0])
def test_torchrun_trains_one_model(image_folder, tmp_path, extra):
    train_two_processes(image_folder, tmp_path, extra, torchrun=True)


@pytest.mark.slow
def test_two_machines_train_one_model(image_folder, tmp_path, free_port):
    """Two launches of one process each that meet on a port, as on two hosts."""
    (tmp_path / 'spy.py').write_text(SPY)
    node = [sys.executable, '-m', 'torch.distributed.run', '--nnodes', '2', '--nproc_per_node', '1']
    node += ['--master_addr', '127.0.0.1', '--master_port', free_port, '--node_rank']
    run = [tmp_path / 'spy.py', *flags(image_folder, tmp_path), '-b', '4']
    env = {**os.environ, 'PYTHONPATH': str(ROOT), 'OMP_NUM_THREADS': '1'}
    nodes = [
        subprocess.Popen([*map(str, [*node, rank, *run])], cwd=ROOT, env=env, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        for process in nodes:
            _, stderr = process.communicate(timeout=180)
            assert process.returncode == 0, stderr[-3000:]
    finally:
        for process in nodes:
            process.kill()
    first, second = (torch.load(tmp_path / f'rank{rank}.pt', weights_only=False) for rank in (0, 1))
    for name, value in first['state_dict'].items():
        assert torch.equal(value, second['state_dict'][name]), name
    assert first['metrics'] == second['metrics']
    assert first['steps'] == second['steps'] == 3


def start_by_slurm(image_folder, folder, port, *extra, **env):
    """Two processes of one srun, on a node each, as Slurm starts them."""
    command = [ROOT / 'train.py', *flags(image_folder, folder), '-b', '4', *extra]
    env |= dict(SLURM_NTASKS='2', SLURM_LOCALID='0', MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    return [
        start(run_script, *command, log=folder / f'rank{rank}.log', SLURM_PROCID=str(rank), **env) for rank in (0, 1)
    ]


@pytest.mark.slow
def test_slurm_starts_one_run_and_stops_it_ahead_of_the_limit(image_folder, tmp_path, free_port):
    """srun starts the processes, SIGUSR1 stops them after a step, and the requeued job goes on and ends."""
    lengthy = ['--epochs', '10000', '--resume', 'auto']
    processes = start_by_slurm(image_folder, tmp_path, free_port, *lengthy, SLURM_STEP_NUM_TASKS='2')
    try:
        deadline = time.time() + 120
        while not (tmp_path / 'run' / 'last.pth.tar').exists() and time.time() < deadline:
            time.sleep(0.05)
        os.kill(processes[1].pid, signal.SIGUSR1)
        for process in processes:
            process.join(timeout=60)
            assert process.exitcode == 128 + signal.SIGUSR1
    finally:
        for process in processes:
            process.kill()
    text = (tmp_path / 'rank0.log').read_text()
    assert '2 process(es) on cpu' in text
    assert 'Interrupted. The last good checkpoint is ' in text
    assert 'Traceback' not in text + (tmp_path / 'rank1.log').read_text()
    checkpoint = next((tmp_path / 'run').glob('recovery-*'), tmp_path / 'run' / 'last.pth.tar')
    done = torch.load(checkpoint, weights_only=False)['saver']['run']['epoch']

    lengthy[1] = str(done + 1)
    processes = start_by_slurm(image_folder, tmp_path, free_port, *lengthy)  # SLURM_NTASKS alone, as timm reads it
    try:
        for process in processes:
            process.join(timeout=120)
            assert process.exitcode == 0
    finally:
        for process in processes:
            process.kill()
    with open(tmp_path / 'run' / 'summary.csv') as file:
        assert sum(1 for _ in file) == 1 + done + 1  # every epoch once


@pytest.mark.parametrize(
    ('environment', 'expected'),
    [
        (dict(SLURM_STEP_NUM_TASKS='4', SLURM_PROCID='3', SLURM_LOCALID='1'), ('4', '3', '1')),
        (dict(SLURM_NTASKS='4', SLURM_PROCID='3', SLURM_LOCALID='1'), ('4', '3', '1')),
        (dict(SLURM_STEP_NUM_TASKS='1', SLURM_NTASKS='4', SLURM_PROCID='0', SLURM_LOCALID='0'), (None, None, None)),
        (dict(SLURM_NTASKS='4'), (None, None, None)),  # a shell of salloc
        (dict(WORLD_SIZE='8', RANK='5', SLURM_STEP_NUM_TASKS='2', SLURM_PROCID='1'), ('8', '5', None)),  # torchrun
    ],
)
def test_ranks_from_slurm(monkeypatch, environment, expected):
    names = ('WORLD_SIZE', 'RANK', 'LOCAL_RANK')
    for name in names:
        monkeypatch.setenv(name, '')  # and so put back at the end
        monkeypatch.delenv(name)
    for name, value in {**environment, 'MASTER_ADDR': 'host', 'MASTER_PORT': '29500'}.items():
        monkeypatch.setenv(name, value)
    take_slurm_ranks()
    assert tuple(map(os.environ.get, names)) == expected


@pytest.mark.parametrize('missing', ['MASTER_ADDR', 'MASTER_PORT'])
def test_slurm_must_say_where_to_meet(run_train, monkeypatch, capsys, missing, tmp_path):
    environment = dict(MASTER_ADDR='host', MASTER_PORT='29500')
    environment.pop(missing)
    for name, value in dict(SLURM_STEP_NUM_TASKS='2', SLURM_PROCID='0', SLURM_LOCALID='0', **environment).items():
        monkeypatch.setenv(name, value)
    with pytest.raises(SystemExit) as error:
        run_train('--synermix')
    assert error.value.code == 2
    assert f'srun has started 2 processes, which do not know where to meet: set {missing}' in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


def test_a_process_beside_srun_trains_alone(run_train, monkeypatch):
    """python in a batch file, or accelerate launch: the job has several tasks, but this is none of them."""
    for name, value in dict(SLURM_NTASKS='2', SLURM_PROCID='0', SLURM_LOCALID='0').items():
        monkeypatch.setenv(name, value)
    assert run_train('--synermix').summary()


@pytest.mark.parametrize('name', ['WORLD_SIZE', 'SLURM_STEP_NUM_TASKS', 'OMPI_COMM_WORLD_SIZE'])
def test_processes_that_would_train_copies_are_refused(run_train, monkeypatch, capsys, name):
    monkeypatch.setenv(name, '2')  # without the rank that a launcher would give
    with pytest.raises(SystemExit) as error:
        run_train('--synermix')
    assert error.value.code == 2
    message = capsys.readouterr().err
    assert f'{name} asks for 2 processes' in message
    assert 'start them with srun, torchrun or accelerate launch' in message


@pytest.mark.parametrize('kind', ['FSDP', 'DEEPSPEED', 'MEGATRON_LM'])
def test_what_accelerate_launch_says_of_shards_is_refused(run_train, monkeypatch, capsys, tmp_path, kind):
    monkeypatch.setenv(f'ACCELERATE_USE_{kind}', 'true')
    with pytest.raises(SystemExit) as error:
        run_train('--synermix')
    assert error.value.code == 2
    assert f"{kind} in Accelerate's configuration is not supported" in capsys.readouterr().err
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_sharded_models_are_refused(image_folder, tmp_path):
    config = tmp_path / 'accelerate.yaml'
    config.write_text(
        'compute_environment: LOCAL_MACHINE\ndistributed_type: FSDP\nuse_cpu: true\nnum_machines: 1\n'
        'num_processes: 2\nfsdp_config:\n  fsdp_version: 2\n'
    )
    launcher = ['-m', 'accelerate.commands.launch', '--config_file', config, '--main_process_port', '0']
    process = launch([*launcher, ROOT / 'train.py', *flags(image_folder, tmp_path)])
    assert process.returncode != 0
    assert "FSDP in Accelerate's configuration is not supported" in process.stderr
    assert not (tmp_path / 'run').exists()


@pytest.mark.slow
def test_accelerate_launch_and_its_configuration(image_folder, tmp_path):
    config = tmp_path / 'accelerate.yaml'
    config.write_text(
        'compute_environment: LOCAL_MACHINE\ndistributed_type: "NO"\nuse_cpu: true\nmixed_precision: bf16\n'
    )
    run = flags(image_folder, tmp_path)
    run.remove('--device'), run.remove('cpu')  # the launcher says so
    process = launch(['-m', 'accelerate.commands.launch', '--config_file', config, ROOT / 'train.py', *run])
    assert process.returncode == 0, process.stderr[-3000:]
    assert json.loads(process.stdout.rpartition('--result\n')[2])[0]['train']['intra_loss'] > 0


def test_python_alone_and_ctrl_c(image_folder, tmp_path):
    """A person stops a run in the middle of an epoch."""
    command = [ROOT / 'train.py', *flags(image_folder, tmp_path), '--epochs', '10000']
    process = start(run_script, *command, log=tmp_path / 'log')
    try:
        deadline = time.time() + 120
        while not (tmp_path / 'run' / 'last.pth.tar').exists() and time.time() < deadline:
            time.sleep(0.05)
        os.kill(process.pid, signal.SIGINT)
        process.join(timeout=60)
        assert process.exitcode == 130
    finally:
        process.kill()
    text = (tmp_path / 'log').read_text()
    assert 'Interrupted. The last good checkpoint is ' in text
    assert 'Traceback' not in text
