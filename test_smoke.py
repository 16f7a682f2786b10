"""Everything that can be checked in two minutes on a CPU: python -m pytest test_smoke.py

The training scripts end to end on tiny data, the method against the papers' formulas, the networks against the
reference implementations (keys, shapes, recorded outputs), losses, hostile files, the commands, README's snippets.
"""

import argparse
import copy
import functools
import hashlib
import http.server
import importlib
import io
import json
import os
import pickle
import random
import re
import resource
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import types
import zipfile
from pathlib import Path

import numpy as np
import pytest
import scipy.linalg
import torch
import torch.nn.functional as F
from PIL import Image, ImageFile
from torch import nn
from torch.utils.data import DataLoader
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

import fid
import losses
import models
from losses import DCDLoss, PathLengthPenalty, PerceptualLoss, PixelLoss
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
TORCHRUN = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
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


def fails(message, function, *args, **options):
    """Calls the function, which has to raise ValueError, as InputError is, with a message of one line that matches."""
    with pytest.raises(ValueError, match=message) as error:
        function(*args, **options)
    assert "\n" not in str(error.value)


@pytest.fixture
def full_disk():
    """Called, it lets no file grow beyond 100 kB."""
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    yield lambda: resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    signal.signal(signal.SIGXFSZ, handler)


@pytest.fixture
def server(tmp_path, monkeypatch):
    """A server of tmp_path/web, of files in broken/ half, and an empty cache of torch hub: (address, paths asked)."""
    asked = []

    class Handler(http.server.SimpleHTTPRequestHandler):
        def copyfile(self, source, target):
            target.write(source.read()[: 100_000 if "broken" in self.path else None])

        def log_request(self, *_):
            asked.append(self.path)

        def log_error(self, *_):
            pass

    (tmp_path / "web/broken").mkdir(parents=True)
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    handler = functools.partial(Handler, directory=str(tmp_path / "web"))
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler) as running:
        threading.Thread(target=running.serve_forever, args=(0.01,), daemon=True).start()
        yield f"http://127.0.0.1:{running.server_port}", asked
        running.shutdown()


def publish(folder, content):
    """Saves bytes under a name that ends in the start of their SHA-256 -> the name."""
    name = f"weights-{hashlib.sha256(content).hexdigest()[:8]}.pth"
    (folder / name).write_bytes(content)
    return name


@pytest.fixture(scope="session")
def inception_file(tmp_path_factory):
    """Random weights of the FID Inception."""
    path, generator = tmp_path_factory.mktemp("weights") / "inception.pth", torch.Generator().manual_seed(0)
    net = fid.FIDInceptionV3()
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.Linear)):
            nn.init.kaiming_uniform_(module.weight, nonlinearity="relu", generator=generator)
        elif isinstance(module, nn.BatchNorm2d):
            module.running_mean.normal_(0, 0.1, generator=generator)
    torch.save(net.state_dict(), path)
    return str(path)


@pytest.fixture(scope="session")
def vgg_file(tmp_path_factory):
    """Random weights of VGG16, as torchvision's file has them, with a layer that the loss does not use."""
    path, state_dict = tmp_path_factory.mktemp("weights") / "vgg16.pth", {}
    for index, layer in enumerate(make_layers(cfgs["D"])[:23]):
        if isinstance(layer, nn.Conv2d):
            nn.init.kaiming_normal_(layer.weight, generator=torch.Generator().manual_seed(index))
            state_dict |= {f"features.{index}.weight": layer.weight.data, f"features.{index}.bias": layer.bias.data}
    torch.save(state_dict | {"classifier.0.bias": torch.ones(1)}, path)
    return str(path)


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
    size = {"cyclegan_dcd": (40, 36), "pix2pix_dcd": (80, 36)}
    for name, folders in FOLDERS.items():
        for folder in folders:
            (root / name / folder).mkdir(parents=True, exist_ok=True)
            for i in range(by_kind(name, 2, 3)):
                noise = Image.effect_noise(size.get(name, (20, 16)), 90)
                noise.convert("RGB").save(root / name / folder / f"{i}.png")
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


def weights(out):
    """{name: state dict} of the networks in a run's checkpoint."""
    return {name: record["state_dict"] for name, record in checkpoint(out)["networks"].items()}


def same_runs(a, b):
    """Whether two runs have the same log, and the same tensors in all their files."""
    names = {path.name for path in Path(a).glob("*.pt")}
    assert names == {path.name for path in Path(b).glob("*.pt")}
    contents = [[models.load_file(Path(out, name)) for name in names] for out in (a, b)]
    return log_lines(a) == log_lines(b) and same(*contents)


@pytest.fixture(scope="session")
def finished(data, tmp_path_factory):
    """The folder of a script's finished run, by name; for reading alone."""

    @functools.cache
    def folder(name):
        out = tmp_path_factory.mktemp("finished") / name
        run(name, data, out)
        return out

    return folder


