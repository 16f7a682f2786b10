"""Everything that can be checked in minutes on a CPU: python -m pytest test_smoke.py

Networks against the reference implementations (keys, shapes, recorded outputs), losses against slow, obvious formulas,
each training script end to end on tiny data, exact resume, signals, several processes, hostile input, fid.py, and the
snippets of the README.
"""

import argparse
import copy
import functools
import hashlib
import http.server
import importlib
import inspect
import io
import json
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import threading
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFile
from torch import nn
from torch.utils.data import ConcatDataset, DataLoader
from torchvision.models import VGG16_Weights

import fid
import losses
import models
from losses import DCDLoss, PathLengthPenalty, PerceptualLoss, PixelLoss
from models import PatchDiscriminator, ResnetGenerator, StyleGAN2Discriminator, StyleGAN2Generator, UnetGenerator

HERE = Path(models.__file__).parent
PYTHON = [sys.executable]
TORCHRUN = [*PYTHON, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
ENVIRONMENT = {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(HERE)}
torch.set_num_threads(1)  # tiny tensors; two threads that wait for each other are slower than one


def same(a, b):
    """Equality of nested containers of tensors, to the bit."""
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(same, a, b))
    return torch.equal(a, b) if isinstance(a, torch.Tensor) else a == b


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
    """Saves weights, or bytes, under the name that their content asks for."""
    path = folder / "new"
    path.write_bytes(content) if isinstance(content, bytes) else torch.save(content, path)
    return path.rename(folder / f"weights-{hashlib.sha256(path.read_bytes()).hexdigest()[:8]}.pth").name


# ----------------------------------------------------------------------------------------------------------------------
# Networks

CIFAR = dict(n_classes=10, dim_z=128, shared_dim=None, hierarchical=False)

# The hash of the reference implementations' state-dict keys and shapes, one "key [shape]" a line, sorted.
REFERENCE_KEYS = {
    "73603dcc5124e07f": lambda: ResnetGenerator(ngf=32),
    "c9b16fcf6267e6db": lambda: ResnetGenerator(ngf=16, separable=True),
    "2c7d5ee6196f00a5": lambda: UnetGenerator(ngf=8, norm="batch"),
    "432c924f8b6febe5": lambda: UnetGenerator(ngf=8),
    "79d536cba8ddecd4": lambda: PatchDiscriminator(ndf=16),
    "717b4f0e6e2d44da": lambda: PatchDiscriminator(6, ndf=16, norm="batch"),
    "4190591f59fca3f3": lambda: StyleGAN2Generator(256),
    "a18adb328021de30": lambda: StyleGAN2Discriminator(256),
    "8cdd2faeb41211e1": fid.FIDInceptionV3,
    "af8e09df5ebd7f1d": lambda: models.BigGANGenerator(128),
    "a8ee3fd51ffa3e7c": lambda: models.BigGANDiscriminator(128),
    "e516a3150770c95d": lambda: models.BigGANGenerator(32, 16, **CIFAR),
    "d4e18eabb0eddbaf": lambda: models.BigGANDiscriminator(32, 16, n_classes=10),
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
        (ResnetGenerator(ngf=4), x, (-0.6224, 0.4917, -0.98497, -0.77184)),
        (ResnetGenerator(ngf=4, separable=True), x, (-0.0005, 0.61655, -0.48172, 0.60551)),
        (ResnetGenerator(ngf=4, norm="batch"), x, (-0.47603, 0.80096, 0.7162, -0.99999)),
        (UnetGenerator(ngf=4), large, (-0.11997, 0.48871, -0.50432, 0.752)),
        (UnetGenerator(ngf=4, norm="batch"), large, (0.79637, 0.23263, 0.54738, 0.95996)),
        (PatchDiscriminator(6, 8), x6, (0.56868, 1.84668, 3.0695, 1.63451)),
        (StyleGAN2Generator(16, 32, 3), z, (-1.39313, 0.85264, -0.53143, -0.2404)),
        (StyleGAN2Discriminator(16), small, (0.67798, 0.0, 0.67798, 0.67798)),
    ):
        options = dict(noise="fixed") if isinstance(net, StyleGAN2Generator) else {}
        assert summary(fill(net)(inputs, **options)) == pytest.approx(expected, abs=1e-4), type(net).__name__


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


def biggan_pair(size, ch=8):
    """(generator, discriminator) of ten classes: hierarchical with attention, at 32 the plain CIFAR form."""
    attention = None if size == 32 else size // 2
    options = CIFAR if size == 32 else dict(n_classes=10)
    G = models.BigGANGenerator(size, ch, attention=attention, **options)
    return G, models.BigGANDiscriminator(size, ch, 10, attention)


@pytest.mark.parametrize("size", BIGGAN_OUTPUTS)
def test_biggan_reference_outputs(size):
    """As test_reference_outputs; in float64, so that a step that casts down to float32 would be seen.

    Attention, spectral and conditional norms, their buffers and gradients, eval mode first, which must leave no trace.
    """
    G, D = (fill(net).double().to(memory_format=torch.channels_last) for net in biggan_pair(size))
    g = torch.Generator().manual_seed(1)
    z, y = torch.randn(3, G.dim_z, generator=g).double(), torch.tensor([7, 0, 7])
    x = (torch.rand(3, 3, size, size, generator=g) * 2 - 1).double()
    found = summary(G(z, y))
    images, logits = G.train()(z, y), D(x, y)
    found += summary(images) + summary(logits)
    (images.square().mean() + logits.sum()).backward()
    rest = [torch.cat([p.grad.flatten() for p in net.parameters()]).norm().item() for net in (G, D)]
    rest.append(sum(value.abs().sum().item() for key, value in G.state_dict().items() if "stored" in key))
    expected = [*map(float, BIGGAN_OUTPUTS[size].split())]
    assert found == pytest.approx(expected[:12], abs=2e-7) and rest == pytest.approx(expected[12:], rel=1e-8)


def test_biggan_classes_and_latents():
    G = fill(models.BigGANGenerator(64, 8, 10, dim_z=23, shared_dim=6))
    assert G.dim_z == 20 and G.config["dim_z"] == 23  # four blocks and the start: five chunks of four
    z, y = torch.randn(2, 20), torch.tensor([1, 8])
    images = G(z, y)
    assert torch.equal(images, G(z, G.shared(y))) and not torch.allclose(images, G(z, y.flip(0)), atol=1e-3)
    assert not any(torch.equal(G(z + F.one_hot(torch.tensor(n), 20), y), images) for n in range(0, 20, 2))
    fails("size is 48, expected 32, 64, 128 or 256", models.BigGANGenerator, size=48)
    fails("hierarchical needs a shared embedding", models.BigGANGenerator, size=32, shared_dim=None)
    fails("attention needs 8 channels or more, found 4", models.BigGANGenerator, size=64, ch=1, attention=32)


def test_init_biggan():
    for orthogonal, net in ((orthogonal, net) for orthogonal in (True, False) for net in biggan_pair(64, 16)):
        before = copy.deepcopy(net.state_dict())
        for key, weight in models.init_biggan(net, orthogonal).state_dict().items():
            if not key.endswith(".weight"):
                assert torch.equal(weight, before[key])
            elif orthogonal:
                W = weight.flatten(1) if len(weight) <= weight[0].numel() else weight.flatten(1).T
                assert torch.allclose(W @ W.T, torch.eye(len(W)), atol=1e-4), key
            elif weight.numel() > 1000:
                assert weight.std().item() == pytest.approx(0.02, rel=0.1), key


@pytest.mark.parametrize("size", (64, 32))
def test_biggan_under_autocast(size, monkeypatch):
    """Convolutions in bfloat16; the spectral norm's step, batch statistics, images and logits in float32."""
    G, D = (models.init_biggan(net).to(memory_format=torch.channels_last) for net in biggan_pair(size))
    types, steps, mv = set(), [], torch.mv
    G.blocks[0][0].conv1.register_forward_hook(lambda module, inputs, output: types.add(output.dtype))
    monkeypatch.setattr(torch, "mv", lambda a, b: steps.append(torch.is_autocast_enabled("cpu")) or mv(a, b))
    norm, x = models.OutputBatchNorm(4), (torch.randn(64, 4, 16, 16) + 100).bfloat16()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        images = G(torch.randn(8, G.dim_z), torch.arange(8))
        logits, maps, _ = D(images, torch.arange(8)), D.blocks(images), norm(x)
    assert types == {maps.dtype} == {torch.bfloat16} and {images.dtype, logits.dtype} == {torch.float32}
    assert images.is_contiguous(memory_format=torch.channels_last)
    assert steps and not any(steps)  # on a GPU autocast would run them in bfloat16
    assert torch.allclose(norm.stored_mean, 0.1 * x.float().mean((0, 2, 3)), rtol=1e-5)
    assert torch.allclose(norm.stored_var, 0.9 + 0.1 * x.float().var((0, 2, 3)), rtol=1e-4)


def test_attention_under_autocast():
    """Scores of 200 or so that differ by one or two: rounded to bfloat16, steps of one, the softmax would be lost."""
    torch.manual_seed(0)
    layer = models.SelfAttention(64, 1e-6).eval()
    layer.phi = layer.theta
    layer.gamma.data.fill_(1.0)
    common = F.normalize(torch.randn(64), dim=0)  # what all pixels share, large for theta and phi, nothing for g
    layer.g.weight.data -= (layer.g.weight[:, :, 0, 0] @ common)[:, None, None, None] * common[:, None, None]
    x = common[:, None, None] + 0.01 * torch.randn(2, 64, 8, 8)
    x = x * 14 / layer.theta(x).square().sum(1).mean().sqrt()
    with torch.no_grad(), torch.autocast("cpu", dtype=torch.bfloat16):
        found = layer(x) - x
        query, key, value = layer.theta(x), F.max_pool2d(layer.phi(x), 2), F.max_pool2d(layer.g(x), 2)
        query, key, value = (m.double().flatten(2) for m in (query, key, value))
        scores, o = query.mT @ key, layer.o.normalised_weight().double()[:, :, 0, 0]
        exact, rounded = (o @ value @ torch.softmax(s, -1).mT for s in (scores, scores.bfloat16().double()))
    assert (found.flatten(2) - exact).norm() < 0.2 * (rounded - exact).norm()


def test_latents_have_the_same_strides_with_one_z_and_with_two():
    G, z = StyleGAN2Generator(16, 8, 1, width=1 / 128), torch.randn(2, 3, 8)
    one, two = G.mapping([z[0]]), G.mapping([z[0], z[1]], inject_index=2)
    assert one.stride() == two.stride()
    torch.testing.assert_close(two, torch.cat([one[:, :2], G.mapping(z[1])[:, 2:]], 1))


@pytest.mark.parametrize("n", (1, 3))
def test_instance_norm(n):
    """Outputs and gradients of PyTorch's own, but the memory stays in channels_last."""
    x = torch.randn(n, 4, 6, 5, dtype=torch.float64).to(memory_format=torch.channels_last).requires_grad_()
    weight = torch.randn(n, 4, 6, 5, dtype=torch.float64)
    y, expected = models.InstanceNorm()(x), F.instance_norm(x)
    assert torch.allclose(y, expected) and y.is_contiguous(memory_format=torch.channels_last)
    gradient, other = (torch.autograd.grad((z * weight).sum(), x)[0] for z in (y, expected))
    assert torch.allclose(gradient, other)
    with pytest.raises(ValueError, match="more than 1"):
        models.InstanceNorm()(x[:, :, :1, :1])


def test_taps():
    x, entering = torch.rand(1, 3, 256, 256) * 2 - 1, []
    for separable in (False, True):
        net = models.init_weights(ResnetGenerator(ngf=4, separable=separable))
        image, taps = net(x[..., :32, :32], taps=True)
        assert torch.equal(image, net(x[..., :32, :32])) and [t.shape[1] for t in taps] == net.tap_channels
        for tap, layer in zip(taps, (9, 12, 15, 18), strict=True):
            torch.testing.assert_close(tap, net.model[: layer + 1](x[..., :32, :32]))
    net = models.init_weights(UnetGenerator(ngf=4))
    level2, level3, level4 = net.model.model[1], net.model.model[1].model[3], net.model.model[1].model[3].model[3]
    for convolution in (level3.model[1], level4.model[3].model[1], level4.model[5], level2.model[5]):
        convolution.register_forward_pre_hook(lambda module, inputs: entering.append(inputs[0]))
    image, taps = net(x, taps=True)
    assert [t.shape[1:] for t in taps] == [(8, 64, 64), (32, 16, 16), (64, 16, 16), (16, 64, 64)]
    assert [t.shape[1] for t in taps] == net.tap_channels and same(taps, entering)


