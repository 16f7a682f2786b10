"""Everything that can be checked in two minutes on a CPU: python -m pytest test_smoke.py

The training scripts end to end on tiny data, the method against the papers' formulas, the networks against the
reference implementations (keys, shapes, recorded outputs), losses, hostile files, commands, the documents' snippets.
"""

import argparse
import copy
import functools
import hashlib
import http.server
import importlib
import itertools
import json
import multiprocessing
import os
import pickle
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import scipy.special
import torch
import torch.nn.functional as F
from PIL import Image
from torch import nn
from torch.testing import assert_close
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers
from torchvision.transforms.functional import pil_to_tensor

import fid
import losses
import models
from losses import DCDLoss, PerceptualLoss, PixelLoss
from models import (
    BigGANDiscriminator,
    BigGANGenerator,
    PatchDiscriminator,
    ResnetGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    UnetGenerator,
)

HERE = Path(models.__file__).parent
ENVIRONMENT = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
torch.set_num_threads(1)  # tiny tensors; two threads that wait for each other are slower than one


def same(a, b):
    """Equality of nested containers of tensors, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


def flat(tensors):
    return torch.cat([tensor.flatten() for tensor in tensors])


def load(net, state_dict):
    net.load_state_dict(state_dict)
    return net


def fails(message, function, *args):
    """Calls the function, which has to raise ValueError, as InputError is, with a message of one line that matches."""
    with pytest.raises(ValueError, match=message) as error:
        function(*args)
    assert "\n" not in str(error.value)


@pytest.fixture(autouse=True)
def own_folder(tmp_path, monkeypatch):
    """Every test runs in an empty folder: a path without a root lies there."""
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """The address of a server of tmp_path/web; torch hub's cache is empty."""
    (tmp_path / "web").mkdir()
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    handler = functools.partial(http.server.SimpleHTTPRequestHandler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}"
        running.shutdown()


def save_random(net, path):
    """Writes a network's weights, random ones that keep the size of activations."""
    generator = torch.Generator().manual_seed(0)
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
    torch.save(net.state_dict(), path)
    return path


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    return save_random(fid.FIDInceptionV3(), tmp_path_factory.mktemp("weights") / "inception.pth")


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """VGG16's as torchvision's file has them, with a layer that the loss does not use."""
    net = nn.ModuleDict(dict(features=make_layers(cfgs["D"])[:23], classifier=nn.Linear(1, 1)))
    return save_random(net, tmp_path_factory.mktemp("weights") / "vgg16.pth")


def save_noise(folder, count, size):
    """Writes pictures 0.png, 1.png .. of (width, height) into a new folder."""
    os.makedirs(folder, exist_ok=True)
    for i in range(count):
        Image.effect_noise(size, 90).save(f"{folder}/{i}.png")


# ----------------------------------------------------------------------------------------------------------------------
# The training scripts end to end: tiny networks, two or three pictures in a folder, eight or nine steps

DCD = "--teacher-ngf 4 --student-ngf 2 --ndf 4 --crop-size 32 --tap-size 32 --batch-size 1"
DCD += " --epochs 2 --epochs-decay 2 --lambda-style 0 --lambda-feature 0 --ema 10 --teacher-every 2"
DGL = "--batch-size 4 --teacher-kimg 0.012 --stage1-kimg 0.012 --stage2-kimg 0.012 --eval-images 20"
STYLEGAN2 = "--size 8 --style-dim 8 --n-mlp 2 --teacher-width 0.0156 --student-width 0.0078 --student-d-width 0.01"
BIGGAN = "--size 32 --dim-z 8 --shared-dim 4 --attention 0 --teacher-ch 2 --student-ch 1 --student-d-ch 2"
OPTIONS = {
    "cyclegan_dcd": f"{DCD} --pool-size 3",
    "pix2pix_dcd": DCD,
    "stylegan2_dgl": f"{STYLEGAN2} {DGL} --ema-kimg 0.01 --r1-every 2 --path-every 2",
    "biggan_dgl": f"{BIGGAN} {DGL} --accumulate 1 --ema-start 2",
}
COMMON = "--workers 0 --device cpu --log-every 1 --sample-every 0 --eval-every 0 --inception none"
FOLDERS = {
    "cyclegan_dcd": ["trainA", "trainB", "testA", "testB"],
    "pix2pix_dcd": ["train", "val"],
    "stylegan2_dgl": ["."],
    "biggan_dgl": ["x", "y"],
}
SCRIPTS = {name: importlib.import_module(f"train_{name}") for name in OPTIONS}
every_script = pytest.mark.parametrize("name", OPTIONS)
dcd_scripts = pytest.mark.parametrize("name", ["cyclegan_dcd", "pix2pix_dcd"])
dgl_scripts = pytest.mark.parametrize("name", ["stylegan2_dgl", "biggan_dgl"])


def by_kind(name, dcd, dgl):
    return dcd if "dcd" in name else dgl


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Tiny data sets in the layouts of the scripts."""
    root = tmp_path_factory.mktemp("data")
    for name, folders in FOLDERS.items():
        for folder in folders:
            save_noise(root / name / folder, by_kind(name, 2, 3), (80, 36))
    return root


def arguments(name, data, out, *options):
    words = [f"--data {data / name} --out {out}", OPTIONS[name], COMMON, *map(str, options)]
    return " ".join(words).split()


def run(name, data, out, *options):
    """Runs a script in this process -> the lines of its log."""
    SCRIPTS[name].main(arguments(name, data, out, *options))
    return log_lines(out)


def resume(name, out, *options):
    SCRIPTS[name].main(" ".join([f"--out {out} --resume", *options]).split())
    return log_lines(out)


def log_lines(out):
    """Of the log without the times."""
    lines = [json.loads(line) for line in Path(out, "log.jsonl").read_text().splitlines()]
    timed = ("images_per_second", "hours_left")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def checkpoint(out):
    return models.load_file(Path(out, "checkpoint.pt"))


def first_moments(out, role):
    """Adam's running means of a run's gradients, of all parameters of an optimiser, as a vector."""
    states = checkpoint(out)["optimizers"][role]["state"].values()
    return flat(state["exp_avg"] for state in states)


def weights(out):
    """{name: state dict} of the networks in a run's checkpoint."""
    return {name: record["state_dict"] for name, record in checkpoint(out)["networks"].items()}


def run_files(out):
    return {path.name: models.load_file(path) for path in Path(out).glob("*.pt")}


def same_runs(a, b):
    """Whether two runs have the same log, and the same tensors in all their files."""
    return same(run_files(a), run_files(b)) and log_lines(a) == log_lines(b)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """The folder of a script's finished run, by name; for reading alone."""

    @functools.cache
    def folder(name):
        out = tmp_path_factory.mktemp("finished") / name
        run(name, data, out)
        return out

    return folder


@pytest.mark.usefixtures("pair")  # from here on it runs beside the tests, on the second core
@every_script
def test_a_whole_run(name, data, finished):
    """The log and the files of a run; evaluations and samples leave it alone."""
    out = "run"
    run(name, data, out, "--sample-every 3 --eval-every 6 --max-steps 4")
    lines = resume(name, out)
    steps = [line["step"] for line in lines if "evaluation" not in line]
    assert steps == list(range(1, by_kind(name, 9, 10)))
    samples = by_kind(
        name,
        "0000003 0000004 0000006 0000008",
        "stage0_0000003 stage1_0000004 stage1_0000006 stage2_0000009",
    )
    assert sorted(path.stem for path in Path(out).glob("samples/*.png")) == samples.split()
    nets = weights(out)
    assert same(weights(finished(name)), nets)
    for file in ("student.pt", "checkpoint.pt"):
        student = models.load_generator(f"{out}/{file}")
        assert same(student.state_dict(), nets[by_kind(name, "student_G_ema", "student_g_ema")])


class SmallInception(nn.Module):
    """In place of Inception, whose own weights can't be had; distances of its 2048 features take seconds."""

    def __init__(self):
        super().__init__()
        self.fc = nn.Linear(12, 5).requires_grad_(False)

    def forward(self, images):
        features = F.adaptive_avg_pool2d(fid.bilinear(images), 2).flatten(1)
        return features, self.fc(features)


@pytest.fixture
def small_inception(monkeypatch):
    net = SmallInception()
    monkeypatch.setattr(fid, "load_inception", lambda weights, *_: {"small": net}[weights])


@every_script
def test_evaluation(name, data, small_inception):
    options = "--max-steps 2 --eval-every 9 --inception small"
    scores = run(name, data, "run", options, by_kind(name, "", "--teacher-kimg 0 --stage2-kimg 0"))[-1]
    more = dict(cyclegan_dcd="student_to_teacher", pix2pix_dcd="psnr_teacher", biggan_dgl="is_student")
    assert scores["fid_student"] > 0 and more.get(name, "step") in scores
    students = [models.load_generator(f"run/{file}.pt").state_dict() for file in ("best_student", "student")]
    assert same(*students)
    os.remove("run/best_student.pt")
    log = Path("run/log.jsonl")
    log.write_text(log.read_text().replace(f'"fid_student": {scores["fid_student"]}', '"fid_student": 0.0'))
    assert resume(name, "run")[-1]["fid_student"] > 0 and not os.path.exists("run/best_student.pt")


