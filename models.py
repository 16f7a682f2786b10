"""Networks of the two papers, their weights on disk, and what a training run needs.

    ResnetGenerator, UnetGenerator, PatchDiscriminator      CycleGAN, Pix2Pix and their compressed forms (DCD)
    StyleGAN2Generator, StyleGAN2Discriminator              StyleGAN2 at any width (DGL-GAN)
    BigGANGenerator, BigGANDiscriminator                    BigGAN at any width (DGL-GAN)
    save, pack, load_generator, load_weights, read_networks, load_nvidia            weights on disk
    parse_run, run_script, save_checkpoint, restore, share_batches, log             a training run
    translate, draw_samples, measure_cost                                           using a compressed generator

State dicts have the keys and shapes of the reference implementations, so their checkpoints load strictly. This file
imports nothing from the rest of the project: copy it beside a student.pt to use the compressed generator.

    python models.py student.pt photos/ translated/                         # translate a picture, or a folder of them
    python models.py student.pt samples/ --count 64 --truncation 0.7        # draw pictures (StyleGAN2, BigGAN)
    python models.py stylegan2-ffhq-config-f.pkl samples/                   # from NVIDIA's files
"""

import argparse
import contextlib
import ctypes
import functools
import io
import json
import math
import multiprocessing
import os
import pickle
import re
import signal
import sys
import textwrap
import time
import warnings
from datetime import timedelta
from pathlib import Path

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode


class InputError(ValueError):
    """Bad input: a message of one line that says what was found, where, and what to do."""


def arguments(scope):
    """Of the locals() that an __init__ begins with its arguments by name: with them the network is built again."""
    return {name: value for name, value in scope.items() if name not in ("self", "__class__")}


# ----------------------------------------------------------------------------------------------------------------------
# Image-to-image generators and the PatchGAN discriminator (CycleGAN, Pix2Pix, DCD)


class InstanceNorm(nn.Module):
    """nn.InstanceNorm2d without affine parameters and running statistics, that keeps the memory in channels_last.

    The instance norm of one image is its batch norm, which knows that layout; the convolutions of the CPU are fastest
    there. On a GPU several images still go through F.instance_norm at once: launches would count for more.
    """

    def forward(self, x):
        """(N, C, H, W) -> the same shape; ValueError for maps of a single pixel."""
        if len(x) == 1:
            return F.batch_norm(x, None, None, training=True)
        if x.is_cuda:
            return F.instance_norm(x)
        return torch.cat([self(image) for image in x.split(1)])


class SeparableConv(nn.Module):
    """3x3 depthwise convolution, instance norm, pointwise convolution (the mobile ResNet of GAN Compression)."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Sequential(
            nn.Conv2d(channels, channels, 3, groups=channels),
            InstanceNorm(),
            nn.Conv2d(channels, channels, 1),
        )

    def forward(self, x):
        return self.conv(x)


class ResnetBlock(nn.Module):
    """x + conv, norm, ReLU, conv, norm; every convolution after a reflection padding."""

    def __init__(self, channels, separable):
        super().__init__()

        def conv():
            return SeparableConv(channels) if separable else nn.Conv2d(channels, channels, 3)

        self.conv_block = nn.Sequential(
            *(nn.ReflectionPad2d(1), conv(), InstanceNorm(), nn.ReLU()),
            nn.Identity(),  # the reference implementations' dropout
            *(nn.ReflectionPad2d(1), conv(), InstanceNorm()),
        )

    def forward(self, x):
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """The ResNet generator of CycleGAN; with separable=True the mobile ResNet of the compression papers.

    Two stride-2 convolutions, nine residual blocks at a quarter of the resolution, two transposed convolutions.

    Args:
        ngf: channels of the first convolution; the residual blocks have 4 ngf.
    """

    tap_layers = (9, 12, 15, 18)
    size_multiple = 4
    facts = {}

    def __init__(self, ngf=64, separable=False):
        super().__init__()
        self.config = arguments(locals())
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(3, ngf, 7), InstanceNorm(), nn.ReLU()]
        for channels in (ngf, 2 * ngf):
            layers += [nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1), InstanceNorm(), nn.ReLU()]
        layers += [ResnetBlock(4 * ngf, separable) for _ in range(9)]
        for channels in (4 * ngf, 2 * ngf):
            layers += [nn.ConvTranspose2d(channels, channels // 2, 3, stride=2, padding=1, output_padding=1)]
            layers += [InstanceNorm(), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, 3, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        self.tap_channels = [4 * ngf] * 4

    def forward(self, x, taps=False):
        """(N, 3, H, W) in [-1, 1] -> the same; H and W multiples of 4.

        With taps=True returns (image, [f_1..f_4]): what enters the first residual block, and the outputs of the blocks
        at one, two and three thirds, each (N, 4 ngf, H/4, W/4) (DCD, section 3.1).
        """
        tapped = []
        for index, layer in enumerate(self.model):
            x = layer(x)
            if index in self.tap_layers:
                tapped.append(x)
        return (x, tapped) if taps else x


class UnetBlock(nn.Module):
    """One level of the U-Net around the next inner one: down-convolution, inner level, up-convolution, skip."""

    def __init__(self, outer, inner, submodule=None, outermost=False):
        super().__init__()
        self.outermost = outermost
        down = nn.Conv2d(outer, inner, 4, stride=2, padding=1)
        joined = 2 * inner if submodule else inner  # an inner level returns its input beside its output
        up = nn.ConvTranspose2d(joined, outer, 4, stride=2, padding=1)
        inside = [InstanceNorm(), submodule] if submodule else []
        layers = [nn.LeakyReLU(0.2), down, *inside, nn.ReLU(), up, InstanceNorm()]
        if outermost:
            layers = [down, submodule, nn.ReLU(), up, nn.Tanh()]
        self.model = nn.Sequential(*layers)

    def forward(self, x, conv_inputs):
        """Appends the input of each convolution, in order of execution, to the list conv_inputs."""
        y = x
        for layer in self.model:
            if isinstance(layer, (nn.Conv2d, nn.ConvTranspose2d)):
                conv_inputs.append(y)
            y = layer(y, conv_inputs) if isinstance(layer, UnetBlock) else layer(y)
        return y if self.outermost else torch.cat([x, y], 1)


class UnetGenerator(nn.Module):
    """The U-Net generator of Pix2Pix: eight halvings, each joined to its mirror image by a skip connection.

    Args:
        ngf: channels of the outermost level; the inner ones have up to 8 ngf.
    """

    size_multiple = 256
    facts = {}

    def __init__(self, ngf=64):
        super().__init__()
        self.config = arguments(locals())
        block = UnetBlock(8 * ngf, 8 * ngf)
        for outer in (8 * ngf, 8 * ngf, 8 * ngf, 4 * ngf, 2 * ngf, ngf):
            block = UnetBlock(outer, min(2 * outer, 8 * ngf), block)
        self.model = UnetBlock(3, ngf, block, outermost=True)
        self.tap_channels = [2 * ngf, 8 * ngf, 16 * ngf, 4 * ngf]

    def forward(self, x, taps=False):
        """(N, 3, H, W) in [-1, 1] -> the same; H and W multiples of 256.

        With taps=True returns (image, [f_1..f_4]): what enters the down-convolutions of levels 3 and 5 and the
        up-convolutions of levels 4 and 2, (N, 2 ngf, H/4, W/4), (N, 8 ngf, H/16, W/16), (N, 16 ngf, H/16, W/16) and
        (N, 4 ngf, H/4, W/4).
        """
        conv_inputs = []
        image = self.model(x, conv_inputs)
        # The down-convolutions of levels 1, 2, .. 8 run first, then the up-convolutions of levels 8, .. 2, 1
        tapped = [conv_inputs[i] for i in (2, 4, 12, 14)]
        return (image, tapped) if taps else image


class PatchDiscriminator(nn.Module):
    """The PatchGAN discriminator of Pix2Pix and CycleGAN: one logit for each overlapping patch of 70x70 pixels.

    Args:
        in_channels: 3, or 6 for the conditional discriminator that reads (input, image) side by side in channels.
        ndf: channels of the first convolution.
    """

    def __init__(self, in_channels=3, ndf=64):
        super().__init__()
        self.config = arguments(locals())
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        for channels, stride in ((ndf, 2), (2 * ndf, 2), (4 * ndf, 1)):
            layers += [nn.Conv2d(channels, 2 * channels, 4, stride, padding=1), InstanceNorm(), nn.LeakyReLU(0.2)]
        layers += [nn.Conv2d(8 * ndf, 1, 4, stride=1, padding=1)]
        self.model = nn.Sequential(*layers)

    def features(self, x):
        """(N, in, H, W) -> the last hidden activation, (N, 8 ndf, H/8 - 1, W/8 - 1).

        H and W of at least 24: of a map of one pixel instance norm leaves nothing.
        """
        return self.model[:-1](x)

    def forward(self, x):
        """(N, in, H, W) in [-1, 1] -> logits (N, 1, H/8 - 2, W/8 - 2)."""
        return self.model(x)


def init_weights(net, std=0.02):
    """Initialises convolutions from N(0, std), biases with 0."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d)):
            nn.init.normal_(module.weight, 0.0, std)
            nn.init.zeros_(module.bias)
    return net


# ----------------------------------------------------------------------------------------------------------------------
# StyleGAN2 (Karras et al., arXiv 1912.04958), in stock operations


def set_clamp(net, clamp):
    """Sets the limit of every layer that can have one."""
    for module in net.modules():
        if hasattr(module, "clamp"):
            module.clamp = clamp