def test_published_complexity():
    z, y, image = torch.zeros(1, 120), torch.zeros(1, dtype=torch.long), torch.zeros(1, 3, 256, 256)
    for net, inputs, *expected in (  # parameters in millions, MACs exact and as published in thousand millions
        (ResnetGenerator(), (image,), 11.378, 49.552, 56.799),
        (ResnetGenerator(separable=True), (image,), 1.987, 11.067, 18.314),
        (ResnetGenerator(ngf=16, separable=True), (image,), 0.137, 0.955, 1.408),
        (UnetGenerator(), (image,), 54.410, 6.048, 18.140),
        (UnetGenerator(ngf=16), (image,), 3.403, 0.406, 1.219),
        (models.BigGANGenerator(128, 24), (z, y), 5.031, 1.423, 1.423),  # without the spectral norm's products
        (models.BigGANDiscriminator(128, 24), (image[..., :128, :128], y), 5.790, 0.733, 0.733),
    ):
        if inputs[0] is image:  # full size: shapes alone
            net, inputs = net.to("meta"), [image.to("meta")]
        found = sum(p.numel() for p in net.parameters()) / 1e6, models.count_macs(net, *inputs) / 1e9
        assert (*found, models.count_macs(net, *inputs, published=True) / 1e9) == pytest.approx(expected, abs=6e-4)
    image, transposed = torch.randn(2, 8, 10, 10), nn.ConvTranspose2d(8, 6, 4, 2, padding=1)  # by hand
    assert models.count_macs(nn.Conv2d(8, 16, 3, groups=4, stride=2, padding=1), image) == 2 * 5 * 5 * 16 * 2 * 9
    assert models.count_macs(transposed, image) == 2 * 10 * 10 * 8 * 6 * 16
    assert models.count_macs(transposed, image, published=True) == 4 * 2 * 10 * 10 * 8 * 6 * 16


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
    shape, name = (
        r"model.1.weight has shape \(4, 3, 7, 7\), expected \(8, 3, 7, 7\)",
        "model.10.conv_block.1.conv.0.weight",
    )
    fails(f"x.pth.* {shape}", models.load_weights, ResnetGenerator(ngf=8), old, "x.pth")
    fails(f"it has no {name}", models.load_weights, ResnetGenerator(ngf=4, separable=True), old, "x.pth")
    fails("which this network has not", models.load_weights, net, old | {"extra": torch.zeros(1)}, "x.pth")


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_hostile_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"args": argparse.Namespace(size=8)}, "namespace.pt")
    assert models.load_file("namespace.pt")["args"].size == 8
    for name, content in dict(code={"weights": RunsCode()}, list=[1, 2], half={"a": torch.zeros(9)}).items():
        torch.save(content, f"{name}.pt")
    os.truncate("half.pt", 900)
    for name, content in {"pickle.pt": pickle.dumps(RunsCode()), "empty.pt": b"", "text.pt": b"hello"}.items():
        Path(name).write_bytes(content)
    for name in ("code.pt", "pickle.pt", "half.pt", "empty.pt", "text.pt", "list.pt", "missing.pt"):
        fails(f"^{name}", models.load_file, name)
    fails("namespace.pt: not a file of save_generator", models.load_generator, "namespace.pt")
    assert not Path("executed").exists()


SAVE_FOREVER = """
import torch, models
for i in range(10**9):
    models.save_checkpoint("checkpoint.pt", {"net": torch.nn.Linear(9, 9)}, {}, {}, i=i, bulk=torch.full((10**6,), i))
    print(i, flush=True)
"""


def test_kill_9_while_saving_leaves_a_whole_file(tmp_path):
    options = dict(cwd=tmp_path, stdout=subprocess.PIPE, env=os.environ | ENVIRONMENT)
    process = subprocess.Popen([*PYTHON, "-c", SAVE_FOREVER], **options)
    for seconds in (0, 0.003, 0.011):
        process.stdout.readline()
        time.sleep(seconds)
    process.kill()
    process.wait()
    content = models.load_file(tmp_path / "checkpoint.pt")
    assert (content["bulk"] == content["i"]).all() and set(content["networks"]["net"]) == {"weight", "bias"}


def test_what_cannot_be_saved_keeps_the_old_checkpoint(tmp_path, full_disk):
    path, net = tmp_path / "checkpoint.pt", nn.Linear(10, 10)
    save = functools.partial(models.save_checkpoint, path, {"net": net}, {}, {})
    save(step=1)
    full_disk()
    with pytest.raises(SystemExit, match="not saved .* the last checkpoint stays"):
        save(step=2, bulk=torch.zeros(10**6))
    net.weight.data[0, 0] = torch.nan
    with pytest.raises(SystemExit, match="diverged, net weight is not finite; the last checkpoint stays"):
        save(step=2)
    assert models.load_file(path)["step"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]


# ----------------------------------------------------------------------------------------------------------------------
# Pictures, and models.py as a command


def write_pictures(folder):
    """Pictures of several modes and sizes, and four files that are none -> {name of the translation: size}."""
    pixels = np.random.default_rng(0).integers(0, 256, (64, 48, 4), dtype=np.uint8)
    (folder / "deep").mkdir(parents=True)
    Image.fromarray(pixels[..., :3]).save(folder / "whole.png")
    Image.fromarray(pixels[:37, :23, :3]).save(folder / "twin.jpg")
    Image.fromarray(pixels[:5, :3]).save(folder / "twin.png")
    Image.fromarray(pixels[:40, :30, 0].astype(np.uint16) * 257).save(folder / "deep/sixteen.png")
    bad = {"notes.txt": b"no picture", "broken.png": b"\x89PNG", "empty.jpg": b"", "huge.ppm": b"P5 30000 30000 255\n"}
    for name, content in bad.items():
        (folder / name).write_bytes(content)
    return {"whole.png": (48, 64), "twin.png": (23, 37), "twin_png.png": (3, 5), "deep/sixteen.png": (30, 40)}


@pytest.mark.parametrize("unet", (False, True))
def test_a_folder_is_translated(unet, tmp_path):
    """By models.py and student.pt alone: sizes stay, what is no picture is skipped with a count."""
    net = fill(UnetGenerator(ngf=2, num_downs=5) if unet else ResnetGenerator(ngf=2, separable=True))
    models.save_generator(tmp_path / "student.pt", net)
    shutil.copy(HERE / "models.py", tmp_path)
    sizes = write_pictures(tmp_path / "photos")
    command = [*PYTHON, "models.py", "student.pt", "photos/", "translated/", "--device", "cpu"]
    done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True)
    count = "4 pictures translated into translated/, 4 files skipped, 1 with transparency, shown on white"
    assert "8/8" in done.stdout and count in done.stdout
    skipped = ("notes.txt", "broken.png", "empty.jpg", "huge.ppm")
    assert done.stderr.count("\n") == 4 and all(name in done.stderr for name in skipped)
    found = {str(p.relative_to(tmp_path / "translated")): Image.open(p) for p in (tmp_path / "translated").rglob("*.*")}
    assert {name: image.size for name, image in found.items()} == sizes
    pixels = np.asarray(models.to_rgb(Image.open(tmp_path / "photos/deep/sixteen.png")))
    padded = np.pad(pixels, ((0, 24 if unet else 8), (0, 2), (0, 0)), mode="reflect")
    expected = (net(torch.from_numpy(padded).permute(2, 0, 1)[None] / 127.5 - 1)[0] + 1).permute(1, 2, 0) * 127.5
    assert np.abs(np.asarray(found["deep/sixteen.png"]) - expected.detach().numpy()[:40, :30]).max() < 0.6


def test_pictures_are_drawn(tmp_path, capsys):
    torch.manual_seed(0)
    models.save_generator(tmp_path / "student.pt", StyleGAN2Generator(16, 8, 2, width=1 / 64))
    names = ["00000.png", "00001.png", "00002.png"]
    runs = []
    for folder, options in enumerate(("--seed 3", "--seed 3", "--seed 9", "--seed 3 --truncation 1e-9")):
        models.main([*f"{tmp_path}/student.pt {tmp_path}/{folder} --count 3 {options} --device cpu".split()])
        assert sorted(os.listdir(tmp_path / str(folder))) == names and "3 pictures" in capsys.readouterr().out
        runs.append([(tmp_path / str(folder) / name).read_bytes() for name in names])
        assert Image.open(tmp_path / f"{folder}_grid.png").height == 16 + 18 + 2
    assert runs[0] == runs[1] and len({*runs[0], *runs[2]}) == 6 and len({*runs[3]}) == 1  # the mean


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("gone.pt a b", "gone.pt: no such file"),
        ("other.pt a b", "other.pt: not a file of save_generator"),
        ("student.pt", "two folders, from and to, found 0"),
        ("student.pt gone translated", "gone: no such folder"),
        ("student.pt folder translated --device abacus", "abacus"),
        ("stylegan2.pt a b", "one folder, where to draw, found 2"),
        ("stylegan2.pt a --count 0", "--count"),
        ("stylegan2.pt a --truncation 0", "--truncation"),
        ("stylegan2.pt other.pt/a --count 1", "other.pt"),
    ],
)
def test_wrong_uses_of_the_command(arguments, message, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    models.save_generator("student.pt", ResnetGenerator(ngf=2))
    models.save_generator("stylegan2.pt", StyleGAN2Generator(8, 4, 1, width=1 / 128))
    torch.save({}, "other.pt")
    write_pictures(tmp_path / "folder")
    with pytest.raises(SystemExit) as stop:
        models.main(arguments.split())
    err = capsys.readouterr().err
    assert stop.value.code == 2 and err.count("\n") == 1 and err.startswith("models.py: error: ") and message in err


# ----------------------------------------------------------------------------------------------------------------------
# Losses, against slow, obvious formulas


def test_adversarial_losses():
    """Least squares and hinge are in test_first_step."""
    real, fake = torch.tensor([[-2.0, 0.5], [3.0, 0.0]]), torch.tensor([[2.0], [-2.5]])
    log_real, log_fake = real.sigmoid().log().mean(), (1 - fake.sigmoid()).log().mean()
    torch.testing.assert_close(losses.generator_loss(real, "logistic"), -log_real)
    torch.testing.assert_close(losses.discriminator_loss(real, fake, "logistic"), -log_real - log_fake)
    fails("wgan", losses.generator_loss, real, "wgan")
    fails("wgan", losses.discriminator_loss, real, fake, "wgan")


def test_dcd_loss():
    """Values and gradients are in test_first_step. Here: small taps, equal ones, what its gradient leaves alone."""
    discriminator, loss, seen = PatchDiscriminator(3, ndf=8).requires_grad_(False), DCDLoss([4] * 4, [4] * 4, 3), []
    taps = [torch.randn(2, 4, size, size, requires_grad=True) for size in (16, 24, 48, 64)]
    others = [torch.randn_like(tap, requires_grad=True) for tap in taps]
    loss(taps, others, lambda maps: seen.append(maps) or discriminator.features(maps)).backward()
    assert [tuple(maps.shape) for maps in seen[::2]] == [(2, 3, size, size) for size in (64, 72, 96, 64)]
    for maps, factor in zip(seen, (4, 4, 3, 3, 2, 2), strict=False):
        small = maps[:, :, ::factor, ::factor]
        assert torch.equal(maps, small.repeat_interleave(factor, 2).repeat_interleave(factor, 3))
    trained = [*taps, *loss.student_connectors.parameters()]
    frozen = [*others, *discriminator.parameters(), *loss.teacher_connectors.parameters()]
    assert all(p.grad.abs().sum() > 0 for p in trained) and all(p.grad is None for p in frozen)
    loss.student_connectors.load_state_dict(loss.teacher_connectors.state_dict())
    assert loss(taps, others, discriminator.features) > 1e-3 and loss(taps, taps, discriminator.features) == 0
    fails("3 student taps and 4", DCDLoss, [1, 2, 3], [1, 2, 3, 4])
    for wrong, found in ((taps[0], "a Tensor"), (taps[:3], "3 maps"), (None, "a NoneType")):
        message = f"_taps: expected a list of 4 maps, found {found}"
        fails("student" + message, loss, wrong, taps, discriminator.features)
        fails("teacher" + message, loss, taps, wrong, discriminator.features)


def test_the_papers_taps_are_not_enlarged():
    discriminator, G = PatchDiscriminator(ndf=4), ResnetGenerator(ngf=2, separable=True)
    loss = DCDLoss(G.tap_channels, G.tap_channels)
    (_, a), (_, b) = (G(torch.rand(1, 3, 256, 256), taps=True) for _ in range(2))
    value = loss(a, b, discriminator.features)
    loss.tap_size = 24
    assert torch.equal(loss(a, b, discriminator.features), value) and value > 1e-3


def test_pixel_loss_is_plain_feature_matching():
    loss = PixelLoss([2, 3], [4, 5])
    taps, targets = ([torch.randn(2, c, 6, 7, requires_grad=True) for c in channels] for channels in ((2, 3), (4, 5)))
    expected = 0
    for connector, f, g in zip(loss.student_connectors, taps, targets, strict=True):
        mapped = torch.einsum("oc,nchw->nohw", connector.weight[:, :, 0, 0], f) + connector.bias[:, None, None]
        expected = expected + (mapped - g).abs().sum() / g.numel()
    value = loss(taps, targets, None)
    torch.testing.assert_close(value, expected)
    value.backward()
    assert all(p.grad.abs().sum() > 0 for p in (*taps, *loss.parameters())) and all(p.grad is None for p in targets)


def test_perceptual_loss_is_the_papers():
    vgg = PerceptualLoss("random")
    x, y = (torch.rand(2, 3, 32, 48).mul(2).sub(1).requires_grad_() for _ in "xy")
    found, expected = vgg(x, y), 0
    for layer in (3, 8, 15, 22):
        a, b = (vgg.features[: layer + 1]((image + 1) / 2) for image in (x, y))
        grams = [torch.einsum("nchw,ndhw->ncd", f, f) / f[0].numel() for f in (a, b)]
        expected = expected + (grams[0] - grams[1]).abs().mean()
        if layer == 8:
            torch.testing.assert_close(found["feature"], (a - b).abs().mean())
    torch.testing.assert_close(found["style"], expected)
    sum(found.values()).backward()
    assert x.grad.abs().sum() > 0 and y.grad is None and all(p.grad is None for p in vgg.parameters())
    assert all(vgg(x, y, [term]) == {term: found[term]} for term in ("style", "feature"))


def test_vgg_weights(server, tmp_path, monkeypatch):
    """Downloaded from a server, then from the cache; from a file; what is wrong is one line."""
    address, asked = server
    random = PerceptualLoss("random").features.state_dict()
    state_dict = {f"features.{key}": value + 1 for key, value in random.items()} | {"classifier.0.bias": torch.ones(1)}
    name = publish(tmp_path / "web", state_dict)
    monkeypatch.setattr(VGG16_Weights.IMAGENET1K_V1.value, "url", f"{address}/{name}")
    for weights in ("auto", "auto", tmp_path / "web" / name):
        loaded = PerceptualLoss(weights).features.state_dict()
        assert all(torch.equal(loaded[key], value + 1) for key, value in random.items())
    assert asked == [f"/{name}"] and os.listdir(tmp_path / "hub/checkpoints") == [name]
    monkeypatch.setattr(VGG16_Weights.IMAGENET1K_V1.value, "url", f"{address}/gone/other-{name}")
    fails(r"no weights .* \(download failed: .*404.*\): get .* and give --vgg FILE", PerceptualLoss, "auto")
    del state_dict["features.5.weight"]
    torch.save(state_dict, tmp_path / "vgg16.pth")
    fails("vgg16.pth: .* no 5.weight", PerceptualLoss, tmp_path / "vgg16.pth")


def test_r1_penalty_is_the_mean_squared_gradient():
    torch.manual_seed(0)
    D = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Softplus(), nn.Flatten(), nn.Linear(16, 1)).double()
    images = torch.randn(3, 3, 4, 4, dtype=torch.float64, requires_grad=True)
    jacobian = torch.autograd.functional.jacobian(lambda x: D(x).squeeze(1), images, create_graph=True)
    expected = sum(jacobian[n, n].square().sum() for n in range(3)) / 3
    penalty = losses.r1_penalty(D(images), images)
    assert penalty.item() == pytest.approx(expected.item(), rel=1e-4)
    found, wanted = (torch.autograd.grad(value, D[0].weight)[0] for value in (penalty, expected))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-8)  # through the gradient