@every_script
def test_a_whole_run(name, data, finished, tmp_path):
    """The files of a run; samples and evaluations leave it alone, and so does going on with it when it is finished."""
    out = tmp_path / "out"
    lines = run(name, data, out, "--sample-every 3 --eval-every 2")
    steps = [line for line in lines if "evaluation" not in line]
    assert [line["step"] for line in steps] == list(range(1, by_kind(name, 9, 10)))
    assert {"images", *by_kind(name, ("lr", "G_S_gan", "G_S_dcd", "D_T"), ("kimg", "D", "G"))} <= steps[0].keys()
    evaluated = [line["step"] for line in lines if "student_to_teacher" in line]
    assert evaluated == by_kind(name, [4, 8], [])  # without an Inception
    samples = by_kind(name, "0000003 0000006 0000008", "stage0_0000003 stage1_0000006 stage2_0000009")
    assert sorted(path.stem for path in out.glob("samples/*.png")) == samples.split()
    assert same(weights(finished(name)), weights(out))
    assert "teacher_g" not in weights(out)  # a teacher's G is no longer needed when stage 0 is over
    student = models.load_generator(out / "student.pt")
    assert same(student.state_dict(), weights(out)[by_kind(name, "student_G_ema", "student_g_ema")])
    summary = json.loads((out / "summary.json").read_text())
    assert summary["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    before = {path: path.read_bytes() for path in out.rglob("*.*") if path.suffix != ".json"}
    resume(name, out)
    assert all(path.read_bytes() == content for path, content in before.items())


@every_script
def test_toy(name, vgg_file, tmp_path):
    script, options = SCRIPTS[name], by_kind(name, f"--vgg {vgg_file}", "")
    script.main(f"--toy --out {tmp_path} --max-steps 1 --batch-size 1 --lr 0.5 --device cpu {options}".split())
    args = json.loads((tmp_path / "args.json").read_text())
    changed = dict(batch_size=1, lr=0.5, vgg=vgg_file)
    assert all(args[key] == changed.get(key, value) for key, value in script.TOY.items())
    assert len(list((tmp_path / "toy_data").rglob("*.png"))) >= 100
    models.load_file(tmp_path / "checkpoint.pt")


def refused(capsys, name, arguments):
    """A script's main that has to end with one line on stderr and status 2 -> that line."""
    capsys.readouterr()
    with pytest.raises(SystemExit) as stop:
        SCRIPTS[name].main(arguments)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith(f"train_{name}.py: error: ")
    return error


def test_the_output_folder(data, tmp_path, capsys):
    name, out = "cyclegan_dcd", tmp_path / "out"
    run(name, data, out, "--max-steps 2 --sample-every 1")
    before = {path: path.read_bytes() for path in out.rglob("*.*")}
    for options, message in (
        ("", "holds a run; go on with --resume"),
        ("--resume --seed 3", "the run has --seed 0, not 3"),
        ("--resume --overwrite", "not allowed with"),
        (f"--overwrite --teacher {out}/checkpoint.pt", "choose another --out"),
        (f"--overwrite --student {out}/student.pt", "choose another --out"),
    ):
        assert message in refused(capsys, name, arguments(name, data, out, options))
    assert all(path.read_bytes() == content for path, content in before.items())
    (out / "mine.pt").write_text("not a file of the run")
    lines = run(name, data, out, "--overwrite --max-steps 1")
    assert [line["step"] for line in lines] == [1] and (out / "mine.pt").exists() and not [*out.glob("samples/*")]
    torch.save(checkpoint(out) | dict(script="other"), out / "checkpoint.pt")
    message = "a checkpoint of train_other.py, expected one of train_cyclegan_dcd.py"
    assert message in refused(capsys, name, ["--out", str(out), "--resume"])


@every_script
def test_resume_is_exact(name, data, finished, tmp_path):
    """Cut inside an epoch, inside and between stages; workers change nothing, nor what the log has of later steps."""
    for cut in by_kind(name, (3,), (3, 7)):
        out = tmp_path / f"cut_{cut}"
        run(name, data, out, f"--max-steps {cut} --workers 2")
        with open(out / "log.jsonl", "a") as file:
            file.write('{"step": 8, "from": "after the checkpoint"}\n{"step": 8, "torn')
        resume(name, out, "--workers 1")
        assert same_runs(finished(name), out)


def test_a_run_without_a_checkpoint_starts_again(data, finished, tmp_path, capsys):
    name = "stylegan2_dgl"
    run(name, data, tmp_path, "--max-steps 1")
    (tmp_path / "checkpoint.pt").unlink()
    resume(name, tmp_path)
    assert "no checkpoint yet, the run starts from its beginning" in capsys.readouterr().out
    assert same_runs(finished(name), tmp_path)


@every_script
def test_longer_training(name, finished, tmp_path, capsys):
    """A changed budget is in the log, and the schedule follows; stages that are over cannot change."""
    out = shutil.copytree(finished(name), tmp_path / "out")
    key, more, step = by_kind(name, ("epochs_decay", 3, 8), ("stage2_kimg", 0.016, 9))
    lines = resume(name, out, f"--{key.replace('_', '-')} {more}")
    assert lines[step] == {"step": step, key: more} and lines[-1]["step"] == 10
    if "dcd" in name:
        assert [line["lr"] for line in lines[9:]] == pytest.approx([2e-4 * 2 / 7, 2e-4 * 1 / 7])
    else:
        for kimg in (0.008, 0.016, 0.1):
            error = refused(capsys, name, f"--out {out} --resume --stage1-kimg {kimg}".split())
            assert "stages that are over keep their lengths" in error


def start(command, environment=ENVIRONMENT):
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    return subprocess.Popen([*map(str, command)], **streams, env=environment)


def wait_for(process, text):
    while text not in process.stdout.readline():
        assert process.poll() is None, process.stderr.read()


@pytest.mark.parametrize("name, number", [("cyclegan_dcd", signal.SIGTERM), ("stylegan2_dgl", signal.SIGINT)])
def test_a_signal_lets_the_step_finish(name, number, data, tmp_path):
    """Sent to the group, workers too, as a terminal does; what goes on is the run that was left alone, to the bit."""
    options = by_kind(name, "--epochs 9999", "--teacher-kimg 999") + " --log-every 2"
    endless = arguments(name, data, tmp_path / "cut", options, "--save-every 9999 --workers 1")
    process = start([sys.executable, HERE / f"train_{name}.py", *endless])
    wait_for(process, "step 4 ")
    os.killpg(process.pid, number)
    said, err = process.communicate(timeout=120)
    step = checkpoint(tmp_path / "cut")["step"]
    assert step >= 4 and f"stopped after step {step}, saved; go on: --out" in said
    assert process.returncode == 128 + number and err == "finishing the step and saving\n"
    resume(name, tmp_path / "cut", f"--max-steps {step + 3} --workers 0")
    run(name, data, tmp_path / "whole", options, f"--max-steps {step + 3}")
    assert same_runs(tmp_path / "whole", tmp_path / "cut")


def test_a_second_signal_ends_at_once():
    """And so does a first one before the steps begin and in work between them."""

    def train(when):
        if when != "before":
            models.defer_signals()
        if when == "in a step":
            os.kill(os.getpid(), signal.SIGTERM)
            assert models.stop_asked() == signal.SIGTERM
        if when == "between":
            with models.interruptible():
                os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        raise AssertionError("went on")

    for when in ("before", "in a step", "between"):
        with pytest.raises(SystemExit) as stop:
            models.run_script("x", lambda argv: [argv], train, when)
        assert stop.value.code == 128 + signal.SIGINT and models.stop_asked() == 0


SAVE_FOREVER = """
import torch, models
for i in range(10**9):
    models.save_checkpoint("checkpoint.pt", {"net": torch.nn.Linear(9, 9)}, {}, {}, i=i, bulk=torch.full((10**6,), i))
    print(i, flush=True)
"""


def test_kill_9_while_saving_leaves_a_whole_file(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    process = start([sys.executable, "-c", SAVE_FOREVER])
    for seconds in (0, 0.003, 0.011):
        process.stdout.readline()
        time.sleep(seconds)
    process.kill()
    process.communicate()
    content = models.load_file("checkpoint.pt")
    assert (content["bulk"] == content["i"]).all() and "net" in content["networks"]


def test_what_cannot_be_saved_keeps_the_old_checkpoint(tmp_path, full_disk):
    path, net = tmp_path / "checkpoint.pt", nn.Linear(10, 10)
    save = functools.partial(models.save_checkpoint, path, {"net": net}, {}, {})
    save(step=1)
    full_disk()
    with pytest.raises(OSError, match="not written, what was there stays"):
        save(step=2, bulk=torch.zeros(10**6))
    net.weight.data[0, 0] = torch.nan
    with pytest.raises(SystemExit, match="diverged, net weight is not finite; the last checkpoint stays"):
        save(step=2)
    assert models.load_file(path)["step"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_divergence_stops_the_run(data, tmp_path):
    name = "stylegan2_dgl"
    run(name, data, tmp_path, "--max-steps 2")
    broken = checkpoint(tmp_path)
    for record in broken["networks"].values():
        next(iter(record["state_dict"].values())).fill_(torch.nan)
    torch.save(broken, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for options in ("--log-every 1", "--log-every 100 --save-every 1"):
        with pytest.raises(SystemExit, match="diverged, .*; the last checkpoint stays"):
            resume(name, tmp_path, "--max-steps 9", options)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before


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
    os.environ["MASTER_PORT"] = str(port)
    importlib.import_module("train_" + name).main(arguments)
    content = b"".join(v.numpy().tobytes() for net in networks for v in net.state_dict().values())
    print(hashlib.sha256(content).hexdigest(), file=sys.stderr)
    while not os.path.exists(arguments[arguments.index("--out") + 1] + "/summary.json"):  # rank 0 writes it last
        time.sleep(0.05)
"""


def free_port():
    with socket.create_server(("127.0.0.1", 0)) as found:
        return found.getsockname()[1]


def test_two_processes(data, tmp_path, capsys):
    """Equal weights in both; resumed to the bit; as one process, where no batch norm and no random number is in it."""
    plain = "--distill pixel --teacher-every 1 --pool-size 0 --eval-every 2 --max-steps 4"
    runs = [("cyclegan_dcd", "plain", plain)]
    for name in ("cyclegan_dcd", "stylegan2_dgl", "biggan_dgl"):
        runs.append((name, f"{name}_whole", "--batch-size 2 --save-every 2 --max-steps 4"))
        runs.append((name, f"{name}_cut", "--batch-size 2 --max-steps 2"))
        runs.append((name, f"{name}_cut", "--batch-size 2 --max-steps 4 --resume"))
    commands = [(free_port(), name, arguments(name, data, tmp_path / out, options)) for name, out, options in runs]
    pair = []
    for rank in "01":
        environment = ENVIRONMENT | dict(RANK=rank, WORLD_SIZE="2", MASTER_ADDR="127.0.0.1")
        pair.append(start([sys.executable, "-c", TWO, json.dumps(commands)], environment))
    hashes = [process.communicate(timeout=300)[1].split()[-len(runs) :] for process in pair]
    assert hashes[0] == hashes[1] and len(set(hashes[0])) == 7, hashes
    for name in ("cyclegan_dcd", "stylegan2_dgl", "biggan_dgl"):
        assert same_runs(tmp_path / f"{name}_whole", tmp_path / f"{name}_cut"), name
    one = run("cyclegan_dcd", data, tmp_path / "one", plain, "--batch-size 2")
    assert log_lines(tmp_path / "plain") == [pytest.approx(line, rel=2e-3) for line in one]
    states = [checkpoint(tmp_path / out)["optimizers"]["student_G"]["state"].values() for out in ("plain", "one")]
    two, one = (flat(state["exp_avg"] for state in values) for values in states)
    assert (two - one).norm() < 1e-2 * one.norm()  # Adam itself would hide a gradient of the wrong length
    error = refused(capsys, "cyclegan_dcd", f"--out {tmp_path}/plain --resume".split())
    assert "the run has 2 processes, found 1: start as many" in error


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


# Script | options | what the error says
BAD = """
cyclegan_dcd | --data gone | gone
cyclegan_dcd | --data {bad}/header | 1.png: not a readable image
cyclegan_dcd | --device cuda:99 | --device cuda:99
cyclegan_dcd | --lr nan | --lr
cyclegan_dcd | --resume | holds no run to go on with
cyclegan_dcd | --out {bad}/file/out | Not a directory
cyclegan_dcd | --teacher {bad}/code.pt | only plain tensors are loaded
cyclegan_dcd | --teacher {bad}/narrow.pt | size mismatch for model.1.weight
cyclegan_dcd | --crop-size 30 | multiple of 4
cyclegan_dcd | --d-fakes none | needs --freeze-teacher
cyclegan_dcd | --freeze-teacher | a trained --teacher
cyclegan_dcd | --inception {bad}/file --eval-every 1 | not the weights of the FID Inception
pix2pix_dcd | --data {bad}/odd | 0.png is 201x100 pixels
pix2pix_dcd | --teacher-arch unet_256 | choose two ResNets or two U-Nets
pix2pix_dcd | --lambda-gan 0 --lambda-dcd 0 | nothing would be learnt
pix2pix_dcd | --vgg {bad}/narrow.pt --lambda-style 1 | narrow.pt
stylegan2_dgl | --colour | --colour
stylegan2_dgl | --teacher-kimg 0 | stage 2 needs a teacher
stylegan2_dgl | --teacher-kimg 0 --teacher {bad}/narrow.pt | does not fit this StyleGAN2Discriminator
stylegan2_dgl | --teacher-kimg 0 --teacher {bad}/pair.pt --size 16 | its images are of 8 pixels, not of 16
stylegan2_dgl | --student {bad}/pair.pt | has no 'g'
biggan_dgl | --shared-dim 0 | --hierarchical needs --shared-dim
biggan_dgl | --data {bad}/odd/train | lies in no class folder
"""
BAD = [line.split(" | ") for line in BAD.strip().splitlines()]


@pytest.fixture(scope="session")
def bad(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    (root / "file").write_text("no folder")
    torch.save({"a": RunsCode()}, root / "code.pt")
    torch.save(ResnetGenerator(ngf=2, separable=True).state_dict(), root / "narrow.pt")
    models.save_pair(root / "pair.pt", dict(d=StyleGAN2Discriminator(8, width=0.01)))
    shutil.copytree(data / "cyclegan_dcd", root / "header")
    (root / "header/testB/1.png").write_bytes(b"no image")
    shutil.copytree(data / "pix2pix_dcd", root / "odd")
    Image.new("RGB", (201, 100)).save(root / "odd/train/0.png")
    return root


@pytest.mark.parametrize("name, options, message", BAD)
def test_bad_input(name, options, message, data, bad, tmp_path, capsys, monkeypatch):
    """One line that says what is wrong, exit status 2, and no run."""
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, name, arguments(name, data, "out", options.format(bad=bad)))
    assert not Path("out/args.json").exists() and not Path("executed").exists()


@every_script
def test_pictures_of_all_kinds(name, data, tmp_path, capfd):
    """Of one that is cut off, DCD takes the next, with a warning; DGL stops, while it resizes all."""
    root = Path(shutil.copytree(data, tmp_path / "data"))
    for n, path in enumerate(sorted((root / name).rglob("*.png"))):
        Image.open(path).convert(["RGBA", "LA", "P", "1", "L"][n % 5]).save(path)
    run(name, root, tmp_path / "whole", "--max-steps 1")
    broken = sorted((root / name).rglob("1.png"))[-1]
    os.truncate(broken, broken.stat().st_size - 40)
    if "dcd" in name:
        broken = broken.rename(sorted((root / name).glob("train*"))[-1] / "1.png")
        run(name, root, tmp_path / "out", "--max-steps 2")
        assert f"warning: {broken}: not a readable image" in capfd.readouterr().err
    else:
        error = refused(capfd, name, arguments(name, root, tmp_path / "out"))
        assert f"{broken}: not a readable image" in error and not [*(tmp_path / "out").glob("*.npy")]


# ----------------------------------------------------------------------------------------------------------------------
# DCD, against the paper's formulas


@pytest.fixture
def batches(monkeypatch):
    """What training reads, from the first step on."""
    seen, read = [], models.run_batches
    monkeypatch.setattr(models, "run_batches", lambda *args: (seen.append(batch) or batch for batch in read(*args)))
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
    (fake_T, taps_T), (fake_S, taps_S) = G(x, taps=True), S(x, taps=True)
    fools, catches = (functools.partial(loss, mode=mode) for loss in (losses.generator_loss, losses.discriminator_loss))
    real, of_T, of_S = (D(torch.cat([x, image], 1) if conditional else image) for image in (y, fake_T, fake_S))
    expected = dict(G_T_gan=fools(of_T), G_S_gan=fools(of_S), D_T=catches(real, torch.cat([of_T, of_S])) / 2)
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
        expected["D_T_A"] = catches(D_A(x), D_A(fake_A)) / 2
        objective_T = expected["G_T_gan"] + 10 * (expected["G_T_cycle"] + 0.5 * expected["G_T_identity"])
        objective_D = expected["D_T"] + expected["D_T_A"]
    expected["G_S_dcd"] = dcd(taps_S, [tap.detach() for tap in taps_T], D.features)
    expected["G_S_style"], expected["G_S_feature"] = PerceptualLoss(vgg_file)(fake_S, fake_T)
    found = {key: value for key, value in line.items() if key.startswith(("G_", "D_"))}
    assert found == {key: pytest.approx(value.item(), rel=1e-3) for key, value in expected.items()}
    objective_S = sum(weight * expected[f"G_S_{term}"] for term, weight in terms.items())
    student = nn.ModuleList([S, dcd.student_connectors])
    nets = dict(student_G=(student, objective_S), teacher_G=(teacher, objective_T), teacher_D=(judges, objective_D))
    for role, (net, objective) in nets.items():
        gradient = flat(torch.autograd.grad(objective, [*net.parameters()], retain_graph=True))
        moments = checkpoint(tmp_path)["optimizers"][role]["state"].values()
        found = 2 * flat(moment["exp_avg"] for moment in moments)  # beta1 is 1/2
        assert (found - gradient).norm() < 1e-2 * gradient.norm(), role


@dcd_scripts
def test_ablations(name, data, tmp_path, capsys):
    """D_T frozen; the teacher frozen; pixel by pixel. The teacher's connectors never move."""
    run(name, data, tmp_path / "still", "--max-steps 1 --lr 0")
    before, given = weights(tmp_path / "still"), f"--teacher {tmp_path}/still/checkpoint.pt"
    for term, options in (
        ("gan", f"{given} --freeze-teacher --d-fakes none"),
        ("dcd", f"{given} --freeze-teacher"),
        ("dcd", "--distill pixel"),
    ):
        alone = f"--lambda-gan 0 --lambda-dcd 0 --lambda-{term} 1"
        line = run(name, data, tmp_path / "out", "--overwrite --max-steps 1", alone, options)[0]
        after = weights(tmp_path / "out")
        moved = {key for key in before if not same(before[key], after[key])}
        assert "student_G" in moved and ("distill_loss" in moved) == (term == "dcd")
        assert ("teacher_D" in moved) == ("D_T" in line) == ("none" not in options)
        assert ("teacher_G" in moved) == ("G_T_gan" in line) == ("freeze" not in options)
        for key, value in before["distill_loss"].items():
            assert not key.startswith("teacher_") or torch.equal(value, after["distill_loss"].get(key, value))
    torch.save(before["teacher_G"], tmp_path / "G.pth")
    words = arguments(name, data, tmp_path / "new", f"--freeze-teacher --d-fakes none --teacher {tmp_path}/G.pth")
    assert "trained D too" in refused(capsys, name, words)


@dcd_scripts
def test_bf16_leaves_the_student_in_float32(name, data, tmp_path):
    types = {8: set(), 16: set()}  # of the student's and the teacher's pointwise convolutions

    def note(module, _inputs, output):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.out_channels in types:
            types[module.out_channels].add(output.dtype)

    hook = nn.modules.module.register_module_forward_hook(note)
    run(name, data, tmp_path, "--max-steps 1 --amp bf16")
    hook.remove()
    assert types[8] == {torch.float32} and torch.bfloat16 in types[16]


# Networks that are given: script, files of --teacher, file of --student
GIVEN = """
cyclegan_dcd | checkpoint.pt | student.pt
pix2pix_dcd | G.pth D.pth | checkpoint.pt
stylegan2_dgl | checkpoint.pt | stage2.pt
stylegan2_dgl | D.pth | checkpoint.pt
stylegan2_dgl | community.pt | checkpoint.pt
biggan_dgl | teacher.pt | stage2.pt
biggan_dgl | D.pth G.pth | checkpoint.pt
"""
STILL = {
    "cyclegan_dcd": "--student-ngf 3 --freeze-teacher --d-fakes none",
    "pix2pix_dcd": "--student-ngf 3 --freeze-teacher --d-fakes none",
    "stylegan2_dgl": "--student-width 0.02 --teacher-kimg 0 --stage1-kimg 0 --path-weight 0",
    "biggan_dgl": "--student-ch 3 --teacher-kimg 0 --stage1-kimg 0 --d-lr 0",
}


@pytest.mark.parametrize("name, teachers, student", [row.split(" | ") for row in GIVEN.strip().splitlines()])
def test_given_networks(name, teachers, student, data, finished, tmp_path):
    """Files of ours bring their widths along, bare state dicts have to fit; D_T is frozen, its spectral vectors too."""
    given = shutil.copytree(finished(name), tmp_path / "given")
    nets = weights(given)
    G, D = by_kind(name, ("teacher_G", "teacher_D"), ("teacher_g_ema", "teacher_d"))
    torch.save(by_kind(name, old_spelling(nets[G]), nets[G]), given / "G.pth")
    torch.save(nets[D], given / "D.pth")
    community = dict(g=nets[G], d=nets[D], g_ema=nets[G], args=argparse.Namespace(size=8), g_optim={})
    torch.save(community, given / "community.pt")
    files = " ".join(f"{given}/{file}" for file in teachers.split())
    options = f"--teacher {files} --student {given}/{student} --lr 0 --max-steps 1 {STILL[name]}"
    run(name, data, tmp_path / "out", options)
    found = weights(tmp_path / "out")
    assert same(nets[D], found[D])
    assert teachers == "D.pth" or same(nets[G], found[G])
    key = by_kind(name, "student_G", "student_g")
    expected = nets["student_G_ema" if student == "student.pt" else key]
    assert all(torch.equal(value, found[key][name]) for name, value in expected.items() if name.endswith("weight"))
    shutil.rmtree(given)  # a run that goes on has all of it in its checkpoint
    resume(name, tmp_path / "out", "--max-steps 2")


@pytest.mark.parametrize("name", ["cyclegan_dcd", "pix2pix_dcd", "stylegan2_dgl"])
def test_moving_average(name, data, tmp_path):
    """ema = decay ema + (1 - decay) net, to a half-life in images, and it is what student.pt holds."""
    options = by_kind(name, "--ema 7", "--teacher-kimg 0 --stage2-kimg 0 --ema-kimg 0.007") + " --max-steps 1"
    student, decay = by_kind(name, ("student_G", 0.5 ** (1 / 7)), ("student_g", 0.5 ** (4 / 7)))
    nets = []
    for lr in (0, 0.1):
        run(name, data, tmp_path, options, f"--overwrite --lr {lr}")
        nets.append(weights(tmp_path)[student])
    expected = {key: decay * value + (1 - decay) * nets[1][key] for key, value in nets[0].items()}
    average = models.load_generator(tmp_path / "student.pt").state_dict()
    torch.testing.assert_close(dict(average), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", ["pix2pix_dcd", "biggan_dgl"])
def test_evaluation(name, data, inception_file, tmp_path):
    options = f"--max-steps 3 --eval-every 9 --inception {inception_file}"
    scores = run(name, data, tmp_path, options, by_kind(name, "", "--teacher-kimg 0 --stage2-kimg 0"))[-1]
    assert scores["fid_student"] > 0 and by_kind(name, "psnr_teacher", "is_student") in scores
    assert json.loads((tmp_path / "summary.json").read_text())["scores"].items() <= scores.items()
    best, last = (models.load_generator(tmp_path / file).state_dict() for file in ("best_student.pt", "student.pt"))
    assert same(best, last)


def test_pix2pix_unet_and_direction(tmp_path):
    pair = Image.new("RGB", (512, 256), "red")
    pair.paste("blue", (256, 0, 512, 256))
    for phase in ("train", "test"):
        (tmp_path / "pix2pix_dcd" / phase).mkdir(parents=True)
        pair.save(tmp_path / "pix2pix_dcd" / phase / "0.jpg")
    archs = "--teacher-arch unet_256 --student-arch unet_256 --load-size 256 --crop-size 256 --batch-size 1"
    run("pix2pix_dcd", tmp_path, tmp_path / "out", archs, "--sample-every 1 --max-steps 1 --direction BtoA")
    grid = np.asarray(Image.open(tmp_path / "out/samples/0000001.png")).astype(int)
    assert grid[146, 130].argmax() == 2 and grid[146, 3 * 260 + 130].argmax() == 0  # blue into red


# ----------------------------------------------------------------------------------------------------------------------
# DGL-GAN


def stage_2(name, finished):
    """Options for stage 2 alone, D_T being that of a finished run."""
    return f"--teacher {finished(name)}/teacher.pt --teacher-kimg 0 --stage1-kimg 0"


@dgl_scripts
def test_dgl_objective(name, data, finished, tmp_path):
    """G's gradient is its own term's plus lambda times D_T's, which the log has unweighted. Here D_T judges as D_S."""
    options = f"{stage_2(name, finished)} --student {finished(name)}/teacher.pt --lr 0 --max-steps 1"
    options += dict(stylegan2_dgl=" --path-weight 0", biggan_dgl=" --d-lr 0")[name]
    logged, gradients = [], []
    for weight in (0, 1, 5):
        logged.append(run(name, data, tmp_path, options, f"--overwrite --lambda-dgl {weight}")[0])
        moments = checkpoint(tmp_path)["optimizers"]["G"]["state"].values()
        gradients.append(flat(moment["exp_avg"] for moment in moments))  # beta1 is 0
    own, one, five = gradients
    assert logged[0] == logged[1] == logged[2] and (five - own - 5 * (one - own)).norm() < 1e-4 * five.norm()
    if name == "stylegan2_dgl":  # BigGAN's spectral norms are a step apart
        assert logged[0]["G"] == pytest.approx(logged[0]["G_dgl"]) and (one - 2 * own).norm() < 1e-4 * one.norm()


def test_stage_2_goes_on_from_stage_1(data, finished, tmp_path):
    """With new optimisers, and the path length's mean; with lr 0 it is where stage 1 ended."""
    means = [line["path_mean"] for line in log_lines(finished("stylegan2_dgl")) if "path_mean" in line]
    start = models.load_file(finished("stylegan2_dgl") / "stage1.pt")
    assert start["path"]["mean"] == means[3] > 0 and means[4] > 0.9 * means[3]
    steps = [state["step"] for state in checkpoint(finished("stylegan2_dgl"))["optimizers"]["D"]["state"].values()]
    assert max(steps) == 5  # three updates, two of R1
    run("stylegan2_dgl", data, tmp_path, "--max-steps 7 --lr 0 --ema-kimg 1e9 --path-weight 0")
    start = models.load_file(tmp_path / "stage1.pt")
    assert all(same(start[key], weights(tmp_path)[f"student_{key}"]) for key in ("g", "d", "g_ema", "path"))


def test_accumulated_gradients_are_one_batchs(data, tmp_path, monkeypatch, batches):
    """Of D, of R1 and of G, over two micro-batches; the latents are known, with lr 0 the networks stay."""
    latents = torch.randn(4, 4, 8, generator=torch.Generator().manual_seed(3))  # two for D, two for G
    options = "--lr 0 --max-steps 1 --accumulate 2 --teacher-kimg 0 --stage2-kimg 0 --path-weight 0 --r1-every 1"
    found = []
    for gamma in (0, 10):
        draws = iter(latents)
        draw = functools.partial(lambda draws, G, n, style_mixing: G.mapping(next(draws)), draws)
        monkeypatch.setattr(SCRIPTS["stylegan2_dgl"], "draw_latents", draw)
        run("stylegan2_dgl", data, tmp_path, options, f"--overwrite --r1-gamma {gamma}")
        found.append(checkpoint(tmp_path)["optimizers"])
    G = load(StyleGAN2Generator(8, 8, 2, width=0.0078), weights(tmp_path)["student_g"])
    D = load(StyleGAN2Discriminator(8, width=0.01), weights(tmp_path)["student_d"])

    def join(pair):
        """One batch, whose groups, of every second image, are the micro-batches."""
        return torch.stack([*pair], 1).flatten(0, 1)

    real = (join(batches[:2]) / 127.5 - 1).requires_grad_()
    logits, fakes, fakes_for_G = D(real), D(G(join(latents[:2]))), D(G(join(latents[2:])))
    (slope,) = torch.autograd.grad(logits.sum(), real, create_graph=True)
    for net, state, objective in (
        (D, found[0]["D"]["state"], F.softplus(-logits).mean() + F.softplus(fakes).mean()),
        (D, found[1]["D"]["state"], 10 / 2 * slope.square().sum((1, 2, 3)).mean()),
        (G, found[0]["G"]["state"], F.softplus(-fakes_for_G).mean()),
    ):
        names, parameters = zip(*net.named_parameters(), strict=True)
        for i, gradient in enumerate(torch.autograd.grad(objective, parameters, retain_graph=True, allow_unused=True)):
            if gradient is not None and "noise" not in names[i]:  # the noise is another one
                assert (state[i]["exp_avg"] - gradient).norm() <= 1e-5 * gradient.norm(), names[i]


def test_penalties_and_paces(data, tmp_path):
    """Each penalty slows the optimiser down (StyleGAN2, appendix B); the mean length's steps are the optimiser's."""
    means = []
    for options in ("--r1-gamma 0 --path-weight 0", "", "--accumulate 2"):
        options += " --r1-every 16 --path-every 4 --stage1-kimg 0 --stage2-kimg 0 --max-steps 1"
        line = run("stylegan2_dgl", data, tmp_path, "--overwrite", options)[0]
        paces = (4 / 5, 16 / 17) if "path" in line else (1, 1)
        assert ("path" in line) == ("R1" in line) == ("--path-weight 0" not in options)
        for key, c in zip("GD", paces, strict=True):
            (group,) = checkpoint(tmp_path)["optimizers"][key]["param_groups"]
            assert group["lr"] == pytest.approx(0.002 * c) and group["betas"] == (0.0, pytest.approx(0.99**c))
        means.append(line.get("path_mean"))
    assert means[2] == pytest.approx(means[1], rel=0.5)


def test_the_teachers_discriminator_is_frozen_and_stage_1_never_calls_it(data, finished, tmp_path, monkeypatch):
    calls, forward = [], StyleGAN2Discriminator.forward
    monkeypatch.setattr(StyleGAN2Discriminator, "forward", lambda self, x: calls.append(self) or forward(self, x))
    teacher = finished("stylegan2_dgl") / "teacher.pt"
    run("stylegan2_dgl", data, tmp_path, f"--teacher-kimg 0 --teacher {teacher} --max-steps 3")
    assert len(set(calls)) == 1 and len(calls) == 3 * 3 + 2  # D_S: real, fake, for G; R1 at two of three steps
    calls.clear()
    resume("stylegan2_dgl", tmp_path)
    D_T, D_S = sorted(set(calls), key=calls.count)
    assert (calls.count(D_T), calls.count(D_S)) == (3, 11)
    assert same(dict(D_T.state_dict()), models.load_file(teacher)["d"])
    assert not any(p.requires_grad or p.grad is not None for p in D_T.parameters())


def test_biggan_updates_and_average(data, tmp_path):
    """--d-steps updates of D for one of G, of --accumulate micro-batches; the average is a copy before --ema-start."""
    options = "--teacher-kimg 0 --stage2-kimg 0 --batch-size 2 --accumulate 2 --d-steps 3 --stage1-kimg 1"
    before = None
    for step in (1, 2, 3):
        decay = f"--ema-decay 0.75 --max-steps {step}"
        lines = run("biggan_dgl", data, tmp_path, options, decay, "--resume" * (step > 1))
        net, average = (weights(tmp_path)[f"student_{key}"] for key in ("g", "g_ema"))
        assert same(net, average) == (step < 3)
        if step == 3:
            expected = {key: 0.75 * before[key] + 0.25 * net[key] for key in net}
            torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
        before = average
    assert lines[-1]["images"] == 3 * 12
    for role, count in dict(G=3, D=9).items():
        states = checkpoint(tmp_path)["optimizers"][role]["state"].values()
        assert {int(state["step"]) for state in states} == {count}


def test_classes(data, tmp_path):
    """Folders in sorted order, also in a .zip with a folder around them all; pictures keep their labels."""
    script, root = SCRIPTS["biggan_dgl"], data / "biggan_dgl"
    shutil.make_archive(tmp_path / "set", "zip", data, "biggan_dgl")
    for source in (root, tmp_path / "set.zip"):
        assert script.find_classes(fid.ImageFiles(source)) == (["x", "y"], [0, 0, 0, 1, 1, 1])
    items = script.LabelledImages(torch.arange(6).view(6, 1, 1, 1), [0, 0, 0, 1, 1, 1], mirror=True, seed=1)
    epoch = [items[n] for n in range(6, 12)]
    assert sorted(image.item() for image, _ in epoch) == list(range(6))
    assert all(label == image // 3 for image, label in epoch)


# ----------------------------------------------------------------------------------------------------------------------
# Networks

# The hash of the reference implementations' state-dict keys and shapes, one "key [shape]" a line, sorted.
CIFAR = dict(n_classes=10, dim_z=128, shared_dim=None, hierarchical=False)
REFERENCE_KEYS = {
    "73603dcc5124e07f": lambda: ResnetGenerator(ngf=32),
    "c9b16fcf6267e6db": lambda: ResnetGenerator(ngf=16, separable=True),
    "2c7d5ee6196f00a5": lambda: UnetGenerator(ngf=8, norm="batch"),
    "432c924f8b6febe5": lambda: UnetGenerator(ngf=8),
    "79d536cba8ddecd4": lambda: PatchDiscriminator(ndf=16),
    "717b4f0e6e2d44da": lambda: PatchDiscriminator(6, ndf=16, norm="batch"),
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
        (ResnetGenerator(ngf=4, norm="batch"), x, "-0.47603 0.80096 0.7162 -0.99999"),
        (UnetGenerator(ngf=4), large, "-0.11997 0.48871 -0.50432 0.752"),
        (UnetGenerator(ngf=4, norm="batch"), large, "0.79637 0.23263 0.54738 0.95996"),
        (PatchDiscriminator(6, 8), x6, "0.56868 1.84668 3.0695 1.63451"),
        (StyleGAN2Generator(16, 32, 3), z, "-1.39313 0.85264 -0.53143 -0.2404"),
        (StyleGAN2Discriminator(16), small, "0.67798 0.0 0.67798 0.67798"),
    ):
        options = dict(noise="fixed") if isinstance(net, StyleGAN2Generator) else {}
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
    G = BigGANGenerator(size, 8, attention=attention, **options)
    D = BigGANDiscriminator(size, 8, 10, attention)
    for net in (G, D):
        fill(net).double().to(memory_format=torch.channels_last)
    g = torch.Generator().manual_seed(1)
    z, y = torch.randn(3, G.dim_z, generator=g).double(), torch.tensor([7, 0, 7])
    x = (torch.rand(3, 3, size, size, generator=g) * 2 - 1).double()
    found = summary(G(z, y))
    images, logits = G.train()(z, y), D(x, y)
    found += summary(images) + summary(logits)
    (images.square().mean() + logits.sum()).backward()
    rest = [flat(p.grad for p in net.parameters()).norm().item() for net in (G, D)]
    rest.append(sum(value.abs().sum().item() for key, value in G.state_dict().items() if "stored" in key))
    expected = [*map(float, BIGGAN_OUTPUTS[size].split())]
    assert found == pytest.approx(expected[:12], abs=2e-7) and rest == pytest.approx(expected[12:], rel=1e-8)


def test_attention():
    """softmax(theta phi^T) g, to one in four positions, through o."""
    layer, x = models.SelfAttention(96, 1e-6).double().eval(), torch.randn(2, 96, 8, 6).double()
    layer.gamma.data.fill_(0.7)
    query, key, value = layer.theta(x), F.max_pool2d(layer.phi(x), 2), F.max_pool2d(layer.g(x), 2)
    scores = torch.einsum("ncij,nckl->nijkl", query, key)
    shares = scores.flatten(3).softmax(3).view_as(scores)
    attended = layer.o(torch.einsum("nijkl,nckl->ncij", shares, value))
    torch.testing.assert_close(layer(x), x + 0.7 * attended)


@pytest.mark.parametrize("n", (1, 3))
def test_instance_norm(n):
    """PyTorch's own, but the memory stays in channels_last."""
    x = torch.randn(n, 4, 6, 5).to(memory_format=torch.channels_last)
    y = models.InstanceNorm()(x)
    torch.testing.assert_close(y, F.instance_norm(x))
    assert y.is_contiguous(memory_format=torch.channels_last)


def test_taps():
    x, entering = torch.rand(1, 3, 256, 256) * 2 - 1, []
    net = models.init_weights(ResnetGenerator(ngf=4, separable=True))
    _, taps = net(x, taps=True)
    assert [tap.shape[1] for tap in taps] == net.tap_channels
    for tap, layer in zip(taps, (9, 12, 15, 18), strict=True):
        torch.testing.assert_close(tap, net.model[: layer + 1](x))
    net = models.init_weights(UnetGenerator(ngf=4))
    level2 = net.model.model[1]
    level3, level4 = level2.model[3], level2.model[3].model[3]
    for layer in (level3.model[1], level4.model[3].model[1], level4.model[5], level2.model[5]):
        layer.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    _, taps = net(x, taps=True)
    assert [tap.shape[1] for tap in taps] == net.tap_channels and same(taps, entering)


def test_published_complexity():
    z, y, image = torch.zeros(1, 120), torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 256, 256)
    for net, inputs, expected in (  # parameters in millions, MACs exact and as published in thousand millions
        (ResnetGenerator(), (image,), "11.378 49.552 56.799"),
        (ResnetGenerator(ngf=16, separable=True), (image,), "0.137 0.955 1.408"),
        (UnetGenerator(), (image,), "54.410 6.048 18.140"),
        (UnetGenerator(ngf=16), (image,), "3.403 0.406 1.219"),
        (BigGANGenerator(128, 24), (z, y), "5.031 1.423 1.423"),  # without the spectral norm's
        (BigGANDiscriminator(128, 24), (image[..., :128, :128], y), "5.790 0.733 0.733"),
    ):
        if inputs[0] is image:  # full size: shapes alone
            net, inputs = net.to("meta"), [image.to("meta")]
        parameters = sum(p.numel() for p in net.parameters()) / 1e6
        macs = [models.count_macs(net, *inputs, published=published) / 1e9 for published in (False, True)]
        assert [parameters, *macs] == pytest.approx([*map(float, expected.split())], abs=6e-4)


# ----------------------------------------------------------------------------------------------------------------------
# Weights on disk


def old_spelling(state_dict):
    """As CycleGAN saved it before 2018: statistics of instance norms, no dropout slot, DataParallel."""
    old = {}
    for key, value in state_dict.items():
        key = key.replace(".conv_block.6.", ".conv_block.5.")
        old["module." + key] = value
        if key.endswith("conv_block.1.weight") or key.endswith("conv_block.5.weight"):
            norm = re.sub(r"(\d)\.weight$", lambda m: str(int(m[1]) + 1), key)
            old |= {f"module.{norm}.running_mean": torch.zeros(16), f"module.{norm}.running_var": torch.ones(16)}
    return old


def test_old_checkpoints_load_strictly():
    net, other = ResnetGenerator(ngf=4), ResnetGenerator(ngf=4)
    old = old_spelling(net.state_dict())
    assert "module.model.10.conv_block.6.running_mean" in old and "module.model.10.conv_block.5.weight" in old
    other.load_state_dict(old)
    assert same(net.state_dict(), other.state_dict())
    load_weights = functools.partial(models.load_weights, source="x.pth")
    fails("x.pth: does not fit .* size mismatch for model.1.weight", load_weights, ResnetGenerator(ngf=8), old)
    fails("Missing key.*model.10.conv_block.1.conv.0", load_weights, ResnetGenerator(ngf=4, separable=True), old)
    fails("Unexpected key.*extra", load_weights, net, old | {"extra": torch.zeros(1)})


def test_hostile_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": argparse.Namespace(size=8)}, "namespace.pt")
    assert models.load_file("namespace.pt")["args"].size == 8
    torch.save({"network": "ResnetGenerator", "config": {"ngf": "many"}, "state_dict": {}}, "config.pt")
    torch.save({"weights": RunsCode()}, "code.pt")
    torch.save([1, 2], "list.pt")
    whole = Path("config.pt").read_bytes()
    files = {"pickle.pt": pickle.dumps(RunsCode()), "empty.pt": b"", "text.pt": b"hello", "half.pt": whole[:500]}
    for name, content in files.items():
        Path(name).write_bytes(content)
    for name in ("code.pt", "list.pt", "missing.pt", *files):
        fails(f"^{name}", models.load_file, name)
    fails("namespace.pt: not a file of save_generator", models.load_generator, "namespace.pt")
    fails("config.pt: no ResnetGenerator can be built", models.load_generator, "config.pt")
    assert not Path("executed").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Losses, against slow, obvious formulas


def test_adversarial_losses():
    real, fake = torch.tensor([[-2.0, 0.5], [3.0, 0.0]]), torch.tensor([[2.0], [-2.5]])
    log_real, log_fake = real.sigmoid().log().mean(), (1 - fake.sigmoid()).log().mean()
    for mode, loss_G, loss_D in (
        ("lsgan", (9 + 0.25 + 4 + 1) / 4, (9 + 0.25 + 4 + 1) / 4 + (4 + 6.25) / 2),
        ("hinge", -(-2 + 0.5 + 3 + 0) / 4, (3 + 0.5 + 0 + 1) / 4 + (3 + 0) / 2),
        ("logistic", -log_real, -log_real - log_fake),
    ):
        assert losses.generator_loss(real, mode).item() == pytest.approx(float(loss_G))
        assert losses.discriminator_loss(real, fake, mode).item() == pytest.approx(float(loss_D))
    fails("wgan", losses.generator_loss, real, "wgan")
    fails("wgan", losses.discriminator_loss, real, fake, "wgan")


def test_dcd_loss():
    D, loss, expected = PatchDiscriminator(3, ndf=8).requires_grad_(False), DCDLoss([4] * 4, [4] * 4, 3), 0
    taps = [torch.randn(2, 4, size, size, requires_grad=True) for size in (16, 24, 48, 64)]
    others = [torch.randn_like(tap, requires_grad=True) for tap in taps]
    value = loss(taps, others, D.features)
    for i, k in enumerate((4, 3, 2, 1)):  # small ones are enlarged, to 64, 72 and 96 pixels
        features = []
        for connector, tap in ((loss.student_connectors[i], taps[i]), (loss.teacher_connectors[i], others[i])):
            maps = torch.einsum("oc,nchw->nohw", connector[0].weight[:, :, 0, 0], tap)
            maps = (maps - maps.mean((0, 2, 3), keepdim=True)) / (
                maps.var((0, 2, 3), correction=0, keepdim=True) + 1e-5
            ).sqrt()
            features.append(D.features(maps.relu().repeat_interleave(k, 2).repeat_interleave(k, 3)))
        expected = expected + (features[0] - features[1]).abs().mean()
    torch.testing.assert_close(value, expected, rtol=1e-4, atol=1e-4)
    value.backward()
    trained = [*taps, *loss.student_connectors.parameters()]
    frozen = [*others, *D.parameters(), *loss.teacher_connectors.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in trained) and all(p.grad is None for p in frozen)
    loss.student_connectors.load_state_dict(loss.teacher_connectors.state_dict())
    assert loss(taps, others, D.features) > 1e-3 and loss(taps, taps, D.features) == 0
    fails("3 student taps and 4", DCDLoss, [1, 2, 3], [1, 2, 3, 4])
    fails("expected a list of 4 taps, found a Tensor", loss, taps[0], taps, D.features)
    fails("expected a list of 4 taps, found a list", loss, taps, taps[:3], D.features)
    fails("taps 1: shapes", loss, taps, [others[0]] * 4, D.features)


def test_the_papers_taps_are_not_enlarged():
    discriminator, G = PatchDiscriminator(ndf=4), ResnetGenerator(ngf=2, separable=True)
    loss = DCDLoss(G.tap_channels, G.tap_channels)
    (_, a), (_, b) = (G(torch.rand(1, 3, 256, 256), taps=True) for _ in range(2))
    value = loss(a, b, discriminator.features)
    loss.tap_size = 24
    assert torch.equal(loss(a, b, discriminator.features), value) and value > 1e-3


def test_pixel_loss_is_plain_feature_matching():
    loss, expected = PixelLoss([2, 3], [4, 5]), 0
    taps = [torch.randn(2, c, 6, 7) for c in (2, 3)]
    targets = [torch.randn(2, c, 6, 7, requires_grad=True) for c in (4, 5)]
    for connector, f, g in zip(loss.student_connectors, taps, targets, strict=True):
        mapped = torch.einsum("oc,nchw->nohw", connector.weight[:, :, 0, 0], f) + connector.bias[:, None, None]
        expected = expected + (mapped - g).abs().sum() / g.numel()
    value = loss(taps, targets)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(p.grad.abs().sum() > 0 for p in loss.parameters()) and all(p.grad is None for p in targets)


def test_perceptual_loss_is_the_papers(vgg_file):
    vgg, expected = PerceptualLoss(vgg_file), 0
    x, y = (torch.rand(2, 3, 32, 48).mul(2).sub(1).requires_grad_() for _ in "xy")
    style, feature = vgg(x, y)
    for layer in (3, 8, 15, 22):
        a, b = (vgg.features[: layer + 1]((image + 1) / 2) for image in (x, y))
        grams = [torch.einsum("nchw,ndhw->ncd", f, f) / f[0].numel() for f in (a, b)]
        expected = expected + (grams[0] - grams[1]).abs().mean()
        if layer == 8:
            torch.testing.assert_close(feature, (a - b).abs().mean())
    torch.testing.assert_close(style, expected)
    (style + feature).backward()
    assert x.grad.abs().sum() > 0 and y.grad is None and all(p.grad is None for p in vgg.parameters())


def test_vgg_weights(server, vgg_file, tmp_path, monkeypatch):
    """Downloaded from a server, then from the cache; what is wrong is one line."""
    (address, asked), state_dict = server, torch.load(vgg_file)
    name = publish(tmp_path / "web", Path(vgg_file).read_bytes())
    monkeypatch.setattr(VGG16_Weights.IMAGENET1K_V1.value, "url", f"{address}/{name}")
    for _ in range(2):
        for key, value in PerceptualLoss().features.state_dict().items():
            assert torch.equal(value, state_dict[f"features.{key}"])
    assert asked == [f"/{name}"] and os.listdir(tmp_path / "hub/checkpoints") == [name]
    monkeypatch.setattr(VGG16_Weights.IMAGENET1K_V1.value, "url", f"{address}/gone/other-{name}")
    fails(r"no weights .* \(download failed: .*404.*\): get .* and give --vgg FILE", PerceptualLoss)
    del state_dict["features.5.weight"]
    torch.save(state_dict, tmp_path / "vgg16.pth")
    fails('vgg16.pth: .* Missing key.* "5.weight"', PerceptualLoss, tmp_path / "vgg16.pth")


def test_path_length_penalty_is_the_papers():
    """R1 is in test_accumulated_gradients_are_one_batchs."""
    torch.manual_seed(0)
    G, penalty, lengths = StyleGAN2Generator(8, 6, 1, width=1 / 128), PathLengthPenalty(decay=0.25), []
    latents = G.mapping(torch.randn(3, 6)).detach().requires_grad_()
    penalty.mean.fill_(0.5)
    images = G.synthesis(latents, "fixed")
    state = torch.get_rng_state()
    value, length = penalty(images, latents)
    torch.set_rng_state(state)
    noise = torch.randn_like(images) / 8  # divided by the root of the number of pixels
    for n in range(3):
        image = G.synthesis(latents[n : n + 1], "fixed")
        (product,) = torch.autograd.grad((image[0] * noise[n]).sum(), latents, create_graph=True)  # J_w^T y
        lengths.append(product[n].square().sum(1).mean().sqrt())
    lengths = torch.stack(lengths)
    mean = 0.5 + 0.25 * (lengths.mean() - 0.5)
    expected = (lengths - mean).square().mean()
    torch.testing.assert_close([value, length], [expected, lengths.mean().detach()], rtol=1e-4, atol=1e-6)
    found, wanted = (torch.autograd.grad(v, G.convs[0].conv.weight, retain_graph=True)[0] for v in (value, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)  # it flows through the mean too
    assert penalty.mean == 0.5
    penalty.move(length)
    torch.testing.assert_close(penalty.mean, mean.detach())


# ----------------------------------------------------------------------------------------------------------------------
# models.py as a command, and README's snippets


def translated(net, pixels):
    """The network's answer to uint8 pixels (H, W, 3), reflected at the right and the bottom, 0 to 255."""
    height, width = pixels.shape[:2]
    multiple = max(16, net.size_multiple)
    padded = np.pad(pixels, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="reflect")
    image = net(torch.from_numpy(padded).permute(2, 0, 1)[None] / 127.5 - 1)[0, :, :height, :width]
    return (image.detach().permute(1, 2, 0).numpy() + 1) * 127.5


def test_a_folder_is_translated(tmp_path):
    """By models.py and student.pt alone: sizes stay, what is no picture is skipped with a count."""
    net = fill(ResnetGenerator(ngf=2, separable=True))
    models.save_generator(tmp_path / "student.pt", net)
    shutil.copy(HERE / "models.py", tmp_path)
    pixels = np.random.default_rng(0).integers(0, 256, (37, 23, 3), dtype=np.uint8)
    (tmp_path / "photos/deep").mkdir(parents=True)
    for name in ("a.jpg", "a.png", "deep/c.png"):
        Image.fromarray(pixels).save(tmp_path / "photos" / name)
    bad = {"notes.txt": b"no picture", "broken.png": b"\x89PNG", "empty.jpg": b"", "huge.ppm": b"P5 30000 30000 255\n"}
    for name, content in bad.items():
        (tmp_path / "photos" / name).write_bytes(content)
    command = [sys.executable, "models.py", "student.pt", "photos/", "translated/", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    assert "3 pictures translated into translated/, 4 files skipped" in done.stdout
    assert done.stderr.count("\n") == 4 and all(f"skipped photos/{name}: " in done.stderr for name in bad)
    for name in ("a_png.png", "deep/c.png"):
        found = np.asarray(Image.open(tmp_path / "translated" / name))
        assert np.abs(found - translated(net, pixels)).max() < 0.6
    assert Image.open(tmp_path / "translated/a.png").size == (23, 37)
    unet = fill(UnetGenerator(ngf=2, num_downs=5))
    assert np.abs(np.asarray(models.translate(unet, Image.fromarray(pixels))) - translated(unet, pixels)).max() < 0.6


def test_pictures_are_drawn(tmp_path):
    torch.manual_seed(0)
    models.save_generator(tmp_path / "stylegan2.pt", StyleGAN2Generator(16, 8, 2, width=1 / 64))
    models.save_generator(tmp_path / "biggan.pt", models.init_biggan(BigGANGenerator(32, 4, 3, attention=None)))
    for network in ("stylegan2", "biggan"):
        runs = []
        for folder, options in enumerate(("--seed 3", "--seed 3", "--seed 9", "--seed 3 --truncation 0.01")):
            out = tmp_path / f"{network}_{folder}"
            models.main(f"{tmp_path}/{network}.pt {out} --count 3 {options} --device cpu".split())
            runs.append(np.stack([Image.open(out / f"0000{n}.png") for n in range(3)]).astype(int))
            assert Path(f"{out}_grid.png").exists()
        assert np.array_equal(runs[0], runs[1]) and not np.array_equal(runs[0], runs[2])
        assert runs[3].std(0).mean() < runs[0].std(0).mean()  # nearer to the mean, or to z = 0


WRONG_USES = """
gone.pt a b | gone.pt: no such file
other.pt a b | other.pt: not a file of save_generator
student.pt | two folders, from and to, found 0
student.pt gone translated | gone: no such folder
student.pt folder translated --device abacus | abacus
stylegan2.pt a b | one folder, where to draw, found 2
stylegan2.pt a --count 0 | --count
stylegan2.pt other.pt/a --count 1 | other.pt
"""


@pytest.mark.parametrize("arguments, message", [row.split(" | ") for row in WRONG_USES.strip().splitlines()])
def test_wrong_uses_of_the_command(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models.save_generator("student.pt", ResnetGenerator(ngf=2))
    models.save_generator("stylegan2.pt", StyleGAN2Generator(8, 4, 1, width=1 / 128))
    torch.save({}, "other.pt")
    with pytest.raises(SystemExit) as stop:
        models.main(arguments.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("models.py: error: ") and message in err


def snippet(start):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


def test_readmes_export(tmp_path, monkeypatch):
    """The snippet itself compares the exported program's picture with the generator's."""
    monkeypatch.chdir(tmp_path)
    models.save_generator("student.pt", models.init_weights(ResnetGenerator(ngf=4, separable=True), 0.1))
    names = {}
    exec(snippet("# export"), names)
    assert isinstance(names["generator"], ResnetGenerator) and Path("student.pt2").exists()


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


@pytest.fixture(scope="session")
def folders(tmp_path_factory):
    """Two folders of 13 and 6 images of 40x40 pixels; one of b/ has an alpha channel."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, low, n in (("a", 0, 13), ("b", 90, 6)):
        (root / name).mkdir()
        for i in range(n):
            channels = 4 if (name, i) == ("b", 3) else 3
            pixels = rng.integers(low, 256, (40, 40, channels), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i:02}.png")
    return str(root / "a"), str(root / "b")


def error_line(capfd, *arguments):
    """Run a command line that has to fail; return its one line of stderr."""
    with pytest.raises(SystemExit, match="2"):
        fid.main([*map(str, arguments), "--workers=0", "--device=cpu"])
    out, err = capfd.readouterr()
    assert out == "" and err.startswith("fid.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_frechet_distance():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.normal(size=(2, 20))
    x, y = rng.normal(size=(2, 99, 20))
    s1, s2, zero = np.cov(x, rowvar=False), np.cov(y * 2, rowvar=False), np.zeros(20)
    expected = np.sum((mu1 - mu2) ** 2) + np.trace(s1 + s2 - 2 * scipy.linalg.sqrtm(s1 @ s2)).real
    assert fid.frechet_distance(mu1, s1, mu2, s2) == pytest.approx(expected, rel=1e-10)
    # Singular covariances, of fewer images than features: the root's trace is a nuclear norm.
    x, y = x[:8] - x[:8].mean(0), y[:8] - y[:8].mean(0)
    few1, few2 = x.T @ x / 7, y.T @ y / 7
    expected = np.trace(few1 + few2) - 2 * np.linalg.norm(x @ y.T / 7, "nuc")
    assert fid.frechet_distance(zero, few1, zero, few2) == pytest.approx(expected, rel=1e-11)
    assert 0 <= fid.frechet_distance(zero, few1, zero, few1) < 1e-10
    fails("same width", fid.frechet_distance, zero, s1, np.zeros(3), np.eye(3))
    fails("NaN", fid.frechet_distance, zero, s1, zero, s1 * np.nan)


def test_statistics(tmp_path):
    """Streamed, merged, written and read: always numpy's, also where the mean is a million deviations."""
    x = np.random.default_rng(2).normal(size=(301, 12)) * 1e-2 + np.linspace(1e4, -1e4, 12)
    streamed, merged = fid.FeatureStats(), fid.FeatureStats()
    for i in range(0, 301, 7):
        streamed.update(torch.from_numpy(x[i : i + 7]))
    for part in (x[:100], x[100:101], x[101:]):
        stats = fid.FeatureStats()
        stats.update(part)
        merged.merge(stats)
    merged.merge(fid.FeatureStats())
    path, foreign = tmp_path / "new/stats.npz", tmp_path / "new/foreign.npz"
    streamed.save(path)
    assert os.listdir(path.parent) == [path.name]
    np.savez(foreign, mu=streamed.mean, sigma=streamed.cov)  # as other tools write it
    loaded, unknown = fid.FeatureStats.load(path), fid.FeatureStats.load(foreign)
    assert (streamed.n, merged.n, loaded.n, unknown.n) == (301, 301, 301, None)
    for stats in (streamed, merged, loaded, unknown):
        np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.cov, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-10)
    fails("number of images", unknown.merge, loaded)
    fails("at least 2", lambda: fid.FeatureStats().cov)
    np.savez(foreign, mu=np.zeros(3))
    fails("foreign.npz: not an .npz of statistics", fid.FeatureStats.load, foreign)


def test_kernel_distance():
    x, y = np.random.default_rng(4).normal(size=(2, 9, 4))
    xx, yy, xy = ((a @ b.T / 4 + 1) ** 3 for a, b in ((x, x), (y, y), (x, y)))
    np.fill_diagonal(xx, 0)
    np.fill_diagonal(yy, 0)
    expected = (xx + yy).sum() / (9 * 8) - 2 * xy.mean()
    assert fid.kernel_distance(torch.from_numpy(x), y) == pytest.approx((expected, 0), rel=1e-10, abs=1e-12)
    mean, std = fid.kernel_distance(x, y, subset_size=4, n_subsets=4000)  # without bias: the same on average
    assert std > 0 and abs(mean - expected) < 4 * std / np.sqrt(4000)
    fails("2 or more", fid.kernel_distance, x[:1], y)
    fails("one width", fid.kernel_distance, x, y[:, :3])


def test_inception_score():
    logits = np.random.default_rng(6).normal(size=(47, 8)) * 3
    p, scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), []
    for i in range(5):
        part = p[i * 47 // 5 : (i + 1) * 47 // 5]
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(axis=0))), axis=1))))
    assert fid.inception_score(torch.from_numpy(logits), splits=5) == pytest.approx((np.mean(scores), np.std(scores)))
    assert fid.inception_score(1e4 * torch.eye(4).repeat(10, 1)) == pytest.approx((4, 0))  # probabilities of 0
    for bad in (torch.zeros(9, 7), torch.full((10, 7), torch.nan)):
        fails("10 images or more", fid.inception_score, bad)


def test_the_network(inception, inception_file):
    """Folded the same as unfolded; float32 in autocast; the poolings of 2015."""
    net, inputs = fid.FIDInceptionV3().eval(), {}
    net.load_state_dict(torch.load(inception_file))
    for name in ("6b.branch1x1", "6b.branch_pool", "7c.branch1x1", "7c.branch_pool"):
        layer = net.get_submodule(f"Mixed_{name}")
        layer.register_forward_hook(lambda _layer, args, _output, name=name: inputs.update({name: args[0]}))
    images = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = inception(images)
        unfolded, _ = net(images)
    assert features.shape == (2, 2048) and logits.shape == (2, 1008) and features.std() > 0.01
    assert features.dtype == logits.dtype == torch.float32
    torch.testing.assert_close(features, unfolded, rtol=1e-3, atol=1e-4)
    torch.testing.assert_close(logits, features @ inception.fc.weight.T, rtol=1e-4, atol=1e-4)  # without the bias
    x = inputs["6b.branch1x1"]
    inside = F.avg_pool2d(x, 3, 1, 1) / F.avg_pool2d(torch.ones_like(x), 3, 1, 1)
    torch.testing.assert_close(inputs["6b.branch_pool"], inside)
    torch.testing.assert_close(inputs["7c.branch_pool"], F.max_pool2d(inputs["7c.branch1x1"], 3, 1, 1))


def test_weights_are_downloaded(server, inception_file, tmp_path, monkeypatch, capsys):
    address, asked = server
    name = publish(tmp_path / "web", Path(inception_file).read_bytes())
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"{address}/{name}")
    state = torch.get_rng_state()
    for _ in range(2):  # the second time from the cache
        loaded = fid.load_inception()
        assert torch.equal(loaded.fc.weight, torch.load(inception_file)["fc.weight"])
    assert torch.equal(torch.get_rng_state(), state) and not any(p.requires_grad for p in loaded.parameters())
    assert asked == [f"/{name}"] and os.listdir(tmp_path / "hub/checkpoints") == [name]
    out, err = capsys.readouterr()
    assert out == "" and "100" in err


FAILURES = dict(hash="invalid hash", full="File too large", gone="404", refused="refused")
FAILURES["broken"] = "IncompleteRead|invalid hash|retrieval incomplete"


@pytest.mark.parametrize("kind", FAILURES)
def test_a_failed_download_leaves_nothing(kind, server, full_disk, tmp_path, monkeypatch, capsys):
    name = publish(tmp_path / "web", os.urandom(200_000))
    if kind == "broken":
        shutil.move(tmp_path / "web" / name, tmp_path / "web/broken")
    elif kind == "hash":
        (tmp_path / "web" / name).write_bytes(b"something else")
    elif kind == "full":
        full_disk()
    address = "http://127.0.0.1:9" if kind == "refused" else server[0]
    url = f"{address}/{kind}/{name}" if kind in ("broken", "gone") else f"{address}/{name}"
    monkeypatch.setattr(fid, "WEIGHTS_URL", url)
    path = tmp_path / "hub/checkpoints" / name
    message = f"): get {url} and give --inception FILE, or put it at {path}"
    fails(rf"^no weights {name} \(download failed: .*({FAILURES[kind]}).*{re.escape(message)}$", fid.load_inception)
    assert os.listdir(path.parent) == [] and capsys.readouterr().out == ""


def test_every_kind_of_image_becomes_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    rgb, sixteen = Image.fromarray(np.stack([grey, 255 - grey, grey.T], axis=2)), grey.astype(np.uint16) * 257
    for folder in ("deep/er", ".hidden", "elsewhere"):
        (tmp_path / folder).mkdir(parents=True)
    for path in (".hidden/x.png", ".x.png", "page.eps", "rgb.PNG", "rgb.webp"):
        rgb.save(tmp_path / path, lossless=True)
    Image.fromarray(grey).save(tmp_path / "elsewhere/grey.png")
    os.symlink(tmp_path / "elsewhere", tmp_path / "link")
    rgb.quantize(64).save(tmp_path / "deep/er/palette.gif")
    Image.fromarray(sixteen).save(tmp_path / "grey16.png")
    Image.fromarray(sixteen.astype(">u2")).save(tmp_path / "grey16.tif")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    files = fid.ImageFiles(tmp_path)
    names = "cmyk.tif deep/er/palette.gif elsewhere/grey.png grey16.png grey16.tif link/grey.png rgb.PNG rgb.webp"
    assert files.names == names.split() and files.check() == [(8, 8)] * 8
    for name, image in zip(files.names, files, strict=True):
        expected = np.asarray(rgb) if "grey" not in name else np.stack([grey] * 3, axis=2)
        found = np.asarray(image).astype(int)
        assert found.shape == (8, 8, 3) and np.abs(found - expected).max() <= dict(cmyk=1, deep=40).get(name[:4], 0)


def test_transparency_and_exif():
    pixels, exif = np.random.default_rng(7).integers(0, 256, (9, 8, 4), dtype=np.uint8), Image.Exif()
    image, grey = Image.fromarray(pixels), Image.effect_noise((7, 5), 50)
    opaque = np.asarray(image.convert("RGB"), dtype=float)
    found = np.asarray(fid.to_rgb(image)).astype(float)
    assert np.abs(found - (opaque - 255) * pixels[..., 3:] / 255 - 255).max() <= 1  # on white
    key, white = grey.getpixel((3, 4)), np.array(grey)
    white[white == key] = 255
    grey.save(buffer := io.BytesIO(), "png", transparency=key)
    assert fid.to_rgb(Image.open(buffer)) == Image.fromarray(white).convert("RGB")
    exif[274] = 6  # Orientation: turn right to see it upright
    grey.transpose(Image.Transpose.ROTATE_90).save(buffer := io.BytesIO(), "png", exif=exif)
    assert fid.to_rgb(Image.open(buffer)).tobytes() == grey.convert("RGB").tobytes()


def test_unreadable_images(tmp_path, monkeypatch, capsys):
    for i in range(4):
        Image.effect_noise((64, 64), 50).save(tmp_path / f"{i}.png")
    os.truncate(tmp_path / "2.png", 2000)
    files, bad = fid.ImageFiles(tmp_path), f"{tmp_path}/2.png: not a readable image ("
    with monkeypatch.context() as patch:
        patch.delattr(ImageFile.ImageFile, "load")
        assert files.check() == [(64, 64)] * 4  # the headers are whole, nothing is decoded
    fails(f"^{re.escape(bad)}", files.__getitem__, 2)
    assert files.next_readable(1) == files[1] and files.next_readable(2) == files[3] != files[1]
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {bad}") and err.endswith(", skipped\n") and err.count("\n") == 1
    (tmp_path / "0.png").unlink()
    (tmp_path / "3.png").write_bytes(b"nothing")
    assert files.next_readable(2) == files[1]  # round the end
    fails("3.png: not a readable image", fid.ImageFiles(tmp_path).check)
    for limit in (64 * 64 - 1, 64 * 30):  # Pillow warns above the limit and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        fails("1.png: not a readable image .*decompression bomb", files.__getitem__, 1)
    fails("none of 4 images can be read", files.next_readable, 1)


def test_stored_squares(tmp_path):
    for i in range(4):
        image = Image.new("RGB", (24, 8), (255, 0, 0))  # in its centre a square: the red tells the number
        image.paste((50 * i, 0, 255), (8, 0, 16, 8))
        image.save(tmp_path / f"{i}.png")
    whole, files, options = (tmp_path / "1.png").read_bytes(), fid.ImageFiles(tmp_path), (8, tmp_path / "new", print)
    (tmp_path / "1.png").write_bytes(b"nothing")
    fails("1.png: not a readable image", fid.StoredSquares, files, *options)
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "1.png").write_bytes(whole)
    stored = fid.StoredSquares(files, *options, workers=2)
    squares = torch.cat([*DataLoader(stored, 2, num_workers=2)])
    assert squares.dtype == torch.uint8 and squares[:, 2].eq(255).all()
    assert [square.unique().tolist() for square in squares[:, 0]] == [[0], [50], [100], [150]]
    written = stored.path.stat()
    assert fid.StoredSquares(files, *options).path == stored.path and stored.path.stat() == written
    os.utime(tmp_path / "1.png", (1, 1))
    assert fid.StoredSquares(files, *options).path != stored.path  # for the picture has another date