def measured(printed):
    """{name: value}, of what fid.py has printed."""
    return {name: json.loads(value) for name, value in re.findall("^(images|fid|kid|is) (.*)", printed, re.MULTILINE)}


def test_translations_score_as_the_log_says(small_inception, capsys):
    """Of square pictures, by the README's two commands; models.py brings them to the size of training."""
    for folder in FOLDERS["cyclegan_dcd"]:
        save_noise(f"cyclegan_dcd/{folder}", 2, (50, 50))
    scores = run("cyclegan_dcd", Path(), "run", "--max-steps 2 --eval-every 9 --inception small")[-1]
    models.main("run/student.pt cyclegan_dcd/testA translated --device cpu".split())
    assert "shorter sides of 32 pixels" in capsys.readouterr().out
    fid.main("translated cyclegan_dcd/testB --size 32 --kid --device cpu --workers 0 --weights small".split())
    found = measured(capsys.readouterr().out)
    assert found["fid"] == pytest.approx(scores["fid_student"], rel=1e-4) and found["images"] == [2, 2]
    assert abs(found["kid"]) < 1


@every_script
def test_toy(name):
    SCRIPTS[name].main("--toy --out run --max-steps 1 --batch-size 1 --device cpu".split())
    args = json.loads(Path("run/args.json").read_text())
    expected = SCRIPTS[name].TOY | dict(batch_size=1)
    assert expected.items() <= args.items()
    assert len(list(Path("run/toy_data").rglob("*.png"))) >= 100


def refused(capsys, program, words):
    """A program's main, which has to end with one line on stderr and status 2 -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        importlib.import_module(program).main(words)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith(f"{program}.py: error: ")
    return error


@every_script
def test_resume_is_exact(name, data, finished, tmp_path, monkeypatch):
    """Cut by a signal in an epoch, in a stage and between two; workers change nothing, nor later lines of the log."""
    log = models.log
    for cut in by_kind(name, (3,), (3, 7)):
        out = tmp_path / f"cut_{cut}"

        def log_and_kill(args, entry, cut=cut):
            log(args, entry)
            if entry["step"] == cut:
                os.kill(os.getpid(), signal.SIGTERM)

        with monkeypatch.context() as patch, pytest.raises(SystemExit, match=str(128 + signal.SIGTERM)):
            patch.setattr(models, "log", log_and_kill)
            run(name, data, out, "--workers 2")
        assert checkpoint(out)["step"] == cut
        with open(out / "log.jsonl", "a") as file:
            file.write('{"step": 8, "from": "after the checkpoint"}\n{"step": 8, "torn')
        resume(name, out, "--workers 1")
        assert same_runs(finished(name), out)


def test_a_run_without_a_checkpoint_starts_again(data, finished, capsys):
    run("stylegan2_dgl", data, "run", "--max-steps 1")
    os.remove("run/checkpoint.pt")
    resume("stylegan2_dgl", "run")
    assert "no checkpoint yet, the run starts from its beginning" in capsys.readouterr().out
    assert same_runs(finished("stylegan2_dgl"), "run")


@every_script
def test_longer_training(name, data, finished, capsys):
    """A changed budget is in the log, and the schedule follows; what cannot change is refused."""
    shutil.copytree(finished(name), "run")
    key, more, step = by_kind(name, ("epochs_decay", 3, 8), ("stage2_kimg", 0.016, 9))
    lines = resume(name, "run", f"--{key.replace('_', '-')} {more}")
    assert lines[step] == {"step": step, key: more} and lines[-1]["step"] == 10
    if "dcd" in name:
        assert [line["lr"] for line in lines[9:]] == pytest.approx([2e-4 * 2 / 7, 2e-4 * 1 / 7])
    assert "args.json: would be overwritten" in refused(capsys, f"train_{name}", arguments(name, data, "run"))
    refusals = by_kind(
        name,
        {"--seed 3": "the run has --seed 0, not 3", "--epochs 1": "has already been trained for 5 epochs"},
        {
            "--stage1-kimg 3": "--stage1-kimg 0.012, not 3",
            "--stage2-kimg 0.004": "stage 2 has already been longer than that",
        },
    )
    for options, message in refusals.items():
        assert message in refused(capsys, f"train_{name}", f"--out run --resume {options}".split())


def start(command, environment=ENVIRONMENT):
    pipe = subprocess.PIPE
    return subprocess.Popen(command, env=environment, stdout=pipe, stderr=pipe, text=True, start_new_session=True)


def test_a_signal_lets_the_step_finish(data):
    """Sent to the group, workers too, as a terminal does; what goes on is the run that was left alone, to the bit."""
    options = "--epochs 9999 --log-every 2"
    endless = arguments("cyclegan_dcd", data, "cut", options, "--save-every 9999 --workers 1")
    process = start([sys.executable, HERE / "train_cyclegan_dcd.py", *endless])
    while "step 4 " not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGINT)
    said, err = process.communicate(timeout=120)
    step = checkpoint("cut")["step"]
    assert step >= 4 and f"stopped after step {step}, saved; go on: --out" in said
    assert process.returncode == 128 + signal.SIGINT and err == "finishing the step and saving\n"
    resume("cyclegan_dcd", "cut", f"--max-steps {step + 3} --workers 0")
    run("cyclegan_dcd", data, "whole", options, f"--max-steps {step + 3}")
    assert same_runs("whole", "cut")


def save_forever():
    for i in itertools.count():
        models.save_checkpoint("checkpoint.pt", {}, {}, {}, i=i, bulk=torch.full((10**6,), i))


def test_kill_9_while_saving_leaves_a_whole_file():
    process = multiprocessing.get_context("fork").Process(target=save_forever, daemon=True)
    process.start()
    while not os.path.exists("checkpoint.pt"):
        assert process.is_alive()
        time.sleep(0.01)
    time.sleep(0.05)
    process.kill()
    process.join()
    content = models.load_file("checkpoint.pt")
    assert (content["bulk"] == content["i"]).all()


def test_what_cannot_be_saved_keeps_the_old_checkpoint():
    net = nn.Linear(10, 10)
    save = functools.partial(models.save_checkpoint, "checkpoint.pt", {"net": net}, {}, {})
    save(step=1)
    os.symlink("/dev/full", "checkpoint.pt.tmp")  # what is written there finds the disk full
    with pytest.raises(OSError, match="not written, what was there stays"):
        save(step=2)
    net.weight.data.fill_(torch.nan)
    with pytest.raises(SystemExit, match="diverged, net is not finite; the last checkpoint stays"):
        save(step=2)
    assert models.load_file("checkpoint.pt")["step"] == 1 and os.listdir() == ["checkpoint.pt"]


# Both processes run all scripts of the list, the second from other weights, and write down a hash of their networks.
TWO = """
import hashlib, importlib, json, os, sys, time
import models
rank, networks, broadcast = int(os.environ["RANK"]), [], models.broadcast_weights
def broadcast_weights(given):
    networks[:] = given
    for net in networks:
        for parameter in net.parameters():
            parameter.data.add_(rank)
    broadcast(networks)
models.broadcast_weights = broadcast_weights
for port, name, arguments in json.loads(sys.argv[1]):
    os.environ["MASTER_PORT"] = port
    importlib.import_module(name).main(arguments)
    content = b"".join(v.numpy().tobytes() for net in networks for v in net.state_dict().values())
    print(hashlib.sha256(content).hexdigest(), file=sys.stderr)
    while name != "fid" and not os.path.exists(arguments[arguments.index("--out") + 1] + "/summary.json"):
        time.sleep(0.05)  # rank 0 writes it last
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return str(found.getsockname()[1])


PLAIN = "--distill pixel --teacher-every 1 --pool-size 0 --eval-every 2 --max-steps 4"
SEVERAL = ("cyclegan_dcd", "stylegan2_dgl", "biggan_dgl")