def disable_autocast(x):
    return torch.autocast(x.device.type, enabled=False)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: weights of unit variance, scaled when used; always in float32."""

    def __init__(self, in_features, out_features, bias_init=0.0, lr_multiplier=1.0, activate=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), bias_init))
        self.scale = lr_multiplier / math.sqrt(in_features)
        self.lr_multiplier = lr_multiplier
        self.activate = activate

    def forward(self, x):
        with disable_autocast(x):
            x = F.linear(x.float(), self.weight * self.scale, self.bias * self.lr_multiplier)
            return F.leaky_relu(x, 0.2) * math.sqrt(2) if self.activate else x


class EqualConv2d(nn.Module):
    """Convolution without bias, with equalised learning rate."""

    def __init__(self, in_channels, out_channels, kernel_size, stride=1, padding=0):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_channels, in_channels, kernel_size, kernel_size))
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.stride, self.padding = stride, padding

    def forward(self, x):
        return F.conv2d(x, self.weight * self.scale, stride=self.stride, padding=self.padding)


class BiasLeakyReLU(nn.Module):
    """Adds a bias per channel, leaky ReLU, the gain sqrt(2) that keeps the variance; then within -clamp..clamp."""

    clamp = None

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        bias = self.bias.to(x.dtype)[:, None, None]
        x = F.leaky_relu(x + bias, 0.2) * math.sqrt(2)
        return x if self.clamp is None else x.clamp(-self.clamp, self.clamp)


class Blur(nn.Module):
    """Low-pass filter 1 3 3 1 along both axes, with stride or, upsample=True, after inserting zeros between pixels.

    Runs in the type of its input even under autocast, so that the RGB images stay in float32.
    """

    def __init__(self, padding, stride=1, gain=1.0, upsample=False):
        super().__init__()
        taps = torch.tensor([1.0, 3.0, 3.0, 1.0])
        self.register_buffer("kernel", torch.outer(taps, taps) / 64 * gain)
        self.padding, self.stride = padding, stride
        self.convolve = F.conv_transpose2d if upsample else F.conv2d

    def forward(self, x):
        kernel = self.kernel.to(x.dtype).expand(x.shape[1], 1, 4, 4)
        with disable_autocast(x):
            return self.convolve(x, kernel, stride=self.stride, padding=self.padding, groups=x.shape[1])


class ModulatedConv2d(nn.Module):
    """Convolution whose weights are scaled per sample by a style and normalised again (section 2.2).

    The weights are the same for all samples: scaling the input by the style and the output by the demodulation factor
    equals convolving every sample with weights of its own, and is one ordinary convolution.
    """

    def __init__(self, in_channels, out_channels, kernel_size, style_dim, demodulate=True, upsample=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(1, out_channels, in_channels, kernel_size, kernel_size))
        self.modulation = EqualLinear(style_dim, in_channels, bias_init=1.0)
        self.scale = 1 / math.sqrt(in_channels * kernel_size**2)
        self.padding = kernel_size // 2
        self.demodulate = demodulate
        self.upsample = upsample
        if upsample:
            self.blur = Blur(padding=1, gain=4.0)

    def forward(self, x, style):
        style = self.modulation(style)
        weight = self.weight[0] * self.scale
        x = x * style.to(x.dtype)[:, :, None, None]
        if self.upsample:
            x = self.blur(F.conv_transpose2d(x, weight.transpose(0, 1), stride=2))
        else:
            x = F.conv2d(x, weight, padding=self.padding)
        if self.demodulate:
            with disable_autocast(x):
                power = weight.square().sum((2, 3))  # (out, in)
                demodulation = torch.rsqrt(style.square() @ power.t() + 1e-8)
            x = x * demodulation.to(x.dtype)[:, :, None, None]
        return x


class StyledConv(nn.Module):
    """Modulated convolution, noise of a learned strength that all channels share, bias and leaky ReLU."""

    def __init__(self, in_channels, out_channels, style_dim, upsample=False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, upsample=upsample)
        self.noise = nn.ParameterDict(dict(weight=torch.zeros(1)))
        self.activate = BiasLeakyReLU(out_channels)

    def forward(self, x, style, noise):
        x = self.conv(x, style)
        noise = self.noise.weight * noise
        return self.activate(x + noise.to(x.dtype))


class ToRGB(nn.Module):
    """1x1 convolution to RGB, added in float32 to the upsampled RGB of the resolution below (skip generator)."""

    clamp = None

    def __init__(self, in_channels, style_dim, upsample=True):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.conv = ModulatedConv2d(in_channels, 3, 1, style_dim, demodulate=False)
        if upsample:
            self.upsample = Blur(padding=1, stride=2, gain=4.0, upsample=True)

    def forward(self, x, style, skip=None):
        rgb = self.conv(x, style).float() + self.bias
        if self.clamp is not None:
            rgb = rgb.clamp(-self.clamp, self.clamp)
        return rgb if skip is None else rgb + self.upsample(skip)


def stylegan2_channels(size, channel_multiplier, width):
    """Channels at each resolution 4..size of StyleGAN2 config f (channel_multiplier 2), scaled by width."""
    if size not in (8, 16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"size is {size}, expected a power of two from 8 to 1024")
    channels = {}
    for exponent in range(2, size.bit_length()):
        resolution = 2**exponent
        full = 512 if resolution <= 32 else 16384 // resolution * channel_multiplier
        channels[resolution] = max(1, round(full * width))
    return channels


class StyleGAN2Generator(nn.Module):
    """The generator of StyleGAN2 with skip connections (config f: channel_multiplier 2).

    Args:
        size: side of the images, a power of two from 8 to 1024.
        style_dim: width of z, w and the mapping network.
        n_mlp: layers of the mapping network.
        width: factor on every channel count of the synthesis network; 0.5 is DGL-GAN's half-width student.
        conv_clamp: limit of what a layer gives, after its activation, on both sides of 0; None: no limit.
    """

    facts = {}

    def __init__(self, size, style_dim=512, n_mlp=8, channel_multiplier=2, width=1.0, conv_clamp=None):
        super().__init__()
        self.config = arguments(locals())
        channels = stylegan2_channels(size, channel_multiplier, width)
        self.style_dim = style_dim
        mapping = [EqualLinear(style_dim, style_dim, lr_multiplier=0.01, activate=True) for _ in range(n_mlp)]
        pixel_norm = nn.RMSNorm(style_dim, eps=1e-8, elementwise_affine=False)
        self.style = nn.Sequential(pixel_norm, *mapping)
        self.input = nn.ParameterDict(dict(input=torch.randn(1, channels[4], 4, 4)))
        self.conv1 = StyledConv(channels[4], channels[4], style_dim)
        self.to_rgb1 = ToRGB(channels[4], style_dim, upsample=False)
        self.convs, self.to_rgbs, self.noises = nn.ModuleList(), nn.ModuleList(), nn.Module()
        self.noises.register_buffer("noise_0", torch.randn(1, 1, 4, 4))
        for i, resolution in enumerate(list(channels)[1:]):
            wide = channels[resolution]
            self.convs += [StyledConv(channels[resolution // 2], wide, style_dim, upsample=True)]
            self.convs += [StyledConv(wide, wide, style_dim)]
            self.to_rgbs += [ToRGB(wide, style_dim)]
            for n in (2 * i + 1, 2 * i + 2):
                self.noises.register_buffer(f"noise_{n}", torch.randn(1, 1, resolution, resolution))
        self.n_latent = len(self.convs) + 2
        set_clamp(self, conv_clamp)

    def mean_latent(self, n_samples=4096):
        """Mean of w, (1, style_dim), the centre of truncation: the file's own, or over n_samples random z."""
        device = self.input.input.device
        if "latent_avg" in self.facts:
            return self.facts["latent_avg"].to(device)
        z = torch.randn(n_samples, self.style_dim, device=device)
        return self.style(z).mean(0, keepdim=True)

    def mapping(self, *latents):
        """One z (N, style_dim) or two -> w for every layer, (N, n_latent, style_dim).

        With two latents, layers from a random one on use the second: style mixing.
        """
        w = self.style(torch.cat(latents)).unsqueeze(1).expand(-1, self.n_latent, -1)
        if len(latents) == 1:
            return w.contiguous()
        index = torch.randint(1, self.n_latent, ()).item()
        first, second = w.chunk(2)
        return torch.cat([first[:, :index], second[:, index:]], 1)

    def synthesis(self, latents, fixed_noise=False):
        """w (N, n_latent, style_dim) -> images (N, 3, size, size); fixed_noise: the buffers, not random numbers."""
        noises = list(self.noises.buffers())
        if not fixed_noise:
            noises = [torch.randn(len(latents), *noise.shape[1:], device=noise.device) for noise in noises]
        x = self.input.input.repeat(len(latents), 1, 1, 1)
        x = x.contiguous(memory_format=fast_layout(x.device))
        x = self.conv1(x, latents[:, 0], noises[0])
        image = self.to_rgb1(x, latents[:, 1])
        for i, to_rgb in enumerate(self.to_rgbs):
            n = 2 * i + 1  # the layer; its noise and its w have the same number
            x = self.convs[n - 1](x, latents[:, n], noises[n])
            x = self.convs[n](x, latents[:, n + 1], noises[n + 1])
            image = to_rgb(x, latents[:, n + 2], image)
        return image

    def forward(self, z, fixed_noise=False):
        """z (N, style_dim) from N(0, 1) -> images (N, 3, size, size), trained towards [-1, 1] but not bounded.

        fixed_noise: the same noise for all images, that of the buffers. For truncation move w = mapping(z) towards
        mean_latent() and call synthesis, as draw_samples does.
        """
        return self.synthesis(self.mapping(z), fixed_noise)


def conv_layer(in_channels, out_channels, kernel_size):
    """Convolution of the discriminator, bias and leaky ReLU."""
    conv = EqualConv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)
    return nn.Sequential(conv, BiasLeakyReLU(out_channels))


