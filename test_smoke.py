"""Everything that can be checked in minutes on a CPU: python -m pytest test_smoke.py

Networks against the reference implementations (keys, shapes, recorded outputs), losses against slow, obvious formulas,
each training script end to end on tiny data, exact resume, signals, several processes, hostile input, fid.py, and the
snippets of the README.
"""

import argparse
import copy
import hashlib
import io
import json
import math
import os
import pickle
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image

import fid
import models
import train_cyclegan_dcd
import train_pix2pix_dcd
import train_stylegan2_dgl
from fid import ImageFiles
from losses import DCDLoss, PathLengthPenalty, PerceptualLoss, dgl_generator_loss, gan_loss, r1_penalty
from models import (
    ModulatedConv2d,
    PatchDiscriminator,
    ResnetGenerator,
    StyleGAN2Discriminator,
    StyleGAN2Generator,
    UnetGenerator,
    count_macs,
    init_weights,
    load_file,
    load_generator,
    load_weights,
    save_generator,
)

HERE = Path(__file__).parent
torch.set_num_threads(1)  # tiny tensors; two threads that wait for each other are slower than one

# ----------------------------------------------------------------------------------------------------------------------
# Networks

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
}


@pytest.mark.parametrize("expected", REFERENCE_KEYS)
def test_reference_keys(expected):
    with torch.device("meta"):
        state_dict = REFERENCE_KEYS[expected]().state_dict()
    lines = [f"{key} {list(value.shape)}" for key, value in sorted(state_dict.items())]
    assert hashlib.sha256("\n".join(lines).encode()).hexdigest()[:16] == expected