def test_files_and_generated_images_are_measured_alike(inception, tmp_path):
    images = torch.randn(5, 3, 20, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for i, image in enumerate(images.detach().clamp(-1, 1)):
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    expected, kept = fid.image_stats(fid.ImageFiles(tmp_path), inception, batch_size=3, keep=["logits"])
    stats, score = fid.generated_stats(images.split(3), inception, splits=2)
    assert stats.n == fid.generated_stats([images], inception).n == 5
    np.testing.assert_array_equal(stats.mean, expected.mean)
    np.testing.assert_array_equal(stats.cov, expected.cov)
    assert score == fid.inception_score(kept["logits"], splits=2)


def test_a_zip_equals_its_folder(inception, tmp_path):
    """Of mixed sizes, with workers, without a step of the random numbers."""
    for i in range(5):
        Image.effect_noise((30 + i, 40), 90).save(tmp_path / f"{i}.png")
    files, state = fid.ImageFiles(tmp_path), torch.get_rng_state()
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in files.names:
            archive.write(tmp_path / name, f"folder/{name}")
        archive.write(tmp_path / "0.png", "__MACOSX/._0.png")
    zipped = pickle.loads(pickle.dumps(fid.ImageFiles(tmp_path / "images.zip")))
    assert zipped.names == [f"folder/{name}" for name in files.names] and zipped.check() == files.check()
    alone = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in files]
    features = torch.cat([inception(image)[0] for image in alone])
    for source, workers in ((files, 0), (zipped, 2)):
        stats, kept = fid.image_stats(source, inception, 3, workers, keep=["features"])
        torch.testing.assert_close(kept["features"], features, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(stats.mean, features.double().mean(0), rtol=1e-5, atol=1e-6)
    assert torch.equal(torch.get_rng_state(), state)


def test_command_line(folders, inception_file, tmp_path, capfd):
    """Folders, statistics and two processes tell the same."""
    (a, b), saved, options = folders, tmp_path / "b.npz", ["--device=cpu", "--workers=0", "--weights", inception_file]
    fid.main([b, "--save", str(saved), *options])
    assert capfd.readouterr() == ("", "")
    fid.main([a, b, "--batch-size=1", "--is", "--kid", "--json", *options])
    out, err = capfd.readouterr()
    alone = json.loads(out)
    assert alone["images"] == [13, 6] and all(alone[key] > 0 for key in ("fid", "kid", "kid_std"))
    assert err.count("warning: 13 images in") == err.count("warning: 6 images in") == 1
    run = [*TORCHRUN, HERE / "fid.py", a, saved, "--is", "--json", "--batch-size=2", *options]
    shared = json.loads(subprocess.run(run, capture_output=True, env=ENVIRONMENT, check=True).stdout)
    assert shared["fid"] == pytest.approx(alone["fid"], rel=1e-4)
    assert shared["is"] - 1 == pytest.approx(alone["is"] - 1, rel=1e-3)
    assert shared["is_std"] == pytest.approx(alone["is_std"], rel=1e-2)  # each of the ten parts has the same images


def test_errors_are_one_line(folders, server, inception_file, tmp_path, monkeypatch, capfd):
    (a, b), weights, foreign = folders, ("--weights", inception_file), tmp_path / "foreign.npz"
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"{server[0]}/w-01234567.pth")
    np.savez(foreign, mu=np.zeros(64), sigma=np.eye(64))
    torch.save(torch.load(inception_file) | {"fc.weight": torch.zeros(1000, 2048)}, tmp_path / "shape")
    torch.save(nn.Linear(2, 2), tmp_path / "module")
    for message, arguments in (
        ("no such folder", (tmp_path / "gone", b)),
        ("same width", (a, foreign, *weights)),
        ("--is needs", (foreign, b, "--is")),
        ("end in .npz", (a, b, "--save", "x")),
        ("B is missing", (a,)),
        ("invalid int value", (a, b, "--batch-size=x")),
        (f"--weights FILE, or put it at {tmp_path}/hub/checkpoints/w-01234567.pth", (a, b)),
        ("shape: not the weights of the FID Inception (", (a, b, "--weights", tmp_path / "shape")),
        ("module: not the weights of the FID Inception (", (a, b, "--weights", tmp_path / "module")),
    ):
        line = error_line(capfd, *arguments)
        assert message in line and "weights_only" not in line


