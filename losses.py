"""Losses of the two papers, and how an update is taken.

    DCDLoss, PixelLoss                          DCD (arXiv 2212.14169), and the plain feature matching it argues against
    generator_loss, discriminator_loss          adversarial: least squares, hinge, logistic
    PerceptualLoss                              DCD's style and feature terms, in VGG16
    r1_penalty, PathLengthPenalty               StyleGAN2 (arXiv 1912.04958)
    take_step, update_ema, Meter                one update, on any number of processes

DGL-GAN's objective (arXiv 2112.06502) is two generator losses: generator_loss(D_S(fake), mode) + lambda_dgl *
generator_loss(D_T(fake), mode). Differences and means are taken in float32, also under autocast.
"""

import math

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import nn
from torchvision.models import VGG16_Weights
from torchvision.models.vgg import cfgs, make_layers

from fid import fetch_weights
from models import load_file, load_weights, processes

# ----------------------------------------------------------------------------------------------------------------------
# DCD


class DCDLoss(nn.Module):
    """Discriminator-cooperated feature map distillation (arXiv 2212.14169, section 3.1):

        L_DCD = sum_i mean | phi(c_i^S(f_i^S)) - phi(c_i^T(f_i^T)) |

    f_i: the i-th tapped feature map of student and teacher; c_i: its connector, 1x1 convolution, batch norm, ReLU, to
    the channels that the discriminator reads; phi: the teacher's discriminator up to its last hidden activation.

    The teacher's connectors are random projections that never learn: if both sides did, mapping all to zero would
    be optimal. Save them with the run, and broadcast them to all processes. The student's are trained with the student:
    optimise loss.student_connectors.parameters() too.

    Args:
        student_channels, teacher_channels: channels of each tap, lists of equal length.
        discriminator_channels: input channels of the discriminator (3; 6 for a conditional one, all from the tap).
        tap_size: pixels. A tap whose shorter side is smaller is enlarged by the smallest integer that reaches it,
            nearest neighbour: 24 -> 72, 32 -> 64. At the paper's 256x256 a ResNet's taps are 64x64, where a PatchGAN of
            three layers ends in maps of 7x7; from 24x24 it would end in 2x2, and instance norm over four pixels leaves
            little more than signs.
    """

    def __init__(self, student_channels, teacher_channels, discriminator_channels=3, tap_size=64):
        super().__init__()
        if len(student_channels) != len(teacher_channels):
            raise ValueError(f"{len(student_channels)} student taps and {len(teacher_channels)} teacher taps")

        def connector(channels):
            conv = nn.Conv2d(channels, discriminator_channels, 1, bias=False)
            nn.init.normal_(conv.weight, 0.0, 0.02)
            norm = nn.BatchNorm2d(discriminator_channels, track_running_stats=False)
            return nn.Sequential(conv, norm, nn.ReLU())

        self.student_connectors = nn.ModuleList(connector(channels) for channels in student_channels)
        self.teacher_connectors = nn.ModuleList(connector(channels) for channels in teacher_channels)
        self.teacher_connectors.requires_grad_(False)
        self.tap_size = tap_size

    def enlarge(self, maps):
        """Maps (N, C, H, W) -> (N, C, k H, k W), the shorter side at least tap_size."""
        factor = math.ceil(self.tap_size / min(maps.shape[2:]))
        return F.interpolate(maps, scale_factor=factor) if factor > 1 else maps

    def forward(self, student_taps, teacher_taps, phi):
        """Returns the scalar L_DCD.

        Args:
            student_taps, teacher_taps: lists of feature maps (N, C_i, H_i, W_i), pairs of equal N, H and W.
            phi: the discriminator's feature function, maps (N, discriminator_channels, H, W) -> one tensor of features,
                computed image by image (no batch norm). The gradient passes through it: freeze its parameters,
                discriminator.requires_grad_(False), while the student learns, or they accumulate gradients.

        The gradient reaches the student's taps and connectors, not the teacher's. Raises ValueError for another
        number of taps than of connectors, and for pairs of different N, H or W.
        """
        loss = 0.0
        for student_connector, teacher_connector, student_tap, teacher_tap in zip(
            self.student_connectors, self.teacher_connectors, student_taps, teacher_taps, strict=True
        ):
            if (len(student_tap), student_tap.shape[2:]) != (len(teacher_tap), teacher_tap.shape[2:]):
                raise ValueError(f"taps of shapes {tuple(student_tap.shape)} and {tuple(teacher_tap.shape)}")
            student_features = phi(self.enlarge(student_connector(student_tap)))
            with torch.no_grad():
                teacher_features = phi(self.enlarge(teacher_connector(teacher_tap)))
            loss = loss + (student_features.float() - teacher_features.float()).abs().mean()
        return loss