def test_path_length_penalty_is_the_papers():
    torch.manual_seed(0)
    G, penalty, lengths = StyleGAN2Generator(8, 6, 1, width=1 / 128), PathLengthPenalty(decay=0.25), []
    latents = G.mapping(torch.randn(3, 6)).detach().requires_grad_()
    penalty.mean.fill_(0.5)
    images = G.synthesis(latents, "fixed")
    state = torch.get_rng_state()
    value = penalty(images, latents)
    torch.set_rng_state(state)
    noise = torch.randn_like(images) / 8  # divided by the root of the number of pixels
    for n in range(3):
        image = G.synthesis(latents[n : n + 1], "fixed")
        (product,) = torch.autograd.grad((image[0] * noise[n]).sum(), latents, create_graph=True)  # J_w^T y
        lengths.append(product[n].square().sum(1).mean().sqrt())
    lengths = torch.stack(lengths)
    mean = 0.5 + 0.25 * (lengths.mean() - 0.5)
    expected, held = (lengths - mean).square().mean(), (lengths - mean.detach()).square().mean()
    assert penalty.mean.item() == pytest.approx(mean.item(), rel=1e-4) and penalty.state_dict().keys() == {"mean"}
    assert value.item() == pytest.approx(expected.item(), rel=1e-4) and value.item() > 1e-4
    weight = G.convs[0].conv.weight  # the gradient flows through the mean too
    found, wanted, other = (torch.autograd.grad(v, weight, retain_graph=True)[0] for v in (value, expected, held))
    torch.testing.assert_close(found, wanted, rtol=1e-3, atol=1e-6)
    assert (found - other).norm() > 0.05 * found.norm()


# ----------------------------------------------------------------------------------------------------------------------
# The training scripts, end to end: name -> (tiny networks, a run of eight or nine steps)

DCD = "--crop-size 96 --batch-size 2 --epochs 2 --epochs-decay 2 --vgg random --lambda-style 0 --lambda-feature 0"
DCD = ("--teacher-ngf 4 --student-ngf 2 --ndf 4", f"{DCD} --ema 10 --teacher-every 2")
DGL = "--batch-size 4 --teacher-kimg 0.012 --stage1-kimg 0.012 --stage2-kimg 0.012 --eval-images 20"
WIDTHS = "--teacher-width 0.0156 --student-width 0.0078 --student-d-width 0.01"
CHANNELS = "--teacher-ch 2 --student-ch 1 --student-d-ch 2"
SIDE = dict(cyclegan_dcd=98, pix2pix_dcd=98, stylegan2_dgl=10, biggan_dgl=34)  # in a sample grid
SCRIPTS = {
    "cyclegan_dcd": (DCD[0], f"{DCD[1]} --pool-size 3"),
    "pix2pix_dcd": DCD,
    "stylegan2_dgl": (
        f"--size 8 --style-dim 8 --n-mlp 2 {WIDTHS}",
        f"{DGL} --ema-kimg 0.01 --r1-every 2 --path-every 2",
    ),
    "biggan_dgl": (
        f"--size 32 --dim-z 8 --shared-dim 4 --attention 0 {CHANNELS}",
        f"{DGL} --accumulate 1 --ema-start 2",
    ),
}
FOLDERS = dict(cyclegan_dcd="trainA trainB testA testB", pix2pix_dcd="train val", stylegan2_dgl=".", biggan_dgl="x y")
SIZES = dict(cyclegan_dcd=(100, 100), pix2pix_dcd=(200, 100))
OPTIONS = "--workers 0 --device cpu --log-every 1 --sample-every 0 --eval-every 0"
MODULES = {name: importlib.import_module(f"train_{name}") for name in SCRIPTS}
every_script = pytest.mark.parametrize("name", SCRIPTS)
dcd_scripts = pytest.mark.parametrize("name", [name for name in SCRIPTS if "dcd" in name])


def by_kind(name, dcd, dgl):
    return dcd if "dcd" in name else dgl


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Tiny data sets in the layouts of the scripts."""
    root = tmp_path_factory.mktemp("data")
    for name in SCRIPTS:
        for folder in FOLDERS[name].split():
            (root / name / folder).mkdir(parents=True, exist_ok=True)
            for i in range(3):
                image = Image.effect_noise(SIZES.get(name, (20, 16)), 90).convert("RGB")
                image.save(root / name / folder / f"{i}.png")
    return root


@pytest.fixture
def quick_inception(monkeypatch):
    """Twelve features in place of the FID Inception's 2048; .broken makes it raise."""

    def features(images, logits=False):
        if features.broken:
            raise RuntimeError("out of memory")
        assert images.min() >= 0 and images.max() <= 1 and torch.equal((images * 255).round() / 255, images)
        found = F.adaptive_avg_pool2d(images, 2).flatten(1)
        return (found, 9 * found) if logits else found

    features.metric, features.key, features.broken = "FID", "fid", False
    monkeypatch.setattr(fid, "load_inception", lambda *_: features)
    return features


@pytest.fixture
def batches(monkeypatch):
    """What training reads, from the first step on."""
    seen, read = [], models.run_batches
    monkeypatch.setattr(models, "run_batches", lambda *args: (seen.append(batch) or batch for batch in read(*args)))
    return seen


def arguments(name, data, out, *options, networks=True):
    base = f"--data {data / name} --out {out} {SCRIPTS[name][0] * networks} {SCRIPTS[name][1]} {OPTIONS}"
    return [*base.split(), *" ".join(map(str, options)).split()]


def run(name, data, out, *options, networks=True):
    """The script with tiny networks, in this process -> its log lines."""
    MODULES[name].main(arguments(name, data, out, *options, networks=networks))
    return log_lines(out)


def refused(capsys, name, data, out, *options):
    """A run that has to end with one line on stderr and status 2 -> that line."""
    with pytest.raises(SystemExit) as stop:
        run(name, data, out, *options)
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and error.startswith(f"train_{name}.py: error: ")
    return error