# ----------------------------------------------------------------------------------------------------------------------
# NVIDIA's StyleGAN2 pickles: written here in both layouts with weights of ours, and read back

# The layers of networks of 16x16, and their weights: ours, stylegan2-ada-pytorch's, TensorFlow's.
GENERATOR = """
style.1     mapping.fc0             Dense0/
style.2     mapping.fc1             Dense1/
input       synthesis.b4            4x4/Const/
conv1       synthesis.b4.conv1      4x4/Conv/
to_rgb1     synthesis.b4.torgb      4x4/ToRGB/
convs.0     synthesis.b8.conv0      8x8/Conv0_up/
convs.1     synthesis.b8.conv1      8x8/Conv1/
to_rgbs.0   synthesis.b8.torgb      8x8/ToRGB/
convs.2     synthesis.b16.conv0     16x16/Conv0_up/
convs.3     synthesis.b16.conv1     16x16/Conv1/
to_rgbs.1   synthesis.b16.torgb     16x16/ToRGB/
"""
DISCRIMINATOR = """
convs.0         b16.fromrgb     16x16/FromRGB/
convs.1.conv1   b16.conv0       16x16/Conv0/
convs.1.conv2   b16.conv1       16x16/Conv1_down/
convs.1.skip    b16.skip        16x16/Skip/
convs.2.conv1   b8.conv0        8x8/Conv0/
convs.2.conv2   b8.conv1        8x8/Conv1_down/
convs.2.skip    b8.skip         8x8/Skip/
final_conv      b4.conv         4x4/Conv/
final_linear.0  b4.fc           4x4/Dense0/
final_linear.1  b4.out          Output/
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
def nvidia_modules(monkeypatch, tmp_path):
    """The modules that the pickles name, for as long as a test writes some, in a folder of its own."""
    names = {"torch_utils.persistence": rebuild, "dnnlib.tflib.network": Network}
    for name in ("torch_utils", "dnnlib", "dnnlib.tflib", *names):
        monkeypatch.setitem(sys.modules, name, types.ModuleType(name))
    for name, named in names.items():
        named.__module__ = name
        setattr(sys.modules[name], named.__name__, named)
    rebuild.__qualname__ = rebuild.__name__ = "_reconstruct_persistent_obj"
    sys.modules["torch_utils.persistence"]._reconstruct_persistent_obj = rebuild
    monkeypatch.chdir(tmp_path)


def make_networks(**options):
    """A generator and a discriminator of 16x16 with 8 and 6 channels, and biases and noise strengths other than 0."""
    torch.manual_seed(0)
    G = StyleGAN2Generator(16, style_dim=12, n_mlp=2, width=8 / 512, conv_clamp=options.get("conv_clamp"))
    D = StyleGAN2Discriminator(16, width=6 / 512, **options)
    for name, value in [*G.named_parameters(), *D.named_parameters()]:
        if name.endswith(("bias", "noise.weight")):
            value.data += torch.randn_like(value)
    return G, D


def named_weights(net, column):
    """The weights of one of the networks above by NVIDIA's names: 1 stylegan2-ada-pytorch's, 2 TensorFlow's."""
    generator = isinstance(net, StyleGAN2Generator)
    state, weights = net.state_dict(), {}
    for layer in (GENERATOR if generator else DISCRIMINATOR).split("\n")[1:-1]:
        for leaf in WEIGHTS.split("\n")[1:-1]:
            value = state.get(f"{layer.split()[0]}.{leaf.split()[0]}")
            if value is not None:
                separator = "." if column == 1 else ""
                weights[layer.split()[column] + separator + leaf.split()[column]] = value.detach()
    for n, layer in enumerate(NOISY if generator else ()):
        weights[(f"{layer}.noise_const", f"noise{n}")[column - 1]] = state[f"noises.noise_{n}"]
    return weights