class PixelLoss(nn.Module):
    """Plain feature matching, what DCD argues against: sum_i mean | c_i(f_i^S) - f_i^T |, pixel by pixel.

    c_i: a trained 1x1 convolution from the student's channels to the teacher's. Called as DCDLoss is; phi has no part.
    """

    def __init__(self, student_channels, teacher_channels):
        super().__init__()
        channels = zip(student_channels, teacher_channels, strict=True)
        self.student_connectors = nn.ModuleList(nn.Conv2d(narrow, wide, 1) for narrow, wide in channels)

    def forward(self, student_taps, teacher_taps, phi=None):
        loss = 0.0
        for connector, student_tap, teacher_tap in zip(
            self.student_connectors, student_taps, teacher_taps, strict=True
        ):
            difference = connector(student_tap) - teacher_tap.detach()
            loss = loss + difference.float().abs().mean()
        return loss


# ----------------------------------------------------------------------------------------------------------------------
# Adversarial losses


def generator_loss(logits, mode):
    """What a generator makes small, given a discriminator's logits of its images, of any shape -> the mean, a scalar.

    "lsgan": E[(D(G) - 1)^2]    "hinge": -E[D(G)]    "logistic", non-saturating: E[softplus(-D(G))]

    Raises ValueError for another mode.
    """
    logits = logits.float()
    if mode == "lsgan":
        return (logits - 1).square().mean()
    if mode == "hinge":
        return -logits.mean()
    if mode == "logistic":
        return F.softplus(-logits).mean()
    raise ValueError(f"mode is {mode!r}, expected 'lsgan', 'hinge' or 'logistic'")


def discriminator_loss(real_logits, fake_logits, mode):
    """What a discriminator makes small, given its logits of real images y and generated ones, of any shape -> scalar.

    "lsgan": E[(D(y) - 1)^2] + E[D(G)^2]    "hinge": E[max(0, 1 - D(y))] + E[max(0, 1 + D(G))]
    "logistic": E[softplus(-D(y))] + E[softplus(D(G))]

    Raises ValueError for another mode.
    """
    real, fake = real_logits.float(), fake_logits.float()
    if mode == "lsgan":
        return (real - 1).square().mean() + fake.square().mean()
    if mode == "hinge":
        return F.relu(1 - real).mean() + F.relu(1 + fake).mean()
    if mode == "logistic":
        return F.softplus(-real).mean() + F.softplus(fake).mean()
    raise ValueError(f"mode is {mode!r}, expected 'lsgan', 'hinge' or 'logistic'")


# ----------------------------------------------------------------------------------------------------------------------
# Perceptual loss


class PerceptualLoss(nn.Module):
    """Style and feature distance of two images in VGG16, as DCD weighs them with 1e4 and 10.

    Style: the mean absolute difference of Gram matrices, each divided by C H W, summed over relu1_2, relu2_2, relu3_3
    and relu4_3. Feature: the mean absolute difference at relu2_2. Images go from [-1, 1] to [0, 1] and are not
    normalised further, as in the released code.

    Args:
        weights: "auto" (ImageNet weights of torchvision, from torch's hub cache or downloaded), or that file's path.

    Raises InputError when the weights are missing or do not fit.
    """

    relu1_2, relu2_2, relu3_3, relu4_3 = 3, 8, 15, 22

    def __init__(self, weights="auto"):
        super().__init__()
        path = weights
        if weights == "auto":
            path = fetch_weights(VGG16_Weights.IMAGENET1K_V1.url, "--vgg FILE")
        trained = load_file(path)
        self.features = make_layers(cfgs["D"])[: self.relu4_3 + 1]
        names = [name for name in self.features.state_dict() if f"features.{name}" in trained]
        load_weights(self.features, {name: trained[f"features.{name}"] for name in names}, f"{path}, read as VGG16")
        self.requires_grad_(False)

    def forward(self, images, targets):
        """(N, 3, H, W) in [-1, 1], twice -> (style, feature), two scalars. The gradient reaches images alone."""
        x, y = (images + 1) / 2, (targets.detach() + 1) / 2
        style = 0.0
        for index, layer in enumerate(self.features):
            x, y = layer(x), layer(y)
            if index in (self.relu1_2, self.relu2_2, self.relu3_3, self.relu4_3):
                style = style + (gram_matrix(x) - gram_matrix(y)).abs().mean()
            if index == self.relu2_2:
                feature = (x.float() - y.float()).abs().mean()
        return style, feature