def fill(net):
    """The same weights in any network with the same keys and shapes."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for key, value in sorted(net.state_dict().items()):
            if value.is_floating_point() and not key.endswith("kernel"):
                noise = torch.randn(value.shape, generator=generator)
                if key.endswith("running_var"):
                    noise = noise.abs() + 0.5
                value.copy_(0.1 * noise if value.ndim == 4 else noise)
    return net.eval()


def test_reference_outputs():
    """Mean, deviation, first and last value of the reference implementations' outputs for fill's weights."""
    g = torch.Generator().manual_seed(1)
    x, x6 = (torch.rand(1, c, 64, 64, generator=g) * 2 - 1 for c in (3, 6))
    z = torch.randn(4, 32, generator=g)
    small = torch.rand(4, 3, 16, 16, generator=g) * 2 - 1
    large = torch.rand(1, 3, 256, 256, generator=g) * 2 - 1
    recorded = [
        (ResnetGenerator(ngf=4), x, (-0.6224, 0.4917, -0.98497, -0.77184)),
        (ResnetGenerator(ngf=4, separable=True), x, (-0.0005, 0.61655, -0.48172, 0.60551)),
        (ResnetGenerator(ngf=4, norm="batch"), x, (-0.47603, 0.80096, 0.7162, -0.99999)),
        (UnetGenerator(ngf=4), large, (-0.11997, 0.48871, -0.50432, 0.752)),
        (UnetGenerator(ngf=4, norm="batch"), large, (0.79637, 0.23263, 0.54738, 0.95996)),
        (PatchDiscriminator(6, 8), x6, (0.56868, 1.84668, 3.0695, 1.63451)),
        (StyleGAN2Generator(16, 32, 3), z, (-1.39313, 0.85264, -0.53143, -0.2404)),
        (StyleGAN2Discriminator(16), small, (0.67798, 0.0, 0.67798, 0.67798)),
    ]
    for net, inputs, expected in recorded:
        with torch.no_grad():
            y = fill(net)(inputs, noise="fixed") if isinstance(net, StyleGAN2Generator) else fill(net)(inputs)
        found = (y.mean().item(), y.std().item(), y.flatten()[0].item(), y.flatten()[-1].item())
        assert found == pytest.approx(expected, abs=1e-4), type(net).__name__


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


def test_old_checkpoints_load_strictly(tmp_path):
    net, other = init_weights(ResnetGenerator(ngf=4)), ResnetGenerator(ngf=4)
    old = old_spelling(net.state_dict())
    assert "module.model.10.conv_block.6.running_mean" in old and "module.model.10.conv_block.5.weight" in old
    other.load_state_dict(old)
    x = torch.rand(1, 3, 32, 32)
    assert torch.equal(net(x), other(x))
    with pytest.raises(models.InputError, match=r"x.pth.*model.1.weight has shape \(4, 3, 7, 7\), expected \(8, 3, 7"):
        load_weights(ResnetGenerator(ngf=8), old, "x.pth")
    with pytest.raises(models.InputError, match="it has no model.10.conv_block.1.conv.0.weight"):
        load_weights(ResnetGenerator(ngf=4, separable=True), old, "x.pth")
    with pytest.raises(models.InputError, match="which this network has not"):
        load_weights(ResnetGenerator(ngf=4), old | {"extra": torch.zeros(1)}, "x.pth")


def test_taps():
    x = torch.rand(1, 3, 32, 32) * 2 - 1
    for separable in (False, True):
        net = init_weights(ResnetGenerator(ngf=4, separable=separable))
        image, taps = net(x, taps=True)
        assert torch.equal(image, net(x)) and [t.shape[1] for t in taps] == net.tap_channels
        for tap, layer in zip(taps, (9, 12, 15, 18), strict=True):
            torch.testing.assert_close(tap, net.model[: layer + 1](x))
    net = init_weights(UnetGenerator(ngf=4))
    entering = {}
    level2 = net.model.model[1]
    level3, level4 = level2.model[3], level2.model[3].model[3]
    convolutions = (level3.model[1], level4.model[3].model[1], level4.model[5], level2.model[5])
    for convolution in convolutions:
        convolution.register_forward_pre_hook(lambda module, inputs: entering.update({module: inputs[0]}))
    image, taps = net(torch.rand(1, 3, 256, 256), taps=True)
    assert [t.shape[1:] for t in taps] == [(8, 64, 64), (32, 16, 16), (64, 16, 16), (16, 64, 64)]
    assert [t.shape[1] for t in taps] == net.tap_channels
    assert all(torch.equal(tap, entering[conv]) for tap, conv in zip(taps, convolutions, strict=True))


@pytest.mark.parametrize(
    "build, parameters, exact, published",
    [
        (lambda: ResnetGenerator(), 11.378, 49.552, 56.799),
        (lambda: ResnetGenerator(separable=True), 1.987, 11.067, 18.314),
        (lambda: ResnetGenerator(ngf=16, separable=True), 0.137, 0.955, 1.408),
        (lambda: UnetGenerator(), 54.410, 6.048, 18.140),
        (lambda: UnetGenerator(ngf=16), 3.403, 0.406, 1.219),
    ],
)
def test_published_complexity(build, parameters, exact, published):
    with torch.device("meta"):
        net, image = build(), torch.randn(1, 3, 256, 256)
        assert sum(p.numel() for p in net.parameters()) / 1e6 == pytest.approx(parameters, abs=6e-4)
        assert count_macs(net, image) / 1e9 == pytest.approx(exact, abs=6e-4)
        assert count_macs(net, image, published=True) / 1e9 == pytest.approx(published, abs=6e-4)


def test_count_macs_by_hand():
    image = torch.randn(2, 8, 10, 10)
    grouped = torch.nn.Conv2d(8, 16, 3, groups=4, stride=2, padding=1)
    assert count_macs(grouped, image) == 2 * 5 * 5 * 16 * 2 * 9 == count_macs(grouped, image, published=True)
    transposed = torch.nn.ConvTranspose2d(8, 6, 4, stride=2, padding=1)
    assert count_macs(transposed, image) == 2 * 10 * 10 * 8 * 6 * 16
    assert count_macs(transposed, image, published=True) == 4 * 2 * 10 * 10 * 8 * 6 * 16
    assert count_macs(torch.nn.Linear(5, 7), torch.randn(3, 5)) == 3 * 5 * 7


# ----------------------------------------------------------------------------------------------------------------------
# Weights on disk


def test_generators_load_elsewhere(tmp_path):
    """Another folder, another process, models.py alone beside it."""
    nets = (ResnetGenerator(ngf=4, separable=True), UnetGenerator(ngf=4, num_downs=5), StyleGAN2Generator(8, 16, 2))
    for i, net in enumerate(nets):
        save_generator(tmp_path / f"{i}.pt", fill(net))
    (tmp_path / "models.py").write_bytes((HERE / "models.py").read_bytes())
    code = (
        "import torch; from models import load_generator\n"
        "x, z = torch.ones(1, 3, 32, 32), torch.ones(1, 16)\n"
        "with torch.no_grad():\n"
        "    print([load_generator('0.pt')(x).sum().item(), load_generator('1.pt')(x).sum().item(),\n"
        "           load_generator('2.pt')(z, noise='fixed').sum().item()])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    x, z = torch.ones(1, 3, 32, 32), torch.ones(1, 16)
    with torch.no_grad():
        expected = [nets[0](x).sum().item(), nets[1](x).sum().item(), nets[2](z, noise="fixed").sum().item()]
    assert json.loads(done.stdout) == pytest.approx(expected, rel=1e-4), done.stderr
    assert not load_generator(tmp_path / "0.pt").training


class RunsCode:
    def __reduce__(self):
        return os.system, ("touch executed",)


def test_hostile_checkpoints(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"weights": RunsCode()}, "code.pt")
    Path("pickle.pt").write_bytes(pickle.dumps(RunsCode()))
    save_generator("whole.pt", ResnetGenerator(ngf=4))
    whole = Path("whole.pt").read_bytes()
    Path("half.pt").write_bytes(whole[: len(whole) // 2])
    Path("empty.pt").write_bytes(b"")
    Path("text.pt").write_text("hello")
    torch.save([1, 2], "list.pt")
    torch.save({"step": 1}, "other.pt")
    torch.save({"args": argparse.Namespace(size=8)}, "namespace.pt")
    for name in ("code.pt", "pickle.pt", "half.pt", "empty.pt", "text.pt", "list.pt", "missing.pt"):
        with pytest.raises(models.InputError, match=name) as error:
            load_file(name)
        assert "\n" not in str(error.value)
    assert not Path("executed").exists()
    assert load_file("namespace.pt")["args"].size == 8
    with pytest.raises(models.InputError, match="other.pt: not a file of save_generator"):
        load_generator("other.pt")


def test_kill_9_while_saving_leaves_a_whole_file(tmp_path):
    code = (
        "import sys, torch; sys.path.insert(0, sys.argv[1]); import models\n"
        "net = torch.nn.Linear(400, 400)\n"
        "for i in range(10**9):\n"
        "    models.save_checkpoint('checkpoint.pt', {'net': net}, {'step': i, 'bulk': torch.full((10**6,), i)})\n"
        "    print(i, flush=True)"
    )
    process = subprocess.Popen(
        [sys.executable, "-c", code, HERE], cwd=tmp_path, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
    )
    rng = np.random.default_rng(0)
    process.stdout.readline()
    for _ in range(3):
        process.stdout.readline()
        time.sleep(rng.uniform(0, 0.02))
    process.kill()
    process.wait()
    content = load_file(tmp_path / "checkpoint.pt")
    assert (content["bulk"] == content["step"]).all() and set(content["networks"]["net"]) == {"weight", "bias"}


def test_full_disk_keeps_the_old_checkpoint(tmp_path):
    path = tmp_path / "checkpoint.pt"
    net = torch.nn.Linear(10, 10)
    models.save_checkpoint(path, {"net": net}, {"step": 1})
    limits, handler = resource.getrlimit(resource.RLIMIT_FSIZE), signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, limits[1]))
    try:
        with pytest.raises(SystemExit, match="not saved .* the last checkpoint stays"):
            models.save_checkpoint(path, {"net": net}, {"step": 2, "bulk": torch.zeros(10**6)})
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        signal.signal(signal.SIGXFSZ, handler)
    assert load_file(path)["step"] == 1 and os.listdir(tmp_path) == ["checkpoint.pt"]


def test_weights_that_are_not_finite_are_not_saved(tmp_path):
    net = torch.nn.Linear(2, 2)
    models.save_checkpoint(tmp_path / "checkpoint.pt", {"net": net}, {"step": 1})
    net.weight.data[0, 0] = torch.nan
    with pytest.raises(SystemExit, match="diverged, net weight"):
        models.save_checkpoint(tmp_path / "checkpoint.pt", {"net": net}, {"step": 2})
    assert load_file(tmp_path / "checkpoint.pt")["step"] == 1


# ----------------------------------------------------------------------------------------------------------------------
# Losses of DCD


def test_gan_loss():
    logits = torch.tensor([[-2.0, 0.5], [3.0, 0.0]])
    for is_real in (True, False):
        target = torch.full_like(logits, is_real)
        assert gan_loss(logits, is_real, "lsgan") == F.mse_loss(logits, target)
        expected = F.binary_cross_entropy_with_logits(logits, target)
        torch.testing.assert_close(gan_loss(logits, is_real, "vanilla"), expected)
    assert gan_loss(logits, True, "hinge") == (3 + 0.5 + 0 + 1) / 4
    assert gan_loss(logits, False, "hinge") == (0 + 1.5 + 4 + 1) / 4
    assert gan_loss(logits, True, "hinge", for_discriminator=False) == -1.5 / 4
    with pytest.raises(ValueError, match="wgan"):
        gan_loss(logits, True, "wgan")
    with pytest.raises(ValueError, match="generator"):
        gan_loss(logits, False, "hinge", for_discriminator=False)


def small_networks(conditional=False):
    torch.manual_seed(0)
    student, teacher = ResnetGenerator(ngf=4, separable=True), ResnetGenerator(ngf=8)
    discriminator = PatchDiscriminator(6 if conditional else 3, ndf=8)
    return [init_weights(net, 0.1) for net in (student, teacher, discriminator)]


def test_dcd_loss_is_the_papers():
    student, teacher, discriminator = small_networks()
    loss = DCDLoss(student.tap_channels, teacher.tap_channels, 3, discriminator.min_size)
    x = torch.rand(2, 3, 96, 96) * 2 - 1
    fake, student_taps = student(x, taps=True)
    teacher_taps = teacher(x, taps=True)[1]
    obvious = 0
    for i in range(4):
        ours = discriminator.features(loss.student_connectors[i](student_taps[i]))
        theirs = discriminator.features(loss.teacher_connectors[i](teacher_taps[i].detach()))
        obvious = obvious + (ours - theirs).abs().mean()
    trained = [*student.parameters(), *loss.student_connectors.parameters()]
    expected = torch.autograd.grad(obvious, trained, retain_graph=True, allow_unused=True)
    found = loss(student_taps, teacher_taps, discriminator.features)
    torch.testing.assert_close(found, obvious)
    found.backward()
    for parameter, gradient in zip(trained, expected, strict=True):
        if gradient is not None:  # the layers behind the last tap have none
            torch.testing.assert_close(parameter.grad, gradient, rtol=1e-3, atol=1e-6)
    assert sum(p.grad.abs().sum() for p in student.model[:19].parameters()) > 0
    frozen = [*teacher.parameters(), *discriminator.parameters(), *loss.teacher_connectors.parameters()]
    assert all(p.grad is None for p in frozen)
    assert not any(p.requires_grad for p in loss.teacher_connectors.parameters())


def test_dcd_loss_vanishes_only_for_equal_taps_and_connectors():
    student, _, discriminator = small_networks()
    loss = DCDLoss(student.tap_channels, student.tap_channels, 3)
    taps = student(torch.rand(1, 3, 96, 96), taps=True)[1]
    assert loss(taps, taps, discriminator.features) > 1e-3
    loss.student_connectors.load_state_dict(loss.teacher_connectors.state_dict())
    assert loss(taps, taps, discriminator.features) == 0
    assert loss([tap + torch.randn_like(tap) for tap in taps], taps, discriminator.features) > 1e-3
    with pytest.raises(ValueError, match="3 student taps and 4"):
        DCDLoss([1, 2, 3], [1, 2, 3, 4])


def test_dcd_loss_reads_equal_taps_in_one_batch_and_enlarges_small_ones():
    torch.manual_seed(0)
    discriminator = init_weights(PatchDiscriminator(6, ndf=4), 0.1)
    seen = []

    def phi(maps):
        seen.append(tuple(maps.shape))
        return discriminator.features(maps)

    loss = DCDLoss([2, 3, 4, 5], [5, 4, 3, 2], 6)
    sizes = (64, 16, 16, 64)
    taps = [torch.randn(2, c, s, s) for c, s in zip((2, 3, 4, 5), sizes, strict=True)]
    targets = [torch.randn(2, c, s, s) for c, s in zip((5, 4, 3, 2), sizes, strict=True)]
    found = loss(taps, targets, phi)
    assert sorted(set(seen)) == [(4, 6, 32, 32), (4, 6, 64, 64)] and len(seen) == 4

    def read(connector, tap):
        maps = connector(tap)
        if maps.shape[2] == 16:
            maps = maps.repeat_interleave(2, 2).repeat_interleave(2, 3)
        return discriminator.features(maps)

    pairs = zip(loss.student_connectors, taps, loss.teacher_connectors, targets, strict=True)
    torch.testing.assert_close(found, sum((read(c, t) - read(d, u)).abs().mean() for c, t, d, u in pairs))


def test_perceptual_loss_is_the_papers(tmp_path, monkeypatch):
    vgg = PerceptualLoss("random")
    torch.manual_seed(0)
    x, y = (torch.rand(2, 3, 32, 48) * 2 - 1 for _ in "xy")
    x.requires_grad_()
    y.requires_grad_()
    style, feature = vgg(x, y)
    expected_style = expected_feature = 0
    for layer in (3, 8, 15, 22):
        a, b = (vgg.features[: layer + 1]((image + 1) / 2) for image in (x, y))
        grams = [torch.einsum("nchw,ndhw->ncd", f, f) / f[0].numel() for f in (a, b)]
        expected_style = expected_style + (grams[0] - grams[1]).abs().mean()
        if layer == 8:
            expected_feature = (a - b).abs().mean()
    torch.testing.assert_close(style, expected_style)
    torch.testing.assert_close(feature, expected_feature)
    (style + feature).backward()
    assert x.grad.abs().sum() > 0 and y.grad is None and all(p.grad is None for p in vgg.parameters())
    assert vgg(x, y, style=False)[0] == 0 and vgg(x, y, style=False)[1] == feature
    assert vgg(x, y, feature=False)[1] == 0 and vgg(x, y, feature=False)[0] == style

    state_dict = {f"features.{k}": v + 1 for k, v in vgg.features.state_dict().items()} | {"classifier": torch.zeros(1)}
    torch.save(state_dict, tmp_path / "vgg16.pth")
    loaded = PerceptualLoss(tmp_path / "vgg16.pth")
    assert torch.equal(loaded.features[0].bias, vgg.features[0].bias + 1)
    del state_dict["features.5.weight"]
    torch.save(state_dict, tmp_path / "vgg16.pth")
    with pytest.raises(models.InputError, match="vgg16.pth: .* no 5.weight"):
        PerceptualLoss(tmp_path / "vgg16.pth")

    def no_network(*_, **__):
        raise OSError("no network")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", no_network)
    with pytest.raises(models.InputError, match=f"put https://.*vgg16.* at {tmp_path}/checkpoints/vgg16"):
        PerceptualLoss()


def test_each_student_term_reaches_the_student_alone():
    """Frozen as in the training scripts; defects 2 and 4 of the released code."""
    for conditional in (False, True):
        student, teacher, discriminator = small_networks(conditional)
        discriminator.requires_grad_(False)
        perceptual = PerceptualLoss("random")
        dcd = DCDLoss(student.tap_channels, teacher.tap_channels, 6 if conditional else 3)
        x = torch.rand(1, 3, 96, 96) * 2 - 1
        fake_T, teacher_taps = teacher(x, taps=True)
        for term in ("gan", "dcd", "style", "feature"):
            fake_S, taps = student(x, taps=True)
            judged = torch.cat([x, fake_S], 1) if conditional else fake_S
            value = {
                "gan": lambda: gan_loss(discriminator(judged), True, "lsgan", False),  # noqa: B023
                "dcd": lambda: dcd(taps, teacher_taps, discriminator.features),  # noqa: B023
                "style": lambda: perceptual(fake_S, fake_T, feature=False)[0],  # noqa: B023
                "feature": lambda: perceptual(fake_S, fake_T, style=False)[1],  # noqa: B023
            }[term]()
            student.zero_grad()
            value.backward()
            reached = student.model[1].weight, student.model[18].conv_block[1].conv[2].weight
            assert all(p.grad.abs().sum() > 0 for p in reached), term
            assert all(p.grad is None for net in (teacher, discriminator, perceptual) for p in net.parameters()), term


# ----------------------------------------------------------------------------------------------------------------------
# The DCD training scripts, end to end

SMALL = "--teacher-ngf 4 --student-ngf 2 --ndf 4 --load-size 98 --crop-size 96 --batch-size 2 --workers 0 --vgg random"
QUICK = "--lambda-style 0 --lambda-feature 0 --log-every 1 --sample-every 0 --eval-every 0 --device cpu"
DCD_SCRIPTS = {"cyclegan": train_cyclegan_dcd, "pix2pix": train_pix2pix_dcd}


@pytest.fixture(scope="session")
def data(tmp_path_factory):
    """Tiny data sets in the layouts of the scripts."""
    root = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)

    def write(path, width, height=100):
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (height, width, 3), dtype=np.uint8)).save(path)

    for i in range(3):
        for folder in ("trainA", "trainB", "testA", "testB"):
            write(root / "cyclegan" / folder / f"{i}.png", 100)
        for folder in ("train", "val"):
            write(root / "pix2pix" / folder / f"{i}.png", 200)
        write(root / "stylegan2" / f"{i}.png", 20, 16)
    return root


def run(script, data, out, *options):
    """The script with tiny networks, in this process -> its log lines."""
    options = " ".join(options).split()
    DCD_SCRIPTS[script].main([*f"--data {data / script} --out {out} {SMALL} {QUICK}".split(), *options])
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


def weights(out):
    return load_file(Path(out) / "checkpoint.pt")["networks"]


def same(a, b):
    return all(torch.equal(a[key], b[key]) for key in a)


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_output_folder(script, data, tmp_path, capsys):
    options = "--max-steps 2 --sample-every 2 --eval-every 1 --inception random --lambda-feature 1"
    lines = run(script, data, tmp_path, options)
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("reference")}
    names -= {"best_student.pt"}
    assert names == {"args.json", "log.jsonl", "samples", "checkpoint.pt", "student.pt", "summary.json"}
    assert {"step", "epoch", "images", "lr", "images_per_second", "G_S_gan", "G_S_dcd", "G_S_feature"} <= set(lines[0])
    assert Image.open(tmp_path / "samples/0000002.png").size == (6 * 98 + 2, 4 * 98 + 2)
    metrics = next(line for line in lines if "FD, random Inception student" in line)
    assert metrics["FD, random Inception teacher"] > 0
    summary = json.loads((tmp_path / "summary.json").read_text())
    student = load_generator(tmp_path / "student.pt")
    assert summary["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert summary["student"]["FD, random Inception"] == metrics["FD, random Inception student"]
    assert same(student.state_dict(), weights(tmp_path)["student_G"])
    assert same(load_generator(tmp_path / "best_student.pt").state_dict(), student.state_dict())
    assert "FID" not in capsys.readouterr().out
    DCD_SCRIPTS[script].main(["--out", str(tmp_path), "--resume"])  # a finished run keeps its metrics
    again = json.loads((tmp_path / "summary.json").read_text())["student"]
    assert again | {"seconds": 0} == summary["student"] | {"seconds": 0}


@pytest.mark.parametrize("script", DCD_SCRIPTS)
@pytest.mark.parametrize("term", ("gan", "dcd", "style", "feature"))
def test_every_ablation(script, term, data, tmp_path):
    """Only the named term missing, then only the named term."""
    on = "--lambda-style 1e4 --lambda-feature 10"
    lines = run(script, data, tmp_path / "without", on, f"--lambda-{term} 0 --max-steps 1")
    assert {k[4:] for k in lines[0] if k.startswith("G_S_")} == {"gan", "dcd", "style", "feature"} - {term}
    off = " ".join(f"--lambda-{name} 0" for name in ("gan", "dcd", "style", "feature") if name != term)
    run(script, data, tmp_path / "alone", off, f"--lambda-{term} 1 --max-steps 1")
    run(script, data, tmp_path / "still", off, f"--lambda-{term} 1 --max-steps 1 --lr 0")
    alone, still = weights(tmp_path / "alone"), weights(tmp_path / "still")
    assert not same(alone["student_G"], still["student_G"])
    connectors_move = not same(alone["dcd_loss"], still["dcd_loss"])
    assert connectors_move == (term == "dcd")


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_loss_weights_go_where_they_are_named(script, data, tmp_path, monkeypatch):
    """With plain gradient descent the student's step is linear in the weights; defect 3 of the released code."""
    module = DCD_SCRIPTS[script]

    class Perceptual(torch.nn.Module):
        def __init__(self, weights):
            super().__init__()

        def forward(self, images, targets, style, feature):
            return images.mean(), images.square().mean()

    monkeypatch.setattr(module, "PerceptualLoss", Perceptual)
    monkeypatch.setattr(torch.optim, "Adam", lambda parameters, lr, **_: torch.optim.SGD(parameters, lr=1e-2))

    def step(style, feature):
        out = tmp_path / f"{style}_{feature}"
        options = f"--lambda-style {style} --lambda-feature {feature} --lambda-gan 0 --lambda-dcd 1e-9 --max-steps 1"
        line = run(script, data, out, options)[0]
        return line, load_generator(out / "student.pt").model[26].bias.detach()

    line, start = step(1e-9, 1e-9)
    moves = {pair: step(*pair)[1] - start for pair in ((1, 1e-9), (2, 1e-9), (1e-9, 1), (1, 1))}
    torch.testing.assert_close(moves[2, 1e-9], 2 * moves[1, 1e-9], rtol=1e-3, atol=1e-8)
    torch.testing.assert_close(moves[1, 1], moves[1, 1e-9] + moves[1e-9, 1], rtol=1e-3, atol=1e-8)
    assert (moves[1, 1e-9] < 0).all()  # a smaller mean: the style weight reached the style term
    assert line["G_S_style"] < 0.5 and line["G_S_feature"] >= 0


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_connectors_and_frozen_teacher(script, data, tmp_path):
    """The teacher's connectors never move, the student's do; --freeze-teacher holds G_T while D_T trains."""
    run(script, data, tmp_path / "a", "--max-steps 1 --teacher-every 1")
    run(script, data, tmp_path / "b", "--max-steps 2 --teacher-every 1")
    a, b = weights(tmp_path / "a"), weights(tmp_path / "b")
    for key in a["dcd_loss"]:
        assert torch.equal(a["dcd_loss"][key], b["dcd_loss"][key]) == key.startswith("teacher_connectors")
    assert not same(a["teacher_G"], b["teacher_G"])

    teacher = tmp_path / "teacher.pt"
    torch.save(old_spelling(a["teacher_G"]) if script == "cyclegan" else a["teacher_G"], teacher)
    arch = "--teacher-arch mobile_resnet_9blocks"
    if script == "cyclegan":  # a reference checkpoint of the other family: ResNet-9 teacher, mobile student
        arch = "--teacher-arch resnet_9blocks"
        torch.save(old_spelling(init_weights(ResnetGenerator(ngf=4)).state_dict()), teacher)
    run(script, data, tmp_path / "c", arch, f"--teacher {teacher} --freeze-teacher --max-steps 1")
    run(script, data, tmp_path / "d", arch, f"--teacher {teacher} --freeze-teacher --max-steps 2 --teacher-every 1")
    c, d = weights(tmp_path / "c"), weights(tmp_path / "d")
    frozen = ResnetGenerator(ngf=4, separable="mobile" in arch)
    load_weights(frozen, load_file(teacher), teacher)
    assert same(c["teacher_G"], frozen.state_dict()) and same(d["teacher_G"], frozen.state_dict())
    assert not same(c["teacher_D"], d["teacher_D"])
    run(script, data, tmp_path / "e", f"--teacher {tmp_path / 'b/checkpoint.pt'} --freeze-teacher --max-steps 1")
    assert same(weights(tmp_path / "e")["teacher_G"], b["teacher_G"])


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_what_the_discriminator_sees(script, data, tmp_path, monkeypatch):
    """(input, image) pairs in Pix2Pix, defect 4; the student's fakes only with --d-fakes both."""
    seen = []
    forward = PatchDiscriminator.forward
    monkeypatch.setattr(PatchDiscriminator, "forward", lambda self, x: seen.append(x.detach()) or forward(self, x))
    counts = {}
    for fakes in ("both", "teacher"):
        seen.clear()
        run(script, data, tmp_path / fakes, f"--d-fakes {fakes} --max-steps 2 --teacher-every 2")
        counts[fakes] = [len(x) for x in seen]
    # The update's real and fake halves, the teacher's fakes, the student's; then the student's second step alone.
    if script == "pix2pix":
        assert counts == dict(both=[6, 2, 2, 2], teacher=[4, 2, 2, 2])
        assert all(x.shape[1] == 6 for x in seen)
        update, teacher, student, _ = seen
        assert torch.equal(update[:2, :3], update[2:, :3])  # real and fake halves have the same inputs
        assert torch.equal(update[:2, :3], teacher[:, :3]) and torch.equal(teacher[:, :3], student[:, :3])
        assert torch.equal(update[2:, 3:], teacher[:, 3:]) and not torch.equal(teacher[:, 3:], student[:, 3:])
    else:  # G_T and F_T, G_S, then the updates of both discriminators
        assert counts == dict(both=[2, 2, 2, 6, 4, 2], teacher=[2, 2, 2, 4, 4, 2])