def pytorch_weights(net):
    """-> by stylegan2-ada-pytorch's names, and in its shapes."""
    weights = named_weights(net, 1)
    for name, value in weights.items():
        if name.endswith("noise_const"):
            value = value[0, 0]
        elif value.ndim == 5 or name.endswith(("const", "noise_strength")):
            value = value[0]
        weights[name] = value.flatten() if name.endswith("bias") else value
    return weights | ({"mapping.w_avg": torch.arange(12.0)} if "synthesis.b4.const" in weights else {})


def write_pytorch(networks, **content):
    G, D = networks
    clamp, group = D.config["conv_clamp"], D.config["mbstd_group"]
    G, D = Module(pytorch_weights(G), c_dim=0, conv_clamp=clamp), Module(pytorch_weights(D), c_dim=0, conv_clamp=clamp)
    D.state["_modules"]["b4"].state["_modules"]["mbstd"] = Module(group_size=group)
    others = dict(augment_pipe=Module(dict(p=torch.tensor(0.25))), training_set_kwargs=dict(xflip=True))
    with open("network.pkl", "wb") as file:
        pickle.dump(dict(G=G, D=D, G_ema=G) | others | content, file)


def tensorflow_weights(net):
    """-> by TensorFlow's names, and in its shapes."""
    weights = named_weights(net, 2)
    for name, value in weights.items():
        if value.ndim == 5 or name.endswith("noise_strength"):
            value = value[0]
        if name.endswith("Conv0_up/weight"):
            value = value.flip(2, 3)
        if name.endswith("weight"):
            value = value.permute(2, 3, 1, 0) if value.ndim == 4 else value.t()
        if name.endswith("mod_bias"):
            value = value - 1
        weights[name] = value.flatten() if name.endswith("bias") else value
    return weights