def log_lines(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def checkpoint(out):
    return models.load_file(Path(out) / "checkpoint.pt")


def weights(out):
    return checkpoint(out)["networks"]


def saved_args(out):
    return json.loads((Path(out) / "args.json").read_text())


@every_script
def test_output_folder(name, data, tmp_path, quick_inception, capsys):
    out = tmp_path / "out"
    lines, said = run(name, data, out, "--eval-every 1 --sample-every 3"), capsys.readouterr().out
    names = {*"args.json log.jsonl samples checkpoint.pt student.pt best_student.pt summary.json".split()}
    names |= by_kind(name, set(), {"teacher.pt", "stage1.pt", "stage2.pt"})
    assert {p.name for p in out.iterdir() if not p.name.startswith("squares_")} == names
    assert all(len(line) <= 100 for line in said.splitlines() if line.startswith(("step", "stage", "  ")))
    assert all(re.fullmatch(r"\w+", key) for line in lines for key in line) and "FID" not in said
    steps, scored = ([line for line in lines if ("evaluation" in line) == flag] for flag in (False, True))
    assert [line["step"] for line in steps] == [*range(1, by_kind(name, 9, 10))]
    assert {"images", "lr", *by_kind(name, ("G_S_gan", "G_S_dcd", "D_T"), ("D", "G"))} <= set(steps[0])
    assert [line["step"] for line in scored] == by_kind(name, [2, 4, 6, 8], [3, 6, 9])
    assert "fid_teacher" in scored[0] and "fid_student" in scored[-1]
    student, best = (models.load_generator(out / f"{prefix}student.pt") for prefix in ("", "best_"))
    assert same(student.state_dict(), weights(out)[by_kind(name, "student_G_ema", "student_g_ema")])
    assert "teacher_g" not in weights(out)  # has served when stage 0 ends
    students = [line.get("fid_student", np.inf) for line in scored]
    assert same(best.state_dict(), student.state_dict()) == (min(students) == students[-1])
    facts = json.loads((out / "summary.json").read_text())
    assert facts["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert facts["scores"] | dict(step=facts["steps"], evaluation=True) == scored[-1]
    stems = by_kind(name, ("0000003", "0000006", "0000008"), ("stage0_0000003", "stage1_0000006", "stage2_0000009"))
    assert sorted(os.listdir(out / "samples")) == [f"{stem}.png" for stem in stems]
    grid = np.asarray(Image.open(out / "samples" / f"{stems[-1]}.png"))
    assert grid.shape == by_kind(
        name, (16 + 4 * 98 + 2, 6 * 100, 3), (2 * (16 + 2 * SIDE[name] + 2), 8 * SIDE[name] + 2, 3)
    )
    assert 10 < (grid[:16] < 128).sum() < grid[:16].size / 4  # names, black on white
    run(name, data, tmp_path / "plain")  # evaluation and samples leave the run alone
    assert same(weights(out), weights(tmp_path / "plain"))


@every_script
def test_runs_are_kept(name, data, tmp_path, quick_inception, capsys):
    lines = run(name, data, tmp_path, "--eval-every 1")
    before = {p: p.read_bytes() for p in tmp_path.glob("*.*") if p.name not in ("args.json", "summary.json")}
    scores = json.loads((tmp_path / "summary.json").read_text())["scores"]
    MODULES[name].main(["--out", str(tmp_path), "--resume"])
    assert "nothing is left to train" in capsys.readouterr().out
    assert json.loads((tmp_path / "summary.json").read_text())["scores"] == scores and "fid_student" in scores
    for options, message in (
        ("", "holds a run"),
        ("--resume --seed 3", "--seed 3 (the run has 0)"),
        ("--resume --overwrite", "not allowed with"),
        (f"--overwrite --{by_kind(name, 'teacher', 'student')} {tmp_path}/checkpoint.pt", "choose another --out"),
        ("--resume --teacher other.pt", "(the run has None)"),
        ("--resume --inception random", "--inception random (the run has auto)"),
    ):
        assert message in refused(capsys, name, data, tmp_path, options)
    assert all(p.read_bytes() == content for p, content in before.items()) and log_lines(tmp_path) == lines
    torch.save(checkpoint(tmp_path) | dict(script="other"), tmp_path / "checkpoint.pt")
    assert "a checkpoint of train_other.py" in refused(capsys, name, data, tmp_path, "--resume")
    (tmp_path / "mine.pt").write_text("not a file of the run")
    assert [line["step"] for line in run(name, data, tmp_path, "--overwrite --max-steps 1")] == [1]
    assert (tmp_path / "mine.pt").exists() and not (tmp_path / "best_student.pt").exists()


@every_script
def test_resume_is_exact(name, data, tmp_path, quick_inception):
    """Cut before the first log line, in an evaluation, inside and between stages; workers change nothing."""
    options = "--log-every 5 --save-every 100 --eval-every 1 --max-steps"
    run(name, data, tmp_path / "whole", options, 8)
    for cut in by_kind(name, ("failing", 3), ("failing", 2, 3, 4, 7)):
        out, quick_inception.broken = tmp_path / f"cut_{cut}", cut == "failing"
        if cut == "failing":
            with pytest.raises(RuntimeError, match="out of memory"):
                run(name, data, out, options, 8)
            assert checkpoint(out)["step"] == by_kind(name, 2, 3)  # saved before the evaluation, which comes first now
        else:
            lines = run(name, data, out, options, f"{cut} --workers 2")
            last = [line for line in lines if "evaluation" not in line][-1]
            assert last["step"] == cut and last.get("cut", False) == ("dgl" not in name or cut != 3)
        with open(out / "log.jsonl", "a") as file:
            file.write('{"step": 8, "from": "after the checkpoint"}\n{"step": 8, "torn')
        quick_inception.broken = False
        MODULES[name].main([*f"--out {out} --resume --max-steps 8 --workers 1".split()])
        assert log_lines(tmp_path / "whole") == log_lines(out)
        for path in (tmp_path / "whole").glob("*.pt"):
            ours, theirs = models.load_file(path), models.load_file(out / path.name)
            assert all(same(ours[key], theirs[key]) for key in ours if key != "args"), path.name


@every_script
def test_a_run_can_be_extended(name, data, tmp_path, capsys):
    """Finished or not; the schedule is computed anew. A smaller budget is refused."""
    key, less, more = by_kind(name, ("epochs_decay", 2, 3), ("stage2_kimg", 0.012, 0.016))
    option = "--" + key.replace("_", "-")
    run(name, data, tmp_path / "finished")
    run(name, data, tmp_path / "cut", "--max-steps 3")
    for out in (tmp_path / "finished", tmp_path / "cut"):
        at = checkpoint(out)["step"]
        lines = run(name, data, out, "--max-steps 99 --resume", option, more)
        assert lines.pop(at) == dict(step=at, extended={key: more}) == saved_args(out)["extended"][0]
        assert len(lines) == 10 and saved_args(out)[key] == more
        error = refused(capsys, name, data, out, "--max-steps 99 --resume", option, less)
        assert f"{option} {less} (the run has {more})" in error
    if "dcd" in name:
        assert [line["lr"] for line in lines] == pytest.approx([2e-4 * min(7, k) / 7 for k in range(10, 0, -1)])
    else:
        error = refused(capsys, name, data, out, "--resume --stage2-kimg 0.016 --stage1-kimg 0.02")
        assert "--stage1-kimg: that stage is over, a later one has begun" in error


@every_script
def test_divergence_stops_the_run(name, data, tmp_path):
    run(name, data, tmp_path, "--max-steps 2")
    broken = checkpoint(tmp_path)
    for state_dict in broken["networks"].values():
        next(iter(state_dict.values())).fill_(torch.nan)
    torch.save(broken, tmp_path / "checkpoint.pt")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for options in ("--max-steps 9 --resume --log-every 100 --save-every 1", "--max-steps 9 --resume"):
        with pytest.raises(SystemExit, match=r"diverged at step 3, not finite: .*(G|D).*; the last checkpoint stays"):
            run(name, data, tmp_path, options)
        assert (tmp_path / "checkpoint.pt").read_bytes() == before


# Scripts | options | what the error says
BAD = """
all | --data {bad}/header | not a readable image
all | --device cuda:99 | --device cuda:99
all | --batch-size -1 | --batch-size
all | --lr nan | --lr
all | --resume | checkpoint.pt: no such file
all | --out {bad}/file/out | cannot be written
all | --inception {bad}/gone.pth --eval-every 1 | gone.pth
all | --colour | --colour
all | --teacher {bad}/file | not a checkpoint
all | --teacher {bad}/code.pt | only plain tensors are loaded
all | --teacher {bad}/script.pt | script.pt: a checkpoint of train_other.py, expected one of train_
all | --student {bad}/script.pt | script.pt: a checkpoint of train_other.py, expected one of train_
dcd | --crop-size 98 | multiple of 4 from 24 on
dcd | --tap-size 20 | --tap-size
dcd | --load-size 90 | smaller than --crop-size
dcd | --teacher {bad}/other.pt | has shape (2, 3, 7, 7), expected (4, 3, 7, 7)
dcd | --vgg {bad}/other.pt --lambda-style 1 | other.pt
dcd | --freeze-teacher | --teacher
dcd | --d-fakes none | needs a --teacher
dcd | --lambda-gan 0 --lambda-dcd 0 | nothing would be learnt
pix2pix | --data {bad}/odd | 0.png is 201x100 pixels
pix2pix | --teacher-arch unet_256 | taps of different sizes
pix2pix | --teacher-arch unet_256 --student-arch unet_256 | multiple of 256 from 256 on
dgl | --teacher-kimg 0 --stage1-kimg 0 --stage2-kimg 0 | nothing to train
dgl | --teacher-kimg 0 | stage 2 needs a teacher
stylegan2 | --teacher {bad}/wide.pt | leave out --teacher-kimg
stylegan2 | --teacher-kimg 0 --teacher {bad}/other.pt | has no 'd'
stylegan2 | --teacher-kimg 0 --teacher {bad}/wide.pt | convs.0.0.weight has shape (15, 3, 1, 1), expected (8, 3, 1, 1)
stylegan2 | --teacher-kimg 0 --teacher {bad}/large.pt | d with this --size and these widths: does not fit
stylegan2 | --teacher-kimg 0 --teacher {bad}/latent.pt | style.1.weight has shape (16, 16), expected (8, 8)
stylegan2 | --student {bad}/wide.pt | has no 'g'
"""
BAD = [line.split(" | ") for line in BAD.strip().splitlines()]


@pytest.fixture(scope="session")
def bad(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    (root / "file").write_text("no folder")
    files = dict(code={"a": RunsCode()}, script={"script": "other"})
    files["other"] = ResnetGenerator(ngf=2, separable=True).state_dict()
    for stem, size, width in (("latent", 8, 0.0156), ("wide", 8, 0.03), ("large", 16, 0.0156)):
        files[stem] = dict(d=StyleGAN2Discriminator(size, width=width).state_dict())
    files["latent"]["g_ema"] = StyleGAN2Generator(8, 16, 2, width=0.0156).state_dict()
    for stem, content in files.items():
        torch.save(content, root / f"{stem}.pt")
    for name in SCRIPTS:
        for path in Path(shutil.copytree(data / name, root / name / "header")).rglob("1.png"):
            path.write_bytes(b"no image")
    shutil.copytree(data / "pix2pix_dcd", root / "pix2pix_dcd/odd")
    Image.new("RGB", (201, 100)).save(root / "pix2pix_dcd/odd/train/0.png")
    return root


@pytest.mark.parametrize(
    "name, bad_input", [(n, row) for n in SCRIPTS for row in BAD if row[0] == "all" or row[0] in n]
)
def test_bad_input(name, bad_input, data, bad, tmp_path, capsys, monkeypatch):
    """One line that says what is wrong, exit status 2, and nothing written."""
    monkeypatch.chdir(tmp_path)
    options = re.sub(r"{bad}/(header|odd)", rf"{bad}/{name}/\1", bad_input[1]).format(bad=bad)
    assert bad_input[2] in refused(capsys, name, data, "out", options) and os.listdir(tmp_path) == []


@every_script
def test_data_comes_before_weights(name, data, server, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"{server[0]}/inception-01234567.pth")
    monkeypatch.setattr(VGG16_Weights.IMAGENET1K_V1.value, "url", f"{server[0]}/vgg-01234567.pth")
    options = "--eval-every 1 --inception auto" + by_kind(name, " --vgg auto --lambda-style 1", "")
    assert "no such folder" in refused(capsys, name, data, tmp_path / "out", options, f"--data {tmp_path}/gone")
    assert server[1] == []
    error = refused(capsys, name, data, tmp_path / "out", options)
    assert f"give {by_kind(name, '--vgg', '--inception')} FILE" in error and len(server[1]) == 1
    assert not (tmp_path / "out").exists()


@every_script
def test_pictures_of_all_kinds(name, data, tmp_path, batches, capfd):
    """Small drawings on transparent ground, one of them cut off; on resume another name."""
    root = Path(shutil.copytree(data, tmp_path / "data")) / name
    for path in root.rglob("*.png"):
        image = Image.new("RGBA", dict(cyclegan_dcd=(40, 30), pix2pix_dcd=(80, 30)).get(name, (7, 6)), (0, 0, 0, 0))
        ImageDraw.Draw(image).line((0, 0, 5, 5), (0, 0, 0, 255))
        image.save(path)
    broken = sorted(root.rglob("1.png"))[-1 if "cyclegan" in name else 0]  # trainB, train
    os.truncate(broken, broken.stat().st_size - 30)
    run(name, root.parent, tmp_path / "whole", "--max-steps 5")
    out, err = capfd.readouterr()
    n, side, smallest = (6, 32, "7x6") if "biggan" in name else by_kind(name, (3, 96, "40x30"), (3, 8, "7x6"))
    assert re.search(rf"{n} of {n} are under {side} .* to {smallest}\n", out)
    assert f"{n} of {n} pictures have transparency, shown on white" in out
    assert err.count("\n") == err.count(f"{broken}: not a readable image") == 1
    values = torch.cat([x.float().flatten() for x in (batches[0] if isinstance(batches[0], list) else [batches[0]])])
    assert values.median() == by_kind(name, 1, 255) and (values < by_kind(name, 0, 128)).any()
    run(name, root.parent, tmp_path / "cut", "--max-steps 2 --workers 2")
    run(name, root.parent, tmp_path / "cut", "--max-steps 5 --workers 1 --resume")
    assert same(weights(tmp_path / "whole"), weights(tmp_path / "cut"))
    assert "have changed" not in capfd.readouterr().out
    broken.rename(broken.with_name("renamed.png"))
    run(name, root.parent, tmp_path / "cut", "--max-steps 6 --resume")
    assert "names or sizes of images have changed, the run is no longer the same bit" in capfd.readouterr().out
    assert checkpoint(tmp_path / "cut")["step"] == 6


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "biggan" not in name])
def test_moving_average(name, data, tmp_path, capfd):
    """ema = decay ema + (1 - decay) net, to a half-life in images, and it is what student.pt holds."""
    options = by_kind(name, "--ema 7", "--teacher-kimg 0 --stage2-kimg 0 --ema-kimg 0.007")
    run(name, data, tmp_path / "still", options, "--lr 0 --max-steps 1")
    net = by_kind(name, "student_G", "student_g")
    expected, decay = weights(tmp_path / "still")[net], 0.5 ** (by_kind(name, 2, 4) / 7)
    for step in (1, 2, 3):
        run(name, data, tmp_path / "out", options, f"--max-steps {step}", "--resume" * (step > 1))
        found = weights(tmp_path / "out")[net]
        expected = {k: decay * v + (1 - decay) * found[k] for k, v in expected.items()}
    average = dict(models.load_generator(tmp_path / "out/student.pt").state_dict())
    torch.testing.assert_close(average, expected, rtol=1e-5, atol=1e-6)
    assert not same(average, dict(found)) and models.load_file(tmp_path / "out/student.pt")["average"] == 7
    warned = "warning: --ema 7 is over a fifth of the run" in capfd.readouterr().out
    assert warned == ("dcd" in name)


@every_script
def test_compiled_steps(name, data, tmp_path, monkeypatch):
    """What torch.compile captures, forward and backward, computes the same; executed here without a compiler."""
    captured, aot_eager = [], torch._dynamo.lookup_backend("aot_eager")

    def backend(*args, **options):
        captured.append(args)
        return aot_eager(*args, **options)

    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=backend))
    options = by_kind(name, "--max-steps 2", "")
    plain, compiled = (run(name, data, tmp_path / f"run{flag}", options, flag) for flag in ("", "--compile"))
    assert captured and compiled == [pytest.approx(line, rel=1e-2) for line in plain]


@every_script
def test_toy_data_and_overrides(name, tmp_path, capfd):
    module = MODULES[name]
    module.main([*f"--toy --out {tmp_path} --max-steps 1 --batch-size 3 --lr 0.5 --device cpu".split()])
    assert (module.TOY | dict(batch_size=3, lr=0.5)).items() <= saved_args(tmp_path).items()
    assert Path(re.search(r"generator: (\S+),", capfd.readouterr().out)[1]).exists()
    assert len(list((tmp_path / "toy_data").rglob("*.png"))) >= 100 and len(list((tmp_path / "samples").iterdir())) == 1


# ----------------------------------------------------------------------------------------------------------------------
# The DCD scripts


def load(net, state_dict):
    net.load_state_dict(state_dict)
    return net


@dcd_scripts
def test_first_step(name, data, tmp_path, batches):
    """Every logged loss and the student's gradient, from the paper's formulas; with lr 0 the networks stay."""
    terms, pairs = dict(gan=0.5, dcd=4.0, style=300.0, feature=2.0), "pix2pix" in name
    line = run(name, data, tmp_path, "--lr 0 --max-steps 1", *(f"--lambda-{k} {v}" for k, v in terms.items()))[0]
    saved, (x, y) = checkpoint(tmp_path), batches[0]
    nets = saved["networks"]
    G = load(ResnetGenerator(ngf=4, separable=True), nets["teacher_G"])
    S = load(ResnetGenerator(ngf=2, separable=True), nets["student_G"])
    D = load(PatchDiscriminator(6 if pairs else 3, 4), nets["teacher_D"])
    dcd = load(DCDLoss(S.tap_channels, G.tap_channels, 6 if pairs else 3), nets["dcd_loss"])
    (fake_T, taps_T), (fake_S, taps_S) = G(x, taps=True), S(x, taps=True)
    if pairs:
        judged = {key: D(torch.cat([x, image], 1)) for key, image in dict(y=y, T=fake_T, S=fake_S).items()}
        expected = dict(G_T_gan=-judged["T"].mean(), G_T_l1=(fake_T - y).abs().mean(), G_S_gan=-judged["S"].mean())
        real, fakes = (1 - judged["y"]).relu().mean(), [(1 + judged[key]).relu().mean() for key in "TS"]
    else:
        judged = {key: D(image) for key, image in dict(y=y, T=fake_T, S=fake_S).items()}
        B_to_A, D_A = load(copy.deepcopy(G), nets["teacher_F"]), load(copy.deepcopy(D), nets["teacher_D_A"])
        fake_A = B_to_A(y)
        expected = dict(G_T_gan=(judged["T"] - 1).square().mean() + (D_A(fake_A) - 1).square().mean())
        expected["G_T_cycle"] = (B_to_A(fake_T) - x).abs().mean() + (G(fake_A) - y).abs().mean()
        expected["G_T_identity"] = (B_to_A(x) - x).abs().mean() + (G(y) - y).abs().mean()
        expected["G_S_gan"] = (judged["S"] - 1).square().mean()
        expected["D_T_A"] = ((D_A(x) - 1).square().mean() + D_A(fake_A).square().mean()) / 2
        real, fakes = (judged["y"] - 1).square().mean(), [judged[key].square().mean() for key in "TS"]
    expected["D_T"] = (real + sum(fakes) / 2) / 2
    expected["G_S_dcd"] = dcd(taps_S, [tap.detach() for tap in taps_T], D.features)
    expected |= {f"G_S_{term}": value for term, value in PerceptualLoss("random")(fake_S, fake_T).items()}
    expected = {key: value.requires_grad_() for key, value in expected.items()}
    found = {key: value for key, value in line.items() if key[:2] in ("G_", "D_")}
    assert found == {key: pytest.approx(value.item(), rel=1e-3) for key, value in expected.items()}
    objective = sum(weight * expected[f"G_S_{term}"] for term, weight in terms.items())
    gradient = torch.autograd.grad(objective, [*S.parameters(), *dcd.student_connectors.parameters()])
    moments = saved["optimizers"]["student_G"]["state"]  # beta1 is 1/2
    found = [2 * moments[i]["exp_avg"] for i in range(len(gradient))]
    found, gradient = (torch.cat([part.flatten() for part in parts]) for parts in (found, gradient))
    assert (found - gradient).norm() < 1e-3 * gradient.norm()
    line = run(name, data, tmp_path, "--overwrite --lr 0 --max-steps 1 --d-fakes teacher")[0]
    assert line["D_T"] == pytest.approx(((real + fakes[0]) / 2).item(), rel=1e-3)