def test_pix2pix_unet_and_direction(data, tmp_path):
    pair = Image.new("RGB", (512, 256), "red")
    pair.paste("blue", (256, 0, 512, 256))
    for phase in ("train", "test"):
        (tmp_path / "pairs" / phase).mkdir(parents=True)
        pair.save(tmp_path / "pairs" / phase / "0.jpg")
    archs = "--teacher-arch unet_256 --student-arch unet_256 --load-size 256 --crop-size 256 --batch-size 1"
    options = f"--data {tmp_path / 'pairs'} --sample-every 1 --max-steps 1 --direction BtoA"
    line = run("pix2pix", data, tmp_path / "out", archs, options)[0]
    assert line["G_S_dcd"] > 0
    grid = np.asarray(Image.open(tmp_path / "out/samples/0000001.png")).astype(int)
    assert grid[130, 130].argmax() == 2 and grid[130, 3 * 258 + 130].argmax() == 0  # blue into red


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_learning_rate_decays_to_zero(script, data, tmp_path):
    lines = run(script, data, tmp_path, "--epochs 2 --epochs-decay 2 --batch-size 1")
    rates = [line["lr"] for line in lines]
    assert rates[:6] == [2e-4] * 6 and rates[6:] == pytest.approx([2e-4 * k / 7 for k in range(6, 0, -1)])


def test_image_pool():
    pool = train_cyclegan_dcd.ImagePool(4)
    first = torch.arange(4.0).view(4, 1, 1, 1)
    assert torch.equal(pool.query(first), first)
    later = torch.cat([pool.query(torch.full((1, 1, 1, 1), float(n))) for n in range(4, 200)])
    fresh = (later.flatten() == torch.arange(4.0, 200)).float().mean()
    assert 0.4 < fresh < 0.6 and len(pool.images) == 4
    assert torch.equal(train_cyclegan_dcd.ImagePool(0).query(first), first)


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_toy_data_and_overrides(script, tmp_path):
    module = DCD_SCRIPTS[script]
    module.main([*f"--toy --out {tmp_path} --max-steps 1 --teacher-ngf 3 --batch-size 1 --device cpu".split()])
    args = json.loads((tmp_path / "args.json").read_text())
    assert (args["teacher_ngf"], args["batch_size"], args["student_ngf"]) == (3, 1, module.TOY["student_ngf"])
    assert (tmp_path / "toy_data").is_dir() and (tmp_path / "samples/0000001.png").exists()


# ----------------------------------------------------------------------------------------------------------------------
# Runs that can be trusted


def comparable(out):
    lines = [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k != "images_per_second"} for line in lines]