@pytest.fixture(scope="session")
def pair(data, inception_file, tmp_path_factory):
    """Two processes, started, and the folder of their runs and statistics."""
    root = tmp_path_factory.mktemp("two")
    runs = [("cyclegan_dcd", "plain", PLAIN)]
    for name in SEVERAL:
        runs.append((name, f"{name}_whole", "--batch-size 2 --max-steps 4"))
        runs.append((name, f"{name}_cut", "--batch-size 2 --max-steps 2"))
        runs.append((name, f"{name}_cut", "--batch-size 2 --max-steps 4 --resume"))
    commands = []
    for name, out, options in runs:
        commands.append((free_port(), f"train_{name}", arguments(name, data, root / out, options)))
    save_noise(root / "a", 11, (40, 40))
    words = f"{root}/a --save {root}/a.npz --is --batch-size 2 --workers 0 --device cpu --weights {inception_file}"
    commands.append((free_port(), "fid", words.split()))
    group = ENVIRONMENT | dict(WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
    words = [sys.executable, "-c", TWO, json.dumps(commands)]
    processes = [start(words, group | dict(RANK=rank)) for rank in "01"]
    yield root, processes
    for process in processes:
        process.kill()


@pytest.fixture(scope="session")
def two_processes(pair):
    """The folder, and what each of the two has printed."""
    root, processes = pair
    return root, [process.communicate(timeout=300) for process in processes]


def test_two_processes(data, two_processes, capsys):
    """Equal weights in both; resumed to the bit; as one process, where no batch norm and no random number is in it."""
    root, printed = two_processes
    hashes = [re.findall("^[0-9a-f]{64}$", errors, re.MULTILINE) for _, errors in printed]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 7, printed
    for name in SEVERAL:
        assert same_runs(root / f"{name}_whole", root / f"{name}_cut"), name
    one = run("cyclegan_dcd", data, "one", PLAIN, "--batch-size 2")
    assert log_lines(root / "plain") == [pytest.approx(line, rel=2e-3) for line in one]
    moments = [first_moments(out, "student_G") for out in (root / "plain", "one")]
    # Adam itself would hide a gradient of the wrong length
    assert (moments[0] - moments[1]).norm() < 1e-2 * moments[1].norm()
    error = refused(capsys, "train_cyclegan_dcd", f"--out {root}/plain --resume".split())
    assert "the run has 2 processes, found 1: start as many" in error


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


# Script | options | what the error says
BAD = """
train_cyclegan_dcd | --data gone | gone
train_cyclegan_dcd | --data {bad}/header | 1.png: not a readable image
train_cyclegan_dcd | --lr nan | --lr
train_cyclegan_dcd | --teacher {bad}/code.pt | code.pt: not a checkpoint of plain tensors, or damaged
train_cyclegan_dcd | --teacher {bad}/pickle.pt | it asks for 'posix.system'
train_cyclegan_dcd | --teacher {bad}/narrow.pt | size mismatch for model.1.weight
train_pix2pix_dcd | --teacher {bad}/narrow.pt --teacher-ngf 2 --freeze-teacher --d-fakes none | trained D_T too
train_cyclegan_dcd | --student {bad}/facts.pt --direction BtoA | its direction is AtoB, expected BtoA
train_pix2pix_dcd | --data {bad}/odd | 0.png is 201x100 pixels
train_cyclegan_dcd | --data= | --data is missing; --toy needs none
train_stylegan2_dgl | --teacher-kimg 0 | stage 2 needs a teacher
train_stylegan2_dgl | --student {bad}/pair.pt | --student: has no 'g_ema', expected the networks g, d and g_ema
train_biggan_dgl | --teacher {run}/checkpoint.pt | checkpoint.pt: expected d, g_ema, a file each, or one that has
train_stylegan2_dgl | --teacher-kimg 0 --teacher {bad}/pair.pt --size 16 | its images are of 8 pixels, not of 16
train_biggan_dgl | --data {bad}/odd/train | lies in no class folder
train_biggan_dgl | --attention 16 | attention needs 8 channels or more, found 4
train_biggan_dgl | --teacher {bad}/classes.pt {bad}/narrow.pt | narrow.pt: expected d, g_ema, a file each
train_biggan_dgl | --teacher {bad}/classes.pt --teacher-kimg 0 | its class 1 is 'z', in --data 'y'
train_stylegan2_dgl | --data {bad}/header/trainA | 0.png: not a readable image
train_stylegan2_dgl | --data {bad}/floats | float.tif: not a readable image (its values have 32 bits
models | {bad}/narrow.pt a b | narrow.pt: no generator that can be built (KeyError('network')), expected a student.pt
models | {bad}/student.pt {bad}/odd/train {bad}/odd/train | train exists: choose a new folder
models | {bad}/student.pt {bad}/floats/float.tif out | float.tif: its values have 32 bits
models | {bad}/student.pt {bad}/gone out | No such file or directory
models | {bad}/config.pt a b | config.pt: no generator that can be built (TypeError
models | {bad}/pickle.pt a b | it asks for 'posix.system', which no StyleGAN2 needs
models | missing.pt a b | missing.pt: not a file
train_cyclegan_dcd | --out {bad} | .pt: would be overwritten; choose another --out
fid | {bad}/odd/train gone | gone: no such folder
fid | {bad}/floats {bad}/odd/train | float.tif: not a readable image (its values have 32 bits
fid | {bad}/odd/train {bad}/odd/val --weights {bad}/narrow.pt | not the weights of the FID Inception
"""


@pytest.fixture(scope="session")
def bad(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    torch.save({"a": RunsCode()}, root / "code.pt")
    (root / "pickle.pt").write_bytes(pickle.dumps(RunsCode()))
    torch.save(dict(network="ResnetGenerator", config={"ngf": "many"}, state_dict={}), root / "config.pt")
    torch.save(ResnetGenerator(ngf=2, separable=True).state_dict(), root / "narrow.pt")
    models.save(root / "student.pt", ResnetGenerator(ngf=2))
    G = ResnetGenerator(ngf=2, separable=True)
    G.facts = dict(direction="AtoB")
    models.save(root / "facts.pt", G)
    models.save(root / "pair.pt", dict(d=StyleGAN2Discriminator(8, width=0.01)))
    D = BigGANDiscriminator(32, 2, 2, None)
    D.facts = dict(classes=["x", "z"])
    models.save(root / "classes.pt", dict(d=D))
    (root / "floats").mkdir()
    Image.new("F", (16, 16)).save(root / "floats/float.tif")
    shutil.copytree(data / "cyclegan_dcd", root / "header")
    (root / "header/testB/1.png").write_bytes(b"no image")
    os.truncate(root / "header/trainA/0.png", 500)
    shutil.copytree(data / "pix2pix_dcd", root / "odd")
    Image.new("RGB", (201, 100)).save(root / "odd/train/0.png")
    return root


@pytest.mark.parametrize("row", BAD.strip().splitlines())
def test_bad_input(row, data, bad, finished, capsys):
    """One line that says what is wrong, exit status 2, no code run, and no file left."""
    program, options, message = row.format(bad=bad, run=finished("stylegan2_dgl")).split(" | ")
    words = f"{options} --device cpu".split()
    if program.startswith("train"):
        words = arguments(program.removeprefix("train_"), data, "out", options)
    assert message in refused(capsys, program, words)
    assert not [path for path in Path().rglob("*") if path.is_file()]


@dcd_scripts
def test_damaged_pictures(name, data, capfd):
    """In place of one that is cut off comes the next, with a warning."""
    shutil.copytree(data / name, name)
    for broken in Path(name).rglob("1.png"):
        os.truncate(broken, 500)
    run(name, Path(), "run", "--max-steps 2")
    assert "1.png: not a readable image" in capfd.readouterr().err


# ----------------------------------------------------------------------------------------------------------------------
# DCD, against the paper's formulas


@pytest.fixture
def batches(monkeypatch):
    """What training reads, from the first step on."""
    seen, read = [], models.share_batches
    monkeypatch.setattr(models, "share_batches", lambda *args: (seen.append(batch) or batch for batch in read(*args)))
    return seen


@dcd_scripts
def test_first_step(name, data, vgg_file, tmp_path, batches):
    """Every logged loss, and the gradients of teacher, student and D_T; with lr 0 the networks stay."""
    terms = dict(gan=0.5, dcd=4.0, style=300.0, feature=2.0)
    weighed = " ".join(f"--lambda-{term} {weight}" for term, weight in terms.items())
    line = run(name, data, tmp_path, f"--batch-size 2 --lr 0 --max-steps 1 --vgg {vgg_file}", weighed)[0]
    nets, (x, y) = weights(tmp_path), batches[0]
    conditional = name == "pix2pix_dcd"
    channels, mode = (6, "hinge") if conditional else (3, "lsgan")
    G = load(ResnetGenerator(ngf=4, separable=True), nets["teacher_G"])
    S = load(ResnetGenerator(ngf=2, separable=True), nets["student_G"])
    D = load(PatchDiscriminator(channels, 4), nets["teacher_D"])
    dcd = load(DCDLoss(S.tap_channels, G.tap_channels, channels, 32), nets["distill_loss"])
    fools = functools.partial(losses.generator_loss, mode=mode)
    catches = functools.partial(losses.discriminator_loss, mode=mode)

    (fake_T, taps_T), (fake_S, taps_S) = G(x, taps=True), S(x, taps=True)
    real, of_T, of_S = (D(torch.cat([x, image], 1) if conditional else image) for image in (y, fake_T, fake_S))
    expected = dict(G_T_gan=fools(of_T), G_S_gan=fools(of_S), D_T=catches(real, torch.cat([of_T, of_S])) / 2)
    expected["G_S_dcd"] = dcd(taps_S, [tap.detach() for tap in taps_T], D.features)
    expected["G_S_style"], expected["G_S_feature"] = PerceptualLoss(vgg_file)(fake_S, fake_T)
    objective_S = sum(weight * expected[f"G_S_{term}"] for term, weight in terms.items())
    teacher, judges = nn.ModuleList([G]), nn.ModuleList([D])
    if conditional:
        expected["G_T_l1"] = (fake_T - y).abs().mean()
        objective_T = expected["G_T_gan"] + 100 * expected["G_T_l1"]
        objective_D = expected["D_T"]
    else:
        B_to_A, D_A = load(copy.deepcopy(G), nets["teacher_F"]), load(copy.deepcopy(D), nets["teacher_D_A"])
        teacher.append(B_to_A)
        judges.append(D_A)
        fake_A = B_to_A(y)
        expected["G_T_gan"] = expected["G_T_gan"] + fools(D_A(fake_A))
        expected["G_T_cycle"] = (B_to_A(fake_T) - x).abs().mean() + (G(fake_A) - y).abs().mean()
        expected["G_T_identity"] = (B_to_A(x) - x).abs().mean() + (G(y) - y).abs().mean()
        expected["D_A"] = catches(D_A(x), D_A(fake_A)) / 2
        objective_T = expected["G_T_gan"] + 10 * expected["G_T_cycle"] + 5 * expected["G_T_identity"]
        objective_D = expected["D_T"] + expected["D_A"]

    found = {key: value for key, value in line.items() if key.startswith(("G_", "D_"))}
    assert found == {key: pytest.approx(value.item(), rel=1e-3) for key, value in expected.items()}
    for role, net, objective in (
        ("student_G", nn.ModuleList([S, dcd.student_connectors]), objective_S),
        ("teacher_G", teacher, objective_T),
        ("teacher_D", judges, objective_D),
    ):
        gradient = flat(torch.autograd.grad(objective, [*net.parameters()], retain_graph=True))
        found = 2 * first_moments(tmp_path, role)  # beta1 is 1/2
        assert (found - gradient).norm() < 1e-2 * gradient.norm(), role


@dcd_scripts
def test_ablations(name, data):
    """D_T frozen; the teacher frozen; pixel by pixel, and without a moving average."""
    run(name, data, "still", "--max-steps 1 --lr 0")
    before, given = weights("still"), "--teacher still/checkpoint.pt --freeze-teacher"
    for out, options, frozen in (
        ("a", f"{given} --d-fakes none --lambda-dcd 0", {"teacher_G", "teacher_D", "distill_loss"}),
        ("b", f"{given} --lambda-gan 0", {"teacher_G"}),
        ("c", "--distill pixel --lambda-gan 0 --ema 0", set()),
    ):
        line = run(name, data, out, "--max-steps 1", options)[0]
        after = weights(out)
        assert same(after["student_G"], after["student_G_ema"]) == (out == "c")
        networks = ("teacher_G", "teacher_D", "student_G", "distill_loss")
        assert {key for key in networks if same(before[key], after[key])} == frozen
        assert ("D_T" in line, "G_T_gan" in line) == ("teacher_D" not in frozen, "teacher_G" not in frozen)


@dcd_scripts
def test_bf16_leaves_the_student_in_float32(name, data, monkeypatch):
    types, forward = [], DCDLoss.forward

    def note(loss, student_taps, teacher_taps, phi):
        types.append((student_taps[0].dtype, teacher_taps[0].dtype))
        return forward(loss, student_taps, teacher_taps, phi)

    monkeypatch.setattr(DCDLoss, "forward", note)
    run(name, data, "run", "--max-steps 1 --amp bf16")
    assert types == [(torch.float32, torch.bfloat16)]


# Networks that are given: script, files of --teacher, file of --student
GIVEN = """
cyclegan_dcd | given/checkpoint.pt | given/student.pt
pix2pix_dcd | given/G.pth given/D.pth | given/checkpoint.pt
stylegan2_dgl | given/community.pt | given/stage2.pt
stylegan2_dgl | given/D.pth | given/stage2.pt
biggan_dgl | given/teacher.pt | given/stage2.pt
biggan_dgl | given/D.pth given/G.pth | given/stage2.pt
"""
STILL = {
    "cyclegan_dcd": "--student-ngf 3 --freeze-teacher --d-fakes none",
    "pix2pix_dcd": "--student-ngf 3 --freeze-teacher --d-fakes none",
    "stylegan2_dgl": "--student-width 0.02 --teacher-kimg 0 --stage1-kimg 0 --path-weight 0",
    "biggan_dgl": "--student-ch 3 --teacher-kimg 0 --stage1-kimg 0 --d-lr 0",
}


def old_spelling(state_dict):
    """As CycleGAN saved it before 2018: no dropout slot, statistics of instance norms, DataParallel."""
    old = dict.fromkeys(["module.model.2.running_mean", "module.model.2.running_var"], torch.ones(4))
    for key, value in state_dict.items():
        old["module." + key.replace(".conv_block.6.", ".conv_block.5.")] = value
    return old


@pytest.mark.parametrize("row", GIVEN.strip().splitlines())
def test_given_networks(row, data, finished):
    """Files of ours bring their widths along, bare state dicts have to fit; D_T is frozen, its spectral vectors too."""
    name, teachers, student = row.split(" | ")
    shutil.copytree(finished(name), "given")
    nets = weights("given")
    G, D, S = by_kind(name, ("teacher_G", "teacher_D", "student_G"), ("teacher_g_ema", "teacher_d", "student_g"))
    torch.save(by_kind(name, old_spelling(nets[G]), nets[G]), "given/G.pth")
    torch.save(nets[D], "given/D.pth")
    community = dict(g=nets[G], d=nets[D], g_ema=nets[G], args=argparse.Namespace(size=8), g_optim={})
    torch.save(community, "given/community.pt")
    options = f"--teacher {teachers} --student {student} --lr 0 --max-steps 1 {STILL[name]}"
    run(name, data, "run", options)
    found = weights("run")
    assert same(nets[D], found[D])
    assert G not in found if teachers == "given/D.pth" else same(nets[G], found[G])
    expected = nets["student_G_ema" if student == "given/student.pt" else S]
    assert all(torch.equal(value, found[S][key]) for key, value in expected.items() if key.endswith("weight"))
    shutil.rmtree("given")  # a run that goes on has all of it in its checkpoint
    resume(name, "run", "--max-steps 2")


# ----------------------------------------------------------------------------------------------------------------------
# DGL-GAN


@dgl_scripts
def test_dgl_objective(name, data, finished):
    """G's gradient is its own term's plus lambda times D_T's, which the log has unweighted. Here D_T judges as D_S."""
    teacher = finished(name) / "teacher.pt"
    options = f"--teacher {teacher} --student {teacher} --teacher-kimg 0 --stage1-kimg 0 --lr 0 --max-steps 1"
    options += dict(stylegan2_dgl=" --path-weight 0", biggan_dgl=" --d-lr 0")[name]
    logged, gradients = [], []
    for weight in (0, 1, 5):
        logged.append(run(name, data, f"run{weight}", options, f"--lambda-dgl {weight}")[0])
        gradients.append(first_moments(f"run{weight}", "G"))  # beta1 is 0
    own, one, five = gradients
    assert logged[0] == logged[1] == logged[2] and (five - own - 5 * (one - own)).norm() < 1e-4 * five.norm()
    if name == "stylegan2_dgl":  # BigGAN's spectral norms are a step apart
        assert (one - 2 * own).norm() < 1e-4 * one.norm()


def draw_again(monkeypatch, script, function):
    """Makes a script draw the same fakes at each call -> the function that draws them."""
    draw = getattr(script, function)

    def draw_from_0(*args):
        torch.manual_seed(0)
        return draw(*args)

    monkeypatch.setattr(script, function, draw_from_0)
    return draw_from_0


def test_stylegan2s_gradients(data, monkeypatch, batches):
    """Of D, R1, G and the path penalty, over two micro-batches; with lr 0 the networks stay."""
    draw = draw_again(monkeypatch, SCRIPTS["stylegan2_dgl"], "draw_images")
    options = "--lr 0 --max-steps 1 --accumulate 2 --teacher-kimg 0 --stage2-kimg 0 --r1-every 16 --path-every 4"
    run("stylegan2_dgl", data, "plain", options, "--r1-gamma 0 --path-weight 0")
    run("stylegan2_dgl", data, "penalties", options)
    nets = weights("penalties")
    G = load(StyleGAN2Generator(8, 8, 2, width=0.0078), nets["student_g"])
    D = load(StyleGAN2Discriminator(8, width=0.01), nets["student_d"])

    fake, _ = draw(G, 4, 0.9)
    loss_D, r1 = F.softplus(D(fake)).mean(), 0.0
    for batch in batches[:2]:
        real = (batch / 127.5 - 1).requires_grad_()
        logits = D(real)
        loss_D = loss_D + F.softplus(-logits).mean() / 2
        (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
        r1 = r1 + slope.square().sum((1, 2, 3)).mean() / 2
    few, w = draw(G, 2, 0.9)
    noise = torch.randn_like(few) / 8  # of 8x8 pixels
    (gradient,) = torch.autograd.grad((few * noise).sum(), w, create_graph=True)
    lengths = gradient.square().sum(2).mean(1).sqrt()
    path, mean = 0.0, 0.0
    for _ in range(2):
        target = mean + (lengths.mean() - mean) / 100
        path, mean = path + (lengths - target).square().mean() / 2, target.item()
    assert nets["student_path"]["mean"] == pytest.approx(mean)
    for out, role, net, objective in (
        ("plain", "D", D, loss_D),
        ("penalties", "D", D, 16 * 10 / 2 * r1),
        ("plain", "G", G, F.softplus(-D(fake)).mean()),
        ("penalties", "G", G, 4 * 2 * path),
    ):
        states = checkpoint(out)["optimizers"][role]["state"]
        gradients = torch.autograd.grad(objective, [*net.parameters()], retain_graph=True, allow_unused=True)
        for i, gradient in enumerate(gradients):
            assert gradient is None or (states[i]["exp_avg"] - gradient).norm() <= 1e-5 * gradient.norm()


def test_biggans_gradients(data, monkeypatch, batches):
    """Of D and G, over two micro-batches; spectral norms are some steps apart."""
    draw = draw_again(monkeypatch, SCRIPTS["biggan_dgl"], "draw_inputs")
    options = "--lr 0 --d-lr 0 --max-steps 1 --accumulate 2 --teacher-kimg 0 --stage2-kimg 0"
    run("biggan_dgl", data, "run", options)
    nets = weights("run")
    G = load(BigGANGenerator(32, 1, 2, 8, 4, attention=None), nets["student_g"])
    D = load(BigGANDiscriminator(32, 2, 2, None), nets["student_d"])
    z, fake_y = draw(G, 4)
    fake = D(G(z, fake_y), fake_y)
    loss_D = F.relu(1 + fake).mean()
    for real, real_y in batches[:2]:
        loss_D = loss_D + F.relu(1 - D(real / 127.5 - 1, real_y)).mean() / 2
    for role, net, objective in (("D", D, loss_D), ("G", G, -fake.mean())):
        gradient = flat(torch.autograd.grad(objective, [*net.parameters()], retain_graph=True))
        assert (first_moments("run", role) - gradient).norm() < 0.1 * gradient.norm(), role


def test_the_teachers_discriminator_is_frozen_and_stage_1_never_calls_it(data, finished, tmp_path, monkeypatch):
    teacher = finished("stylegan2_dgl") / "teacher.pt"
    calls, forward = [], StyleGAN2Discriminator.forward
    monkeypatch.setattr(StyleGAN2Discriminator, "forward", lambda self, x: calls.append(self) or forward(self, x))
    run("stylegan2_dgl", data, tmp_path, f"--teacher-kimg 0 --teacher {teacher} --max-steps 3")
    assert len(set(calls)) == 1
    calls.clear()
    resume("stylegan2_dgl", tmp_path)
    D_T, D_S = sorted(set(calls), key=calls.count)
    assert calls.count(D_T) == 3  # once for each update of G
    assert same(dict(D_T.state_dict()), models.load_file(teacher)["d"]["state_dict"])


# ----------------------------------------------------------------------------------------------------------------------
# Networks

# The hash of the reference implementations' state-dict keys and shapes, one "key [shape]" a line, sorted.
CIFAR = dict(n_classes=10, dim_z=128, shared_dim=None, hierarchical=False)
REFERENCE_KEYS = {
    "73603dcc5124e07f": lambda: ResnetGenerator(ngf=32),
    "c9b16fcf6267e6db": lambda: ResnetGenerator(ngf=16, separable=True),
    "432c924f8b6febe5": lambda: UnetGenerator(ngf=8),
    "79d536cba8ddecd4": lambda: PatchDiscriminator(ndf=16),
    "4190591f59fca3f3": lambda: StyleGAN2Generator(256),
    "a18adb328021de30": lambda: StyleGAN2Discriminator(256),
    "8cdd2faeb41211e1": lambda: fid.FIDInceptionV3(),
    "af8e09df5ebd7f1d": lambda: BigGANGenerator(128),
    "a8ee3fd51ffa3e7c": lambda: BigGANDiscriminator(128),
    "e516a3150770c95d": lambda: BigGANGenerator(32, 16, **CIFAR),
    "d4e18eabb0eddbaf": lambda: BigGANDiscriminator(32, 16, n_classes=10),
}


@pytest.mark.parametrize("expected", REFERENCE_KEYS)
def test_reference_keys(expected):
    with torch.device("meta"):
        state_dict = REFERENCE_KEYS[expected]().state_dict()
    lines = "\n".join(f"{key} {list(value.shape)}" for key, value in sorted(state_dict.items()))
    assert hashlib.sha256(lines.encode()).hexdigest()[:16] == expected


def fill(net):
    """The same weights in any network with the same keys and shapes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in sorted(net.state_dict().items()):
            if value.is_floating_point() and not key.endswith("kernel"):
                noise = torch.randn(value.shape, generator=generator)
                noise = noise.abs() + 0.5 if key.endswith(("running_var", "stored_var")) else noise
                value.copy_(0.1 * noise if value.ndim == 4 else noise)
    return net.eval()


def summary(v):
    return [v.mean().item(), v.std().item(), v.flatten()[0].item(), v.flatten()[-1].item()]


def test_reference_outputs():
    """Mean, deviation, first and last value of the reference implementations' outputs for fill's weights."""
    g = torch.Generator().manual_seed(1)
    x, x6 = (torch.rand(1, c, 64, 64, generator=g) * 2 - 1 for c in (3, 6))
    z = torch.randn(4, 32, generator=g)
    small = torch.rand(4, 3, 16, 16, generator=g) * 2 - 1
    large = torch.rand(1, 3, 256, 256, generator=g) * 2 - 1
    for net, inputs, expected in (
        (ResnetGenerator(ngf=4), x, "-0.6224 0.4917 -0.98497 -0.77184"),
        (ResnetGenerator(ngf=4, separable=True), x, "-0.0005 0.61655 -0.48172 0.60551"),
        (UnetGenerator(ngf=4), large, "-0.11997 0.48871 -0.50432 0.752"),
        (PatchDiscriminator(6, 8), x6, "0.56868 1.84668 3.0695 1.63451"),
        (StyleGAN2Generator(16, 32, 3), z, "-1.39313 0.85264 -0.53143 -0.2404"),
        (StyleGAN2Discriminator(16), small, "0.67798 0.0 0.67798 0.67798"),
    ):
        options = dict(fixed_noise=True) if isinstance(net, StyleGAN2Generator) else {}
        found = summary(fill(net)(inputs, **options))
        assert found == pytest.approx([*map(float, expected.split())], abs=1e-4), type(net).__name__


# Of the generator in eval mode and in train mode, and of the discriminator (both modes): mean, deviation, first, last;
# the norm of all gradients, of the generator and the discriminator; the sum of the running statistics' magnitudes.
BIGGAN_OUTPUTS = {
    128: "0.6716608 0.5011174 0.9968204 -0.6246749 -0.0675976 0.6774885 0.1305365 -0.7009514 -15.8274176 2.393257 "
    "-17.2109907 -17.2073389 2.280972081 838.732793070 1214.093084565",
    64: "-0.486387 0.6592578 -0.6977481 -0.0392273 0.0660547 0.6818861 0.1749069 0.997237 -40.0559861 9.169141 "
    "-34.7477611 -34.7766121 1.668900456 688.205921869 1225.035591149",
    32: "0.5563626 0.5419226 0.8312911 0.2554412 0.0509482 0.6312853 -0.4116253 0.3573135 -129.4121959 44.1684444 "
    "-104.7084462 -103.1228357 2.103271119 3869.410021163 470.168524363",
}


@pytest.mark.parametrize("size", BIGGAN_OUTPUTS)
def test_biggan_reference_outputs(size):
    """Ten classes, hierarchical with attention, at 32 the plain CIFAR form; in float64, so that a step that casts down
    to float32 would be seen. Eval mode first, which must leave no trace."""
    attention = None if size == 32 else size // 2
    options = CIFAR if size == 32 else dict(n_classes=10)
    G = fill(BigGANGenerator(size, 8, attention=attention, **options)).double()
    D = fill(BigGANDiscriminator(size, 8, 10, attention)).double()
    g = torch.Generator().manual_seed(1)
    z, y = torch.randn(3, G.dim_z, generator=g).double(), torch.tensor([7, 0, 7])
    x = (torch.rand(3, 3, size, size, generator=g) * 2 - 1).double()
    found = summary(G(z, y))
    images, logits = G.train()(z, y), D(x, y)
    found += summary(images) + summary(logits)
    (images.square().mean() + logits.sum()).backward()
    found += [flat(p.grad for p in net.parameters()).norm().item() for net in (G, D)]
    found.append(sum(value.abs().sum().item() for key, value in G.state_dict().items() if "stored" in key))
    assert found == pytest.approx([*map(float, BIGGAN_OUTPUTS[size].split())], abs=2e-7, rel=1e-8)


def test_instance_norm():
    x = torch.randn(3, 4, 6, 5)
    assert_close(models.InstanceNorm()(x), F.instance_norm(x))


def record_inputs(net, names):
    """{name: what enters that part of the network}, at its last call; filled while the network runs."""
    inputs = {}
    for name in names:

        def note(_part, given, name=name):
            inputs[name] = given[0]

        net.get_submodule(name).register_forward_pre_hook(note)
    return inputs


def test_taps():
    """What enters layers of a ResNet and of a U-Net, at the paper's size large enough for D_T as it is."""
    resnet = "model.10 model.13 model.16 model.19"
    unet = "model.model.1.model.3.model.1 model.model.1.model.3.model.3.model.3.model.1"
    unet += " model.model.1.model.3.model.3.model.5 model.model.1.model.5"
    for net, names, sides in (
        (ResnetGenerator(ngf=4, separable=True), resnet, [64, 64, 64, 64]),
        (UnetGenerator(ngf=4), unet, [64, 16, 16, 64]),
    ):
        inputs = record_inputs(net, names.split())
        _, taps = net(torch.rand(1, 3, 256, 256) * 2 - 1, taps=True)
        assert same(taps, [*inputs.values()])
        assert [tap.shape[1:3] for tap in taps] == [*zip(net.tap_channels, sides, strict=True)]


def test_published_complexity():
    image, z, y = torch.zeros(1, 3, 256, 256, device="meta"), torch.zeros(1, 120), torch.tensor([0])
    for net, inputs, expected in (  # parameters, MACs exact and as published, in millions
        (ResnetGenerator().to("meta"), [image], "11.378 49552 56799"),
        (ResnetGenerator(ngf=16, separable=True).to("meta"), [image], "0.1373 955 1408"),
        (UnetGenerator().to("meta"), [image], "54.41 6048 18140"),
        (BigGANGenerator(128, 24), [z, y], "5.031 1423 1423"),  # without the spectral norm's
    ):
        cost = models.measure_cost("", net, *inputs)
        found = [cost[name] / 1e6 for name in ("parameters", "macs", "macs_published")]
        assert found == pytest.approx([*map(float, expected.split())], rel=5e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Losses, against slow, obvious formulas


def test_adversarial_losses():
    real, fake = torch.tensor([[-2.0, 0.5], [3.0, 0.0]]), torch.tensor([[2.0], [-2.5]])
    for mode, loss_G, loss_D in (
        ("lsgan", (1 - fake) ** 2, [(1 - real) ** 2, fake**2]),
        ("hinge", -fake, [(1 - real).clamp(min=0), (1 + fake).clamp(min=0)]),
        ("logistic", -fake.sigmoid().log(), [-real.sigmoid().log(), -(1 - fake.sigmoid()).log()]),
    ):
        assert_close(losses.generator_loss(fake, mode), loss_G.mean())
        assert_close(losses.discriminator_loss(real, fake, mode), loss_D[0].mean() + loss_D[1].mean())


def test_dcd_loss():
    D, loss = PatchDiscriminator(3, ndf=8).requires_grad_(False), DCDLoss([4] * 4, [4] * 4, 3)
    taps = [torch.randn(2, 4, size, size, requires_grad=True) for size in (16, 24, 48, 64)]
    targets = [torch.randn_like(tap, requires_grad=True) for tap in taps]

    def features(connector, tap, k):
        """1x1 convolution, batch norm, ReLU, enlarged k times, D's features."""
        maps = torch.einsum("oc,nchw->nohw", connector[0].weight[:, :, 0, 0], tap)
        variance, mean = torch.var_mean(maps, (0, 2, 3), correction=0, keepdim=True)
        maps = ((maps - mean) / (variance + 1e-5).sqrt()).relu()
        return D.features(maps.repeat_interleave(k, 2).repeat_interleave(k, 3))

    expected = 0
    for i, k in enumerate((4, 3, 2, 1)):  # small ones are enlarged, to 64, 72 and 96 pixels
        of_student = features(loss.student_connectors[i], taps[i], k)
        of_teacher = features(loss.teacher_connectors[i], targets[i], k)
        expected = expected + (of_student - of_teacher).abs().mean()
    value = loss(taps, targets, D.features)
    assert_close(value, expected, rtol=1e-4, atol=1e-4)
    value.backward()
    trained = [*taps, *loss.student_connectors.parameters()]
    frozen = [*targets, *D.parameters(), *loss.teacher_connectors.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in trained) and all(p.grad is None for p in frozen)
    fails("taps of shapes", loss, taps, [targets[0]] * 4, D.features)


def test_pixel_loss_is_plain_feature_matching():
    loss, expected = PixelLoss([2, 3], [4, 5]), 0
    taps = [torch.randn(2, c, 6, 7) for c in (2, 3)]
    targets = [torch.randn(2, c, 6, 7) for c in (4, 5)]
    for connector, tap, target in zip(loss.student_connectors, taps, targets, strict=True):
        expected = expected + (connector(tap) - target).abs().mean()
    assert_close(loss(taps, targets), expected)


def test_perceptual_loss_is_the_papers(vgg_file):
    vgg, expected = PerceptualLoss(vgg_file), 0
    x, y = (torch.rand(2, 3, 32, 48) * 2 - 1 for _ in "xy")
    style, feature = vgg(x, y)
    for layer in (3, 8, 15, 22):
        a, b = (vgg.features[: layer + 1]((image + 1) / 2) for image in (x, y))
        grams = [torch.einsum("nchw,ndhw->ncd", f, f) / f[0].numel() for f in (a, b)]
        expected = expected + (grams[0] - grams[1]).abs().mean()
        if layer == 8:
            assert_close(feature, (a - b).abs().mean())
    assert_close(style, expected)


@pytest.mark.parametrize("network", ["inception", "vgg"])
def test_weights_are_downloaded(network, server, inception_file, vgg_file, tmp_path, monkeypatch):
    """Once, then they come from the cache; a failure is one line, and leaves no part of a file."""
    file, read, key = dict(
        inception=(inception_file, fid.load_inception, "fc.weight"),
        vgg=(vgg_file, PerceptualLoss, "features.5.weight"),
    )[network]
    name = f"weights-{hashlib.sha256(file.read_bytes()).hexdigest()[:8]}.pth"
    published, path = tmp_path / "web" / name, tmp_path / "hub/checkpoints" / name
    shutil.copy(file, published)

    def read_from(url):
        monkeypatch.setattr(fid, "WEIGHTS_URL", url)
        monkeypatch.setattr(VGG16_Weights.IMAGENET1K_V1.value, "url", url)
        return read()

    for _ in range(2):
        assert torch.equal(read_from(f"{server}/{name}").get_parameter(key), torch.load(file)[key])
        assert os.listdir(path.parent) == [name]
        published.write_bytes(b"something else")
    path.unlink()
    for url, problem in (
        (f"{server}/{name}", "invalid hash"),
        (f"{server}/gone/{name}", "404"),
    ):
        found = rf"download failed: .*{problem}.*\): get {url} and give --{network} FILE, or put it at {path}$"
        fails(found, read_from, url)
        assert os.listdir(path.parent) == []


# ----------------------------------------------------------------------------------------------------------------------
# models.py as a command, and the documents' snippets


def test_a_folder_is_translated():
    """By models.py and student.pt alone; what cannot be read is skipped with a count."""
    net = fill(ResnetGenerator(ngf=2, separable=True))
    net.facts = dict(size=20, direction="BtoA")
    models.save("student.pt", net)
    shutil.copy(HERE / "models.py", "models.py")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (37, 24, 3), dtype=np.uint8))
    Path("photos/deep").mkdir(parents=True)
    for name in ("photos/a.bmp", "photos/a.png", "photos/deep/b.png", "photos/\udce9.png"):
        picture.save(name)
    Path("photos/broken.png").write_bytes(b"\x89PNG")
    Path("photos/a.aae").touch()  # a phone's, beside its picture

    environment = ENVIRONMENT | dict(PYTHONIOENCODING="ascii", PYTHONPATH="")
    command = f"{sys.executable} models.py student.pt photos trained --device cpu".split()
    said, errors = start(command, environment).communicate()
    assert errors.count("\n") == 2 and "skipped photos/broken.png: " in errors
    assert "skipped photos/a.png: trained/a.png is the translation of another picture of that name" in errors
    assert "3 pictures translated into trained, 2 skipped" in said
    models.main("student.pt photos photos/halves --size 0 --pairs --device cpu".split())
    for name, source, right, below in (  # padded to multiples of 4
        ("trained/a.png", picture.resize((20, 31), Image.Resampling.BICUBIC), 0, 1),
        ("photos/halves/deep/b.png", picture.crop((12, 0, 24, 37)), 0, 3),
    ):
        x = pil_to_tensor(source)[None] / 127.5 - 1
        expected = net(F.pad(x, (0, right, 0, below), mode="reflect"))[0, :, : source.height, : source.width]
        found = pil_to_tensor(Image.open(name))
        assert (found - (expected + 1) * 127.5).abs().max() < 0.6, name


@dgl_scripts
def test_pictures_are_drawn(name, finished, capsys):
    """From every file of a run, the same from the same seed; nothing is overwritten."""

    def draw(words):
        folder = words.replace(" ", "_")
        models.main(f"{finished(name)}/{words} {folder} --count 3 --device cpu".split())
        return np.stack([Image.open(f"{folder}/0000{i}.png") for i in range(3)]).astype(int)

    first = draw("student.pt")
    assert not np.array_equal(first, draw("student.pt --seed 9"))
    truncated = draw("student.pt --truncation 0.01")
    assert np.abs(truncated[0] - truncated[2]).mean() < 1 < np.abs(first[0] - first[2]).mean()  # of one class
    others = [draw(file) for file in ("stage2.pt", "teacher.pt")]
    assert [np.array_equal(first, other) for other in others] == [True, False]
    again = f"{finished(name)}/student.pt student.pt --device cpu".split()
    assert "student.pt exists: choose a new folder" in refused(capsys, "models", again)
    if name == "biggan_dgl":  # two classes take turns
        of_one_class = draw("student.pt --class 1")
        assert (first == of_one_class).all((1, 2, 3)).tolist() == [False, True, False]


def test_older_biggan_files_are_read():
    """Their configuration has an option that is gone."""
    G = BigGANGenerator(32, 2, 2, attention=None)
    G.config["sn_eps"] = 1e-8
    models.save("student.pt", G)
    assert same(models.load_generator("student.pt").state_dict(), G.state_dict())


def snippet(start):
    text = (HERE / "README.md").read_text() + (HERE / ".github/RECIPES.md").read_text()
    blocks = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


def test_recipe_for_pairs():
    for folder, colour in (("A", "red"), ("B", "blue")):
        Path(folder).mkdir()
        Image.new("RGB", (30, 40), colour).save(Path(folder, "1.jpg"))
    exec(snippet("# pairs"), {})
    pair = Image.open("data/train/1.jpg.png")
    assert pair.size == (512, 256)
    for x, channel in ((0, 0), (255, 0), (256, 2), (511, 2)):
        assert np.argmax(pair.getpixel((x, 99))) == channel


def test_readme_dcd_loss_in_another_project():
    """With the class alone, as somebody would copy it, and the imports that the README names."""
    copied = re.search(r"^class DCDLoss.*?(?=^class )", (HERE / "losses.py").read_text(), re.DOTALL | re.MULTILINE)[0]
    header, names = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n", {}
    exec(header + copied + snippet("import torch\n\nfrom losses").replace("from losses import DCDLoss", ""), names)
    assert names["loss"] > 0 and names["student"].weight.grad.abs().sum() > 0
    assert names["teacher"].weight.grad is None and names["discriminator"][0].weight.grad is None


# ----------------------------------------------------------------------------------------------------------------------
# fid.py


@pytest.fixture(scope="session")
def inception(inception_file):
    return fid.load_inception(inception_file)


def test_frechet_distance():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.normal(size=(2, 20))
    x, y = rng.normal(size=(2, 99, 20))
    s1, s2 = np.cov(x.T), np.cov(2 * y.T)
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2)).real
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-10)
    # Singular covariances, of fewer images than features: the root's trace is a nuclear norm.
    x, y = x[:8] - x[:8].mean(0), y[:8] - y[:8].mean(0)
    few1, few2 = x.T @ x / 7, y.T @ y / 7
    expected = np.trace(few1 + few2) - 2 * np.linalg.norm(x @ y.T / 7, "nuc")
    assert fid.frechet_distance(mu1, few1, mu1, few2) == pytest.approx(expected, rel=1e-11)