@dcd_scripts
def test_every_ablation(name, data, tmp_path, capsys):
    run(name, data, tmp_path / "still", "--max-steps 1 --lr 0")
    before, terms, frozen = weights(tmp_path / "still"), ("gan", "dcd", "style", "feature"), "--d-fakes none --teacher"
    frozen = f"{frozen} {tmp_path}/still/checkpoint.pt"
    for term, options in (*((term, "") for term in terms), ("dcd", "--distill pixel"), ("gan", frozen)):
        on = " ".join(f"--lambda-{t} {int(t == term)}" for t in terms)
        line = run(name, data, tmp_path / "out", "--overwrite --max-steps 1", on, options)[0]
        after = weights(tmp_path / "out")
        assert {key for key in line if key.startswith("G_S_")} == {f"G_S_{term}"}
        assert not same(before["student_G"], after["student_G"])
        assert same(before["teacher_D"], after["teacher_D"]) == ("D_T" not in line) == (options == frozen)
        if not options:
            assert same(before["dcd_loss"], after["dcd_loss"]) == (term != "dcd")
    torch.save(before["teacher_G"], tmp_path / "G.pth")
    options = f"--overwrite --d-fakes none --teacher {tmp_path}/G.pth"
    assert "with its trained discriminator" in refused(capsys, name, data, tmp_path / "out", options)


@dcd_scripts
def test_trained_networks_come_along(name, data, tmp_path):
    """--teacher and --student, with architecture and width; the teacher's connectors never move, the student's do."""
    archs = "--teacher-arch resnet_9blocks --student-arch resnet_9blocks"
    run(name, data, tmp_path / "a", archs, "--max-steps 2 --teacher-every 1")
    a = weights(tmp_path / "a")
    for file, net in (("student.pt", "student_G_ema"), ("checkpoint.pt", "student_G")):
        options = f"--teacher {tmp_path}/a/checkpoint.pt --freeze-teacher --student {tmp_path}/a/{file} --lr 0"
        run(name, data, tmp_path / file, options, "--max-steps 1", networks=False)
        found, args = weights(tmp_path / file), saved_args(tmp_path / file)
        assert same(found["teacher_G"], a["teacher_G"]) and same(found["teacher_D"], a["teacher_D"])
        assert same(found["student_G"], a[net]) and (args["teacher_ngf"], args["ndf"], args["student_ngf"]) == (4, 4, 2)
        assert args["teacher_arch"] == args["student_arch"] == "resnet_9blocks"
    torch.save(old_spelling(a["teacher_G"]), tmp_path / "reference.pth")
    options = f"--teacher {tmp_path}/reference.pth --freeze-teacher --teacher-every 1 {archs} --max-steps"
    b, c = (run(name, data, tmp_path / n, options, n) and weights(tmp_path / n) for n in "12")
    assert same(b["teacher_G"], a["teacher_G"]) and same(c["teacher_G"], a["teacher_G"])
    assert not same(b["teacher_D"], c["teacher_D"])
    for key in b["dcd_loss"]:
        assert torch.equal(b["dcd_loss"][key], c["dcd_loss"][key]) == key.startswith("teacher_connectors")


@dcd_scripts
def test_bf16_leaves_the_student_in_float32(name, data, tmp_path):
    types = {8: set(), 16: set()}  # of the student's and the teacher's pointwise convolutions

    def note(module, _inputs, output):
        if isinstance(module, nn.Conv2d) and module.kernel_size == (1, 1) and module.out_channels in types:
            types[module.out_channels].add(output.dtype)

    hook = nn.modules.module.register_module_forward_hook(note)
    run(name, data, tmp_path / "off", "--max-steps 1")
    assert types[8] == types[16] == {torch.float32}
    run(name, data, tmp_path / "on", "--max-steps 1 --amp bf16")
    hook.remove()
    assert types[8] == {torch.float32} and types[16] == {torch.float32, torch.bfloat16}


@dcd_scripts
def test_scores(name, data, tmp_path):
    """Without an Inception, against plain formulas; --load-size follows --crop-size."""
    lines = run(name, data, tmp_path, "--max-steps 2 --eval-every 1 --inception none --crop-size 128")
    nets, pairs, rows = weights(tmp_path), "pix2pix" in name, []
    G = load(ResnetGenerator(ngf=4, separable=True), nets["teacher_G"])
    S = load(ResnetGenerator(ngf=2, separable=True), nets["student_G_ema"])
    for path in (data / name / ("val" if pairs else "testA")).iterdir():
        image = Image.open(path)
        halves = (image.crop((x, 0, x + 100, 100)).resize((128, 128), Image.BICUBIC) for x in (0, image.width - 100))
        x, y = (torch.from_numpy(np.array(half)).permute(2, 0, 1)[None] / 127.5 - 1 for half in halves)
        errors = G(x) - y, S(x) - y, S(x) - G(x)
        rows.append([value.item() for e in errors for value in (e.abs().mean(), 10 * (4 / e.square().mean()).log10())])
    names = ("mae_teacher", "psnr_teacher", "mae_student", "psnr_student", "student_to_teacher")
    expected = {k: pytest.approx(v, rel=1e-3) for k, v in zip(names, np.mean(rows, 0), strict=False)}
    expected = expected if pairs else {"student_to_teacher": expected["student_to_teacher"]}
    assert lines[-1] == dict(step=2, evaluation=True) | expected and saved_args(tmp_path)["load_size"] == 143


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


def test_image_pool():
    pool, first = MODULES["cyclegan_dcd"].ImagePool(4), torch.arange(4.0).view(4, 1, 1, 1)
    assert torch.equal(pool.query(first), first)
    later = torch.cat([pool.query(torch.full((1, 1, 1, 1), float(n))) for n in range(4, 200)])
    fresh = (later.flatten() == torch.arange(4.0, 200)).float().mean()
    assert 0.4 < fresh < 0.6 and len(pool.images) == 4
    assert torch.equal(MODULES["cyclegan_dcd"].ImagePool(0).query(first), first)


# ----------------------------------------------------------------------------------------------------------------------
# train_stylegan2_dgl.py


@pytest.fixture(scope="session")
def teacher(tmp_path_factory):
    """The option for a teacher as the community saves it."""
    torch.manual_seed(5)
    g, d, g_ema = (StyleGAN2Generator(8, 8, 2, width=0.0156) for _ in range(3))
    content = dict(g=g, d=StyleGAN2Discriminator(8, width=0.0156), g_ema=g_ema)
    content = {name: net.state_dict() for name, net in content.items()}
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    torch.save(content | dict(args=argparse.Namespace(size=8, latent=8, n_mlp=2, path="ffhq.lmdb"), g_optim={}), path)
    return f"--teacher-kimg 0 --teacher {path}"


def dgl(data, out, *options, **kw):
    return run("stylegan2_dgl", data, out, *options, **kw)


def test_dgl_continues_stage_1(data, teacher, tmp_path):
    """Stage 2 starts from stage 1's networks, with new optimisers and the path length's mean; --student from a file."""
    lines = dgl(data, tmp_path / "two", teacher)
    means = [line["path_mean"] for line in lines if "path_mean" in line]
    start = models.load_file(tmp_path / "two/stage1.pt")
    assert start["path"]["mean"] == means[1] > 0 and means[2] > 0.9 * means[1]
    states = checkpoint(tmp_path / "two")["optimizers"]["D"]["state"].values()
    assert max(int(state["step"]) for state in states) == 5  # three updates, two of R1
    dgl(data, tmp_path / "one", teacher, "--stage2-kimg 0")
    for file in (tmp_path / "two/stage1.pt", tmp_path / "one/checkpoint.pt"):
        out, still = tmp_path / file.stem, "--lr 0 --ema-kimg 1e9 --path-weight 0 --stage1-kimg 0 --stage2-kimg 0.004"
        lines = dgl(data, out, teacher, f"--teacher-width 0.0156 --student {file}", still, networks=False)
        assert [(line["stage"], line["step"]) for line in lines] == [(2, 1)]
        assert all(same(start[key], weights(out)[f"student_{key}"]) for key in ("g", "d", "g_ema", "path"))
        found = [saved_args(out)[key] for key in ("student_width", "student_d_width", "size", "style_dim", "n_mlp")]
        assert found == [0.0078, 0.01, 8, 8, 2]


@pytest.mark.parametrize("name", [name for name in SCRIPTS if "dgl" in name])
def test_dgl_objective(name, data, tmp_path):
    """G's gradient is its own term's plus lambda times D_T's, which the log has unweighted. Here D_T judges as D_S."""
    run(name, data, tmp_path / "first", "--stage1-kimg 0 --stage2-kimg 0")
    options = f"--student {tmp_path}/first/teacher.pt --lr 0 --max-steps 1"
    options += dict(stylegan2_dgl=" --path-weight 0", biggan_dgl=f" --d-lr 0 {CHANNELS} --student-ch 2")[name]
    losses, gradients = [], []
    files = {0: "teacher.pt", 1: "checkpoint.pt", 5: "teacher.pt"}  # which bring their networks along
    for weight, file in files.items():
        extra = f"--overwrite --teacher {tmp_path}/first/{file} --stage1-kimg 0 --teacher-kimg 0 --lambda-dgl {weight}"
        losses.append(run(name, data, tmp_path / "out", options, extra, networks=False)[0])
        moments = checkpoint(tmp_path / "out")["optimizers"]["G"]["state"].values()  # beta1 is 0
        gradients.append(torch.cat([moment["exp_avg"].flatten() for moment in moments]))
    own, one, five = gradients
    assert losses[0] == losses[1] == losses[2] and (five - own - 5 * (one - own)).norm() < 1e-4 * five.norm()
    if "stylegan2" in name:  # BigGAN's spectral norms are a step apart
        assert losses[0]["G"] == pytest.approx(losses[0]["G_dgl"]) and (one - 2 * own).norm() < 1e-4 * one.norm()


def test_dgl_without_penalties_and_other_stages(data, teacher, tmp_path):
    """Each penalty takes the optimiser's pace into account (StyleGAN2, appendix B)."""
    plain = "--teacher-kimg 0.004 --stage1-kimg 0 --stage2-kimg 0.008 --r1-gamma 0 --path-weight 0 --amp bf16"
    lines = dgl(data, tmp_path / "plain", plain)
    assert [line["stage"] for line in lines] == [0, 2, 2] and not {"R1", "path"} & set(lines[0])
    lines = dgl(data, tmp_path / "lazy", "--stage1-kimg 0 --stage2-kimg 0 --r1-every 16 --path-every 4")
    assert [line["stage"] for line in lines] == [0, 0, 0] and not (tmp_path / "lazy/student.pt").exists()
    for name, paces in (("plain", (1, 1)), ("lazy", (4 / 5, 16 / 17))):
        for key, c in zip("GD", paces, strict=True):
            (group,) = checkpoint(tmp_path / name)["optimizers"][key]["param_groups"]
            assert group["lr"] == pytest.approx(0.002 * c) and group["betas"] == (0.0, pytest.approx(0.99**c))


def test_dgl_teacher_discriminator_stays_and_stage_1_never_calls_it(data, teacher, tmp_path, monkeypatch):
    calls, forward = [], StyleGAN2Discriminator.forward
    monkeypatch.setattr(StyleGAN2Discriminator, "forward", lambda self, x: calls.append(self) or forward(self, x))
    dgl(data, tmp_path / "one", teacher, "--max-steps 3")
    assert len(set(calls)) == 1 and len(calls) == 3 * 3 + 2  # D_S: real, fake, for G; R1 at two of three steps
    dgl(data, tmp_path / "one", teacher, "--max-steps 6 --resume")
    dgl(data, tmp_path / "two", teacher, "--lambda-dgl 5")
    counts = sorted((calls.count(net), id(net)) for net in set(calls))
    assert [count for count, _ in counts] == [3, 3, 11, 11, 22]  # D_T once a step of stage 2
    for D in (net for net in set(calls) if calls.count(net) == 3):
        assert same(D.state_dict(), models.load_file(teacher.split()[-1])["d"])
        assert not any(p.requires_grad or p.grad is not None for p in D.parameters())
    assert not same(weights(tmp_path / "one")["student_g"], weights(tmp_path / "two")["student_g"])