def gram_matrix(x):
    """(N, C, H, W) -> inner products of the channels divided by C H W, (N, C, C), float32."""
    n, c, h, w = x.shape
    with torch.autocast(x.device.type, enabled=False):
        x = x.float().reshape(n, c, h * w)
        return x @ x.mT / (c * h * w)


# ----------------------------------------------------------------------------------------------------------------------
# StyleGAN2's penalties


def r1_penalty(logits, images):
    """E[ |grad_y D(y)|^2 ], the gradient penalty on real images; R1's objective is gamma / 2 times it.

    Args:
        logits: D(images), computed from images that require gradients.
        images: (N, C, H, W).
    """
    (gradient,) = torch.autograd.grad(logits.float().sum(), images, create_graph=True)
    return gradient.float().square().sum((1, 2, 3)).mean()


class PathLengthPenalty(nn.Module):
    """Path length regularisation of StyleGAN2 (arXiv 1912.04958, equation 4): E[ (|J_w^T y| - a)^2 ].

    y is Gaussian noise in image space, J_w the Jacobian of the images with respect to w, a the running mean of the
    lengths with the given decay, kept in the state dict. As in the references, a contains this batch's mean, through
    which the gradient flows too, and moves at every call. Every process has to call it: a is the same in all.
    """

    def __init__(self, decay=0.01):
        super().__init__()
        self.decay = decay
        self.register_buffer("mean", torch.zeros(()))

    def forward(self, images, latents):
        """Images (N, 3, H, W) computed from latents w (N, layers, style_dim) -> the penalty, a scalar."""
        noise = torch.randn_like(images) / math.sqrt(images.shape[2] * images.shape[3])
        (gradient,) = torch.autograd.grad((images * noise).sum(), latents, create_graph=True)
        lengths = gradient.square().sum(2).mean(1).sqrt()
        target = self.mean.lerp(lengths.mean(), self.decay)
        self.mean.copy_(target.detach())
        if processes()[1] > 1:
            dist.all_reduce(self.mean)
            self.mean /= processes()[1]
        return (lengths - target).square().mean()


# ----------------------------------------------------------------------------------------------------------------------
# One update


def take_step(optimizer, loss):
    """One step of the optimiser down the gradient of loss, averaged over the processes."""
    optimizer.zero_grad()
    loss.backward()
    finish_step(optimizer)


def finish_step(optimizer):
    """One step of the optimiser down the gradients that have been gathered, averaged over the processes."""
    average_gradients(optimizer)
    optimizer.step()


def average_gradients(optimizer):
    """Replaces the gradients of the optimiser's parameters by their mean over the processes."""
    world = processes()[1]
    if world == 1:
        return
    parameters = []
    for group in optimizer.param_groups:
        parameters += [p for p in group["params"] if p.grad is not None]
    flat = torch.cat([p.grad.flatten() for p in parameters])
    dist.all_reduce(flat)
    flat /= world
    means = flat.split([p.numel() for p in parameters])
    for p, mean in zip(parameters, means, strict=True):
        p.grad.copy_(mean.view_as(p))


@torch.no_grad()
def update_ema(ema, net, decay, buffers=False):
    """Moves the parameters, and buffers, of a moving average towards net's: ema = decay * ema + (1 - decay) * net."""
    if buffers:
        averages, values = ema.state_dict(), net.state_dict()
    else:
        averages, values = dict(ema.named_parameters()), dict(net.named_parameters())
    torch._foreach_lerp_(list(averages.values()), list(values.values()), 1 - decay)


class Meter:
    """Running means of named losses, for the log; the sums stay on the device until they are read."""

    def __init__(self, sums=()):
        self.sums = dict(sums)  # name: (sum, count)

    def add(self, **losses):
        for name, loss in losses.items():
            total, count = self.sums.get(name, (0.0, 0))
            self.sums[name] = total + loss.detach(), count + 1

    def state(self):
        """The sums as plain numbers: Meter(state) goes on from them."""
        return {name: (float(total), count) for name, (total, count) in self.sums.items()}

    def means(self):
        """{name: mean over steps and processes}; SystemExit when one is not finite. Every process calls it."""
        means = torch.tensor([float(total) / count for total, count in self.sums.values()])
        if processes()[1] > 1:
            dist.all_reduce(means)
            means /= processes()[1]
        means = dict(zip(self.sums, means.tolist(), strict=True))
        for name, mean in means.items():
            if not math.isfinite(mean):
                raise SystemExit(f"error: diverged, the loss {name} is {mean}; the last checkpoint stays")
        return means