def test_statistics():
    """Summed up, written and read: always numpy's."""
    x = np.random.default_rng(2).normal(size=(301, 12)) + np.linspace(1, -1, 12)
    stats = fid.feature_stats(map(torch.from_numpy, np.array_split(x, 20)))
    stats.save("ours.npz")
    np.savez("foreign.npz", mu=stats.mean, sigma=stats.cov)  # as other tools write it
    for found, n in (
        (stats, 301),
        (fid.FeatureStats.load("ours.npz"), 301),
        (fid.FeatureStats.load("foreign.npz"), 0),
    ):
        assert found.n == n
        np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(found.cov, np.cov(x.T), rtol=1e-10, atol=1e-12)


def test_kernel_distance():
    x, y = np.random.default_rng(4).normal(size=(2, 9, 4))
    xx, yy, xy = ((a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    expected = (xx + yy).sum() / (9 * 8) - 2 * xy.mean()
    assert fid.kernel_distance(x, y) == pytest.approx((expected, 0), rel=1e-10, abs=1e-12)


def test_inception_score():
    logits = np.random.default_rng(6).normal(size=(47, 8)) * 3
    p, scores = scipy.special.softmax(logits, axis=1), []
    for i in range(5):
        part = p[i * 47 // 5 : (i + 1) * 47 // 5]
        divergence = scipy.special.rel_entr(part, part.mean(axis=0)).sum(axis=1)
        scores.append(np.exp(divergence.mean()))
    assert fid.inception_score(logits, splits=5) == pytest.approx((np.mean(scores), np.std(scores)))


def test_the_network(inception, inception_file):
    """Folded the same as unfolded; float32 in autocast; the poolings of 2015."""
    net = load(fid.FIDInceptionV3().eval(), torch.load(inception_file))
    branches = ["Mixed_6b.branch1x1", "Mixed_6b.branch_pool", "Mixed_7c.branch1x1", "Mixed_7c.branch_pool"]
    inputs = record_inputs(net, branches)
    images = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = inception(images)
        unfolded, _ = net(images)
    assert features.dtype == torch.float32 and features.std() > 0.01
    assert_close(features, unfolded, rtol=1e-3, atol=1e-4)
    assert_close(logits, features @ inception.fc.weight.T, rtol=1e-4, atol=1e-4)  # without the bias
    in_6b, average, in_7c, maximum = (inputs[name] for name in branches)
    assert torch.equal(average, F.avg_pool2d(in_6b, 3, 1, 1, count_include_pad=False))
    assert torch.equal(maximum, F.max_pool2d(in_7c, 3, 1, 1))


@pytest.mark.parametrize("to_rgb", [fid.to_rgb, models.to_rgb])
def test_every_kind_of_image_becomes_rgb(to_rgb):
    """16 bits scaled, white under transparency, turned as the EXIF data say."""
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    rgb = np.stack([grey, 255 - grey, grey.T], axis=2)
    turned = Image.fromarray(np.rot90(rgb))
    turned.getexif()[274] = 6  # Orientation: turn right to see it upright
    half = Image.fromarray(rgb)
    half.putalpha(128)
    deep = grey.astype(np.uint16) * 257
    for image, expected in (
        (Image.fromarray(deep), grey[..., None]),
        (half, rgb * (128 / 255) + 127),
        (turned, rgb),
    ):
        found = to_rgb(image)
        assert found.mode == "RGB" and np.abs(np.asarray(found).astype(float) - expected).max() <= 1


def test_files_are_found(tmp_path):
    """Through links, but not in circles; not what starts with a dot, nor what a run draws."""
    names = (
        "in/a.png in/b/a.png in/.hidden/a.png in/b/.a.png out/a.png in/notes.txt in/run/args.json in/run/samples/a.png"
    )
    for name in names.split():
        Path(name).parent.mkdir(exist_ok=True, parents=True)
        Path(name).touch()
    os.symlink(tmp_path / "out", "in/link")
    os.symlink(tmp_path / "in", "out/circle")
    files = fid.ImageFiles("in")
    assert files.names == ["a.png", "b/a.png", "link/a.png"]


def test_stored_squares():
    save_noise("pictures", 4, (24, 8))
    files = fid.ImageFiles("pictures")
    options = (files, 8, "new")
    stored = fid.StoredSquares(*options, 2)
    for found, image in zip(stored, files, strict=True):
        assert torch.equal(found, pil_to_tensor(image.crop((8, 0, 16, 8))))
    assert fid.StoredSquares(*options).path == stored.path
    os.utime("pictures/1.png", (1, 1))
    assert fid.StoredSquares(*options).path != stored.path  # for the picture has another date


def test_images_are_measured(inception):
    """Files of mixed sizes, with workers, and generated images, from -1 to 1: as one by one."""
    save_noise("pictures", 3, (30, 40))
    save_noise("pictures/more", 2, (40, 20))
    Path("pictures/notes.txt").touch()
    files = fid.ImageFiles("pictures")
    images = [pil_to_tensor(image)[None] / 255 for image in files]
    features = torch.cat([inception(image)[0] for image in images])
    stats, kept = fid.image_stats(files, inception, 3, workers=2, keep=["features"])
    assert_close(kept["features"], features, rtol=1e-4, atol=1e-4)
    generated = fid.generated_stats([image * 2 - 1 for image in images], inception)
    for found in (stats, generated):
        np.testing.assert_allclose(found.mean, features.mean(0), rtol=1e-4, atol=1e-5)


def test_command_line(two_processes, inception_file, capsys):
    """A folder, and its .zip; two processes find what one does."""
    root, printed = two_processes
    shutil.make_archive("a", "zip", root / "a")
    fid.main(f"a.zip --save a.npz --is --workers 2 --device cpu --weights {inception_file}".split())
    found = measured(capsys.readouterr().out)
    shared = measured(printed[0][0])
    assert found["images"] == shared["images"] == [11]
    assert shared["is"] - 1 == pytest.approx(found["is"] - 1, rel=1e-3)
    for one, two in zip(*map(fid.FeatureStats.load, ("a.npz", root / "a.npz")), strict=True):
        np.testing.assert_allclose(one, two, rtol=1e-3, atol=1e-5)


# ----------------------------------------------------------------------------------------------------------------------
# NVIDIA's StyleGAN2 pickles: written here in both layouts with weights of ours, and read back

# The layers of networks of 16x16, and their weights: ours, stylegan2-ada-pytorch's, TensorFlow's.
GENERATOR = """
style.1         mapping.fc0.             Dense0/
style.2         mapping.fc1.             Dense1/
input           synthesis.b4.            4x4/Const/
conv1           synthesis.b4.conv1.      4x4/Conv/
to_rgb1         synthesis.b4.torgb.      4x4/ToRGB/
convs.0         synthesis.b8.conv0.      8x8/Conv0_up/
convs.1         synthesis.b8.conv1.      8x8/Conv1/
to_rgbs.0       synthesis.b8.torgb.      8x8/ToRGB/
convs.2         synthesis.b16.conv0.     16x16/Conv0_up/
convs.3         synthesis.b16.conv1.     16x16/Conv1/
to_rgbs.1       synthesis.b16.torgb.     16x16/ToRGB/
"""
DISCRIMINATOR = """
convs.0         b16.fromrgb.             16x16/FromRGB/
convs.1.conv1   b16.conv0.               16x16/Conv0/
convs.1.conv2   b16.conv1.               16x16/Conv1_down/
convs.1.skip    b16.skip.                16x16/Skip/
convs.2.conv1   b8.conv0.                8x8/Conv0/
convs.2.conv2   b8.conv1.                8x8/Conv1_down/
convs.2.skip    b8.skip.                 8x8/Skip/
final_conv      b4.conv.                 4x4/Conv/
final_linear.0  b4.fc.                   4x4/Dense0/
final_linear.1  b4.out.                  Output/
"""
WEIGHTS = """
input                   const           const
conv.modulation.weight  affine.weight   mod_weight
conv.modulation.bias    affine.bias     mod_bias
conv.weight             weight          weight
noise.weight            noise_strength  noise_strength
activate.bias           bias            bias
bias                    bias            bias
weight                  weight          weight
0.weight                weight          weight
1.weight                weight          weight
1.bias                  bias            bias
2.bias                  bias            bias
"""
NOISY = ["synthesis.b4.conv1", "synthesis.b8.conv0", "synthesis.b8.conv1", "synthesis.b16.conv0", "synthesis.b16.conv1"]


def rebuild(meta):
    raise AssertionError("called by a reader that should have put something else in its place")


class Module:
    """Pickled as stylegan2-ada-pytorch pickles a module: what rebuilds it is named, source text is part of it."""

    def __init__(self, weights=(), **options):
        self.state = dict(_parameters={}, _buffers={}, _modules={}) | options
        for name, value in dict(weights).items():
            *layers, leaf = name.split(".")
            part = self
            for layer in layers:
                part = part.state["_modules"].setdefault(layer, Module(**options))
            part.state["_parameters"][leaf] = nn.Parameter(value)

    def __reduce__(self):
        return rebuild, (dict(type="class", version=6, module_src="1 / 0", class_name="Any", state=self.state),)


class Network:
    """Pickled as TensorFlow's dnnlib pickles a network."""

    def __init__(self, variables=(), **components):
        self.variables = [(name, value.contiguous().numpy()) for name, value in dict(variables).items()]
        self.static_kwargs, self.components = dict(label_size=0, num_channels=3), components


@pytest.fixture
def nvidia_modules(monkeypatch):
    """The modules that the pickles name, for as long as a test writes some."""
    names = {"torch_utils.persistence": rebuild, "dnnlib.tflib.network": Network}
    for name in ("torch_utils", "dnnlib", "dnnlib.tflib", *names):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, named in names.items():
        named.__module__ = name
        setattr(sys.modules[name], named.__name__, named)
    rebuild.__qualname__ = rebuild.__name__ = "_reconstruct_persistent_obj"
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = rebuild


def make_networks(**options):
    """A generator and a discriminator of 16x16 with 8 and 6 channels, and biases and noise strengths other than 0."""
    torch.manual_seed(0)
    G = StyleGAN2Generator(16, style_dim=12, n_mlp=2, width=8 / 512, conv_clamp=options.get("conv_clamp"))
    D = StyleGAN2Discriminator(16, width=6 / 512, **options)
    for name, value in [*G.named_parameters(), *D.named_parameters()]:
        if name.endswith(("bias", "noise.weight")):
            value.data += torch.randn_like(value)
    return G, D


def nvidia_weights(net, column):
    """A network's weights by NVIDIA's names and in NVIDIA's shapes: 1 stylegan2-ada-pytorch's, 2 TensorFlow's."""
    generator = isinstance(net, StyleGAN2Generator)
    state, weights = net.state_dict(), {}
    for layer in (GENERATOR if generator else DISCRIMINATOR).strip().splitlines():
        for leaf in WEIGHTS.strip().splitlines():
            value = state.get(f"{layer.split()[0]}.{leaf.split()[0]}")
            if value is not None:
                name = layer.split()[column] + leaf.split()[column]
                value = value[0] if value.ndim == 5 or "noise" in name else value
                weights[name] = value.flatten() if name.endswith("bias") else value.detach()
    for n, layer in enumerate(NOISY if generator else ()):
        weights[(f"{layer}.noise_const", f"noise{n}")[column - 1]] = state[f"noises.noise_{n}"]
    return weights


def pytorch_weights(net):
    weights = nvidia_weights(net, 1)
    for name, value in weights.items():
        if name.endswith("noise_const"):
            weights[name] = value[0, 0]
        elif name.endswith(".const"):
            weights[name] = value[0]
    return weights | ({"mapping.w_avg": torch.arange(12.0)} if "synthesis.b4.const" in weights else {})


def tensorflow_weights(net):
    weights = nvidia_weights(net, 2)
    for name, value in weights.items():
        if name.endswith("Conv0_up/weight"):
            value = value.flip(2, 3)
        if name.endswith("weight"):
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.t()
        weights[name] = value - 1 if name.endswith("mod_bias") else value
    return weights


def write_pytorch(networks, **content):
    G, D = networks
    clamp, group = D.config["conv_clamp"], D.config["mbstd_group"]
    G, D = Module(pytorch_weights(G), c_dim=0, conv_clamp=clamp), Module(pytorch_weights(D), c_dim=0, conv_clamp=clamp)
    D.state["_modules"]["b4"].state["_modules"]["mbstd"] = Module(group_size=group)
    with open("network.pkl", "wb") as file:
        pickle.dump(dict(G=G, D=D, G_ema=G, training_set_kwargs={}) | content, file)


def write_tensorflow(networks):
    G, D = (tensorflow_weights(net) for net in networks)
    mapping = {name: G.pop(name) for name in [*G] if name.startswith("Dense")}
    G = Network({"dlatent_avg": torch.arange(12.0)}, mapping=Network(mapping), synthesis=Network(G))
    with open("network.pkl", "wb") as file:
        pickle.dump((G, Network(D), G), file)


@pytest.mark.parametrize("write", [write_pytorch, write_tensorflow])
def test_nvidias_files(write, nvidia_modules):
    G, D = make_networks(**(dict(conv_clamp=2.5, mbstd_group=None) if write is write_pytorch else {}))
    write((G, D))
    found = models.load_nvidia("network.pkl")
    z, images = torch.randn(6, 12), torch.randn(6, 3, 16, 16)
    for g in (found["g"], found["g_ema"]):
        assert_close(g(z, fixed_noise=True), G(z, fixed_noise=True), rtol=1e-6, atol=1e-6)
    assert_close(found["d"](images), D(images), rtol=1e-6, atol=1e-6)
    assert found["d"].config == D.config
    assert torch.equal(found["g_ema"].facts["latent_avg"], torch.arange(12.0)[None])
    torch.save(D.state_dict(), "network.pkl")
    assert models.load_file("network.pkl").keys() == D.state_dict().keys()


def test_nvidias_refusals(nvidia_modules, capsys):
    """What ours cannot be; where D alone is refused, G is read."""
    networks = make_networks()
    G, D = map(pytorch_weights, networks)
    conditional = Module(G, c_dim=10)
    write_pytorch(networks, G_ema=conditional, D=conditional)
    fails("class-conditional", models.load_nvidia, "network.pkl")
    for reason, module in {
        "Unexpected key": Module(D | {"b4.more": torch.ones(3)}),
        "architecture": Module(D, architecture="orig"),
    }.items():
        write_pytorch(networks, D=module)
        found = models.load_nvidia("network.pkl")
        assert "g" in found and "d" not in found and reason in capsys.readouterr().out


def test_nvidias_damaged_files(nvidia_modules):
    write_pytorch(make_networks())
    path = Path("network.pkl")
    whole = path.read_bytes()
    for n in range(10):
        path.write_bytes(whole[: len(whole) * n // 10])
        fails("network.pkl", models.load_nvidia, path)


def test_limits_and_groups():
    """A limit above all activations and groups of four change nothing, lower and larger ones do."""
    z, images = torch.randn(4, 12), torch.randn(8, 3, 16, 16)
    options = ({}, dict(conv_clamp=1e6, mbstd_group=4), dict(conv_clamp=0.5), dict(mbstd_group=None))
    pairs = [make_networks(**given) for given in options]
    fakes = [G(z, fixed_noise=True) for G, _ in pairs]
    logits = [D(images) for _, D in pairs]
    assert [torch.equal(fake, fakes[0]) for fake in fakes] == [True, True, False, True]
    assert [torch.equal(logit, logits[0]) for logit in logits] == [True, True, False, False]