@pytest.mark.parametrize("keys", ("d", "d g_ema", "g d g_ema args"))
def test_dgl_reads_teachers(keys, data, teacher, tmp_path, quick_inception):
    """As the community saves them: with a moving average or without."""
    content, path = models.load_file(teacher.split()[-1]), tmp_path / "teacher.pt"
    torch.save({key: content[key] for key in keys.split()}, path)
    options = f"--teacher {path} --teacher-kimg 0 --sample-every 3 --eval-every 1 --max-steps"
    dgl(data, tmp_path, options, 3)
    scores = json.loads((tmp_path / "summary.json").read_text())["scores"]
    assert scores.keys() == {"fid_student"} | ({"fid_teacher"} if "g_ema" in keys else set())
    assert Image.open(tmp_path / "samples/stage1_0000003.png").size[1] == 38 * (2 if "g_ema" in keys else 1)
    path.unlink()  # a resumed run has it in its checkpoint
    dgl(data, tmp_path, "--resume", options, 4)
    assert same(weights(tmp_path)["teacher_d"], content["d"])


def test_dgl_order_and_flips():
    images = torch.arange(5).view(5, 1, 1, 1) * 10 + torch.arange(4)
    plain, mirrored = (MODULES["stylegan2_dgl"].TrainingImages(images, mirror, seed=1) for mirror in (False, True))
    orders = [[plain[n][0, 0, 0].item() // 10 for n in range(start, start + 5)] for start in (0, 5, 10)]
    assert [sorted(order) for order in orders] == [list(range(5))] * 3 and len(set(map(tuple, orders))) > 1
    flipped = [mirrored[n][0, 0, 0].item() % 10 == 3 for n in range(100)]
    assert 30 < sum(flipped) < 70
    assert all(torch.equal(mirrored[n], plain[n].flip(2) if flip else plain[n]) for n, flip in enumerate(flipped))


# ----------------------------------------------------------------------------------------------------------------------
# train_biggan_dgl.py


def biggan(data, out, *options):
    return run("biggan_dgl", data, out, *options)


def test_biggan_average_starts_late(data, tmp_path):
    """A copy before --ema-start, then ema = decay ema + (1 - decay) net over weights and buffers."""
    before = None
    for step in (1, 2, 3):
        options = f"--teacher-kimg 0 --stage2-kimg 0 --ema-decay 0.75 --max-steps {step}"
        biggan(data, tmp_path, options, "--resume" * (step > 1))
        net, average = (weights(tmp_path)[f"student_{key}"] for key in ("g", "g_ema"))
        if step < 3:
            assert same(net, average)
        else:
            expected = {key: 0.75 * before[key] + 0.25 * net[key] for key in net}
            torch.testing.assert_close(dict(average), expected, rtol=1e-5, atol=1e-6)
        before = average
    assert any("stored_mean" in key and not torch.equal(net[key], average[key]) for key in net)


def test_biggan_updates(data, tmp_path):
    """--d-steps updates of D for one of G, each of --accumulate micro-batches; images counts the real ones."""
    lines = biggan(
        data, tmp_path, "--batch-size 2 --accumulate 2 --d-steps 3 --teacher-kimg 0 --stage2-kimg 0 --max-steps 1"
    )
    assert lines[0]["images"] == 12
    states = {role: optimizer["state"].values() for role, optimizer in checkpoint(tmp_path)["optimizers"].items()}
    assert {role: {int(s["step"]) for s in state} for role, state in states.items()} == dict(G={1}, D={3})


@pytest.mark.parametrize("form", ("pair", "state dicts", "checkpoint"))
def test_biggan_teacher_is_frozen(form, data, tmp_path, capsys):
    """D_T's state dict, spectral vectors included, is the same before and after stage 2, in each form of file."""
    biggan(data, tmp_path / "first", "--stage1-kimg 0 --stage2-kimg 0")
    pair, files = models.load_file(tmp_path / "first/teacher.pt"), [tmp_path / "first/teacher.pt"]
    if form == "checkpoint":
        files = [tmp_path / "first/checkpoint.pt"]
    elif form == "state dicts":
        files = [tmp_path / "D.pth", tmp_path / "G_ema.pth"]
        torch.save(pair["d"], files[0])
        torch.save(pair["g_ema"], files[1])
    teacher = f"--teacher {' '.join(map(str, files))} --teacher-kimg 0 --stage1-kimg 0"
    lines = biggan(data, tmp_path / "second", teacher)
    assert [line["stage"] for line in lines] == [2] * 3 and all("G_dgl" in line for line in lines)
    found = weights(tmp_path / "second")
    assert same(pair["d"], found["teacher_d"]) and same(pair["g_ema"], found["teacher_g_ema"])
    biggan(data, tmp_path / "third", teacher, "--lambda-dgl 5")
    assert not same(found["student_g"], weights(tmp_path / "third")["student_g"])
    capsys.readouterr()
    for options, message in (
        (f"{teacher} --teacher-ch 3", "has shape (8, 3, 3, 3), expected (12, 3, 3, 3)"),
        (f"--teacher {' '.join(map(str, files))} {files[0]} x --teacher-kimg 0", "or one file of ours"),
        ("--size 64 --attention 64 --teacher-ch 8 --student-ch 8 --student-d-ch 8", "no maps of that side in both"),
        ("--shared-dim 0", "--hierarchical needs --shared-dim"),
    ):
        assert message in refused(capsys, "biggan_dgl", data, tmp_path / "fourth", options)


def test_biggan_classes(data, tmp_path):
    """Folders in sorted order, also in a .zip with a folder around them all; none, or one alone, is refused."""
    find, root = MODULES["biggan_dgl"].find_classes, data / "biggan_dgl"
    assert find(fid.ImageFiles(root)) == (["x", "y"], [0, 0, 0, 1, 1, 1])
    with zipfile.ZipFile(tmp_path / "set.zip", "w") as archive:
        for path in root.rglob("*.png"):
            archive.write(path, Path("all") / path.relative_to(root))
    assert find(fid.ImageFiles(tmp_path / "set.zip")) == (["x", "y"], [0, 0, 0, 1, 1, 1])
    for folder, message in ((root / "x", "0.png lies in no class folder"), (tmp_path / "one", "one class alone, x")):
        shutil.copytree(root / "x", tmp_path / "one/x", dirs_exist_ok=True)
        with pytest.raises(models.InputError, match=message):
            find(fid.ImageFiles(folder))
    images = torch.arange(6).view(6, 1, 1, 1).expand(6, 3, 1, 2)
    items = MODULES["biggan_dgl"].LabelledImages(images, [0, 0, 0, 1, 1, 1], True, seed=1)
    assert all(label == image[0, 0, 0] // 3 for image, label in (items[n] for n in range(12)))


# ----------------------------------------------------------------------------------------------------------------------
# Signals, start methods and several processes: the scripts as commands of their own


def start(name, data, out, options, launcher=PYTHON, code=""):
    """Code that imports the script, as a process of its own or several under torchrun."""
    path = Path(f"{out}_driver.py")
    header = f"import hashlib, multiprocessing, os, sys\nimport train_{name} as script\nif __name__ == '__main__':\n"
    path.write_text(header + textwrap.indent(code, "    "))
    streams = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, start_new_session=True)
    command = [*launcher, str(path), *arguments(name, data, out, options)]
    return subprocess.Popen(command, **streams, env=os.environ | ENVIRONMENT)


@pytest.mark.parametrize("name, number", [*zip(SCRIPTS, [signal.SIGTERM, signal.SIGINT] * 2, strict=False)])
def test_signals_save_and_stop(name, number, data, tmp_path):
    """Sent to the whole group, as a terminal does: the workers, here spawned as on Windows, are not to die of it."""
    options = by_kind(name, "--epochs 9999", "--teacher-kimg 999") + " --save-every 9999 --workers 1"
    spawn = "multiprocessing.set_start_method('spawn')\nscript.main()"
    process = start(name, data, tmp_path / "out", options, code=spawn)
    while not re.search(r"\bstep 3/", process.stdout.readline()):
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, number)
    out, err = process.communicate(timeout=120)
    step = checkpoint(tmp_path / "out")["step"]
    assert step >= 3 and f"stopped by {number.name} after step {step}, saved; go on: --out" in out
    err = re.sub(r".*resource_tracker.*\n.*warnings.warn.*\n", "", err)  # Python's own, of workers that it did not end
    assert process.returncode == 128 + number and err == "finishing the step and saving; again to quit without\n"
    MODULES[name].main([*f"--out {tmp_path / 'out'} --resume --max-steps {step + 1} --workers 0".split()])
    assert checkpoint(tmp_path / "out")["step"] == step + 1


@every_script
def test_a_later_signal_ends_at_once(name, monkeypatch):
    """One of the same moment does not: torchrun passes on what the whole group has got."""
    module, ended = MODULES[name], []
    monkeypatch.setattr(os, "_exit", ended.append)
    monkeypatch.setattr(module, "stop_signals", [])
    module.on_signal(signal.SIGTERM, None)
    module.on_signal(signal.SIGINT, None)
    assert ended == [] and module.stop_asked() == signal.SIGTERM
    module.stop_signals[0] = signal.SIGTERM, time.monotonic() - 2
    module.on_signal(signal.SIGINT, None)
    assert ended == [130]


# Rank 1 starts from other weights. After each run every rank writes down the hash of all its networks; in the end
# rank 1 fails, and torchrun ends rank 0.
TWO = """
rank, kept, share = int(os.environ["RANK"]), [], script.models.share_weights
def share_weights(networks):
    kept[:] = networks
    for net in kept:
        for parameter in net.parameters():
            parameter.data.add_(rank)
    share(kept)
script.models.share_weights = share_weights
dist, init = script.dist, script.dist.init_process_group
dist.init_process_group = lambda *args, **options: dist.is_initialized() or init(*args, **options)
dist.destroy_process_group = lambda: None  # one group serves all runs
for options in {runs}:
    script.main(sys.argv[1:] + options.split())
    dist.barrier()  # rank 0 writes last
    content = b"".join(v.numpy().tobytes() for net in kept for v in net.state_dict().values())
    open(f"{{options.split()[1]}}_rank{{rank}}", "w").write(hashlib.sha256(content).hexdigest())
for url in {urls}:  # rank 0 downloads for all
    try:
        found = open(script.fid.fetch_weights(url, "--vgg FILE")).read()
    except script.fid.InputError as error:
        found = error
    print(found, file=open(f"{{options.split()[1]}}_rank{{rank}}", "a"))
def fail(*_):
    raise script.InputError("rank 1 has found a bad thing")
if rank == 1:
    script.models.average_gradients = fail
script.main()
"""


@every_script
def test_two_processes(name, data, server, tmp_path):
    """Equal weights, exact resume, the step of one process with twice the batch, one download, and an end together."""
    (address, asked), file = server, publish(tmp_path / "web", b"weights")
    urls = [f"{address}/gone-00000000.pth", f"{address}/{file}"]
    plain = by_kind(name, "--batch-size 1 --lambda-dcd 0 --teacher-every 1", "") + " --pool-size 0" * ("cycle" in name)
    runs = [f"--out {tmp_path}/whole --max-steps 4", f"--out {tmp_path}/cut --max-steps 3"]
    runs += [f"--out {tmp_path}/cut --max-steps 4 --resume", f"--out {tmp_path}/plain --max-steps 3 {plain}"]
    options = by_kind(name, "--batch-size 1", "")
    process = start(name, data, tmp_path / "out", options, TORCHRUN, TWO.format(runs=runs, urls=urls))
    _, err = process.communicate(timeout=240)
    assert f"train_{name}.py: error: rank 1 has found a bad thing" in err
    for folder in ("whole", "cut", "plain"):
        said = [(tmp_path / f"{folder}_rank{rank}").read_text() for rank in (0, 1)]
        assert said[0] == said[1]
    assert "404" in said[0] and said[0].endswith("\nweights\n") and asked == ["/gone-00000000.pth", f"/{file}"]
    a, b = checkpoint(tmp_path / "whole"), checkpoint(tmp_path / "cut")
    assert all(same(a[key], b[key]) for key in ("ranks", "networks", "optimizers")) and len(a["ranks"]) == 2
    assert not same(a["ranks"][0], a["ranks"][1]) and log_lines(tmp_path / "whole") == log_lines(tmp_path / "cut")
    with pytest.raises(SystemExit):  # one process cannot go on for two
        MODULES[name].main([*f"--out {tmp_path / 'cut'} --resume --max-steps 5".split()])
    if "dcd" in name:  # connectors aside: their batch norm sees its own process alone
        one = run(name, data, tmp_path / "one", plain, "--batch-size 2 --max-steps 3")
        two = [{key: pytest.approx(value, rel=2e-3) for key, value in line.items()} for line in one]
        assert log_lines(tmp_path / "plain") == two


# ----------------------------------------------------------------------------------------------------------------------
# The README's snippets


def snippet(start):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


def test_readme_exports_and_quantises(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    student, names = models.init_weights(ResnetGenerator(ngf=16, separable=True), 0.1).eval(), {}
    models.save_generator("student.pt", student)
    exec(snippet("# export"), names)
    assert os.path.getsize("student_int8.pt") < 0.6 * os.path.getsize("student.pt")
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    assert 0 < (names["generator"](x) - student(x)).abs().mean() < 0.05


def test_readme_dcd_loss_in_another_project():
    """With the class alone, as somebody would copy it, and the imports that the README names."""
    copied = re.search(r"^class DCDLoss.*?(?=^class )", (HERE / "losses.py").read_text(), re.DOTALL | re.MULTILINE)[0]
    header, names = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n", {}
    exec(header + copied + snippet("import torch\n\nfrom losses").replace("from losses import DCDLoss", ""), names)
    assert names["loss"] > 0 and names["student"].weight.grad.abs().sum() > 0
    assert names["teacher"].weight.grad is None and names["discriminator"][0].weight.grad is None


# ----------------------------------------------------------------------------------------------------------------------
# fid.py

RANDOM = ("--device", "cpu", "--weights", "random")


@pytest.fixture(scope="module")
def inception():
    return fid.load_inception("random")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of ten and six images of 40x40 pixels; one of b/ has an alpha channel."""
    root, rng = tmp_path_factory.mktemp("images"), np.random.default_rng(0)
    for name, low, n in (("a", 0, 10), ("b", 90, 6)):
        (root / name).mkdir()
        for i in range(n):
            pixels = rng.integers(low, 256, (40, 40, 4 if (name, i) == ("b", 3) else 3), dtype=np.uint8)
            Image.fromarray(pixels).save(root / name / f"{i}.png")
    return str(root / "a"), str(root / "b")


def command(capsys, *arguments):
    """Run the command line in this process; return stdout and stderr."""
    fid.main([*map(str, arguments), *RANDOM])
    return capsys.readouterr()


def error_line(capsys, *arguments):
    """Run a command line that has to fail; return its one line of stderr."""
    with pytest.raises(SystemExit, match="2"):
        fid.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert out == "" and err.startswith("fid.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


def test_frechet_distance():
    rng = np.random.default_rng(0)
    mu1, mu2, a, b = *rng.normal(size=(2, 50)), *rng.uniform(0.1, 3, (2, 50))
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert fid.frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(expected, rel=1e-12)
    # Singular covariances: tr((S1 S2)^(1/2)) is the nuclear norm of X Y^T, where S1 = X^T X / 19 and S2 = Y^T Y / 29.
    x, y = rng.normal(size=(20, 200)), rng.normal(size=(30, 200)) * 2 + 1
    x, y = x - x.mean(0), y - y.mean(0)
    s1, s2, zero = np.cov(x, rowvar=False), np.cov(y, rowvar=False), np.zeros(200)
    root = np.linalg.svd(x @ y.T / np.sqrt(19 * 29), compute_uv=False).sum()
    expected = np.trace(s1) + np.trace(s2) - 2 * root
    there, back = fid.frechet_distance(zero, s1, zero, s2), fid.frechet_distance(zero, s2, zero, s1)
    assert there == pytest.approx(expected, rel=1e-11) and back == pytest.approx(there, rel=1e-11)
    assert 0 <= fid.frechet_distance(zero, s1, zero, s1) < 1e-11 * np.trace(s1)
    assert fid.frechet_distance(zero, 0 * s1, zero, s1) == pytest.approx(np.trace(s1))
    fails("same width", fid.frechet_distance, zero, s1, np.zeros(3), np.eye(3))
    fails("NaN", fid.frechet_distance, zero, s1, zero, s1 * np.nan)


@pytest.mark.parametrize("rows", (1, 10, 2048))
def test_stats_streamed_and_merged_are_numpys(rows, monkeypatch):
    monkeypatch.setattr(fid, "ROWS", rows)
    # Means up to a million deviations away: summing squares would lose all digits of the covariance in float64.
    x = np.random.default_rng(2).normal(size=(301, 12)) * 1e-2 + np.linspace(1e4, -1e4, 12)
    streamed, left, right = fid.FeatureStats(), fid.FeatureStats(), fid.FeatureStats()
    buffer = torch.empty(7, 12, dtype=torch.float64)
    for i in range(0, 301, 7):
        streamed.update(buffer.copy_(torch.from_numpy(x[i : i + 7])))  # the caller may use its memory again
        assert streamed.n == i + 7
    for stats, part in ((left, x[:100]), (right, x[100:101]), (right, x[101:])):
        stats.update(part)
    left.merge(right)
    left.merge(fid.FeatureStats())
    for stats in (streamed, left, pickle.loads(pickle.dumps(streamed))):
        assert stats.n == 301
        np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-12)
        np.testing.assert_allclose(stats.cov, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-10)
    with pytest.raises(fid.InputError, match="at least 2"):
        _ = fid.FeatureStats().cov


def test_stats_files(tmp_path):
    path, stats = tmp_path / "stats.npz", fid.FeatureStats("FD, random Inception", "clean")
    stats.update(np.random.default_rng(3).normal(size=(20, 5)))
    stats.save(path)
    again = fid.FeatureStats.load(path)
    assert (again.n, again.metric, again.resize) == (20, stats.metric, "clean") and os.listdir(tmp_path) == [path.name]
    np.savez(path, mu=stats.mean, sigma=stats.cov)  # as other tools write it
    foreign = fid.FeatureStats.load(path)
    assert (foreign.n, foreign.metric, foreign.resize) == (None, "FID", None)
    for loaded in (again, foreign):
        np.testing.assert_array_equal(loaded.mean, stats.mean)
        np.testing.assert_allclose(loaded.cov, stats.cov, rtol=1e-14)
    fails("number of images", foreign.update, np.ones((3, 5)))
    for message, arrays in (
        ("needs the arrays mu and sigma, has mu", {"mu": np.zeros(3)}),
        (r"\(4, 4\)", {"mu": np.zeros(3), "sigma": np.eye(4)}),
        ("stats.npz: not an .npz", {"mu": np.array([{}]), "sigma": np.eye(1)}),
    ):
        np.savez(path, **arrays)
        fails(message, fid.FeatureStats.load, path)


def test_kernel_distance_is_the_unbiased_mmd():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)) + 0.5
    kernel = (np.concatenate([x, y]) @ np.concatenate([x, y]).T / 4 + 1) ** 3
    within = sum(kernel[i, j] + kernel[9 + i, 9 + j] for i in range(9) for j in range(9) if i != j) / (9 * 8)
    expected = within - 2 * kernel[:9, 9:].mean()
    assert fid.kernel_distance(torch.from_numpy(x), y) == (pytest.approx(expected, rel=1e-10), 0)
    # Without bias the mean over subsets is that of the whole; a set against itself scatters around 0 or below.
    mean, std = fid.kernel_distance(x, y, subset_size=4, n_subsets=4000)
    assert std > 0 and abs(mean - expected) < 4 * std / np.sqrt(4000) and fid.kernel_distance(x, x)[0] < 0
    fails("2 or more", fid.kernel_distance, x[:1], y)


def test_inception_score():
    logits = np.random.default_rng(6).normal(size=(47, 8)) * 3
    p, scores = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True), []
    for i in range(5):
        part = p[i * 47 // 5 : (i + 1) * 47 // 5]
        scores.append(np.exp(np.mean(np.sum(part * (np.log(part) - np.log(part.mean(axis=0))), axis=1))))
    assert fid.inception_score(torch.from_numpy(logits), splits=5) == pytest.approx((np.mean(scores), np.std(scores)))
    # Certain of one of four classes each, all as often: as many as classes; probabilities of 0 do no harm.
    assert fid.inception_score(1e4 * torch.eye(4).repeat(10, 1)) == pytest.approx((4, 0))
    for bad in (torch.zeros(9, 7), torch.full((10, 7), torch.nan), torch.zeros(10)):
        fails("10 images or more", fid.inception_score, bad)


def test_features_and_logits(inception):
    images = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features, logits = inception(images, logits=True)
    assert features.dtype == logits.dtype == torch.float32 and 0.01 < features.std() < 100
    resized = F.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(inception(resized, resize=False), features, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits, features @ inception.fc.weight.T, rtol=1e-4, atol=1e-4)  # without the bias
    assert inception.metric == "FD, random Inception" and inception.key == "fd_random" and not inception.training
    state = torch.get_rng_state()
    again = fid.load_inception("random")  # the same everywhere
    assert torch.equal(torch.get_rng_state(), state) and not any(p.requires_grad for p in again.parameters())
    assert all(torch.equal(a, b) for a, b in zip(inception.parameters(), again.parameters(), strict=True))
    # Poolings of 2015. Average windows without padding keep a map of ones, torchvision's own give 4 / 9.
    block, x = inception.Mixed_6b, torch.ones(1, 768, 2, 2)
    torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(x))
    # The last block pools by maximum: one bright pixel in the middle of 3x3 fills every window.
    block, x = inception.Mixed_7c, torch.zeros(1, 2048, 3, 3)
    x[:, :, 1, 1] = 1
    torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(torch.ones_like(x)))


def test_weights_are_downloaded(server, tmp_path, monkeypatch, capsys):
    (address, asked), net, images = server, fid.FIDInceptionV3().eval(), torch.rand(1, 3, 32, 32)
    fid.init_random(net)
    net.Mixed_7c.branch_pool.bn.running_mean.fill_(-0.5)
    name = publish(tmp_path / "web", net.state_dict())
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"{address}/{name}")
    for weights in ("auto", "auto", tmp_path / "web" / name):  # the second time from the cache
        loaded = fid.load_inception(weights)
        assert (loaded.metric, loaded.key) == ("FID", "fid") and torch.equal(loaded.fc.weight, net.fc.weight)
    torch.testing.assert_close(loaded(images), net(images), rtol=1e-4, atol=1e-4)  # the folded network is the same
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
    reason = rf"^no weights {name} \(download failed: .*({FAILURES[kind]}).*{re.escape(message)}$"
    fails(reason, fid.load_inception)
    assert os.listdir(path.parent) == [] and capsys.readouterr().out == ""


@pytest.mark.filterwarnings("ignore:.*torch.jit")
def test_wrong_weight_files_are_refused_in_one_line(folders, tmp_path, capfd):
    """Files of each kind that is not the FID Inception's weights, and two that nearly are."""
    net, whole = nn.Linear(2, 2), fid.FIDInceptionV3().state_dict()
    lacking = {key: value for key, value in whole.items() if not key.startswith("Mixed_6")}
    files = dict(network=net.state_dict(), truncated=net.state_dict(), module=net, list=[1, 2], numbers={1: 2})
    files |= dict(lacking=lacking, shape=whole | {"fc.weight": torch.zeros(1000, 2048)})
    for name, content in files.items():
        torch.save(content, tmp_path / name)
    os.truncate(tmp_path / "truncated", 700)
    torch.save(net.state_dict(), tmp_path / "old", _use_new_zipfile_serialization=False)
    torch.jit.script(net).save(tmp_path / "script")
    (tmp_path / "pickle").write_bytes(pickle.dumps([1, np.zeros(2)], protocol=4))
    (tmp_path / "text").write_text("hello\n" * 9)
    (tmp_path / "empty").touch()
    capfd.readouterr()
    named = dict(lacking='"Mixed_6a.branch3x3.conv.weight', shape="fc.weight", absent="No such file")
    for path in [*tmp_path.iterdir(), tmp_path, tmp_path / "absent"]:
        line = error_line(capfd, *folders, "--device", "cpu", "--weights", path)
        assert line.startswith(f"fid.py: error: {path}: not the weights of the FID Inception (") and len(line) < 300
        assert "weights_only" not in line and named.get(path.name, "") in line  # no advice to execute what is in it


def test_every_kind_of_image_becomes_rgb(tmp_path):
    assert inspect.getsource(models.to_rgb) == inspect.getsource(fid.to_rgb)
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    rgb, sixteen = Image.fromarray(np.stack([grey, 255 - grey, grey.T], axis=2)), grey.astype(np.uint16) * 257
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for path in (".hidden/x.png", ".x.png", "rgb.PNG", "rgb.webp"):
        rgb.save(tmp_path / path, lossless=True)
    (tmp_path / "notes.txt").write_text("no image")
    Image.fromarray(grey).save(tmp_path / "deep/grey.png")
    rgb.quantize(64).save(tmp_path / "deep/er/palette.gif")
    Image.fromarray(sixteen).save(tmp_path / "grey16.png")
    Image.fromarray(sixteen.astype(">u2")).save(tmp_path / "grey16.tif")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    os.symlink(tmp_path, tmp_path / "deep/loop")
    files = fid.ImageFiles(tmp_path)
    names = "cmyk.tif deep/er/palette.gif deep/grey.png grey16.png grey16.tif rgb.PNG rgb.webp"
    assert files.names == names.split() and files.check() == [(8, 8)] * 7
    for name, image in zip(files.names, files, strict=True):
        expected = np.asarray(rgb) if "grey" not in name else np.stack([grey] * 3, axis=2)
        found = np.asarray(image).astype(int)
        assert found.shape == (8, 8, 3) and np.abs(found - expected).max() <= dict(cmyk=1, deep=40).get(name[:4], 0)


def test_transparency_is_white():
    rng = np.random.default_rng(7)
    pixels, alpha = rng.integers(0, 256, (9, 8, 3), dtype=np.uint8), rng.integers(0, 256, (9, 8), dtype=np.uint8)
    alpha[0], alpha[1] = 0, 255
    rgb, mask = Image.fromarray(pixels), Image.fromarray(alpha)
    rgba = Image.merge("RGBA", (*rgb.split(), mask))
    for mode in ("RGBA", "RGBa", "LA", "La", "PA"):
        image = rgba.convert("LA").convert("La") if mode == "La" else rgba.convert(mode)
        opaque = image.convert("RGBA").convert("RGB") if mode == "PA" else rgb.convert(mode[:1].replace("R", "RGB"))
        opaque = np.asarray(opaque.convert("RGB"), dtype=float)
        expected = (opaque - 255) * alpha[..., None] / 255 + 255
        found = np.asarray(fid.to_rgb(image)).astype(float)
        assert found.shape == (9, 8, 3) and np.abs(found - expected).max() <= 2, mode  # premultiplied: rounded twice
        assert (found[0] == 255).all() and (found[1] == opaque[1]).all()
    # One transparent colour, as PNG and GIF have it.
    deep = Image.fromarray(rng.integers(0, 65536, (9, 8), dtype=np.uint16))
    for image in (rgb, rgb.convert("L"), rgb.convert("1"), rgb.quantize(8), deep):
        key, opaque = image.getpixel((3, 4)), np.array(fid.to_rgb(image))
        image.save(buffer := io.BytesIO(), "png", transparency=key)
        opaque[(np.asarray(image).reshape(9, 8, -1) == key).all(axis=2)] = 255
        np.testing.assert_array_equal(np.asarray(fid.to_rgb(Image.open(buffer))), opaque)


@pytest.mark.parametrize("mode", ("RGB", "L", "P", "I;16", "LA"))
def test_images_are_turned_as_exif_says(mode):
    upright, exif = Image.effect_noise((7, 5), 50), Image.Exif()
    upright = Image.fromarray(np.asarray(upright).astype(np.uint16) * 200) if mode == "I;16" else upright.convert(mode)
    stored = upright.transpose(Image.Transpose.ROTATE_90)
    exif[274] = 6  # Orientation: turn right to see it upright
    for data, shown in ((exif, upright), (b"no EXIF data at all", stored)):
        stored.save(buffer := io.BytesIO(), "png", exif=data)
        assert fid.to_rgb(Image.open(buffer)).tobytes() == fid.to_rgb(shown).tobytes()


def test_a_survey_reads_headers_alone(tmp_path, monkeypatch):
    opaque, clear, said = Image.new("RGB", (6, 4), "red"), Image.new("RGBA", (6, 4), (0, 0, 0, 0)), []
    for kind in ("png", "jpg", "gif", "webp", "bmp", "tif"):
        opaque.save(tmp_path / f"opaque.{kind}")
    for kind in ("png", "gif", "webp", "tif"):
        clear.save(tmp_path / f"clear.{kind}")
    opaque.save(tmp_path / "key.png", transparency=(255, 0, 0))
    clear.convert("LA").save(tmp_path / "la.png")
    clear.quantize().save(tmp_path / "palette.png")
    files = fid.ImageFiles(tmp_path)
    with monkeypatch.context() as patch:
        patch.delattr(ImageFile.ImageFile, "load")
        patch.delattr(Image, "_getdecoder")
        digests = {files.survey(said.append, *options) for options in ((4,), (5,), (4, True))}
    clear, small = (
        "7 of 13 pictures have transparency, shown on white",
        "13 of 13 are under {} and enlarged, down to {}",
    )
    lines = clear, small.format("5 pixels", "6x4"), clear, small.format("4 pixels", "3x4"), clear
    assert said == [f"{tmp_path}: {line}" for line in lines] and files.sizes == [(6, 4)] * 13 and len(digests) == 1
    opaque.resize((5, 5)).save(tmp_path / "opaque.png")
    assert fid.ImageFiles(tmp_path).survey(said.append) not in digests


def test_bad_images_are_named(tmp_path, monkeypatch, capsys):
    """By ImageFiles, and in one line by the command, also if a worker finds it; or the next stands in, once said."""
    for i in range(4):
        Image.effect_noise((64, 64), 50).save(tmp_path / f"{i}.png")
    os.truncate(tmp_path / "2.png", 2000)
    files, bad = fid.ImageFiles(tmp_path), f"{tmp_path}/2.png: not a readable image ("
    assert files.check() == [(64, 64)] * 4  # the headers are whole
    fails(f"^{re.escape(bad)}", files.__getitem__, 2)
    line = error_line(capsys, tmp_path, *RANDOM, "--workers", "1", "--save", tmp_path / "x.npz")
    assert line.startswith(f"fid.py: error: {bad}") and not (tmp_path / "x.npz").exists()
    files = fid.ImageFiles(tmp_path, replace=True)
    assert files[2] == files[2] == files[-2] == files[3] != files[1]
    err = capsys.readouterr().err
    assert err.startswith(f"warning: {bad}") and err.endswith(f"; {tmp_path}/3.png stands in for it\n")
    assert err.count("\n") == 1
    (tmp_path / "0.png").unlink()  # deleted since
    (tmp_path / "3.png").write_bytes(b"nothing")
    assert files[2] == files[0] == files[1]
    fails("3.png: not a readable image", fid.ImageFiles(tmp_path).check)
    for limit in (64 * 64 - 1, 64 * 30):  # Pillow warns above the limit and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        fails("none of 4 images can be read, the first: .*1.png: more pixels", files.__getitem__, 1)


def test_sources(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    Image.new("L", (5, 4), 7).save(buffer := io.BytesIO(), "png")
    with zipfile.ZipFile(tmp_path / "images.zip", "w") as archive:
        for name in ("b/1.png", "a/2.png", "__MACOSX/._2.png", "readme.txt"):
            archive.writestr(name, buffer.getvalue())
        archive.writestr("z.png", b"broken")
    for name, message in (("gone", "no such folder or file"), ("empty", "no images"), ("file.txt", "neither")):
        fails(f"{tmp_path}/{name}: {message}", fid.ImageFiles, tmp_path / name)
    files = fid.ImageFiles(tmp_path / "images.zip")
    assert files.names == ["a/2.png", "b/1.png", "z.png"] and files[1].getpixel((0, 0)) == (7, 7, 7)
    copied = pickle.loads(pickle.dumps(files))  # as a worker process gets it, after the file was opened
    assert copied[0].size == (5, 4)
    fails("images.zip::z.png: not a readable image", copied.__getitem__, 2)


@pytest.mark.parametrize("start, workers", [("fork", 2), ("spawn", 1)])
def test_workers_share_stored_squares_and_warnings(tmp_path, capfd, start, workers):
    """Resized once into one file, which a broken attempt does not leave; a stand-in is named once by all workers."""
    for i in range(4):
        image = Image.new("RGB", (24, 8), (255, 0, 0))  # in its centre a square: the left half tells the number
        image.paste((50 * i, 0, 0), (8, 0, 12, 8))
        image.paste((50 * i, 0, 255), (12, 0, 16, 8))
        image.save(tmp_path / f"{i}.png")
    whole, files, options = (tmp_path / "1.png").read_bytes(), fid.ImageFiles(tmp_path), (8, tmp_path / "new", print)
    (tmp_path / "1.png").write_bytes(b"nothing")
    fails("1.png: not a readable image", fid.StoredSquares, files, *options)
    assert os.listdir(tmp_path / "new") == []
    (tmp_path / "1.png").write_bytes(whole)
    path = Path(fid.StoredSquares(files, *options, workers=2).path)
    squares = torch.stack([fid.Squares(files, 8, Image.Resampling.BICUBIC)[i] for i in range(4)])
    assert [square.unique().tolist() for square in squares[:, 0]] == [[0], [50], [100], [150]]
    assert squares[:, 2, :, :4].eq(0).all() and squares[:, 2, :, 4:].eq(255).all()
    path.rename(f"{path}.1.tmp")
    os.truncate(f"{path}.1.tmp", 500)  # half written, by a process that was killed
    stored, written = fid.StoredSquares(files, *options), path.stat()
    assert fid.StoredSquares(files, *options).path == str(path) and path.stat() == written
    (tmp_path / "1.png").write_bytes(b"nothing")
    replaced = fid.Squares(fid.ImageFiles(tmp_path, replace=True), 8, Image.Resampling.BICUBIC)
    both = ConcatDataset([stored, replaced, replaced])
    found = torch.cat([*DataLoader(both, 2, num_workers=workers, multiprocessing_context=start)])
    assert torch.equal(found, torch.cat([squares, *[squares[[0, 2, 2, 3]]] * 2]))
    assert capfd.readouterr().err.count("warning") == 1
    fails("1.png: not a readable image", fid.StoredSquares, files, *options)  # for the picture has another date


def test_clean_resize():
    step = np.zeros((64, 64, 3), dtype=np.uint8)
    step[:, 32:] = (255, 100, 0)
    resized = fid.clean_resize(Image.fromarray(step))
    assert resized.shape == (3, 299, 299) and resized.dtype == np.float32
    assert (resized.min(), resized.max()) == (0, 255)  # bicubic overshoots at the step, clipped to the range
    assert resized[1].max() > 101 and np.any(resized % 1)  # and within it, unrounded
    stripes = np.broadcast_to(np.arange(1000)[:, None] % 2 * 255, (1000, 1000, 3)).astype(np.uint8)
    assert np.abs(fid.clean_resize(Image.fromarray(stripes))[:, :, 9:-9] - 127.5).max() < 10  # antialiased to grey


def test_images_of_files_and_of_generators_are_measured_alike(inception, tmp_path):
    """Of mixed sizes, with workers, without a step of the random numbers."""
    images = torch.randn(5, 3, 20, 20, generator=torch.Generator().manual_seed(0), requires_grad=True)
    for i, image in enumerate(images.detach().clamp(-1, 1)):
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(tmp_path / f"{i}.png")
    expected, kept = fid.image_stats(fid.ImageFiles(tmp_path), inception, batch_size=3, keep=["logits"])
    stats, score = fid.generated_stats(iter(images.split(3)), inception, splits=2)
    assert (stats.n, stats.metric, stats.resize) == (5, inception.metric, "pytorch")
    np.testing.assert_array_equal(stats.mean, expected.mean)
    np.testing.assert_array_equal(stats.cov, expected.cov)
    assert score == fid.inception_score(kept["logits"], splits=2)
    Image.new("RGB", (30, 20), (250, 20, 90)).save(tmp_path / "z.png")
    files, state = fid.ImageFiles(tmp_path), torch.get_rng_state()
    stats, kept = fid.image_stats(files, inception, 4, workers=1, keep=["features", "logits"])
    assert torch.equal(torch.get_rng_state(), state) and stats.n == 6
    alone = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in files]
    torch.testing.assert_close(kept["features"], torch.cat([*map(inception, alone)]), rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.mean, kept["features"].double().mean(0).numpy(), rtol=1e-6)


def test_command_line(folders, tmp_path, capsys):
    (a, b), saved = folders, tmp_path / "b.npz"
    out, err = command(capsys, b, "--save", saved)
    assert out == "" and "6/6" in err and "warning" not in err
    assert f"{b}: 1 of 6 pictures have transparency, shown on white\n" in err
    out, err = command(capsys, a, saved, "--batch-size", "4", "--is")
    number, score = re.fullmatch(r"FD, random Inception (\S+)\nIS, random Inception (\S+) \+- \S+\n", out).groups()
    assert err.count("warning: 10 images in") == err.count("warning: 6 images in") == 1
    # Two processes give the number of one, printed once.
    run = [*TORCHRUN, HERE / "fid.py", a, b, "--kid", "--is", "--json", "--batch-size", "2", *RANDOM]
    found = json.loads(subprocess.run(run, capture_output=True, env=os.environ | ENVIRONMENT, check=True).stdout)
    assert found["distance"] == pytest.approx(float(number), rel=1e-4) and float(number) > 0
    assert found["is"] == pytest.approx(float(score), rel=1e-3) and found["kid"] > 0 and found["kid_std"] > 0
    assert (found["metric"], found["images"], found["resize"]) == ("FD, random Inception", [10, 6], "pytorch")


def test_command_line_errors(folders, server, tmp_path, monkeypatch, capsys):
    (a, b), narrow = folders, dict(mu=np.zeros(64), sigma=np.eye(64))
    monkeypatch.setattr(fid, "WEIGHTS_URL", f"{server[0]}/w-01234567.pth")
    for name, facts in (("pytorch", dict(resize="pytorch")), ("clean", dict(resize="clean")), ("other", {})):
        np.savez(tmp_path / f"{name}.npz", **narrow, **facts)
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    pytorch, clean, other, foreign = (tmp_path / f"{name}.npz" for name in ("pytorch", "clean", "other", "foreign"))
    out = json.loads(command(capsys, pytorch, other, "--json").out)
    assert out["distance"] == pytest.approx(0, abs=1e-9) and out["resize"] == "pytorch"
    for message, arguments in (
        ("clean.npz is resized as clean", (clean, pytorch)),
        (f"resized as pytorch, {b} as clean: need the same --resize", (pytorch, b, *RANDOM, "--resize", "clean")),
        ("64 features", (other, b, *RANDOM)),
        ("same network", (a, foreign, *RANDOM)),
        ("--kid", (foreign, b, "--kid", *RANDOM)),
        ("--is needs", (foreign, b, "--is", *RANDOM)),
        ("no such folder", (tmp_path / "gone", b, *RANDOM)),
        ("no such folder", (a, b, "--save", tmp_path / "gone/x.npz", *RANDOM)),
        ("end in .npz", (a, b, "--save", "x", *RANDOM)),
        ("B is missing", (a,)),
        ("--batch-size: 0", (a, b, "--batch-size", "0")),
        ("--device cuda:99", (a, b, "--device", "cuda:99")),
        (f"--weights FILE, or put it at {tmp_path}/hub/checkpoints/w-01234567.pth", (a, b, "--device", "cpu")),
    ):
        assert message in error_line(capsys, *arguments)