class ResidualDownBlock(nn.Module):
    """Residual block that halves the side: both branches filter (1 3 3 1) before they take every second pixel."""

    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = conv_layer(in_channels, in_channels, 3)
        strided = EqualConv2d(in_channels, out_channels, 3, stride=2)
        self.conv2 = nn.Sequential(Blur(padding=2), strided, BiasLeakyReLU(out_channels))
        # The pixels that a strided 1x1 convolution would skip are not filtered at all
        self.skip = nn.Sequential(Blur(padding=1, stride=2), EqualConv2d(in_channels, out_channels, 1))

    def forward(self, x):
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class StyleGAN2Discriminator(nn.Module):
    """The residual discriminator of StyleGAN2, with minibatch standard deviation over groups of four.

    Args:
        size: side of the images, a power of two from 8 to 1024.
        width: factor on every channel count.
        conv_clamp: as the generator's; the skip connections are free.
        mbstd_group: images in a group of the standard deviation, at most; None: the whole batch.
    """

    def __init__(self, size, channel_multiplier=2, width=1.0, conv_clamp=None, mbstd_group=4):
        super().__init__()
        self.config = arguments(locals())
        self.mbstd_group = mbstd_group
        channels = stylegan2_channels(size, channel_multiplier, width)
        falling = sorted(channels, reverse=True)
        down = [ResidualDownBlock(channels[r], channels[r // 2]) for r in falling[:-1]]
        self.convs = nn.Sequential(conv_layer(3, channels[size], 1), *down)
        self.final_conv = conv_layer(channels[4] + 1, channels[4], 3)
        self.final_linear = nn.Sequential(
            EqualLinear(channels[4] * 16, channels[4], activate=True), EqualLinear(channels[4], 1)
        )
        set_clamp(self, conv_clamp)

    def forward(self, images):
        """(N, 3, size, size) -> logits (N, 1), float32.

        The standard deviation is taken over groups of the largest size up to mbstd_group that divides N; of four
        images samples n, n + N/4, ..
        """
        x = self.convs(images)
        n, c, h, w = x.shape
        limit = n if self.mbstd_group is None else self.mbstd_group
        group = next(g for g in range(limit, 0, -1) if n % g == 0)
        with disable_autocast(x):
            variance = x.float().view(group, n // group, c, h, w).var(0, correction=0)
            deviation = (variance + 1e-8).sqrt().mean((1, 2, 3))
        deviation = deviation.to(x.dtype).repeat(group).view(n, 1, 1, 1).expand(n, 1, h, w)
        x = self.final_conv(torch.cat([x, deviation], 1))
        return self.final_linear(x.flatten(1))


# ----------------------------------------------------------------------------------------------------------------------
# BigGAN (Brock et al., arXiv 1809.11096)


class SpectralLayer(nn.Module):
    """Convolution (weight of four dimensions) or linear layer (of two), the weight divided by its spectral norm.

    The norm is estimated by one power step from u0, in eval mode too, so that an averaged u0 does no harm. Training
    stores the step's u in u0 and the norm in sv0. The gradient passes through the norm, but not through u and v.
    """

    def __init__(self, *shape, bias=True):
        super().__init__()
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bound, bound)) if bias else None
        self.register_buffer("u0", torch.randn(1, shape[0]))
        self.register_buffer("sv0", torch.ones(1))

    def normalised_weight(self):
        """W / sigma: v = unit(W^T u0), u = unit(W v), sigma = u . W v. In the type of W, even under autocast."""
        weight = self.weight
        # Any order of the columns gives the same sigma: take the one that needs no copy.
        matrix = (weight if weight.is_contiguous() else weight.movedim(1, -1)).flatten(1)
        with disable_autocast(weight):
            with torch.no_grad():
                v = F.normalize(torch.mv(matrix.t(), self.u0[0]), dim=0)
            product = torch.mv(matrix, v)
            u = F.normalize(product.detach(), dim=0)
            sigma = torch.dot(product, u)
            if self.training:
                self.u0.copy_(u)
                self.sv0.copy_(sigma.detach())
            return weight / sigma

    def forward(self, x):
        weight = self.normalised_weight()
        if weight.ndim == 2:
            return F.linear(x, weight, self.bias)
        return F.conv2d(x, weight, self.bias, padding=weight.shape[2] // 2)


class SelfAttention(nn.Module):
    """x + gamma * attention of every position to the 2x2 max-pooled ones (arXiv 1805.08318), dot products unscaled."""

    def __init__(self, channels):
        super().__init__()
        if channels < 8:
            raise InputError(f"attention needs 8 channels or more, found {channels}: raise ch, or --attention 0")
        self.theta = SpectralLayer(channels // 8, channels, 1, 1, bias=False)
        self.phi = SpectralLayer(channels // 8, channels, 1, 1, bias=False)
        self.g = SpectralLayer(channels // 2, channels, 1, 1, bias=False)
        self.o = SpectralLayer(channels, channels // 2, 1, 1, bias=False)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        query = self.theta(x).flatten(2).mT  # (N, positions, channels)
        key = F.max_pool2d(self.phi(x), 2).flatten(2).mT
        value = F.max_pool2d(self.g(x), 2).flatten(2).mT
        if x.is_cuda:  # fast kernels take multiples of 8 channels, and zeros change nothing
            padding = (0, -query.shape[2] % 8)
            query, key = F.pad(query, padding), F.pad(key, padding)
        # One head: (N, 1, positions, channels)
        attended = F.scaled_dot_product_attention(query[:, None], key[:, None], value[:, None], scale=1.0)
        attended = attended.mT.reshape(len(x), -1, *x.shape[2:])
        return x + self.gamma * self.o(attended)


class BatchNorm(nn.Module):
    """BN(x) * gain + bias, with parameters; or BN(x) * (1 + gain(v)) + bias(v), with maps of a condition v."""

    def __init__(self, channels, gain, bias):
        super().__init__()
        self.gain, self.bias = gain, bias
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x, v=None):
        if v is None:
            return F.batch_norm(x, self.stored_mean, self.stored_var, self.gain, self.bias, self.training)
        normalised = F.batch_norm(x, self.stored_mean, self.stored_var, training=self.training)
        gain = (1 + self.gain(v)).to(x.dtype)
        bias = self.bias(v).to(x.dtype)
        return normalised * gain[:, :, None, None] + bias[:, :, None, None]


class GeneratorBlock(nn.Module):
    """Residual block that doubles the side; both branches are enlarged before their convolutions."""

    def __init__(self, in_channels, out_channels, make_map):
        super().__init__()
        self.conv1 = SpectralLayer(out_channels, in_channels, 3, 3)
        self.conv2 = SpectralLayer(out_channels, out_channels, 3, 3)
        self.conv_sc = SpectralLayer(out_channels, in_channels, 1, 1)
        self.bn1 = BatchNorm(in_channels, make_map(in_channels), make_map(in_channels))
        self.bn2 = BatchNorm(out_channels, make_map(out_channels), make_map(out_channels))

    def forward(self, x, v):
        h = F.interpolate(F.relu(self.bn1(x, v), inplace=True), scale_factor=2)
        h = F.relu(self.bn2(self.conv1(h), v), inplace=True)
        return self.conv2(h) + self.conv_sc(F.interpolate(x, scale_factor=2))


class DiscriminatorBlock(nn.Module):
    """Residual block, wide form; halve: average pooling at the end; first: reads images, so no ReLU at the entry."""

    def __init__(self, in_channels, out_channels, first, halve):
        super().__init__()
        self.conv1 = SpectralLayer(out_channels, in_channels, 3, 3)
        self.conv2 = SpectralLayer(out_channels, out_channels, 3, 3)
        self.conv_sc = nn.Identity()
        if halve or in_channels != out_channels:
            self.conv_sc = SpectralLayer(out_channels, in_channels, 1, 1)
        self.first, self.halve = first, halve

    def forward(self, x):
        h = x if self.first else F.relu(x)  # not in place: the shortcut takes x as it is
        h = self.conv1(h)
        h = self.conv2(F.relu(h, inplace=True))
        if self.first:  # a 1x1 convolution and pooling commute: images are pooled first, three channels being few
            return F.avg_pool2d(h, 2) + self.conv_sc(F.avg_pool2d(x, 2))
        h = h + self.conv_sc(x)
        return F.avg_pool2d(h, 2) if self.halve else h


def biggan_channels(size, ch):
    """Channels of the generator's 4x4 start and after each of its blocks, and after each of the discriminator's."""
    factors = {
        32: (4, 4, 4, 4),
        64: (16, 16, 8, 4, 2),
        128: (16, 16, 8, 4, 2, 1),
        256: (16, 16, 8, 8, 4, 2, 1),
    }
    if size not in factors:
        raise ValueError(f"size is {size}, expected 32, 64, 128 or 256")
    of_generator = [ch * factor for factor in factors[size]]
    of_discriminator = of_generator[::-1]
    if size == 64:  # no mirror image: (1, 2, 4, 8, 16), as released
        of_discriminator = [ch, *of_discriminator[:-1]]
    return of_generator, of_discriminator


class BigGANGenerator(nn.Module):
    """The generator of BigGAN: class and latent condition the batch norm of every block.

    Args:
        size: side of the images, 32, 64, 128 or 256.
        ch: channel multiplier, 96 in the paper; 48 is DGL-GAN's half-width student.
        dim_z: length of z; when hierarchical, rounded down to a multiple of the chunks: read self.dim_z.
        shared_dim: length of the class embedding that all norms share; None: a table of classes in every norm (CIFAR).
        hierarchical: z is cut into equal chunks, the first for the 4x4 start and one for each block.
        attention: side of the maps that an attention layer reads; none for a side that no block has, and for None.

    Raises ValueError for another size, InputError for hierarchical without a shared embedding to join the chunks to.
    """

    facts = {}

    def __init__(self, size, ch=96, n_classes=1000, dim_z=120, shared_dim=128, hierarchical=True, attention=64):
        super().__init__()
        self.config = arguments(locals())
        if hierarchical and not shared_dim:
            raise InputError("hierarchical needs a shared embedding: --shared-dim, or --no-hierarchical")
        (start, *widths), _ = biggan_channels(size, ch)
        self.n_chunks = len(widths) + 1 if hierarchical else 1
        chunk = dim_z // self.n_chunks
        self.dim_z = chunk * self.n_chunks

        def make_map(channels):
            if not shared_dim:
                return nn.Embedding(n_classes, channels)
            condition_dim = shared_dim + chunk if hierarchical else shared_dim
            return SpectralLayer(channels, condition_dim, bias=False)

        self.shared = nn.Embedding(n_classes, shared_dim) if shared_dim else nn.Identity()
        self.linear = SpectralLayer(16 * start, chunk)
        self.blocks = nn.ModuleList()
        for i, (before, after) in enumerate(zip([start, *widths], widths, strict=False)):
            self.blocks.append(nn.ModuleList([GeneratorBlock(before, after, make_map)]))
            if 8 * 2**i == attention:
                self.blocks[i].append(SelfAttention(after))
        wide = widths[-1]
        norm = BatchNorm(wide, nn.Parameter(torch.ones(wide)), nn.Parameter(torch.zeros(wide)))
        self.output_layer = nn.Sequential(norm, nn.ReLU(inplace=True), SpectralLayer(3, wide, 3, 3))

    def forward(self, z, y):
        """Latents z (N, dim_z) from N(0, 1) and classes y -> images (N, 3, size, size) in [-1, 1], in z's type.

        y: labels (N,), integer; or embedded classes (N, shared_dim), self.shared(labels), which can be mixed.
        """
        v = y if y.is_floating_point() else self.shared(y)
        first, *chunks = z.chunk(self.n_chunks, 1)
        conditions = [v] * len(self.blocks)
        if chunks:
            conditions = [torch.cat([v, chunk], 1) for chunk in chunks]
        x = self.linear(first).view(len(z), -1, 4, 4)
        for layers, condition in zip(self.blocks, conditions, strict=True):
            x = layers[0](x, condition)
            for attention in layers[1:]:
                x = attention(x)
        return torch.tanh(self.output_layer(x).to(z.dtype))


class BigGANDiscriminator(nn.Module):
    """The projection discriminator of BigGAN; arguments as BigGANGenerator's."""

    def __init__(self, size, ch=96, n_classes=1000, attention=64):
        super().__init__()
        self.config = arguments(locals())
        _, widths = biggan_channels(size, ch)
        halvings = 2 if size == 32 else len(widths) - 1
        self.blocks = nn.Sequential()
        for i, (before, after) in enumerate(zip([3, *widths], widths, strict=False)):
            layers = [DiscriminatorBlock(before, after, first=i == 0, halve=i < halvings)]
            if size >> min(i + 1, halvings) == attention:
                layers += [SelfAttention(after)]
            self.blocks.append(nn.Sequential(*layers))
        self.linear = SpectralLayer(1, widths[-1])
        self.embed = SpectralLayer(n_classes, widths[-1], bias=False)  # one row a class

    def forward(self, images, labels):
        """(N, 3, size, size) in [-1, 1] and their classes (N,) -> logits (N, 1), in the type of the weights."""
        x = self.blocks(images)
        with disable_autocast(x):
            h = F.relu(x).sum((2, 3), dtype=self.linear.weight.dtype)
            projection = F.embedding(labels, self.embed.normalised_weight()) * h
            return self.linear(h) + projection.sum(1, keepdim=True)


def init_biggan(net, orthogonal=True):
    """Initialises all weights but biases: orthogonal (ImageNet), or from N(0, 0.02) (CIFAR)."""
    for module in net.modules():
        if isinstance(module, (SpectralLayer, nn.Embedding)):
            if orthogonal:
                nn.init.orthogonal_(module.weight)
            else:
                nn.init.normal_(module.weight, 0.0, 0.02)
    return net


# ----------------------------------------------------------------------------------------------------------------------
# Weights on disk


def write_atomically(path, write):
    """Calls write(file) on a temporary file beside path, flushes it to disk, and moves it into place.

    A process that is killed at any moment leaves the old file or the new one, whole. Raises OSError (disk full, no
    permission), the old file being untouched.
    """
    temporary = Path(f"{path}.tmp")
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except (OSError, RuntimeError) as error:  # the second is torch's word for a full disk
        raise OSError(f"{path}: not written, what was there stays ({error})") from error
    finally:
        temporary.unlink(missing_ok=True)


def load_file(path):
    """Reads a checkpoint: a dictionary of tensors, containers, numbers, strings and argparse.Namespace; or NVIDIA's.

    Nothing in it is executed. Raises InputError when the file is missing, truncated, or holds anything else.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: not a file")
    if is_nvidia_pickle(path):
        return {name: pack(net) for name, net in load_nvidia(path).items()}
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):
            content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises nearly anything on a file of another kind
        problem = f"not a checkpoint of plain tensors, or damaged ({type(error).__name__})"
        raise InputError(f"{path}: {problem}; nothing in it was run") from error
    if not isinstance(content, dict):
        raise InputError(f"{path}: expected a checkpoint, names to tensors, found {type(content).__name__}")
    return content


def save(path, networks):
    """On rank 0, writes what load_file reads of a network, or of several by name, as teacher.pt: see pack."""
    if processes()[0] > 0:
        return
    if isinstance(networks, nn.Module):
        content = pack(networks)
    else:
        content = {name: pack(net) for name, net in networks.items()}
    write_atomically(path, lambda file: torch.save(content, file))


def pack(net):
    """What a file of ours holds of a network: its weights, how to build it again, and facts for those who use it."""
    state_dict = {key: value.cpu() for key, value in net.state_dict().items()}
    config, facts = getattr(net, "config", {}), getattr(net, "facts", {})
    return dict(network=type(net).__name__, config=config, state_dict=state_dict, facts=facts)


def adapt_reference_keys(state_dict):
    """Renames what the reference implementations' checkpoints spell differently.

    Three things: a "module." in front of every key (DataParallel), running statistics of instance norms (CycleGAN
    before 2018), and residual blocks without the dropout slot, where the second convolution is layer 5 and not 6.
    """
    adapted = {}
    for key, value in state_dict.items():
        name = key.removeprefix("module.").replace(".conv_block.5.", ".conv_block.6.")
        if not name.endswith(("running_mean", "running_var", "num_batches_tracked")):
            adapted[name] = value
    return adapted


def read_config(record):
    """The arguments of a packed network's __init__; without sn_eps, an option of BigGAN's that never acted."""
    return {name: value for name, value in record.get("config", {}).items() if name != "sn_eps"}


def load_weights(net, record, source):
    """Loads a network's weights strictly, the reference implementations' spelling included.

    Args:
        record: what pack returns, and net becomes a network of that configuration; or a bare state dict that fits net.
        source: named in the message of the InputError for another class or direction (if both have one), for a
            configuration that cannot be built, and for the first parameter that does not fit.
    """
    name, config = type(net).__name__, read_config(record)
    if record.get("network", name) != name:
        raise InputError(
            f"{source}: holds a {record['network']}, expected a {name}: choose another file or architecture"
        )
    ours = getattr(net, "facts", {}).get("direction")
    theirs = record.get("facts", {}).get("direction", ours)
    if ours and theirs != ours:
        raise InputError(f"{source}: its direction is {theirs}, expected {ours}")
    try:
        if config and config != net.config:
            training = net.training
            net.__init__(**config)  # anew, in place and on the CPU
            net.train(training)
        net.load_state_dict(adapt_reference_keys(record.get("state_dict", record)))
    except (AttributeError, TypeError, ValueError, RuntimeError) as error:  # of a RuntimeError the first line says less
        reason = textwrap.shorten(str(error).partition("\n")[2] or str(error), 200)
        raise InputError(f"{source}: does not fit this {name}: {reason}") from error


def load_networks(networks, records):
    """Loads those of the networks (name to module) that records (name to what load_weights takes) holds."""
    for name, net in networks.items():
        if name in records:
            source = records[name].get("source", f"the weights of {name}")
            load_weights(net, records[name], source)


def read_networks(paths, names):
    """Reads trained networks -> {name: what load_weights takes, and its source}, those of the names that there are.

    paths: a file for each of the names, in order; or one that has them by name: DCD's checkpoint.pt, a pair
    {g, d, g_ema} of ours or of rosinality's, NVIDIA's; or None.
    Raises InputError where there are none, or more files than names.
    """
    if not paths:
        return {}
    files = [load_file(path) for path in paths]
    content = files[0].get("networks", files[0])
    given = " ".join(map(str, paths))
    most = 1
    if "networks" not in files[0] and content.keys().isdisjoint([*names, "g", "d"]):
        most = len(names)
        content = dict(zip(names, files, strict=False))
    records = {}
    for name in names:
        if name in content:
            record = content[name]
            if not isinstance(record, dict) or "state_dict" not in record:
                record = dict(state_dict=record)
            records[name] = record | dict(source=f"{given}, read as {name}")
    if not records or len(files) > most:
        raise InputError(f"{given}: expected {', '.join(names)}, a file each, or one that has them by these names")
    return records


def check_stages(args):
    """Settles the stages of a DGL script, what is given being trained already; InputError if they cannot be."""
    if args.teacher:
        args.teacher_kimg = 0.0
    if args.student:
        args.stage1_kimg = 0.0
    if not (args.teacher_kimg or args.stage1_kimg or args.stage2_kimg):
        raise InputError("--teacher-kimg, --stage1-kimg and --stage2-kimg are all 0: nothing to train")
    if args.stage2_kimg and not (args.teacher or args.teacher_kimg):
        raise InputError("stage 2 needs a teacher: give --teacher FILE or a --teacher-kimg, or --stage2-kimg 0")


def load_given(args, checkpoint, networks, teacher_names):
    """Loads a DCD script's networks, given by name: the checkpoint's when resuming, else those of --teacher, --student.

    Networks of other widths are rebuilt in place. teacher_names: in the order of --teacher's files.
    """
    for name in ("teacher_G", "student_G"):  # stored with their weights, and compared where they are loaded
        networks[name].facts = dict(size=args.crop_size, direction=args.direction)
    if checkpoint:
        records = checkpoint["networks"]
        records.setdefault("student_G_ema", records["student_G"])  # older runs had none without a half-life
    else:
        records = read_networks(args.teacher, teacher_names) | read_networks(args.student, ["student_G"])
    load_networks(networks, records)
    if args.d_fakes == "none" and "teacher_D" not in records:
        raise InputError("--d-fakes none: --teacher needs its trained D_T too")


def read_pairs(args):
    """Reads the pairs of a DGL script's --teacher and --student -> {"teacher_d": what load_weights takes, ..}.

    args take what the files' configurations say of them, so that a student is built as a given teacher, but for the
    width. Raises InputError for another --size, and for a pair without a network that is needed: of a teacher D, of a
    student D, G and its average.
    """
    records = {}
    for role, needed, useful in (("teacher", ["d"], "g_ema"), ("student", ["d", "g_ema", "g"], "path")):
        pair = read_networks(getattr(args, role), [*needed, useful])
        for name in needed:
            if pair and name not in pair:
                raise InputError(f"--{role}: has no {name!r}, expected the networks g, d and g_ema")
        for name, record in pair.items():
            config = record.get("config", {})
            size = config.get("size", args.size)
            if size != args.size:
                raise InputError(f"--{role}: its images are of {size} pixels, not of {args.size}: give --size {size}")
            for option in vars(args).keys() & config.keys():
                setattr(args, option, config[option] or 0)  # on the command line None is 0
            records[f"{role}_{name}"] = record
    return records


def load_generator(path, device="cpu"):
    """Rebuilds a generator, in eval mode on device: a student's, or G's average of a pair or of NVIDIA's.

    What the file says besides is in its attribute facts: size (pixels, of training), direction, classes.
    Raises InputError when the file is missing, damaged or something else.
    """
    names = ["g_ema", "student_g_ema", "student_G_ema", "student_G"]
    record = next(iter(read_networks([path], names).values()))
    classes = {cls.__name__: cls for cls in (ResnetGenerator, UnetGenerator, StyleGAN2Generator, BigGANGenerator)}
    try:
        net = classes[record["network"]](**read_config(record))
    except (KeyError, TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"{path}: no generator that can be built ({error!r}), expected a student.pt") from error
    load_weights(net, record, path)
    net.facts = record.get("facts", {})
    return net.to(device).eval()


# NVIDIA's StyleGAN2 pickles. Weights are called as in stylegan2-ada-pytorch: "synthesis.b64.conv0.bias".


def noise_layer(match):
    """For re.sub: noise number n of a generator, as we and TensorFlow count -> the layer that adds it."""
    n = int(match[1]) + 1
    return f"b{4 << n // 2}.conv{n % 2}.noise_const"


# Replaced one after the other: in our names of a generator's weights, and in TensorFlow's names in lower case.
NVIDIA_GENERATOR = {
    r"^style\.(\d+)": lambda match: f"mapping.fc{int(match[1]) - 1}",
    r"^convs\.(\d+)": lambda match: f"synthesis.b{8 << int(match[1]) // 2}.conv{int(match[1]) % 2}",
    r"^to_rgbs\.(\d+)": lambda match: f"synthesis.b{8 << int(match[1])}.torgb",
    r"^conv1\.": "synthesis.b4.conv1.",
    r"^to_rgb1\.": "synthesis.b4.torgb.",
    r"^input\.input": "synthesis.b4.const",
    r"^noises\.": "synthesis.",
    r"\bnoise_(\d+)$": noise_layer,
    r"conv\.modulation\.": "affine.",
    r"conv\.weight$": "weight",
    r"noise\.weight$": "noise_strength",
    r"activate\.bias$": "bias",
}
TENSORFLOW_NAMES = {
    r"^dlatent_avg$": "mapping.w_avg",
    r"^mapping\.dense": "mapping.fc",
    r"^synthesis\.4x4/conv/": "synthesis.4x4/conv1/",
    r"^4x4/dense0/": "4x4/fc/",
    r"^output/": "4x4/out/",
    r"\bnoise(\d\d?)$": noise_layer,
    r"\b(\d+)x\1/": r"b\1.",
    r"\bconst/": "",
    "_up|_down": "",
    "mod_": "affine.",
    "/": ".",
}
NVIDIA_OPTIONS = {  # what another value than ours makes of a network: what it is called, in TensorFlow too, and ours
    "class-conditional": (r"\b(c_dim|label_size)$", 0),
    "not RGB": (r"(\bimg_channels|^num_channels)$", 3),
    "a generator of another architecture": (r"^synthesis\.b\d+\.architecture$", "skip"),
    "a discriminator of another architecture": (r"^b\d+\.architecture$", "resnet"),
    "a generator without noise": (r"\buse_noise$", True),
    "a mapping that keeps the length of z": (r"\bnormalize_latents$", True),
    "a mapping with another learning rate": (r"^(mapping\.fc\d+\.bias_gain|mapping_lrmul)$", 0.01),
    "another activation": (r"\b(conv\d?|fromrgb|fc\d*)\.activation$|nonlinearity$", "lrelu"),
    "another filter": (r"^resample_kernel$", [1, 3, 3, 1]),
    "another minibatch standard deviation": (r"\bmbstd(\.num_channel|_num_feature)s$", 1),
}


def is_nvidia_pickle(path):
    """Whether the file is a plain pickle, as NVIDIA's are: it begins as neither a zip nor one of torch's."""
    with open(path, "rb") as file:
        start = file.read(32)
    return start[:1] == b"\x80" and torch.serialization.MAGIC_NUMBER.to_bytes(10, "little") not in start


def load_nvidia(path):
    """Reads NVIDIA's pickle of a StyleGAN2: stylegan2-ada-pytorch's, TensorFlow's, stylegan3's (of a StyleGAN3 its D).

    Nothing that the file names is called, and no source text in it is run: see unpickle_nvidia.

    Returns a dict of g, d, g_ema: our networks with the file's configuration and weights, in eval mode, but for those
    refused; g_ema.facts has latent_avg, the centre of truncation. Prints a line for each network, its configuration or
    why it is refused, and one for what had to be assumed.

    Raises InputError when the file is missing, damaged or asks for anything else, and when g_ema and d are refused.
    """
    try:
        with open(path, "rb") as file, warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of odd pickles, which are then read or refused
            networks, notes = convert_nvidia(unpickle_nvidia(file))
    except InputError as error:
        raise InputError(f"{path}: {error}") from error
    except Exception as error:  # an unpickler raises nearly anything on damaged bytes
        found = f"damaged, or not a StyleGAN2 of NVIDIA's ({type(error).__name__})"
        raise InputError(f"{path}: {found}; nothing in it was run; copy it again") from error
    for note in notes:
        say(f"{path}: {note}")
    return networks


def unpickle_nvidia(file):
    """Reads a pickle, calling only the functions and the class below, in place of those that it names.

    They are new for each file, since a pickle can set attributes of what it is handed. A module of PyTorch becomes a
    dict, its state; an array or a network of TensorFlow an object with .state, which holds what was pickled of it.

    Raises InputError for a file that names anything else, nearly any exception for a damaged one.
    """

    class Stub:
        def __init__(self, *arguments):
            self.arguments = arguments

        def __setstate__(self, state):
            self.state = state

    def scalar(dtype, data):
        return read_numbers(dtype, data).item()

    def load_storage(data):
        storage = torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        return torch.empty(0, dtype=storage.dtype).set_(storage)

    def rebuild_tensor(numbers, offset, size, stride, *_):
        if math.prod(size) > len(numbers):  # strides of 0 would make a few numbers a tensor of any size
            raise InputError(f"it has a tensor of size {size} in {len(numbers)} numbers")
        return numbers.as_strided(size, stride, offset)

    answers = {
        "torch_utils.persistence._reconstruct_persistent_obj": lambda meta: meta["state"],
        "torch.storage._load_from_bytes": load_storage,
        "torch._utils._rebuild_tensor_v2": rebuild_tensor,
        "torch._utils._rebuild_parameter": lambda tensor, *_: tensor,
        "torch._utils._rebuild_parameter_with_state": lambda tensor, *_: tensor,
        "collections.OrderedDict": dict,
        "dnnlib.util.EasyDict": dict,
        "dnnlib.tflib.network.Network": Stub,
        "builtins.set": set,
        "numpy.ndarray": Stub,
        "numpy.dtype": Stub,
        "numpy.core.multiarray._reconstruct": Stub,
        "numpy.core.multiarray.scalar": scalar,
        "numpy._core.multiarray._reconstruct": Stub,
        "numpy._core.multiarray.scalar": scalar,
    }

    class Unpickler(pickle._Unpickler):  # the one in C reserves as much memory as a damaged index asks for
        def find_class(self, module, name):
            asked = f"{module}.{name}"
            if asked not in answers:
                raise InputError(f"it asks for {asked!r}, which no StyleGAN2 needs; don't trust this file")
            return answers[asked]

    return Unpickler(file).load()


def read_numbers(dtype, data):
    """The type, a Stub, and the bytes of an array or a number of NumPy -> a flat array; it refuses objects."""
    return np.frombuffer(data, dtype.state[1] + dtype.arguments[0])


def convert_nvidia(content):
    """What unpickle_nvidia read -> networks and notes of load_nvidia; InputError when both G_ema and D are refused."""
    roles, networks, notes = ("G", "D", "G_ema"), {}, []
    if isinstance(content, tuple):
        stored = {role: flatten_tensorflow(network) for role, network in zip(roles, content, strict=True)}
        unsaid = "mbstd_group_size" not in stored["D"]
    else:
        stored = {role: flatten_module(content[role]) for role in roles if content.get(role)}
        # A file that was converted from TensorFlow's has no training set, and None for groups that were left unsaid
        converted = content.get("training_set_kwargs") is None
        unsaid = converted and "D" in stored and stored["D"].get("b4.mbstd.group_size", 4) is None
    if unsaid:
        stored["D"]["b4.mbstd.group_size"] = 4
        notes.append("D: mbstd_group 4 is assumed, the original StyleGAN2's: the file does not say")
    for role in roles:
        try:
            net = networks[role.lower()] = build_nvidia(role, stored.get(role, {}))
            notes.append(f"{role}: " + ", ".join(f"{key} {value}" for key, value in net.config.items()))
        except ValueError as error:
            notes.append(textwrap.shorten(f"{role} refused: {error}", 300))
    if not networks.keys() & {"d", "g_ema"}:
        raise InputError("; ".join(notes) + "; give an unconditional StyleGAN2 of configuration e or f")
    if "g_ema" in networks and "mapping.w_avg" in stored["G_ema"]:
        networks["g_ema"].facts = dict(latent_avg=stored["G_ema"]["mapping.w_avg"].float()[None])
    return networks, notes


def flatten_module(state, prefix=""):
    """A PyTorch module's state -> its weights and attributes, and those of its parts, by dotted name."""
    own = state | state["_parameters"] | state["_buffers"]
    flat = {prefix + name: value for name, value in own.items()}
    for name, part in state["_modules"].items():
        if part is not None:
            flat |= flatten_module(part, prefix + name + ".")
    return flat


def rename(name, replacements):
    """Replaces regular expressions in a name, one after the other."""
    for pattern, replacement in replacements.items():
        name = re.sub(pattern, replacement, name)
    return name


def flatten_tensorflow(network):
    """A network of TensorFlow -> its weights by the names that they have in flatten_module, options by their own."""
    parts = {"": network} | {f"{name}.": part for name, part in network.state["components"].items()}
    arguments, flat = {}, {}
    for prefix, part in parts.items():
        arguments |= part.state["static_kwargs"]
        for name, array in part.state["variables"]:
            _, shape, dtype, fortran, data = array.state
            order = "F" if fortran else "C"
            numbers = read_numbers(dtype, data).reshape(shape, order=order)
            value = torch.from_numpy(numbers.astype(np.float32))
            if name.endswith("weight"):  # (height, width, in, out) or (in, out)
                value = value.movedim((-1, -2), (0, 1))
            if name.endswith("Conv0_up/weight"):
                value = value.flip(2, 3)
            if name.endswith("mod_bias"):
                value = value + 1
            flat[rename(prefix + name.lower(), TENSORFLOW_NAMES)] = value
    return flat | arguments


def check_nvidia(flat):
    """Raises InputError naming what a network of NVIDIA's has and ours cannot have, or a weight that is not finite."""
    for meaning, (pattern, ours) in NVIDIA_OPTIONS.items():
        for name, value in flat.items():
            if re.search(pattern, name) and value != ours:
                raise InputError(f"{meaning}: {name} is {value!r}, expected {ours!r}")
    kernel = Blur(padding=1).kernel
    for name, value in flat.items():
        if name.endswith("resample_filter") and not torch.equal(value.float(), kernel):
            raise InputError(f"another filter than 1 3 3 1: {name}")
        if isinstance(value, torch.Tensor) and not value.isfinite().all():
            raise InputError(f"{name} is not finite")


def build_nvidia(role, flat):
    """Builds our network with the weights and options of NVIDIA's; raises ValueError, of one line, where it cannot."""
    check_nvidia(flat)
    generator = role != "D"
    weights = {
        name: value
        for name, value in flat.items()
        if isinstance(value, torch.Tensor) and not name.endswith(("w_avg", "resample_filter"))
    }
    layer = r"synthesis\.b(\d+)\.conv1\.weight" if generator else r"b(\d+)\.conv0?\.weight"
    matches = {name: re.fullmatch(layer, name) for name in weights}
    channels = {int(match[1]): len(weights[name]) for name, match in matches.items() if match}
    if 4 not in channels:
        raise InputError("not in the file, or not StyleGAN2's: it has no block b4")
    size, width = max(channels), channels[4] / 512
    multipliers = [m for m in (2, 1) if stylegan2_channels(size, m, width) == channels]
    if not multipliers:
        raise InputError(f"channels of the blocks are {channels}: not StyleGAN2's of configuration e or f at any width")
    layer = "synthesis.b4.conv1" if generator else "b4.conv"
    clamp = flat.get(f"{layer}.conv_clamp", flat.get("conv_clamp"))  # the same in all layers
    common = dict(channel_multiplier=multipliers[0], width=width, conv_clamp=clamp)
    if generator:
        style_dim = weights["synthesis.b4.conv1.affine.weight"].shape[1]
        n_mlp = sum(name.startswith("mapping.fc") for name in weights) // 2
        net = StyleGAN2Generator(size, style_dim, n_mlp, **common)
        replacements = NVIDIA_GENERATOR
    else:
        mbstd_group = flat.get("b4.mbstd.group_size", flat.get("mbstd_group_size"))
        net = StyleGAN2Discriminator(size, mbstd_group=mbstd_group, **common)
        replacements = {
            r"^convs\.0\.\d": f"b{size}.fromrgb",
            r"^convs\.(\d+)": lambda match: f"b{2 * size >> int(match[1])}",
            r"\bconv1\.\d": "conv0",
            r"\bconv2\.\d": "conv1",
            r"\bskip\.\d": "skip",
            r"^final_conv\.\d": "b4.conv",
            r"^final_linear\.0": "b4.fc",
            r"^final_linear\.1": "b4.out",
        }
    for ours, own in net.state_dict().items():
        theirs = rename(ours, replacements)
        if ours.endswith("kernel"):  # the filter 1 3 3 1, which is none of their weights
            weights[ours] = own
        elif theirs in weights:
            value = weights.pop(theirs)
            alike = value.squeeze().shape == own.squeeze().shape
            weights[ours] = value.reshape(own.shape) if alike else value
    load_weights(net, weights, "its weights")  # refuses what is left over, missing or of another shape
    return net.eval()


# ----------------------------------------------------------------------------------------------------------------------
# A training run: what every script needs and nobody edits


def processes():
    """(rank, number of processes) of torch.distributed, (0, 1) without it. Also in fid.py, which works alone."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def say(text):
    """Prints, on rank 0 alone."""
    if processes()[0] == 0:
        print(text, flush=True)


def broadcast_weights(networks):
    """Gives every process rank 0's parameters and buffers."""
    if processes()[1] > 1:
        for net in networks:
            for tensor in net.state_dict().values():
                dist.broadcast(tensor, 0)


def start_processes(device, amp, one_thread):
    """Joins the process group that torchrun describes, if any, and tunes torch to the device -> (rank, processes).

    amp "off" is true float32: no TF32 either.
    """
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.backends.cudnn.allow_tf32 = amp != "off"
        precision = "highest" if amp == "off" else "high"
        torch.set_float32_matmul_precision(precision)
    elif sys.platform == "linux" and hasattr(libc := ctypes.CDLL(None), "mallopt"):
        # glibc would give every tensor over 32 MB back to the system, and clearing its pages anew can cost half a step.
        libc.mallopt(-4, 0)  # M_MMAP_MAX: blocks mapped one by one
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes kept at the end of the heap
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download, or resize the images
    if one_thread:  # a toy's maps are so small that a second one only adds overhead
        torch.set_num_threads(1)
    return processes()


def end_processes():
    """Ends data loader workers, and leaves the process group, unless this process fails: NCCL waits for the others."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each
    for worker in multiprocessing.active_children():
        worker.kill()
    if sys.exc_info()[0] is None and processes()[1] > 1:
        dist.destroy_process_group()


def has_bf16(device):
    """Whether the device computes in bf16 itself, not by emulation."""
    return device.type == "cuda" and torch.cuda.is_bf16_supported(including_emulation=False)


def fast_layout(device):
    """The memory format of image networks: channels_last on a CPU, where it was measured; the default on a GPU."""
    return torch.channels_last if device.type == "cpu" else torch.contiguous_format


# Options


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves a docstring's lines as they are, and names the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.const else super()._get_help_string(action)


def run_parser(doc):
    """An argument parser whose description is doc and whose errors are InputErrors."""

    def refuse(message):
        raise InputError(message)

    parser = argparse.ArgumentParser(description=doc, formatter_class=HelpFormatter)
    parser.error = refuse
    return parser


def at_least(minimum):
    """An argparse type: finite numbers of the minimum's own type (int or float) from it on."""

    def parse(text):
        value = type(minimum)(text)
        if not minimum <= value < 2**63:  # of torch's seeds
            raise argparse.ArgumentTypeError(f"{text} is not {minimum} or more")
        return value

    parse.__name__ = type(minimum).__name__
    return parse


def add_section(parser, title):
    """Begins a section of the help -> option, its add_argument, and number(name, default, help, minimum): an option
    that takes numbers of the default's type; if no minimum is given, integers from 1 and floats from 0 on."""
    group = parser.add_argument_group(title)

    def number(name, default, help, minimum=None):
        if minimum is None:
            minimum = 1 if isinstance(default, int) else 0.0
        group.add_argument(name, type=at_least(minimum), default=default, metavar="N", help=help)

    return group.add_argument, number


def add_run_options(parser, unit, eval_every, auto):
    option, number = add_section(parser, "run")
    option("--out", metavar="FOLDER", help="where everything is written; runs/SCRIPT_DATA if it is not given")
    option("--resume", action="store_true", help="go on with the run in OUT, exactly; budgets may change")
    number("--seed", 0, "of all random numbers", minimum=0)
    option("--device", default="auto", help="auto, cpu, cuda or cuda:N")
    option("--amp", choices=("auto", "bf16", "off"), default="auto", help=f"auto: TF32{auto}; off: true float32")
    number("--workers", 4, "data loader processes", minimum=0)
    option("--max-steps", type=at_least(1), help="stop after so many steps; the schedule stays as it is")
    number("--log-every", 100, "steps between lines of log.jsonl")
    number("--sample-every", 1000, "steps between sample grids; 0: none", minimum=0)
    number("--save-every", 1000, "steps between checkpoints")
    number("--eval-every", eval_every, f"{unit} between evaluations; 0: none", minimum=0)
    option("--inception", default="auto", help="FID Inception: auto (is downloaded), a weight file, or none")


# What may change when a run goes on, besides its budgets.
FREE = "data cache vgg inception out resume device workers max_steps".split()
FREE += "log_every sample_every save_every eval_every".split()


def parse_run(parser, argv, name, toy, budgets):
    """Parses a script's arguments -> (arguments, checkpoint to go on from, or None).

    What the command line leaves out is, with --resume, as the run had it (OUT/args.json); otherwise with --toy as in
    toy. Raises InputError when a run would be overwritten, when --resume finds none, or an option that contradicts it
    and is neither FREE nor one of the budgets: of stages, those that are not over.
    """
    given = parser.parse_args(argv)
    if not (given.data or given.toy or (given.resume and given.out)):
        raise InputError("--data is missing; --toy needs none, nor does --resume with --out")
    source = Path(given.data).resolve().name.removesuffix(".zip") if given.data else "toy"
    out = Path(given.out or f"runs/{name}_{source}")
    defaults, checkpoint = {}, None
    taken = [*out.glob("args.json"), *out.glob("*.pt")]
    if given.resume:
        if not (out / "args.json").is_file():
            raise InputError(f"{out}: holds no run to go on with; leave out --resume to start one")
        defaults = json.loads((out / "args.json").read_text()) | dict(max_steps=None)
        if defaults.get("script") != name:
            raise InputError(f"{out}: is no run of train_{name}.py")
        if (out / "checkpoint.pt").exists():
            checkpoint = load_file(out / "checkpoint.pt")
            budgets = budgets[checkpoint.get("stage", 0) :]
        else:
            say(f"{out}: no checkpoint yet, the run starts from its beginning")
    elif taken:
        raise InputError(f"{taken[0]}: would be overwritten; choose another --out, or go on with a run by --resume")
    elif given.toy:
        defaults = toy
    parser.set_defaults(**defaults | dict(out=str(out), script=name))
    args = parser.parse_args(argv)
    for key, value in changes(args, defaults).items():
        if given.resume and key not in budgets:
            option = f"--{key.replace('_', '-')}"
            raise InputError(f"{out}: the run has {option} {defaults[key]}, not {value}; start another with --out")
    return args, checkpoint


def changes(args, before):
    """{name: value} of the options, not FREE, that differ from those of a run."""
    fixed = {key: value for key, value in vars(args).items() if key not in FREE}
    return {key: value for key, value in fixed.items() if value != before.get(key, value)}


def data_folder(args, checkpoint, write_toy_dataset):
    """The folder or .zip of --data; with --toy alone toy_data in the run's folder, which is written when it begins."""
    folder = Path(args.data or Path(args.out, "toy_data"))
    if not (args.data or checkpoint) and processes()[0] == 0:
        write_toy_dataset(folder)
    if processes()[1] > 1:
        dist.barrier()
    return folder


# The folder of a run


def open_output(args, step):
    """On rank 0, makes the folder of a run and writes args.json; drops of a log what is later than step."""
    if processes()[0] > 0:
        return
    out = Path(args.out)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if args.resume:
        kept = read_log(args, step)
        write_text(out / "log.jsonl", "".join(json.dumps(entry) + "\n" for entry in kept))
        budgets = changes(args, json.loads((out / "args.json").read_text()))
        if budgets:
            log(args, dict(step=step) | budgets)
    write_json(out / "args.json", vars(args))


def read_log(args, step):
    """The entries up to a step of the log of a run that goes on, without a line that was cut off; none of a new run."""
    path = Path(args.out, "log.jsonl")
    if not (args.resume and path.exists()):
        return []
    entries = [json.loads(line) for line in path.read_text().splitlines() if line.endswith("}")]
    return [entry for entry in entries if entry["step"] <= step]


def read_scores(args, step):
    """The lowest fid_student of a run's evaluations up to a step, infinity without one, and the last one's scores."""
    evaluations = [{}]
    evaluations += [entry for entry in read_log(args, step) if "evaluation" in entry]
    best = min(scores.get("fid_student", math.inf) for scores in evaluations)
    return best, evaluations[-1]


def write_json(path, content):
    write_text(path, json.dumps(content, indent=1) + "\n")


def write_text(path, text):
    write_atomically(path, lambda file: file.write(text.encode()))


def log(args, entry):
    """On rank 0, appends an entry to log.jsonl and prints it."""
    if processes()[0] == 0:
        with open(Path(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(entry) + "\n")
        texts = [f"{key} {value:.4g}" if isinstance(value, float) else f"{key} {value}" for key, value in entry.items()]
        print("  ".join(texts), flush=True)


class Pace:
    """For the log: images per second, all processes together, and hours left at that pace."""

    def __init__(self, step_images, first_step, last_step):
        self.step_images, self.last_step = step_images, last_step
        self.restart(first_step)

    def restart(self, step):
        """From here on: what came before was no step."""
        self.step, self.time = step, time.perf_counter()

    def read(self, step):
        """{"images_per_second", "hours_left"}, over the steps since the last reading."""
        pace = self.step_images * (step - self.step) / (time.perf_counter() - self.time)
        hours_left = (self.last_step - step) * self.step_images / pace / 3600
        self.restart(step)
        return dict(images_per_second=pace, hours_left=hours_left)


def save_checkpoint(path, networks, optimizers, own, **content):
    """Writes all that a run needs to go on to the bit; every process calls it, rank 0 writes.

    Args:
        networks, optimizers: name to module, name to optimiser.
        own: what this process alone knows; its random state is added.
        content: anything else that load_file reads.

    Raises SystemExit when a weight is not finite, OSError when the disk is full; the last checkpoint stays.
    """
    rank, world = processes()
    own = own | dict(random=torch.get_rng_state())
    if torch.cuda.is_initialized():
        own["cuda"] = torch.cuda.get_rng_state()
    ranks = [own] * world
    if world > 1:
        received = ranks if rank == 0 else None
        dist.gather_object(own, received)
    if rank > 0:
        return
    content |= {"ranks": ranks, "networks": {name: pack(net) for name, net in networks.items()}}
    content |= {"optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
    for name, net in networks.items():
        if not all(value.isfinite().all() for value in net.state_dict().values()):
            raise SystemExit(f"error: diverged, {name} is not finite; the last checkpoint stays: {path}")
    write_atomically(path, lambda file: torch.save(content, file))


def restore(checkpoint, networks, optimizers):
    """Loads networks, optimisers and this process's random state from a checkpoint -> what this process alone knew.

    Raises InputError when the run had another number of processes, or other networks.
    """
    rank, world = processes()
    if len(checkpoint["ranks"]) != world:
        raise InputError(f"the run has {len(checkpoint['ranks'])} processes, found {world}: start as many")
    missing = networks.keys() - checkpoint["networks"].keys()
    if missing:
        raise InputError(f"checkpoint.pt: has no {', '.join(missing)}: of another version; start a new run")
    load_networks(networks, checkpoint["networks"])
    for name, optimizer in optimizers.items():
        optimizer.load_state_dict(checkpoint["optimizers"][name])
    own = checkpoint["ranks"][rank]
    torch.set_rng_state(own["random"])
    if "cuda" in own and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    return own


# Batches


@functools.lru_cache(maxsize=4)
def shuffled(length, *seed):
    """The order of one pass through a data set, from its seed, a few integers."""
    return np.random.default_rng(seed).permutation(length)


def share_batches(dataset, batch_size, workers, items=None):
    """Iterates over every world-th of these items (a range; None: all): this process's share, in batches of batch_size.

    What a batch has depends on its place alone, so a run that resumes sees what it would have seen.
    """
    rank, world = processes()
    if items is None:
        items = range(len(dataset))
    return DataLoader(
        dataset,
        batch_size,
        sampler=items[rank::world],
        num_workers=workers,
        pin_memory=torch.cuda.is_initialized(),
        worker_init_fn=ignore_signals,
        generator=torch.Generator(),  # the loader draws a seed: not from the run's random numbers
    )


def ignore_signals(_worker):
    """Data loader workers go on until the main process, which may get the same signal, has done its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


# Signals: SIGINT and SIGTERM end the process at once, by SystemExit, so that no part of a file stays. While steps are
# taken the first lets the step finish and the run be saved.

signals = dict(deferred=False, received=0)


def on_signal(number, _frame):
    several = processes()[1] > 1  # torchrun passes on to its processes what they have got themselves
    if signals["deferred"] and not signals["received"]:
        signals["received"] = number
        os.write(2, b"finishing the step and saving\n")
    elif not (signals["deferred"] and several):
        os.write(2, b"stopped\n")
        sys.exit(128 + number)


def defer_signals():
    """From here on the first signal is kept for stop_asked."""
    signals["deferred"] = True


@contextlib.contextmanager
def interruptible():
    """Inside, during long work that is not a step, a signal ends the process at once."""
    signals["deferred"] = False
    if signals["received"]:  # since stop_asked
        sys.exit(128 + signals["received"])
    yield
    signals["deferred"] = True


def stop_asked():
    """The signal that this process or another got, as a number; 0: none. Every process calls it."""
    number = torch.tensor(signals["received"])
    if processes()[1] > 1:
        dist.all_reduce(number, dist.ReduceOp.MAX)
    return number.item()


def end_run(args, step, signal_number):
    """Ends the process as the signal asks for, after the step's checkpoint."""
    say(f"stopped after step {step}, saved; go on: --out {args.out} --resume")
    sys.exit(128 + signal_number)


def run_script(name, parse_args, work, argv=None):
    """The main function of a program: work(*parse_args(argv)); bad input is one line on stderr and exit status 2."""
    if hasattr(sys.stdout, "reconfigure"):  # a notebook's stream takes everything
        sys.stdout.reconfigure(errors="replace")  # names that the terminal's encoding lacks get question marks
    handlers = {number: signal.signal(number, on_signal) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        work(*parse_args(argv))
    except (InputError, OSError) as error:
        last_line = str(error).strip().splitlines()[-1]
        message = last_line.rpartition("InputError: ")[2]  # one from a worker has its traceback before the message
        print(f"{name}.py: error: {message}", file=sys.stderr)
        sys.exit(2)
    finally:
        signals.update(deferred=False, received=0)
        for number, handler in handlers.items():
            signal.signal(number, handler)
        end_processes()


# ----------------------------------------------------------------------------------------------------------------------
# Using a compressed generator: pictures, cost, the command


def to_rgb(image):
    """A PIL image of any mode as 8-bit RGB: turned as its EXIF data say, transparency on white, 16 bits scaled.

    Raises InputError for 32 bits, whose range can't be known. As in fid.py, which works without this file.
    """
    if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):  # those two have 16 bits
        raise InputError("its values have 32 bits and no known range: save it with 8 or 16 bits")
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data count for none
        image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I"):
        grey = np.asarray(image)
        image = Image.fromarray((grey / 257 + 0.5).astype(np.uint8))
    if image.has_transparency_data:
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image.convert("RGBA"))
    return image.convert("RGB")


def save_grid(path, blocks, columns=1):
    """Writes named blocks of images as one picture, each under its name.

    Args:
        blocks: name to images (N, 3, H, W) in [-1, 1]. With columns=1 every block is a column and they stand side by
            side, else every block has rows of so many images and they stand one below the other.
    """
    from torchvision.utils import make_grid  # here: it takes seconds to import, and nothing else in this file needs it

    pictures = []
    for name, images in blocks.items():
        grid = to_image(make_grid(images.float(), nrow=columns, pad_value=-1))
        labelled = Image.new("RGB", (grid.width, grid.height + 16), "white")
        labelled.paste(grid, (0, 16))
        ImageDraw.Draw(labelled).text((2, 2), name, "black")
        pictures.append(np.asarray(labelled))
    axis = 1 if columns == 1 else 0
    picture = Image.fromarray(np.concatenate(pictures, axis))
    write_atomically(path, lambda file: picture.save(file, "png"))


@torch.inference_mode()
def translate(net, image):
    """One RGB PIL image, of 5 pixels or more on each side -> its translation, a PIL image of the same size.

    The sides are padded by reflection to what the generator can halve, and the padding is cut off again.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    below, right = -height % net.size_multiple, -width % net.size_multiple
    pixels = np.pad(pixels, ((0, below), (0, right), (0, 0)), mode="reflect")
    device = next(net.parameters()).device
    x = torch.from_numpy(pixels).to(device).permute(2, 0, 1)[None] / 127.5 - 1
    return to_image(net(x)[0, :, :height, :width])


def to_image(pixels):
    """(3, H, W) in [-1, 1] -> PIL image."""
    levels = (pixels.clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().byte().permute(1, 2, 0).cpu().numpy())


def translate_folder(net, source, target, size=None, pairs=False):
    """Translates a picture, or every picture below a folder, into a PNG of the same name below the new folder target.

    Args:
        size: pixels; the shorter side is brought to it first. 0: it stays. None: what the network was trained at.
        pairs: each picture is a pair, two halves side by side, of which the input is translated.

    Skips pictures that cannot be read, are too large for the memory, or differ from another in their ending alone, with
    a line on stderr. Raises InputError if that is all of them.
    """
    source, target = Path(source), Path(target)
    size = net.facts.get("size", 0) if size is None else size
    if size:
        print(f"shorter sides of {size} pixels; --size 0: as they are")
    root, paths = source.parent, [source]
    if source.is_dir():
        known = Image.registered_extensions()
        root, paths = source, [path for path in sorted(source.rglob("[!.]*")) if path.suffix.lower() in known]
    count = 0
    for path in paths:
        place = (target / path.relative_to(root)).with_suffix(".png")
        try:
            if place.exists():
                raise InputError(f"{place} is the translation of another picture of that name already; rename one")
            with open(path, "rb") as file, Image.open(file) as opened:  # given a name, Pillow garbles turned TIFFs
                image = to_rgb(opened)
            if pairs:
                half = image.width // 2
                left = half if net.facts.get("direction") == "BtoA" else 0
                image = image.crop((left, 0, left + half, image.height))
            if size:
                scale = size / min(image.size)
                image = image.resize([round(scale * side) for side in image.size], Image.Resampling.BICUBIC)
            image = translate(net, image)
        except Exception as error:  # Pillow's decoders raise nearly anything on what is no picture; memory can run out
            problem = f"{path}: {' '.join(str(error).split())}"
            if len(paths) == 1:
                raise InputError(problem) from error
            print(f"skipped {problem}", file=sys.stderr)
            continue
        place.parent.mkdir(parents=True, exist_ok=True)
        image.save(place)
        print(place)
        count += 1
    if not count:
        raise InputError(f"{source}: {len(paths)} pictures, of which none can be read")
    print(f"{count} pictures translated into {target}, {len(paths) - count} skipped")


@torch.inference_mode()
def draw_samples(net, target, count, truncation, seed, label=None):
    """Writes count pictures of a StyleGAN2 or BigGAN into the new folder target.

    Args:
        truncation: StyleGAN2's w is moved to its mean so far; BigGAN's z has no entry beyond it.
        label: BigGAN's class, a number; None: they take turns.
    """
    n_classes = net.config.get("n_classes", 0)
    if label is not None and label >= n_classes:
        raise InputError(f"--class {label}: the network has {n_classes} classes, numbered from 0")
    target = Path(target)
    target.mkdir(parents=True)
    device = next(net.parameters()).device
    torch.manual_seed(seed)
    center = net.mean_latent() if isinstance(net, StyleGAN2Generator) else None
    generator = torch.Generator().manual_seed(seed)
    for n in range(count):
        if isinstance(net, BigGANGenerator):
            z = nn.init.trunc_normal_(torch.empty(1, net.dim_z), a=-truncation, b=truncation, generator=generator)
            y = n % n_classes if label is None else label
            image = net(z.to(device), torch.tensor([y], device=device))[0]
        else:
            z = torch.randn(1, net.style_dim, generator=generator)
            w = net.mapping(z.to(device))
            image = net.synthesis(center.lerp(w, truncation))[0]
        path = target / f"{n:05d}.png"
        to_image(image).save(path)
        print(path)


def published_conv_flops(_x_shape, w_shape, *_, out_shape, **__):
    """Two operations per weight and output pixel, also of a transposed convolution, where the exact count is per input
    pixel: the counter of the GAN compression papers counts a stride-2 transposed convolution four times over."""
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(w_shape)


@torch.inference_mode()
def measure_cost(name, net, *inputs):
    """Prints and returns what one call of a network costs: {"parameters": .., "macs": multiply-accumulates of
    convolutions and matrix products, "macs_published": as the compression papers count them, "milliseconds": the best
    of three calls}. The network is put in eval mode."""
    net.eval()
    exact = FlopCounterMode(display=False)
    published = FlopCounterMode(display=False, custom_mapping={torch.ops.aten.convolution: published_conv_flops})
    with exact, published:
        net(*inputs)
    macs, macs_published = exact.get_total_flops() // 2, published.get_total_flops() // 2
    times = []
    for _ in range(3):
        start = time.perf_counter()
        net(*inputs)
        if inputs[0].is_cuda:
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    parameters, milliseconds = sum(p.numel() for p in net.parameters()), 1000 * min(times)
    counts = f"{macs / 1e9:9.3f}G MACs, exact{macs_published / 1e9:9.3f}G by DCD's counter"
    print(f"{name:32}{parameters / 1e6:9.3f}M parameters{counts}{milliseconds:10.1f} ms", flush=True)
    return dict(parameters=parameters, macs=macs, macs_published=macs_published, milliseconds=milliseconds)


def write_summary(out, step, scores, calls):
    """Writes to summary.json in the folder out a run's last scores and what its networks cost, which it prints.

    calls: name to (network, input, ..), what is called once.
    """
    costs = {name: measure_cost(name, *call) for name, call in calls.items()}
    write_json(out / "summary.json", dict(steps=step, scores=scores) | costs)
    print(f"everything is in {out}")


def parse_args(argv):
    parser = run_parser(__doc__)
    option, number = add_section(parser, "using a generator")
    option("generator", metavar="student.pt", help="a generator, or a pair that has one")
    option("paths", nargs="+", metavar="PATH", help="a picture or a folder, and the new folder for their translations")
    option("--size", type=at_least(0), help="pixels of the shorter side; 0: native, of which 12 megapixels take 4.3 GB")
    option("--pairs", action="store_true", help="translate the input half of pictures that are pairs (Pix2Pix's)")
    number("--count", 64, "of a StyleGAN2 or BigGAN: draw so many into the new folder PATH")
    number("--truncation", 0.7, "of their latents", minimum=0.01)
    number("--seed", 0, "of their latents", minimum=0)
    option("--class", dest="label", type=at_least(0), help="BigGAN: number of the class; all in turn if not given")
    device = "cuda" if torch.cuda.is_available() else "cpu"
    option("--device", default=device, help="cpu, cuda")
    return [parser.parse_intermixed_args(argv)]


def use(args):
    """What the command line asks for: translations or drawings."""
    try:
        device = torch.empty(1, device=args.device).device
    except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA raises the second
        raise InputError(f"--device {args.device} does not work here, use cpu") from error
    net = load_generator(args.generator, device)
    draws = isinstance(net, (StyleGAN2Generator, BigGANGenerator))
    if len(args.paths) != (1 if draws else 2):
        wanted = "one folder, where to draw" if draws else "pictures, and a folder for their translations"
        raise InputError(f"{args.generator} is a {type(net).__name__}: give {wanted}")
    target = Path(args.paths[-1])
    if target.exists():
        raise InputError(f"{target} exists: choose a new folder")
    if draws:
        draw_samples(net, target, args.count, args.truncation, args.seed, args.label)
    else:
        translate_folder(net, args.paths[0], target, args.size, args.pairs)


def main(argv=None):
    run_script("models", parse_args, use, argv)


if __name__ == "__main__":
    main()