def equal(a, b):
    """Equality of nested containers of tensors."""
    if isinstance(a, torch.Tensor):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_resume_is_exact(script, data, tmp_path):
    options = "--log-every 3 --save-every 100 --teacher-every 2 --lambda-feature 1"
    options += " --pool-size 3" if script == "cyclegan" else ""
    run(script, data, tmp_path / "whole", options, "--max-steps 7")
    run(script, data, tmp_path / "cut", options, "--max-steps 4 --workers 2")
    assert comparable(tmp_path / "whole") != comparable(tmp_path / "cut")
    with open(tmp_path / "cut/log.jsonl", "a") as file:
        file.write('{"step": 6, "from": "after the checkpoint"}\n{"step": 7, "torn')
    DCD_SCRIPTS[script].main([*f"--out {tmp_path / 'cut'} --resume --max-steps 7 --workers 1".split()])
    whole, cut = (load_file(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    for key in ("networks", "optimizers", "ranks", "step", "best"):
        assert equal(whole[key], cut[key]), key
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "cut")


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_divergence_stops_the_run(script, data, tmp_path, monkeypatch):
    module = DCD_SCRIPTS[script]
    calls = []

    class Diverging(DCDLoss):
        def forward(self, *inputs):
            calls.append(1)
            return super().forward(*inputs) * (torch.nan if len(calls) == 4 else 1)

    monkeypatch.setattr(module, "DCDLoss", Diverging)
    with pytest.raises(SystemExit, match="the loss G_S_dcd is nan at step 4; the last checkpoint stays"):
        run(script, data, tmp_path, "--log-every 2 --save-every 3 --max-steps 9")
    checkpoint = load_file(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 3
    assert all(value.isfinite().all() for net in checkpoint["networks"].values() for value in net.values())


BAD = {
    "--data {tmp}/missing": "missing",
    "--data {tmp}/empty": "empty",
    "--data {tmp}/truncated": "1.png",
    "--data {tmp}/header": "not a readable image",
    "--data {tmp}/small": "1.png",
    "--device cuda": "--device cuda",
    "--device abacus": "abacus",
    "--batch-size -1": "--batch-size",
    "--max-steps 0": "--max-steps",
    "--lr nan": "--lr",
    "--epochs many": "--epochs",
    "--crop-size 64": "multiple of 4",
    "--crop-size 98": "multiple of 4",
    "--toy --crop-size 64": "multiple of 4",
    "--device meta": "--device meta",
    "--load-size 90": "smaller than --crop-size",
    "--resume": "checkpoint.pt: no such file",
    "--out {tmp}/file/out": "cannot be written",
    "--teacher {tmp}/other.pt": "has shape (2, 3, 7, 7), expected (4, 3, 7, 7)",
    "--teacher {tmp}/file": "not a checkpoint",
    "--teacher {tmp}/list.pt": "list.pt: expected a checkpoint",
    "--vgg {tmp}/list.pt --lambda-style 1": "list.pt: expected a checkpoint",
    "--freeze-teacher": "--teacher",
    "--vgg {tmp}/other.pt --lambda-style 1": "other.pt",
    "--inception {tmp}/gone.pth --eval-every 1": "gone.pth",
    "--lambda-gan 0 --lambda-dcd 0": "nothing would be learnt",
    "--colour": "--colour",
}


@pytest.fixture(scope="session")
def bad_data(data, tmp_path_factory):
    root = tmp_path_factory.mktemp("bad")
    (root / "file").write_text("no folder")
    torch.save(ResnetGenerator(ngf=2, separable=True).state_dict(), root / "other.pt")
    (root / "empty").mkdir()
    torch.save([torch.zeros(1)], root / "list.pt")
    for script in DCD_SCRIPTS:
        for kind in ("truncated", "header", "small"):
            for source in (data / script).rglob("*.png"):
                target = root / script / kind / source.relative_to(data / script)
                target.parent.mkdir(parents=True, exist_ok=True)
                content = source.read_bytes()
                if target.name == "1.png" and kind == "truncated":
                    content = content[: len(content) // 2]
                if target.name == "1.png" and kind == "header":
                    content = b"no image"
                target.write_bytes(content)
                if target.name == "1.png" and kind == "small":
                    Image.new("RGB", (180, 90)).save(target)
    return root


@pytest.mark.parametrize("script", DCD_SCRIPTS)
@pytest.mark.parametrize("options", BAD)
def test_bad_input(script, options, data, bad_data, tmp_path, capsys):
    """One line that says what is wrong, exit status 2, and nothing written."""
    filled = options.format(tmp=bad_data)
    for kind in ("truncated", "header", "small"):
        filled = filled.replace(f"{bad_data}/{kind}", f"{bad_data}/{script}/{kind}")
    out = [] if "--out" in options else ["--out", str(tmp_path / "out")]
    base = [*f"--data {data / script} {SMALL} {QUICK} --max-steps 2".split(), *out]
    with pytest.raises(SystemExit) as stop:
        DCD_SCRIPTS[script].main([*base, *filled.split()])
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and BAD[options] in error
    assert error.startswith(f"train_{script}_dcd.py: error: ")
    assert "truncated" in options or not (tmp_path / "out").exists()


def test_bad_input_of_one_script(data, tmp_path, capsys):
    (tmp_path / "odd/train").mkdir(parents=True)
    (tmp_path / "odd/val").mkdir()
    for folder in ("train", "val"):
        Image.new("RGB", (201, 100)).save(tmp_path / "odd" / folder / "0.png")
    unet = "--teacher-arch unet_256"
    for options, message in (
        (f"--data {tmp_path / 'odd'}", "0.png is 201x100 pixels"),
        (unet, "taps of different sizes"),
        (f"{unet} --student-arch unet_256 --crop-size 96", "multiple of 256 from 256 on"),
    ):
        with pytest.raises(SystemExit) as stop:
            run("pix2pix", data, tmp_path / "out", options)
        assert stop.value.code == 2 and message in capsys.readouterr().err


@pytest.mark.parametrize("script", DCD_SCRIPTS)
def test_existing_runs_are_kept(script, data, tmp_path, capsys):
    run(script, data, tmp_path, "--max-steps 2")
    shutil.copytree(data / script, data / "toys", dirs_exist_ok=True)
    for path in (data / "toys").rglob("1.png"):
        path.rename(path.with_name("other.png"))
    before = (tmp_path / "checkpoint.pt").read_bytes()
    for options, message in (
        ("--max-steps 2", "holds a run"),
        ("--resume --max-steps 4 --lr 1 --d-fakes teacher", "--d-fakes teacher (the run has both)"),
        ("--resume --overwrite", "not allowed with"),
        ("--resume --max-steps 4 --teacher other.pt", "--teacher ['other.pt'] (the run has None)"),
        (f"--resume --max-steps 4 --data {data / 'toys'}", "not those that the run"),
    ):
        with pytest.raises(SystemExit) as stop:
            run(script, data, tmp_path, options)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before
    run(script, data, tmp_path, "--resume --max-steps 2")  # nothing left to do
    shutil.rmtree(data / "toys")
    with pytest.raises(SystemExit):
        train_stylegan2_dgl.main(["--out", str(tmp_path), "--resume"])
    assert "not a checkpoint of train_stylegan2_dgl.py" in capsys.readouterr().err
    (tmp_path / "mine.pt").write_text("not a file of the run")
    assert [line["step"] for line in run(script, data, tmp_path, "--overwrite --max-steps 1")] == [1]
    assert (tmp_path / "mine.pt").exists()


# ----------------------------------------------------------------------------------------------------------------------
# StyleGAN2 and DGL-GAN: losses and layers against slow, obvious formulas


def tiny_discriminator():
    """Three images of 4x4 in float64 -> logits, smooth, so that differences approximate its derivatives."""
    torch.manual_seed(0)
    layers = (torch.nn.Conv2d(3, 4, 3), torch.nn.Softplus(), torch.nn.Flatten(), torch.nn.Linear(16, 1))
    return torch.nn.Sequential(*layers).double(), torch.randn(3, 3, 4, 4, dtype=torch.float64)


def differences(function, x, step=1e-4):
    """Central differences of a scalar function at every entry of x."""
    gradient = torch.zeros_like(x)
    for index in np.ndindex(*x.shape):
        ahead, behind = x.clone(), x.clone()
        ahead[index] += step
        behind[index] -= step
        gradient[index] = (function(ahead) - function(behind)) / (2 * step)
    return gradient


def test_r1_penalty_is_the_mean_squared_gradient():
    D, images = tiny_discriminator()
    with torch.no_grad():
        lengths = [differences(lambda x: D(x[None]).squeeze(), image).square().sum() for image in images]
    images.requires_grad_(True)
    penalty = r1_penalty(D(images), images)
    assert penalty.item() == pytest.approx((sum(lengths) / 3).item(), rel=1e-4)

    # Its gradient, through the gradient, is that of the penalty: at one weight of the first layer.
    penalty.backward()

    def penalty_at(value):
        with torch.no_grad():
            D[0].weight[0, 0, 0, 0] = value
        return r1_penalty(D(images), images).item()

    value = D[0].weight[0, 0, 0, 0].item()
    slope = (penalty_at(value + 0.01) - penalty_at(value - 0.01)) / 0.02
    assert D[0].weight.grad[0, 0, 0, 0].item() == pytest.approx(slope, rel=1e-3)


def test_path_length_penalty_is_the_papers():
    torch.manual_seed(0)
    G = StyleGAN2Generator(8, 6, 1, width=1 / 128)
    latents = G.mapping(torch.randn(3, 6)).detach().requires_grad_()
    penalty = PathLengthPenalty(decay=0.25)
    penalty.mean.fill_(0.5)
    images = G.synthesis(latents, "fixed")
    torch.manual_seed(1)
    value = penalty(images, latents)

    torch.manual_seed(1)
    noise = torch.randn_like(images) / 8  # divided by the root of the number of pixels
    lengths = []
    for w, y in zip(latents.detach(), noise, strict=True):
        jacobian = torch.autograd.functional.jacobian(lambda v: G.synthesis(v[None], "fixed")[0].flatten(), w)
        product = (y.flatten()[:, None, None] * jacobian).sum(0)  # J_w^T y, (layers, style_dim)
        lengths.append(product.square().sum(1).mean().sqrt())
    lengths = torch.stack(lengths)
    mean = 0.5 + 0.25 * (lengths.mean() - 0.5)
    assert penalty.mean.item() == pytest.approx(mean.item(), rel=1e-4)
    assert value.item() == pytest.approx((lengths - mean).square().mean().item(), rel=1e-4)
    assert value.item() > 1e-4
    value.backward()
    assert G.convs[0].conv.weight.grad.abs().sum() > 0
    assert PathLengthPenalty().state_dict().keys() == {"mean"}


@pytest.mark.parametrize("upsample", (False, True))
@pytest.mark.parametrize("demodulate", (False, True))
def test_modulated_convolution_is_the_textbooks(upsample, demodulate):
    """w'_ijk = s_i w_ijk, w''_ijk = w'_ijk / sqrt(sum_ik w'_ijk^2 + eps): weights of its own for every sample."""
    torch.manual_seed(0)
    conv = ModulatedConv2d(5, 4, 3, 6, demodulate, upsample)
    x, style = torch.randn(3, 5, 8, 8), torch.randn(3, 6)
    outputs = []
    for image, s in zip(x, conv.modulation(style), strict=True):
        weight = conv.scale * conv.weight[0] * s[None, :, None, None]
        if demodulate:
            weight = weight / (weight.square().sum((1, 2, 3), keepdim=True) + 1e-8).sqrt()
        if upsample:
            outputs.append(conv.blur(F.conv_transpose2d(image[None], weight.transpose(0, 1), stride=2)))
        else:
            outputs.append(F.conv2d(image[None], weight, padding=1))
    assert torch.allclose(conv(x, style), torch.cat(outputs), atol=1e-5)


def test_dgl_term_reaches_the_student_generator_alone():
    torch.manual_seed(0)
    G, D = StyleGAN2Generator(8, 6, 1, width=1 / 128), StyleGAN2Discriminator(8, width=1 / 128)
    teacher_D = StyleGAN2Discriminator(8, width=1 / 64).requires_grad_(False)
    z = torch.randn(4, 6)

    def gradient(weight):
        G.zero_grad()
        fake = G(z, noise="fixed")
        student_logits, teacher_logits = D(fake), teacher_D(fake)
        loss = dgl_generator_loss(student_logits, teacher_logits, weight)
        expected = -(student_logits.sigmoid().log().mean() + weight * teacher_logits.sigmoid().log().mean())
        assert loss.item() == pytest.approx(expected.item(), rel=1e-5)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in G.parameters() if p.grad is not None])

    without, once, twice = (gradient(weight) for weight in (0.0, 1.0, 2.0))
    assert (once - without).abs().max() > 1e-4
    assert torch.allclose(twice - without, 2 * (once - without), atol=1e-5)
    assert all(p.grad is None for p in teacher_D.parameters())


def test_lazy_regularisation_keeps_the_pace():
    net = torch.nn.Linear(2, 2)
    for every, lr, beta in ((16, 0.002 * 16 / 17, 0.99 ** (16 / 17)), (4, 0.0016, 0.99**0.8), (None, 0.002, 0.99)):
        group = train_stylegan2_dgl.lazy_adam(net, 0.002, every).param_groups[0]
        assert group["lr"] == pytest.approx(lr) and group["betas"] == (0.0, pytest.approx(beta))
        assert group["params"] == list(net.parameters()) and group["fused"]


def test_ema_half_life():
    G, G_ema = torch.nn.Linear(3, 3), torch.nn.Linear(3, 3)
    before = copy.deepcopy(G_ema)
    for _ in range(50):
        train_stylegan2_dgl.update_ema(G_ema, G, 32, 32 * 50)
    for p, ema, old in zip(G.parameters(), G_ema.parameters(), before.parameters(), strict=True):
        assert torch.allclose(ema, (p + old) / 2, atol=1e-5)
    train_stylegan2_dgl.update_ema(G_ema, G, 32, 0)
    assert same(G.state_dict(), G_ema.state_dict())


# ----------------------------------------------------------------------------------------------------------------------
# train_stylegan2_dgl.py, end to end

DGL = "--size 8 --teacher-width 0.0156 --student-width 0.0078 --student-d-width 0.01 --style-dim 8 --n-mlp 2"
DGL += " --batch-size 4 --r1-every 2 --path-every 2 --ema-kimg 0.01 --workers 0 --mirror"
DGL += " --log-every 1 --sample-every 0 --eval-every 0 --device cpu"
STEPS = "--stage1-kimg 0.012 --stage2-kimg 0.012"  # three steps each


def dgl(data, out, *options):
    """The script with tiny networks, in this process -> its log lines."""
    options = " ".join(options).split()
    train_stylegan2_dgl.main([*f"--data {data / 'stylegan2'} --out {out} {DGL}".split(), *options])
    return [json.loads(line) for line in (Path(out) / "log.jsonl").read_text().splitlines()]


@pytest.fixture(scope="session")
def teacher_file(tmp_path_factory):
    """A teacher that fits the options of DGL, as the community saves it."""
    torch.manual_seed(5)
    nets = dict(g=StyleGAN2Generator(8, 8, 2, width=0.0156), d=StyleGAN2Discriminator(8, width=0.0156))
    nets["g_ema"] = StyleGAN2Generator(8, 8, 2, width=0.0156)
    path = tmp_path_factory.mktemp("teacher") / "teacher.pt"
    content = {name: net.state_dict() for name, net in nets.items()}
    torch.save(content | dict(args=argparse.Namespace(size=8, path="ffhq.lmdb"), g_optim={}), path)
    return path


@pytest.fixture
def quick_inception(monkeypatch):
    """Twelve features in place of the FID Inception's 2048."""

    def features(images):
        assert images.min() >= 0 and images.max() <= 1 and torch.equal((images * 255).round() / 255, images)
        return F.adaptive_avg_pool2d(images, 2).flatten(1)

    features.metric = "FID"
    monkeypatch.setattr(train_stylegan2_dgl, "load_inception", lambda *_: features)


def test_dgl_output_folder(data, tmp_path, quick_inception):
    options = "--inception random --eval-every 1 --eval-images 6 --sample-every 2 --cache"
    lines = dgl(data, tmp_path, "--teacher-kimg 0.012", STEPS, options)
    names = {path.name for path in tmp_path.iterdir() if not path.name.startswith("reference")}
    names -= {"best_student.pt"}
    expected = {"args.json", "log.jsonl", "samples", "checkpoint.pt", "student.pt", "summary.json"}
    assert names == expected | {"teacher.pt", "stage1.pt", "stage2.pt"}
    steps = [line for line in lines if "kimg" in line]
    assert [(line["step"], line["stage"]) for line in steps] == [(n + 1, n // 3) for n in range(9)]
    assert [line["stage_kimg"] for line in steps] == [0.004, 0.008, 0.012] * 3
    assert {"kimg", "images", "lr_G", "lr_D", "images_per_second", "D", "G", "R1", "path"} <= set(steps[0])
    assert [line["step"] for line in steps if "R1" in line] == [1, 3, 4, 6, 7, 9]
    assert [line["step"] for line in steps if "G_dgl" in line] == [7, 8, 9]
    names = {path.name for path in (tmp_path / "samples").iterdir()}
    assert names == {
        f"stage{stage}_000000{step}.png" for stage, step in ((0, 2), (0, 3), (1, 4), (1, 6), (2, 8), (2, 9))
    }
    assert Image.open(tmp_path / "samples/stage0_0000002.png").size == (8 * 10 + 2, 2 * 10 + 2)
    assert Image.open(tmp_path / "samples/stage2_0000009.png").size == (8 * 10 + 2, 4 * 10 + 2)

    scored = [line for line in lines if "FID teacher" in line]
    assert [line["step"] for line in scored] == [3, 6, 9]
    assert len({line["FID teacher"] for line in scored}) == 1  # of its last weights, once
    summary = json.loads((tmp_path / "summary.json").read_text())
    student = load_generator(tmp_path / "student.pt")
    assert summary["student"]["parameters"] == sum(p.numel() for p in student.parameters())
    assert summary["student"]["FID"] == scored[-1]["FID student"]
    assert summary["teacher"]["FID"] == scored[-1]["FID teacher"]
    assert same(student.state_dict(), weights(tmp_path)["student_G_ema"])
    assert "teacher_G" not in weights(tmp_path)  # has served when stage 0 ends
    last, before = (load_file(tmp_path / f"stage{n}.pt") for n in (2, 1))
    assert same(last["g_ema"], student.state_dict()) and not same(last["g"], before["g"])
    best = before if scored[1]["FID student"] < scored[2]["FID student"] else last
    assert same(load_generator(tmp_path / "best_student.pt").state_dict(), best["g_ema"])


def test_dgl_evaluation_and_samples_leave_the_run_alone(data, teacher_file, tmp_path, quick_inception):
    dgl(data, tmp_path / "plain", STEPS, f"--teacher {teacher_file}")
    options = "--inception random --eval-every 1 --eval-images 4 --sample-every 1 --mirror"
    dgl(data, tmp_path / "watched", STEPS, f"--teacher {teacher_file} {options}")
    assert equal(weights(tmp_path / "plain"), weights(tmp_path / "watched"))


def test_dgl_continues_stage_1(data, teacher_file, tmp_path):
    """Stage 2 starts from stage 1's three networks, with new optimisers; --student does so from the file."""
    dgl(data, tmp_path / "first", f"--teacher {teacher_file} --stage1-kimg 0.012 --stage2-kimg 0")
    student = tmp_path / "first/stage1.pt"
    options = f"--teacher {teacher_file} --student {student} --stage2-kimg 0.004"
    lines = dgl(data, tmp_path / "second", options, "--lr 0 --ema-kimg 1e9")
    assert [(line["stage"], line["step"]) for line in lines] == [(2, 1)]
    start = load_file(student)
    for name, key in (("g", "student_G"), ("d", "student_D"), ("g_ema", "student_G_ema")):
        assert same(start[name], weights(tmp_path / "second")[key]), name
    assert start["args"] == argparse.Namespace(size=8, latent=8, n_mlp=2, channel_multiplier=2, width=0.0078)
    lines = dgl(data, tmp_path / "third", options, "--stage1-kimg 0.004")
    assert [line["stage"] for line in lines] == [1, 2]

    optimizers = load_file(tmp_path / "second/checkpoint.pt")["optimizers"]
    assert {int(state["step"]) for state in optimizers["D"]["state"].values()} <= {1, 2}


@pytest.mark.parametrize(
    "options, stages",
    (
        ("--teacher-kimg 0.004 --stage1-kimg 0 --stage2-kimg 0", [0]),
        ("--teacher-kimg 0 --stage1-kimg 0.004 --stage2-kimg 0", [1]),
        ("--teacher-kimg 0.004 --stage1-kimg 0.004 --stage2-kimg 0.004", [0, 1, 2]),
        ("--teacher-kimg 0.004 --stage1-kimg 0 --stage2-kimg 0.008", [0, 2, 2]),
        ("--teacher {teacher} --stage1-kimg 0.004 --stage2-kimg 0.004", [1, 2]),
        (
            "--teacher {teacher} --student-width 0.0156 --stage1-kimg 0.004 --stage2-kimg 0.004",
            [1, 2],
        ),
        ("--teacher {teacher} --stage1-kimg 0.004 --stage2-kimg 0.004 --r1-gamma 0 --path-weight 0 --amp bf16", [1, 2]),
    ),
)
def test_dgl_stage_sets(options, stages, data, teacher_file, tmp_path):
    lines = dgl(data, tmp_path, options.format(teacher=teacher_file))
    assert [line["stage"] for line in lines] == stages
    assert (tmp_path / "student.pt").exists() == (stages != [0])
    if "--r1-gamma 0" in options:
        assert lines[0]["lr_G"] == lines[0]["lr_D"] == 0.002 and "R1" not in lines[0] and "path" not in lines[0]
    else:
        assert lines[0]["lr_G"] == lines[0]["lr_D"] == pytest.approx(0.002 * 2 / 3)


def test_dgl_teacher_discriminator_stays_and_stage_1_never_calls_it(data, teacher_file, tmp_path, monkeypatch):
    calls = []

    def forward(self, images):
        calls.append(self)
        return original(self, images)

    original = StyleGAN2Discriminator.forward
    monkeypatch.setattr(StyleGAN2Discriminator, "forward", forward)
    dgl(data, tmp_path / "first", f"--teacher {teacher_file} --stage1-kimg 0.012 --stage2-kimg 0")
    assert len(set(calls)) == 1 and len(calls) == 3 * 3 + 2  # D_S: real, fake, for G; R1 at two of three steps
    calls.clear()
    student = tmp_path / "first/stage1.pt"
    dgl(data, tmp_path / "second", f"--teacher {teacher_file} --student {student} --stage2-kimg 0.012")
    counts = {net: calls.count(net) for net in set(calls)}
    assert sorted(counts.values()) == [3, 3 * 3 + 2]  # D_T once a step
    teacher_D = min(counts, key=counts.get)
    assert not any(p.requires_grad or p.grad is not None for p in teacher_D.parameters())
    before, after = load_file(teacher_file), weights(tmp_path / "second")
    assert same(before["d"], teacher_D.state_dict()) and same(before["d"], after["teacher_D"])
    assert same(before["g_ema"], after["teacher_G_ema"]) and not same(load_file(student)["d"], after["student_D"])


def test_dgl_term_has_its_weight(data, teacher_file, tmp_path):
    def student_G(weight):
        out = tmp_path / str(weight)
        dgl(data, out, f"--teacher {teacher_file} --stage1-kimg 0 --stage2-kimg 0.008 --lambda-dgl {weight}")
        return weights(out)["student_G"]

    without, with_it = student_G(0.0), student_G(5.0)
    assert not same(without, with_it)


@pytest.mark.parametrize("keys", (("d",), ("d", "g_ema"), ("g", "d", "g_ema", "args"), ("d", "args")))
def test_dgl_reads_community_teachers(keys, data, teacher_file, tmp_path, capsys, quick_inception):
    content = load_file(teacher_file)
    torch.save({key: content[key] for key in keys}, tmp_path / "teacher.pt")
    dgl(
        data,
        tmp_path,
        STEPS,
        f"--teacher {tmp_path / 'teacher.pt'} --sample-every 3 --max-steps 3 --eval-every 1 --eval-images 4",
    )
    summary = json.loads((tmp_path / "summary.json").read_text())
    assert "FID" in summary["student"] and ("FID" in summary["teacher"]) == ("g_ema" in keys)
    assert capsys.readouterr().out.splitlines()[-6].endswith("FID")  # the heading of the table
    rows = 4 if "g_ema" in keys else 2
    assert Image.open(tmp_path / "samples/stage1_0000003.png").size[1] == rows * 10 + 2
    (tmp_path / "teacher.pt").unlink()  # a resumed run has it in its checkpoint
    dgl(data, tmp_path, "--resume", STEPS, f"--teacher {tmp_path / 'teacher.pt'} --max-steps 4")
    assert same(weights(tmp_path)["teacher_D"], content["d"])
    assert ("teacher_G_ema" in weights(tmp_path)) == ("g_ema" in keys)


def test_dgl_reads_its_own_teacher(data, tmp_path):
    dgl(data, tmp_path / "first", "--teacher-kimg 0.008 --stage1-kimg 0 --stage2-kimg 0")
    dgl(data, tmp_path / "second", f"--teacher {tmp_path / 'first/teacher.pt'} --stage1-kimg 0 --stage2-kimg 0.004")
    first = weights(tmp_path / "first")
    assert same(first["teacher_D"], weights(tmp_path / "second")["teacher_D"])
    assert same(first["teacher_G_ema"], weights(tmp_path / "second")["teacher_G_ema"])
    assert not same(first["teacher_G_ema"], load_file(tmp_path / "first/teacher.pt")["g"])


@pytest.mark.parametrize("cut", (2, 3, 4, 6, 7))
def test_dgl_resume_is_exact(cut, data, tmp_path, quick_inception):
    """Cut inside stages 0, 1 and 2 and at both borders; evaluation and samples at each end."""
    options = "--teacher-kimg 0.012 --stage1-kimg 0.012 --stage2-kimg 0.012 --log-every 2 --save-every 100"
    options += " --inception random --eval-every 1 --eval-images 4 --sample-every 2"
    dgl(data, tmp_path / "whole", options, "--max-steps 8")
    dgl(data, tmp_path / "cut", options, f"--max-steps {cut} --workers 2")
    assert comparable(tmp_path / "whole") != comparable(tmp_path / "cut")
    with open(tmp_path / "cut/log.jsonl", "a") as file:
        file.write('{"step": 8, "from": "after the checkpoint"}\n{"step": 8, "torn')
    train_stylegan2_dgl.main(f"--out {tmp_path / 'cut'} --resume --max-steps 8 --workers 1".split())
    whole, cut = (load_file(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    for key in ("networks", "optimizers", "path_length", "ranks", "step", "best", "scores"):
        assert equal(whole[key], cut[key]), key
    assert comparable(tmp_path / "whole") == comparable(tmp_path / "cut")
    for name in ("stage1.pt", "best_student.pt"):
        assert equal(load_file(tmp_path / "whole" / name), load_file(tmp_path / "cut" / name)), name


def test_dgl_finished_runs_stay(data, teacher_file, tmp_path, capsys):
    dgl(data, tmp_path, STEPS, f"--teacher {teacher_file}")
    before = (tmp_path / "checkpoint.pt").read_bytes()
    capsys.readouterr()
    train_stylegan2_dgl.main(["--out", str(tmp_path), "--resume"])
    assert "nothing is left to train" in capsys.readouterr().out
    for options, message in (
        ("", "holds a run"),
        ("--resume --stage2-kimg 7 --lambda-dgl 2", "--lambda-dgl 2.0 (the run has 0.1)"),
    ):
        with pytest.raises(SystemExit) as stop:
            dgl(data, tmp_path, STEPS, f"--teacher {teacher_file}", options)
        assert stop.value.code == 2 and message in capsys.readouterr().err
    assert (tmp_path / "checkpoint.pt").read_bytes() == before


def test_dgl_divergence_stops_the_run(data, teacher_file, tmp_path, monkeypatch):
    calls = []

    def diverging(real, fake):
        calls.append(1)
        return original(real, fake) * (torch.nan if len(calls) == 4 else 1)

    original = train_stylegan2_dgl.discriminator_logistic_loss
    monkeypatch.setattr(train_stylegan2_dgl, "discriminator_logistic_loss", diverging)
    with pytest.raises(SystemExit, match="the loss D is nan at step 4; the last checkpoint stays"):
        dgl(data, tmp_path, STEPS, f"--teacher {teacher_file} --log-every 2 --save-every 3")
    checkpoint = load_file(tmp_path / "checkpoint.pt")
    assert checkpoint["step"] == 3
    assert all(value.isfinite().all() for net in checkpoint["networks"].values() for value in net.values())


def test_dgl_signal_saves_and_stops(data, teacher_file, tmp_path, monkeypatch, capsys):
    def interrupting(*logits):
        os.kill(os.getpid(), signal.SIGTERM)
        return original(*logits)

    original = train_stylegan2_dgl.dgl_generator_loss
    monkeypatch.setattr(train_stylegan2_dgl, "dgl_generator_loss", interrupting)
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        with pytest.raises(SystemExit) as stop:
            dgl(data, tmp_path, STEPS, f"--teacher {teacher_file}")
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    assert stop.value.code == 143 and "stopped by SIGTERM after step 4, saved" in capsys.readouterr().out
    monkeypatch.undo()
    train_stylegan2_dgl.main(["--out", str(tmp_path), "--resume"])
    dgl(data, tmp_path / "whole", STEPS, f"--teacher {teacher_file}")
    assert equal(weights(tmp_path), weights(tmp_path / "whole"))
    assert comparable(tmp_path) == comparable(tmp_path / "whole")


# What each file of bad_teachers lacks, as the error names it.
BAD_TEACHERS = {
    "missing.pt": "no such file",
    "truncated.pt": "truncated",
    "text.pt": "not",
    "foreign.pt": "asks for",
    "list.pt": "found list",
    "generator.pt": "has no 'd'",
    "tensors.pt": "found list",
    "wider.pt": "convs.0.0.weight has shape (15, 3, 1, 1), expected (8, 3, 1, 1)",
    "other_size.pt": "d: does not fit StyleGAN2Discriminator: it has convs.2.conv1.0.weight",
    "other_latent.pt": "style.1.weight has shape (16, 16), expected (8, 8)",
}


class Foreign:
    def __reduce__(self):
        return os.mkdir, (str(Path(os.environ["DGL_TEST_FOLDER"], "executed")),)


@pytest.mark.parametrize("name", BAD_TEACHERS)
def test_dgl_bad_teachers(name, data, teacher_file, tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("DGL_TEST_FOLDER", str(tmp_path))
    content = load_file(teacher_file)
    path = tmp_path / name
    torch.save(
        {
            "foreign.pt": content | dict(latent_avg=Foreign()),
            "list.pt": [content],
            "generator.pt": dict(g_ema=content["g_ema"]),
            "tensors.pt": content | dict(d=list(content["d"].values())),
            "wider.pt": content | dict(d=StyleGAN2Discriminator(8, width=0.03).state_dict()),
            "other_size.pt": content | dict(d=StyleGAN2Discriminator(16, width=0.0156).state_dict()),
            "other_latent.pt": content | dict(g_ema=StyleGAN2Generator(8, 16, 2, width=0.0156).state_dict()),
        }.get(name, content),
        path,
    )
    if name == "truncated.pt":
        path.write_bytes(path.read_bytes()[:-3000])
    if name == "text.pt":
        path.write_text("not a checkpoint")
    if name == "missing.pt":
        path.unlink()
    with pytest.raises(SystemExit) as stop:
        dgl(data, tmp_path / "out", STEPS, f"--teacher {path}")
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1
    assert error.startswith("train_stylegan2_dgl.py: error: ") and str(path) in error and BAD_TEACHERS[name] in error
    assert not (tmp_path / "out").exists() and not (tmp_path / "executed").exists()


@pytest.mark.parametrize(
    "options, message",
    (
        ("--size 20", "--size"),
        ("--size 32", "need at least 32 a side"),
        ("--teacher-width 0", "--teacher-width"),
        ("--style-mixing -1", "--style-mixing"),
        ("--batch-size 0", "--batch-size"),
        ("--stage1-kimg -1", "--stage1-kimg"),
        ("--stage2-kimg inf", "--stage2-kimg"),
        ("--eval-images 1", "--eval-images"),
        ("--teacher-kimg 0 --stage1-kimg 0 --stage2-kimg 0", "nothing to train"),
        ("--teacher-kimg 0", "stage 2 needs a teacher"),
        ("--teacher {teacher} --teacher-kimg 1", "leave out --teacher-kimg"),
        ("--teacher {teacher} --student {teacher}", "expected"),
        ("--teacher {teacher} --inception gone.pth --eval-every 1", "gone.pth"),
        ("--device cuda", "--device cuda"),
        ("--resume", "checkpoint.pt: no such file"),
        ("--data gone", "gone: no such folder"),
        ("--colour", "--colour"),
    ),
)
def test_dgl_bad_input(options, message, data, teacher_file, tmp_path, capsys):
    with pytest.raises(SystemExit) as stop:
        dgl(data, tmp_path / "out", options.format(teacher=teacher_file))
    error = capsys.readouterr().err
    assert stop.value.code == 2 and error.count("\n") == 1 and message in error
    assert error.startswith("train_stylegan2_dgl.py: error: ") and not (tmp_path / "out").exists()


def test_dgl_images(tmp_path):
    """The central square, resized; a pass shows every image once; flips; the cache changes nothing."""
    for i in range(5):
        image = Image.new("RGB", (24, 8), (255, 0, 0))
        image.paste((50 * i, 0, 0), (8, 0, 12, 8))  # the square: its left half bears the number, its right half is blue
        image.paste((50 * i, 0, 255), (12, 0, 16, 8))
        image.save(tmp_path / f"{i}.png")
    images = train_stylegan2_dgl.SquareImages(ImageFiles(tmp_path), 8)
    assert [image[0].unique().tolist() for image in images] == [[50 * i] for i in range(5)]
    assert all(image[2, :, :4].eq(0).all() and image[2, :, 4:].eq(255).all() for image in images)
    assert train_stylegan2_dgl.SquareImages(ImageFiles(tmp_path), 16)[1].shape == (3, 16, 16)

    plain, mirrored = (train_stylegan2_dgl.TrainingImages(images, mirror, seed=1) for mirror in (False, True))
    orders = [[plain[n][0, 0, 0].item() // 50 for n in range(start, start + 5)] for start in (0, 5, 10)]
    assert [sorted(order) for order in orders] == [list(range(5))] * 3 and len(set(map(tuple, orders))) > 1
    items = [mirrored[n] for n in range(100)]
    flipped = [item[2, 0, 0].item() == 255 for item in items]
    assert 30 < sum(flipped) < 70
    for n, flip in enumerate(flipped):
        assert torch.equal(items[n], plain[n].flip(2) if flip else plain[n])
    images.cache(workers=0)
    for path in tmp_path.glob("*.png"):
        path.unlink()
    assert all(torch.equal(mirrored[n], items[n]) for n in range(100))


def test_dgl_toy_data_and_overrides(tmp_path, capsys):
    options = f"--toy --out {tmp_path} --teacher-kimg 0.016 --stage1-kimg 0.016 --stage2-kimg 0.016 --batch-size 8"
    train_stylegan2_dgl.main([*options.split(), "--size", "16", "--device", "cpu"])
    assert load_generator(tmp_path / "student.pt").config["size"] == 16
    assert len(ImageFiles(tmp_path / "toy_data").check(32)) > 200
    assert load_file(tmp_path / "checkpoint.pt")["step"] == 6
    assert math.isfinite(json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["G_dgl"])


# ----------------------------------------------------------------------------------------------------------------------
# Signals and several processes: the scripts as commands of their own

LONG = "--teacher-kimg 0 --stage1-kimg 1000 --stage2-kimg 0"
COMMANDS = {
    "train_cyclegan_dcd": f"--data {{data}}/cyclegan {SMALL} {QUICK}",
    "train_pix2pix_dcd": f"--data {{data}}/pix2pix {SMALL} {QUICK}",
    "train_stylegan2_dgl": f"--data {{data}}/stylegan2 {DGL} {LONG}",
}


def start(script, data, out, options="", processes=1, code=None):
    """The script, or code that imports it, as a process of its own, under torchrun if there are several."""
    launcher = [sys.executable]
    if processes > 1:
        launcher += ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
    program = [str(HERE / f"{script}.py")]
    if code:
        path = Path(f"{out}_driver.py")
        path.write_text(f"import sys\nsys.path.insert(0, {str(HERE)!r})\nimport {script} as script\n{code}")
        program = [str(path)]
    arguments = f"{COMMANDS[script].format(data=data)} --out {out} {options}".split()
    return subprocess.Popen(
        [*launcher, *program, *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=os.environ | {"OMP_NUM_THREADS": "1"},
        start_new_session=True,
    )


def finish(process, status=0):
    out, err = process.communicate(timeout=120)
    assert process.returncode == status, err
    return out, err


@pytest.mark.parametrize(
    "script, number", [*zip(COMMANDS, (signal.SIGTERM, signal.SIGINT, signal.SIGTERM), strict=True)]
)
def test_signals_save_and_stop(script, number, data, tmp_path):
    process = start(script, data, tmp_path / "out", "--max-steps 100000 --save-every 100000 --workers 1")
    while not re.search(r"\bstep 3/", process.stdout.readline()):
        assert process.poll() is None, process.stderr.read()
    process.send_signal(number)
    out, err = finish(process, 128 + number)
    step = load_file(tmp_path / "out/checkpoint.pt")["step"]
    assert step >= 3 and f"stopped by {number.name} after step {step}" in out and "--resume" in out and err == ""
    sys.modules[script].main([*f"--out {tmp_path / 'out'} --resume --max-steps {step + 1} --workers 0".split()])
    assert load_file(tmp_path / "out/checkpoint.pt")["step"] == step + 1


@pytest.mark.parametrize("script", ("cyclegan", "pix2pix"))
def test_an_unreadable_image_loses_nothing(script, data, tmp_path):
    """Its header is fine: a worker finds it. The run is saved, ends, and goes on once the file is replaced."""
    shutil.copytree(data / script, tmp_path / script)
    broken = next((tmp_path / script).glob("train*")) / "1.png"
    whole = broken.read_bytes()
    broken.write_bytes(whole[: len(whole) // 2])
    process = start(f"train_{script}_dcd", tmp_path, tmp_path / "out", "--batch-size 1 --max-steps 4 --workers 2")
    _, err = finish(process, 2)
    assert err.count("\n") == 1 and str(broken) in err and "saved after step" in err
    broken.write_bytes(whole)
    DCD_SCRIPTS[script].main([*f"--out {tmp_path / 'out'} --resume --workers 0".split()])
    run(script, data, tmp_path / "uncut", "--batch-size 1 --max-steps 4")
    assert equal(weights(tmp_path / "out"), weights(tmp_path / "uncut"))


def test_a_signal_to_the_whole_group_during_evaluation(data, tmp_path):
    options = "--max-steps 100 --eval-every 1 --inception random --workers 2"
    process = start("train_cyclegan_dcd", data, tmp_path / "out", options)
    while not re.search(r"\bstep 2/", process.stdout.readline()):
        assert process.poll() is None, process.stderr.read()
    os.killpg(process.pid, signal.SIGTERM)  # an epoch has two steps
    out, _ = finish(process, 143)
    assert "stopped by SIGTERM after step 2, saved" in out


def test_an_exception_ends_the_workers(data, tmp_path):
    code = "def fail_late(*_):\n    raise RuntimeError('a bug')\nscript.average_gradients = fail_late\nscript.main()"
    _, err = finish(start("train_pix2pix_dcd", data, tmp_path / "out", "--max-steps 9 --workers 2", 1, code), 1)
    assert "RuntimeError: a bug" in err


def test_a_second_signal_ends_at_once(monkeypatch):
    for module in (train_cyclegan_dcd, train_pix2pix_dcd, train_stylegan2_dgl):
        ended = []
        monkeypatch.setattr(os, "_exit", ended.append)
        module.stop_signals.clear()
        module.on_signal(signal.SIGTERM, None)
        assert ended == [] and module.stop_signals == [signal.SIGTERM]
        module.on_signal(signal.SIGTERM, None)
        assert ended == [143]
        module.stop_signals.clear()


# Rank 1 starts from other weights; at the end every rank writes down the hash of all its networks.
COMPARE_RANKS = """
import hashlib, os, torch
kept, share, rank = [], script.share_weights, int(os.environ.get("RANK", 0))
def share_weights(modules, world):
    kept.extend(modules)
    with torch.no_grad():
        for module in kept:
            for parameter in module.parameters():
                parameter.add_(rank)
    share(kept, world)
script.share_weights = share_weights
script.main()
content = b"".join(v.numpy().tobytes() for m in kept for v in m.state_dict().values())
open(f"{sys.argv[sys.argv.index('--out') + 1]}_rank{rank}", "w").write(hashlib.sha256(content).hexdigest())
"""


@pytest.mark.parametrize("script", COMMANDS)
def test_two_processes(script, data, tmp_path):
    """Equal weights on both ranks at the end, and exact resume."""
    options = "--batch-size 1" + (" --pool-size 2" if "cyclegan" in script else "")
    whole = start(script, data, tmp_path / "whole", f"{options} --max-steps 4", 2, COMPARE_RANKS)
    finish(whole)
    hashes = [(tmp_path / f"whole_rank{rank}").read_text() for rank in (0, 1)]
    assert hashes[0] == hashes[1]
    finish(start(script, data, tmp_path / "cut", f"{options} --max-steps 3", 2))
    finish(start(script, data, tmp_path / "cut", f"{options} --max-steps 4 --resume", 2))
    a, b = (load_file(tmp_path / name / "checkpoint.pt") for name in ("whole", "cut"))
    assert equal(a["ranks"], b["ranks"]) and len(a["ranks"]) == 2
    if "cyclegan" in script:
        assert not equal(a["ranks"][0]["pools"], a["ranks"][1]["pools"])  # the data is shared out
    with pytest.raises(SystemExit):  # one process cannot go on for two
        sys.modules[script].main([*f"--out {tmp_path / 'cut'} --resume --max-steps 5".split()])


def test_two_processes_take_the_step_of_one(data, tmp_path):
    """Twice a batch of one image is one batch of two, connectors aside: their batch norm sees its own process alone."""
    options = "--lambda-dcd 0 --pool-size 0 --teacher-every 1 --max-steps 4"
    two = start("train_cyclegan_dcd", data, tmp_path / "two", f"{options} --batch-size 1", 2)
    one = run("cyclegan", data, tmp_path / "one", f"{options} --batch-size 2")
    finish(two)
    for line, expected in zip(comparable(tmp_path / "two"), one, strict=True):
        for key in ("images", "G_S_gan", "G_T_gan", "G_T_cycle", "G_T_identity", "D_T", "D_T_A"):
            assert line[key] == pytest.approx(expected[key], rel=2e-3), key


def test_a_failing_rank_ends_the_run(data, tmp_path):
    code = """
import os
if os.environ["RANK"] == "1":
    def fail_late(*_):
        raise script.InputError("rank 1 has found a bad thing")
    script.average_gradients = fail_late
script.main()
"""
    process = start("train_pix2pix_dcd", data, tmp_path / "out", "--max-steps 100", 2, code)
    _, err = process.communicate(timeout=120)
    assert process.returncode != 0 and "error: rank 1 has found a bad thing" in err


# ----------------------------------------------------------------------------------------------------------------------
# The README's snippets


def snippet(start):
    blocks = re.findall(r"```python\n(.*?)```", (HERE / "README.md").read_text(), re.DOTALL)
    return next(block for block in blocks if block.startswith(start))


@pytest.fixture
def student(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    net = init_weights(ResnetGenerator(ngf=16, separable=True), 0.1).eval()
    save_generator("student.pt", net)
    return net


def test_readme_translates_a_folder(student, tmp_path):
    (tmp_path / "photos").mkdir()
    pixels = np.random.default_rng(0).integers(0, 256, (256, 256, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(tmp_path / "photos/one.png")
    Image.fromarray(pixels[:90, :70, 0]).save(tmp_path / "photos/two.jpg")
    exec(snippet("# translate"), {})
    assert sorted(os.listdir("translated")) == ["one.png", "two.png"]
    with torch.no_grad():
        expected = student(torch.from_numpy(pixels).permute(2, 0, 1)[None] / 127.5 - 1)[0]
    found = torch.from_numpy(np.array(Image.open("translated/one.png"))).permute(2, 0, 1) / 127.5 - 1
    torch.testing.assert_close(found, expected, atol=0.02, rtol=0)


def test_readme_exports_and_quantises(student, tmp_path):
    names = {}
    exec(snippet("# export"), names)
    assert os.path.getsize("student_int8.pt") < 0.6 * os.path.getsize("student.pt")
    x = torch.rand(1, 3, 64, 64) * 2 - 1
    with torch.no_grad():
        error = (names["generator"](x) - student(x)).abs().mean()
    assert 0 < error < 0.05


def test_readme_dcd_loss_in_another_project(tmp_path):
    """With the class alone, as somebody would copy it."""
    source = (HERE / "losses.py").read_text()
    copied = re.search(r"^class DCDLoss.*?(?=^class )", source, re.DOTALL | re.MULTILINE)[0]
    header = "import math\nimport torch\nimport torch.nn.functional as F\nfrom torch import nn\n"
    names = {}
    exec(header + copied + snippet("import torch\n\nfrom losses").replace("from losses import DCDLoss", ""), names)
    assert names["loss"] > 0 and names["student"].weight.grad.abs().sum() > 0
    assert names["teacher"].weight.grad is None and names["discriminator"][0].weight.grad is None


# ----------------------------------------------------------------------------------------------------------------------
# fid.py


@pytest.fixture(scope="module")
def inception():
    return fid.load_inception("random")


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Two folders of six images of 40x40 pixels."""
    root = tmp_path_factory.mktemp("images")
    rng = np.random.default_rng(0)
    for name, low in (("a", 0), ("b", 90)):
        (root / name).mkdir()
        for i in range(6):
            Image.fromarray(rng.integers(low, 256, (40, 40, 3), dtype=np.uint8)).save(root / name / f"{i}.png")
    return str(root / "a"), str(root / "b")


def command(capsys, *arguments):
    """Run the command line in this process; return stdout and stderr."""
    fid.main([*map(str, arguments), "--device", "cpu"])
    return capsys.readouterr()


def error_line(capsys, *arguments):
    """Run a command line that has to fail; return its one line of stderr."""
    with pytest.raises(SystemExit) as stop:
        fid.main([*map(str, arguments)])
    out, err = capsys.readouterr()
    assert stop.value.code == 2 and out == ""
    assert err.startswith("fid.py: error: ") and err.count("\n") == 1 and err.endswith("\n")
    return err


# fid.py: distances and statistics


def test_frechet_distance_closed_forms():
    rng = np.random.default_rng(0)
    mu1, mu2 = rng.normal(size=(2, 50))
    a, b = rng.uniform(0.1, 3, (2, 50))
    expected = np.sum((mu1 - mu2) ** 2) + np.sum((np.sqrt(a) - np.sqrt(b)) ** 2)
    assert fid.frechet_distance(mu1, np.diag(a), mu2, np.diag(b)) == pytest.approx(expected, rel=1e-12)

    # In 2D: tr((S1 S2)^(1/2)) = (tr(S1 S2) + 2 det(S1 S2)^(1/2))^(1/2), for matrices that do not commute.
    s1, s2 = np.array([[2.0, 0.7], [0.7, 1.0]]), np.array([[0.5, -0.3], [-0.3, 4.0]])
    root = np.sqrt(np.trace(s1 @ s2) + 2 * np.sqrt(np.linalg.det(s1 @ s2)))
    expected = np.trace(s1) + np.trace(s2) - 2 * root
    assert fid.frechet_distance(np.zeros(2), s1, np.zeros(2), s2) == pytest.approx(expected, rel=1e-12)


def test_frechet_distance_of_singular_covariances():
    rng = np.random.default_rng(1)
    d = 200
    x, y = rng.normal(size=(20, d)), rng.normal(size=(30, d)) * 2 + 1
    x, y = x - x.mean(0), y - y.mean(0)
    s1, s2 = np.cov(x, rowvar=False), np.cov(y, rowvar=False)
    zero = np.zeros(d)
    # tr((S1 S2)^(1/2)) is the nuclear norm of X Y^T, of size 20x30, where S1 = X^T X / 19 and S2 = Y^T Y / 29
    root = np.linalg.svd(x @ y.T / np.sqrt(19 * 29), compute_uv=False).sum()
    expected = np.trace(s1) + np.trace(s2) - 2 * root
    there, back = fid.frechet_distance(zero, s1, zero, s2), fid.frechet_distance(zero, s2, zero, s1)
    assert there == pytest.approx(expected, rel=1e-9) and back == pytest.approx(there, rel=1e-9)
    assert 0 <= fid.frechet_distance(zero, s1, zero, s1) < 1e-9 * np.trace(s1)
    assert fid.frechet_distance(zero, 0 * s1, zero, s1) == pytest.approx(np.trace(s1))
    assert fid.frechet_distance(zero, s1, zero, 0 * s1) == pytest.approx(np.trace(s1))


def test_frechet_distance_refuses_other_widths_and_nan():
    with pytest.raises(fid.InputError, match="same width"):
        fid.frechet_distance(np.zeros(2), np.eye(2), np.zeros(3), np.eye(3))
    with pytest.raises(fid.InputError, match="NaN"):
        fid.frechet_distance(np.zeros(2), np.eye(2) * np.nan, np.zeros(2), np.eye(2))


def test_stats_streamed_and_merged_are_numpys():
    # Means up to a million deviations away: summing squares would lose all digits of the covariance in float64.
    x = np.random.default_rng(2).normal(size=(301, 12)) * 1e-2 + np.linspace(1e4, -1e4, 12)
    streamed, left, right = fid.FeatureStats(), fid.FeatureStats(), fid.FeatureStats()
    for i in range(0, 301, 7):
        streamed.update(torch.from_numpy(x[i : i + 7]))
    left.update(x[:100])
    right.update(x[100:101])
    right.update(x[101:])
    left.merge(right)
    left.merge(fid.FeatureStats())
    for stats in (streamed, left):
        assert stats.n == 301
        np.testing.assert_allclose(stats.mean, x.mean(0), rtol=1e-13)
        np.testing.assert_allclose(stats.cov, np.cov(x, rowvar=False), rtol=1e-6, atol=1e-10)
    with pytest.raises(fid.InputError, match="at least 2"):
        _ = fid.FeatureStats().cov


def test_stats_files(tmp_path):
    path = tmp_path / "stats.npz"
    stats = fid.FeatureStats("FD, random Inception")
    stats.update(np.random.default_rng(3).normal(size=(20, 5)))
    stats.save(path)
    assert os.listdir(tmp_path) == ["stats.npz"]
    again = fid.FeatureStats.load(path)
    assert (again.n, again.metric) == (20, stats.metric)
    np.testing.assert_array_equal(again.mean, stats.mean)
    np.testing.assert_allclose(again.cov, stats.cov, rtol=1e-14)
    again.update(np.ones((3, 5)))
    assert again.n == 23

    np.savez(path, mu=stats.mean, sigma=stats.cov)  # as other tools write it
    foreign = fid.FeatureStats.load(path)
    assert foreign.n is None and foreign.metric == "FID"
    np.testing.assert_array_equal(foreign.cov, stats.cov)
    with pytest.raises(fid.InputError, match="number of images"):
        foreign.update(np.ones((3, 5)))


@pytest.mark.parametrize(
    "arrays, message",
    [
        ({"mu": np.zeros(3)}, "needs the arrays mu and sigma, has mu"),
        ({"mu": np.zeros(3), "sigma": np.eye(4)}, r"\(4, 4\)"),
        ({"mu": np.array([{}]), "sigma": np.eye(1)}, "not an .npz"),
    ],
)
def test_stats_files_that_do_not_fit(tmp_path, arrays, message):
    np.savez(tmp_path / "bad.npz", **arrays)
    with pytest.raises(fid.InputError, match=message):
        fid.FeatureStats.load(tmp_path / "bad.npz")
    (tmp_path / "text.npz").write_text("no zip")
    with pytest.raises(fid.InputError, match="text.npz: not an .npz"):
        fid.FeatureStats.load(tmp_path / "text.npz")


def test_kernel_distance_is_the_unbiased_mmd():
    rng = np.random.default_rng(4)
    x, y = rng.normal(size=(9, 4)), rng.normal(size=(9, 4)) + 0.5

    def kernel(a, b):
        return (sum(p * q for p, q in zip(a, b, strict=True)) / 4 + 1) ** 3

    pairs = [(i, j) for i in range(9) for j in range(9)]
    within = sum(kernel(x[i], x[j]) + kernel(y[i], y[j]) for i, j in pairs if i != j) / (9 * 8)
    expected = within - 2 * sum(kernel(x[i], y[j]) for i, j in pairs) / 81
    mean, std = fid.kernel_distance(torch.from_numpy(x), y)
    assert mean == pytest.approx(expected, rel=1e-10) and std == 0

    # Without bias the mean over subsets is that of the whole; a set against itself scatters around 0 or below.
    mean, std = fid.kernel_distance(x, y, subset_size=4, n_subsets=4000)
    assert std > 0 and abs(mean - expected) < 4 * std / np.sqrt(4000)
    assert fid.kernel_distance(x, y, subset_size=4) == fid.kernel_distance(x, y, subset_size=4)
    assert fid.kernel_distance(x, x)[0] < 0
    with pytest.raises(fid.InputError, match="2 or more"):
        fid.kernel_distance(x[:1], y)


# fid.py: the network and its weights


def test_inception_has_the_public_keys():
    with torch.device("meta"):
        state = fid.FIDInceptionV3().state_dict()
    assert len(state) == 566
    assert sum(tensor.numel() for tensor in state.values()) == 23885486
    shapes = {
        "Conv2d_1a_3x3.conv.weight": (32, 3, 3, 3),
        "Mixed_5b.branch_pool.bn.running_var": (32,),
        "Mixed_6e.branch7x7dbl_5.conv.weight": (192, 192, 1, 7),
        "Mixed_7c.branch3x3dbl_3b.conv.weight": (384, 384, 3, 1),
        "Mixed_7c.branch_pool.bn.num_batches_tracked": (),
        "fc.weight": (1008, 2048),
        "fc.bias": (1008,),
    }
    assert {key: tuple(state[key].shape) for key in shapes} == shapes


def test_random_inception_is_the_same_everywhere(inception):
    state = torch.get_rng_state()
    again = fid.load_inception("random")
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(a, b) for a, b in zip(inception.parameters(), again.parameters(), strict=True))
    assert inception.metric == "FD, random Inception" and not inception.training
    assert not any(parameter.requires_grad for parameter in inception.parameters())


def test_features(inception):
    images = torch.rand(2, 3, 50, 70, generator=torch.Generator().manual_seed(0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        features = inception(images)
    assert features.shape == (2, 2048) and features.dtype == torch.float32
    assert 0.01 < features.std() < 100 and (features != 0).float().mean() > 0.5
    assert (features[0] - features[1]).abs().max() > 1e-3
    resized = torch.nn.functional.interpolate(images, (299, 299), mode="bilinear", align_corners=False)
    torch.testing.assert_close(inception(resized, resize=False), features, rtol=1e-5, atol=1e-5)


def test_poolings_are_those_of_2015(inception):
    # A 2x2 map of ones: average windows without padding keep 1, torchvision's own give 4 / 9.
    block, x = inception.Mixed_6b, torch.ones(1, 768, 2, 2)
    pooled = block.branch_pool(x)
    torch.testing.assert_close(block(x)[:, -192:], pooled)
    # The last block pools by maximum: one bright pixel in the middle of 3x3 fills every window.
    block, x = inception.Mixed_7c, torch.zeros(1, 2048, 3, 3)
    x[:, :, 1, 1] = 1
    torch.testing.assert_close(block(x)[:, -192:], block.branch_pool(torch.ones_like(x)))


def test_weight_files(inception, tmp_path, monkeypatch):
    path = tmp_path / "weights.pth"
    net = fid.FIDInceptionV3().eval()
    fid.init_random(net)
    net.Mixed_7c.branch_pool.bn.running_mean.fill_(-0.5)
    torch.save(net.state_dict(), path)
    loaded = fid.load_inception(path)
    assert loaded.metric == "FID"
    images = torch.rand(1, 3, 32, 32)
    torch.testing.assert_close(loaded(images), net(images), rtol=1e-4, atol=1e-4)  # the folded network is the same
    assert not torch.allclose(loaded(images), inception(images), atol=1e-2)

    monkeypatch.setenv("TORCH_HOME", str(tmp_path))
    monkeypatch.setattr(torch.hub, "_hub_dir", None)
    (tmp_path / "hub/checkpoints").mkdir(parents=True)
    path.rename(tmp_path / "hub/checkpoints" / fid.WEIGHTS_URL.rpartition("/")[2])
    assert torch.equal(fid.load_inception().fc.weight, net.fc.weight)

    state = {key: value for key, value in net.state_dict().items() if not key.startswith("Mixed_6")}
    torch.save(state, path)
    with pytest.raises(fid.InputError, match='weights.pth: .*"Mixed_6a.branch3x3.conv.weight') as error:
        fid.load_inception(path)
    assert "\n" not in str(error.value) and len(str(error.value)) < 300
    torch.save({**net.state_dict(), "fc.weight": torch.zeros(1000, 2048)}, path)
    with pytest.raises(fid.InputError, match="fc.weight.*1000"):
        fid.load_inception(path)
    path.write_text("<html>not found</html>")
    with pytest.raises(fid.InputError, match="weights.pth: not the weights"):
        fid.load_inception(path)


def test_missing_weights(tmp_path, folders, monkeypatch, capsys):
    def refuse(url, target, *_, **__):
        raise OSError("no\nnetwork")

    monkeypatch.setattr(torch.hub, "_hub_dir", str(tmp_path))
    monkeypatch.setattr(torch.hub, "download_url_to_file", refuse)
    line = error_line(capsys, *folders, "--device", "cpu")
    assert str(tmp_path / "checkpoints/pt_inception-2015-12-05-6726825d.pth") in line and "random" in line
    assert "absent.pth" in error_line(capsys, *folders, "--device", "cpu", "--weights", tmp_path / "absent.pth")


# fid.py: images


def test_every_kind_of_image_becomes_rgb(tmp_path):
    grey = np.arange(64, dtype=np.uint8).reshape(8, 8) * 4
    colour = np.stack([grey, 255 - grey, grey.T], axis=2)
    rgb = Image.fromarray(colour)
    (tmp_path / "deep/er").mkdir(parents=True)
    (tmp_path / ".hidden").mkdir()
    for path in (".hidden/x.png", ".x.png"):
        rgb.save(tmp_path / path)
    (tmp_path / "notes.txt").write_text("no image")
    rgb.save(tmp_path / "rgb.PNG")
    Image.fromarray(grey).save(tmp_path / "deep/grey.png")
    rgb.quantize(64).save(tmp_path / "deep/er/palette.gif")
    Image.merge("RGBA", (*rgb.split(), Image.fromarray(grey))).save(tmp_path / "rgba.png")
    Image.fromarray(grey.astype(np.uint16) * 257).save(tmp_path / "sixteen.png")
    Image.fromarray((grey.astype(np.uint16) * 257).astype(">u2")).save(tmp_path / "sixteen.tif")
    rgb.convert("CMYK").save(tmp_path / "cmyk.tif")
    os.symlink(tmp_path, tmp_path / "deep/loop")
    files = fid.ImageFiles(tmp_path)
    assert files.names == [
        *("cmyk.tif", "deep/er/palette.gif", "deep/grey.png", "rgb.PNG", "rgba.png", "sixteen.png", "sixteen.tif")
    ]
    assert files.check(min_size=8) == [(8, 8)] * 7
    images = {Path(name).name: np.asarray(image) for name, image in zip(files.names, files, strict=True)}
    assert all(image.shape == (8, 8, 3) and image.dtype == np.uint8 for image in images.values())
    for name in ("rgb.PNG", "rgba.png"):
        np.testing.assert_array_equal(images[name], colour)
    for name in ("grey.png", "sixteen.png", "sixteen.tif"):
        np.testing.assert_array_equal(images[name], np.stack([grey] * 3, axis=2))
    assert np.abs(images["cmyk.tif"].astype(int) - colour).max() <= 1
    with pytest.raises(fid.InputError, match="cmyk.tif: 8x8 pixels"):
        files.check(min_size=9)


def test_bad_images_are_named(tmp_path, monkeypatch):
    noise = np.random.default_rng(5).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    Image.fromarray(noise).save(tmp_path / "a.png")
    whole = (tmp_path / "a.png").read_bytes()
    (tmp_path / "b.png").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "c.png").write_bytes(b"nothing")
    files = fid.ImageFiles(tmp_path)
    assert files[0].size == (64, 64)
    for i, name in ((1, "b.png"), (2, "c.png")):
        with pytest.raises(fid.InputError, match=f"{tmp_path}/{name}: not a readable image"):
            files[i]
    with pytest.raises(fid.InputError, match="c.png"):
        files.check()  # b.png has a good header
    for limit in (64 * 64 - 1, 64 * 30):  # Pillow warns above the limit and refuses above twice the limit
        monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", limit)
        with pytest.raises(fid.InputError, match="a.png: more pixels"):
            files[0]


def test_sources_that_are_none(tmp_path):
    (tmp_path / "empty").mkdir()
    (tmp_path / "file.txt").write_text("text")
    zipfile.ZipFile(tmp_path / "empty.zip", "w").close()
    for name, message in [("gone", "no such"), ("empty", "no images"), ("file.txt", "neither"), ("empty.zip", "no im")]:
        with pytest.raises(fid.InputError, match=f"{tmp_path}/{name}: {message}"):
            fid.ImageFiles(tmp_path / name)


def test_zip_and_fingerprint(tmp_path, folders):
    path = tmp_path / "images.zip"
    buffer = io.BytesIO()
    Image.new("L", (5, 4), 7).save(buffer, "png")

    def write(last):
        with zipfile.ZipFile(path, "w") as archive:
            for name in ("b/1.png", "a/2.png", "__MACOSX/._2.png", "readme.txt"):
                archive.writestr(name, buffer.getvalue())
            archive.writestr("z.png", last)

    write(b"broken")
    files = fid.ImageFiles(path)
    assert files.names == ["a/2.png", "b/1.png", "z.png"] and len(files) == 3
    assert files[1].getpixel((0, 0)) == (7, 7, 7)
    copy = pickle.loads(pickle.dumps(files))  # as a worker process gets it, after the file was opened
    assert copy[0].size == (5, 4)
    with pytest.raises(fid.InputError, match="images.zip::z.png: not a readable image"):
        copy[2]
    before = files.fingerprint()
    assert before == copy.fingerprint()
    write(buffer.getvalue())
    assert fid.ImageFiles(path).fingerprint() != before

    files = fid.ImageFiles(folders[0])
    before = files.fingerprint()
    os.utime(Path(folders[0], files.names[0]), ns=(1, 1))
    assert files.fingerprint() != before


def test_clean_resize():
    step = np.zeros((64, 64, 3), dtype=np.uint8)
    step[:, 32:] = (255, 100, 0)
    resized = fid.clean_resize(Image.fromarray(step))
    assert resized.shape == (3, 299, 299) and resized.dtype == np.float32
    assert resized.min() == 0 and resized.max() == 255  # bicubic overshoots at the step, clipped to the range
    assert resized[1].max() > 101 and np.any(resized % 1)  # and within it, unrounded
    stripes = np.broadcast_to(np.arange(1000)[:, None] % 2 * 255, (1000, 1000, 3)).astype(np.uint8)
    inside = fid.clean_resize(Image.fromarray(stripes))[:, :, 9:-9]
    assert np.abs(inside - 127.5).max() < 10  # antialiased to grey


def test_mixed_sizes_and_workers_give_the_same_features(inception, folders, tmp_path):
    paths = sorted(Path(folders[0]).glob("*.png"))[:2]
    for path in paths:
        (tmp_path / path.name).write_bytes(path.read_bytes())
    Image.new("RGB", (30, 20), (250, 20, 90)).save(tmp_path / "z.png")
    state = torch.get_rng_state()
    stats, features = fid.image_stats(fid.ImageFiles(tmp_path), inception, 3, workers=1, keep_features=True)
    assert torch.equal(torch.get_rng_state(), state)
    alone = [torch.from_numpy(np.array(image)).permute(2, 0, 1)[None] / 255 for image in fid.ImageFiles(tmp_path)]
    expected = torch.cat([inception(image) for image in alone])
    torch.testing.assert_close(features, expected, rtol=1e-4, atol=1e-4)
    np.testing.assert_allclose(stats.mean, features.double().mean(0).numpy(), rtol=1e-6)


# fid.py: the command line


def test_command_line(folders, tmp_path, capsys):
    a, b = folders
    saved = tmp_path / "a.npz"
    out, err = command(capsys, a, "--save", saved, "--weights", "random")
    assert out == "" and "6/6" in err and "warning" not in err
    assert sorted(np.load(saved)) == ["metric", "mu", "n", "sigma"]

    out, err = command(capsys, saved, b, "--weights", "random", "--batch-size", "4")
    label, _, number = out.strip().rpartition(" ")
    assert label == "FD, random Inception" and float(number) > 0
    assert err.count("warning: 6 images in") == 2

    out, _ = command(capsys, a, b, "--weights", "random", "--kid", "--json", "--batch-size", "5")
    result = json.loads(out)
    assert result["distance"] == pytest.approx(float(number), rel=1e-4)
    assert (result["metric"], result["images"], result["resize"]) == (label, [6, 6], "pytorch")
    assert result["kid"] > 0 and result["kid_std"] == 0

    out, _ = command(capsys, saved, saved, "--json")
    assert json.loads(out)["distance"] == pytest.approx(0, abs=1e-9)
    assert float(command(capsys, saved, b, "--weights", "random", "--resize", "clean").out.split()[-1]) > 0


def test_command_line_errors(folders, tmp_path, capsys):
    a, b = folders
    np.savez(tmp_path / "narrow.npz", mu=np.zeros(64), sigma=np.eye(64))
    np.savez(tmp_path / "foreign.npz", mu=np.zeros(2048), sigma=np.eye(2048))
    random = ("--device", "cpu", "--weights", "random")
    assert "64 features" in error_line(capsys, tmp_path / "narrow.npz", b, *random)
    assert "same network" in error_line(capsys, a, tmp_path / "foreign.npz", *random)
    assert "--kid" in error_line(capsys, tmp_path / "foreign.npz", b, "--kid", *random)
    assert "no such folder" in error_line(capsys, tmp_path / "gone", b, *random)
    assert "no such folder" in error_line(capsys, a, b, "--save", tmp_path / "gone/x.npz", *random)
    assert "end in .npz" in error_line(capsys, a, b, "--save", "x", *random)
    assert "B is missing" in error_line(capsys, a)
    assert "--resizes" in error_line(capsys, a, b, "--resizes", "clean")
    assert "--batch-size: 0" in error_line(capsys, a, b, "--batch-size", "0")
    assert "--device abacus" in error_line(capsys, a, b, "--device", "abacus")
    assert "--device cuda:99" in error_line(capsys, a, b, "--device", "cuda:99")


def test_an_error_in_a_worker_is_one_line(tmp_path, capsys):
    (tmp_path / "broken.png").write_bytes(b"nothing")
    arguments = ("--weights", "random", "--device", "cpu", "--workers", "1", "--save", tmp_path / "x.npz")
    line = error_line(capsys, tmp_path, *arguments)
    assert line.startswith(f"fid.py: error: {tmp_path}/broken.png: not a readable image (")
    assert not (tmp_path / "x.npz").exists()


def test_two_processes_give_the_number_of_one(folders, tmp_path, capsys):
    arguments = [*folders, "--weights", "random", "--device", "cpu", "--json", "--kid", "--batch-size", "2"]
    one = json.loads(command(capsys, *arguments).out)
    run = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", HERE / "fid.py"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([*run, *arguments], capture_output=True, text=True, env=environment, timeout=120)
    assert done.returncode == 0, done.stderr
    two = json.loads(done.stdout)  # printed once
    assert two.pop("distance") == pytest.approx(one.pop("distance"), rel=1e-4)
    assert two.pop("kid") == pytest.approx(one.pop("kid"), rel=1e-4)
    assert two == one