def write_tensorflow(networks):
    G, D = (tensorflow_weights(net) for net in networks)
    mapping = {name: G.pop(name) for name in [*G] if name.startswith("Dense")}
    G = Network({"dlatent_avg": torch.arange(12.0)}, mapping=Network(mapping), synthesis=Network(G))
    with open("network.pkl", "wb") as file:
        pickle.dump((G, Network(D), G), file)


def refusal():
    """The message, of one line, with which the file is refused."""
    with pytest.raises(models.InputError) as raised:
        models.load_nvidia("network.pkl")
    assert "\n" not in str(raised.value)
    return str(raised.value)


@pytest.mark.parametrize("write", [write_pytorch, write_tensorflow])
def test_nvidias_files(write, nvidia_modules):
    pytorch = write is write_pytorch
    options = dict(conv_clamp=2.5, mbstd_group=None) if pytorch else {}
    G, D = make_networks(**options)
    write((G, D))
    assert models.is_nvidia_pickle("network.pkl")
    found = models.load_nvidia("network.pkl")
    z, images = torch.randn(6, 12), torch.randn(6, 3, 16, 16)
    for g in (found["g"], found["g_ema"]):
        torch.testing.assert_close(g(z, noise="fixed"), G(z, noise="fixed"), rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(found["d"](images), D(images), rtol=1e-6, atol=1e-6)
    assert found["d"].config == D.config and found["g_ema"].config == G.config
    assert torch.equal(found["latent_avg"], torch.arange(12.0)[None])
    assert (found["augment_p"], found["mirror"]) == ((0.25, True) if pytorch else (None, False))
    assert any("assumed" in note for note in found["notes"]) == (not pytorch)
    for zipped in (True, False):
        torch.save(D.state_dict(), "network.pkl", _use_new_zipfile_serialization=zipped)
        assert not models.is_nvidia_pickle("network.pkl")


def test_nvidias_refusals(nvidia_modules):
    G, D = networks = make_networks()
    write_pytorch(networks, D=Module(pytorch_weights(D), architecture="orig"))
    found = models.load_nvidia("network.pkl")
    assert found["d"] is None and found["g"] and "D refused: " in " ".join(found["notes"])
    weights, conditional = pytorch_weights(D), Module(pytorch_weights(G), c_dim=10)
    for message, content in {
        "class-conditional": dict(G_ema=conditional, D=conditional),
        "size mismatch for final_linear.1.bias": dict(G_ema=None, D=Module(weights | {"b4.out.bias": torch.ones(3)})),
        "b4.out.bias is not finite": dict(G_ema=None, D=Module(weights | {"b4.out.bias": torch.full([1], torch.nan)})),
        "Unexpected key": dict(G_ema=None, D=Module(weights | {"b4.more": torch.ones(3)})),
        "posix.system": dict(training_set_kwargs=RunsCode()),
        "damaged": dict(D=5),
    }.items():
        write_pytorch(networks, **content)
        assert message in refusal()
    assert not os.path.exists("executed")


def test_nvidias_damaged_files(nvidia_modules):
    write_pytorch(make_networks())
    with open("network.pkl", "rb") as file:
        whole = file.read()
    chance = random.Random(0)
    for _ in range(20):
        place = chance.randrange(len(whole))
        with open("network.pkl", "wb") as file:
            file.write(whole[:place])
        refusal()
        with open("network.pkl", "wb") as file:
            file.write(whole[:place] + bytes([whole[place] ^ 64]) + whole[place + 1 :])
        try:
            models.load_nvidia("network.pkl")
        except models.InputError as error:
            assert "\n" not in str(error)


def test_limits_and_groups():
    """A limit above all activations and groups of four change nothing, lower ones do; neither adds a weight."""
    z, images = torch.randn(4, 12), torch.randn(8, 3, 16, 16)
    (G, D), (high_G, high_D) = make_networks(), make_networks(conv_clamp=1e6, mbstd_group=4)
    assert torch.equal(G(z, noise="fixed"), high_G(z, noise="fixed")) and torch.equal(D(images), high_D(images))
    low_G, low_D = make_networks(conv_clamp=0.5)
    assert not torch.allclose(G(z, noise="fixed"), low_G(z, noise="fixed"))
    assert not torch.allclose(D(images), low_D(images)) and low_D.state_dict().keys() == D.state_dict().keys()
    assert low_G.to_rgb1(torch.full((1, 8, 4, 4), 1e3), z[:1]).abs().max() == 0.5
    by_group = {group: make_networks(mbstd_group=group)[1](images) for group in (None, 8, 5, 4)}
    assert torch.equal(by_group[None], by_group[8]) and not torch.equal(by_group[8], by_group[4])
    assert torch.equal(by_group[5], by_group[4]), "four is the largest number up to five that divides eight"
