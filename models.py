"""Networks of the two papers, their weights on disk and in several processes, and their cost.

    ResnetGenerator, UnetGenerator, PatchDiscriminator      CycleGAN, Pix2Pix and their compressed forms (DCD)
    StyleGAN2Generator, StyleGAN2Discriminator              StyleGAN2 at any width (DGL-GAN)
    BigGANGenerator, BigGANDiscriminator                    BigGAN at any width (DGL-GAN)
    start_processes, run_batches, take_step, update_ema     training
    save_generator, load_generator, load_networks, save_checkpoint, load_file, load_weights, write_atomically
    save_grid, count_macs, compare

State dicts have the keys and shapes of the reference implementations, so their checkpoints load strictly. This file
imports nothing from the rest of the project: copy it beside a student.pt to use the compressed generator.

    python models.py                                                        # parameters, MACs, time per image
    python models.py student.pt photos/ translated/                         # translate a folder of pictures
    python models.py student.pt samples/ --count 64 --truncation 0.7        # draw pictures (StyleGAN2, BigGAN)
"""

import argparse
import contextlib
import ctypes
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
from PIL import Image, ImageDraw, ImageFont, ImageOps
from torch import nn
from torch.utils.data import DataLoader
from torch.utils.flop_counter import FlopCounterMode
from torchvision.utils import make_grid


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Leaves a docstring's lines as they are, and names the default of each option that has one."""

    def _get_help_string(self, action):
        return action.help if action.default is None or action.const else super()._get_help_string(action)


class InputError(ValueError):
    """Bad input: a message of one line that says what was found, where, and what to do."""


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
        return F.instance_norm(x) if x.is_cuda else torch.cat([self(image) for image in x.split(1)])


def make_norm(norm, channels):
    """Instance norm or batch norm: the two that the papers use."""
    if norm not in ("instance", "batch"):
        raise ValueError(f"norm is {norm!r}, expected 'instance' or 'batch'")
    return InstanceNorm() if norm == "instance" else nn.BatchNorm2d(channels)


def adapt_reference_keys(net, state_dict, prefix="", *_):
    """Renames in place what the reference implementations' checkpoints spell differently; runs before every load.

    Three things: a "module." in front of every key (DataParallel), running statistics of instance norms (CycleGAN
    before 2018), and residual blocks without the dropout slot, where the second convolution is layer 5 and not 6.
    """
    own = net.state_dict(prefix=prefix)
    for key in list(state_dict):
        if key.startswith("module.") and key not in own:
            state_dict[key.removeprefix("module.")] = state_dict.pop(key)
    if any(".conv_block.5." in key for key in state_dict):
        for key in sorted((k for k in state_dict if re.search(r"\.conv_block\.[56]\.", k)), reverse=True):
            state_dict[re.sub(r"\.conv_block\.([56])\.", lambda m: f".conv_block.{int(m[1]) + 1}.", key)] = (
                state_dict.pop(key)
            )
    statistics = ("running_mean", "running_var", "num_batches_tracked")
    for key in [k for k in state_dict if k.startswith(prefix) and k.endswith(statistics) and k not in own]:
        del state_dict[key]


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
    """x + conv, norm, ReLU, dropout, conv, norm; every convolution after a reflection padding."""

    def __init__(self, channels, separable, norm, dropout):
        super().__init__()

        def conv():
            return SeparableConv(channels) if separable else nn.Conv2d(channels, channels, 3, bias=norm == "instance")

        self.conv_block = nn.Sequential(
            *(nn.ReflectionPad2d(1), conv(), make_norm(norm, channels), nn.ReLU(), nn.Dropout(dropout)),
            *(nn.ReflectionPad2d(1), conv(), make_norm(norm, channels)),
        )

    def forward(self, x):
        return x + self.conv_block(x)


class ResnetGenerator(nn.Module):
    """The ResNet generator of CycleGAN; with separable=True the mobile ResNet of the compression papers.

    Two stride-2 convolutions, n_blocks residual blocks at a quarter of the resolution, two transposed convolutions.

    Args:
        ngf: channels of the first convolution; the residual blocks have 4 ngf.
        n_blocks: residual blocks, 3 or more.
        norm: "instance" or "batch".
        dropout: probability inside the residual blocks.
    """

    def __init__(
        self, in_channels=3, out_channels=3, ngf=64, n_blocks=9, separable=False, norm="instance", dropout=0.0
    ):
        super().__init__()
        if n_blocks < 3:
            raise ValueError(f"n_blocks is {n_blocks}, expected 3 or more")
        self.config = dict(
            in_channels=in_channels, out_channels=out_channels, ngf=ngf, n_blocks=n_blocks, separable=separable
        ) | dict(norm=norm, dropout=dropout)
        bias = norm == "instance"
        layers = [nn.ReflectionPad2d(3), nn.Conv2d(in_channels, ngf, 7, bias=bias)]
        layers += [make_norm(norm, ngf), nn.ReLU()]
        for channels in (ngf, 2 * ngf):
            layers += [nn.Conv2d(channels, 2 * channels, 3, stride=2, padding=1, bias=bias)]
            layers += [make_norm(norm, 2 * channels), nn.ReLU()]
        first = len(layers) - 1
        layers += [ResnetBlock(4 * ngf, separable, norm, dropout) for _ in range(n_blocks)]
        for channels in (4 * ngf, 2 * ngf):
            layers += [nn.ConvTranspose2d(channels, channels // 2, 3, 2, padding=1, output_padding=1, bias=bias)]
            layers += [make_norm(norm, channels // 2), nn.ReLU()]
        layers += [nn.ReflectionPad2d(3), nn.Conv2d(ngf, out_channels, 7), nn.Tanh()]
        self.model = nn.Sequential(*layers)
        self.tap_layers = [first + i * n_blocks // 3 for i in range(4)]  # 9, 12, 15, 18 for nine blocks
        self.tap_channels = [4 * ngf] * 4
        self.size_multiple = 4
        self.register_load_state_dict_pre_hook(adapt_reference_keys)

    def forward(self, x, taps=False):
        """(N, in, H, W) in [-1, 1] -> (N, out, H, W) in [-1, 1]; H and W multiples of 4.

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

    def __init__(self, outer, inner, norm, submodule=None, in_channels=None, dropout=0.0):
        super().__init__()
        self.outermost = in_channels is not None
        bias = norm == "instance"
        down = nn.Conv2d(in_channels or outer, inner, 4, stride=2, padding=1, bias=bias)
        up_channels = inner if submodule is None else 2 * inner
        up = nn.ConvTranspose2d(up_channels, outer, 4, stride=2, padding=1, bias=bias or self.outermost)
        if self.outermost:
            layers = [down, submodule, nn.ReLU(), up, nn.Tanh()]
        elif submodule is None:
            layers = [nn.LeakyReLU(0.2), down, nn.ReLU(), up, make_norm(norm, outer)]
        else:
            layers = [nn.LeakyReLU(0.2), down, make_norm(norm, inner), submodule, nn.ReLU(), up, make_norm(norm, outer)]
            layers += [nn.Dropout(dropout)] if dropout else []
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
    """The U-Net generator of Pix2Pix: num_downs halvings, each joined to its mirror image by a skip connection.

    Args:
        ngf: channels of the outermost level; the inner ones have up to 8 ngf.
        num_downs: levels, 5 or more; the image's sides are multiples of 2 ** num_downs.
        norm: "instance" or "batch".
        dropout: probability in the 8 ngf levels between the innermost and the fourth.
    """

    def __init__(self, in_channels=3, out_channels=3, ngf=64, num_downs=8, norm="instance", dropout=0.0):
        super().__init__()
        if num_downs < 5:
            raise ValueError(f"num_downs is {num_downs}, expected 5 or more")
        self.config = dict(in_channels=in_channels, out_channels=out_channels, ngf=ngf, num_downs=num_downs)
        self.config |= dict(norm=norm, dropout=dropout)
        block = UnetBlock(8 * ngf, 8 * ngf, norm)
        for _ in range(num_downs - 5):
            block = UnetBlock(8 * ngf, 8 * ngf, norm, block, dropout=dropout)
        for outer in (4 * ngf, 2 * ngf, ngf):
            block = UnetBlock(outer, 2 * outer, norm, block)
        self.model = UnetBlock(out_channels, ngf, norm, block, in_channels=in_channels)
        # The down-convolutions of levels 1, 2, .. n run first, then the up-convolutions of levels n, .. 2, 1.
        self.tap_convs = [3 - 1, 5 - 1, 2 * num_downs - 4, 2 * num_downs - 2]
        self.tap_channels = [2 * ngf, 8 * ngf, 16 * ngf, 4 * ngf]
        self.size_multiple = 2**num_downs
        self.register_load_state_dict_pre_hook(adapt_reference_keys)

    def forward(self, x, taps=False):
        """(N, in, H, W) in [-1, 1] -> (N, out, H, W) in [-1, 1]; H and W multiples of 2 ** num_downs.

        With taps=True returns (image, [f_1..f_4]): what enters the down-convolutions of levels 3 and 5 and the
        up-convolutions of levels 4 and 2, (N, 2 ngf, H/4, W/4), (N, 8 ngf, H/16, W/16), (N, 16 ngf, H/16, W/16) and
        (N, 4 ngf, H/4, W/4).
        """
        conv_inputs = []
        image = self.model(x, conv_inputs)
        return (image, [conv_inputs[i] for i in self.tap_convs]) if taps else image


class PatchDiscriminator(nn.Module):
    """The PatchGAN discriminator of Pix2Pix and CycleGAN: one logit for each overlapping patch.

    Args:
        in_channels: 3, or 6 for the conditional discriminator that reads (input, image) side by side in channels.
        ndf: channels of the first convolution.
        n_layers: stride-2 convolutions; 3 gives the 70x70 patches of the papers.
        norm: "instance" or "batch".
    """

    def __init__(self, in_channels=3, ndf=64, n_layers=3, norm="instance"):
        super().__init__()
        bias = norm == "instance"
        layers = [nn.Conv2d(in_channels, ndf, 4, stride=2, padding=1), nn.LeakyReLU(0.2)]
        channels = ndf
        for n in range(1, n_layers + 1):
            wider = ndf * min(2**n, 8)
            layers += [nn.Conv2d(channels, wider, 4, stride=2 if n < n_layers else 1, padding=1, bias=bias)]
            layers += [make_norm(norm, wider), nn.LeakyReLU(0.2)]
            channels = wider
        layers += [nn.Conv2d(channels, 1, 4, stride=1, padding=1)]
        self.model = nn.Sequential(*layers)
        self.min_size = 3 * 2**n_layers  # below it the last hidden map is one pixel: instance norm has nothing to do
        self.register_load_state_dict_pre_hook(adapt_reference_keys)

    def features(self, x):
        """(N, in, H, W) -> the last hidden activation, (N, 8 ndf, H/8 - 1, W/8 - 1); H and W at least min_size."""
        return self.model[:-1](x)

    def forward(self, x):
        """(N, in, H, W) in [-1, 1] -> logits (N, 1, H/8 - 2, W/8 - 2)."""
        return self.model(x)


def init_weights(net, std=0.02):
    """Initialises convolutions and linear layers from N(0, std), batch norm scales from N(1, std), biases with 0."""
    for module in net.modules():
        if isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear)):
            nn.init.normal_(module.weight, 0.0, std)
        elif isinstance(module, nn.BatchNorm2d):
            nn.init.normal_(module.weight, 1.0, std)
        else:
            continue
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    return net


# ----------------------------------------------------------------------------------------------------------------------
# StyleGAN2 (Karras et al., arXiv 1912.04958), in stock operations


def disable_autocast(x):
    return torch.autocast(x.device.type, enabled=False)


class PixelNorm(nn.Module):
    """Scales every latent to unit mean square."""

    def forward(self, z):
        return z * torch.rsqrt(z.square().mean(1, keepdim=True) + 1e-8)


class EqualLinear(nn.Module):
    """Linear layer with equalised learning rate: weights of unit variance, scaled when used; always in float32."""

    def __init__(self, in_features, out_features, bias_init=0.0, lr_multiplier=1.0, activate=False):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(out_features, in_features) / lr_multiplier)
        self.bias = nn.Parameter(torch.full((out_features,), float(bias_init)))
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
    """Adds a bias per channel, leaky ReLU, and the gain sqrt(2) that keeps the variance."""

    def __init__(self, channels):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x):
        return F.leaky_relu(x + self.bias.to(x.dtype).view(1, -1, 1, 1), 0.2) * math.sqrt(2)


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
                demodulation = torch.rsqrt(style.square() @ weight.square().sum((2, 3)).t() + 1e-8)
            x = x * demodulation.to(x.dtype)[:, :, None, None]
        return x


class NoiseInjection(nn.Module):
    """Adds noise, the same for all channels, with a learned strength."""

    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x, noise):
        return x + (self.weight * noise).to(x.dtype)


class StyledConv(nn.Module):
    def __init__(self, in_channels, out_channels, style_dim, upsample=False):
        super().__init__()
        self.conv = ModulatedConv2d(in_channels, out_channels, 3, style_dim, upsample=upsample)
        self.noise = NoiseInjection()
        self.activate = BiasLeakyReLU(out_channels)

    def forward(self, x, style, noise):
        return self.activate(self.noise(self.conv(x, style), noise))


class ToRGB(nn.Module):
    """1x1 convolution to RGB, added in float32 to the upsampled RGB of the resolution below (skip generator)."""

    def __init__(self, in_channels, style_dim, upsample=True):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, 3, 1, 1))
        self.conv = ModulatedConv2d(in_channels, 3, 1, style_dim, demodulate=False)
        if upsample:
            self.upsample = Blur(padding=1, stride=2, gain=4.0, upsample=True)

    def forward(self, x, style, skip=None):
        rgb = self.conv(x, style).float() + self.bias
        return rgb if skip is None else rgb + self.upsample(skip)


class ConstantInput(nn.Module):
    def __init__(self, channels):
        super().__init__()
        self.input = nn.Parameter(torch.randn(1, channels, 4, 4))


def stylegan2_channels(size, channel_multiplier, width):
    """Channels at each resolution 4..size of StyleGAN2 config f (channel_multiplier 2), scaled by width."""
    if size not in (8, 16, 32, 64, 128, 256, 512, 1024):
        raise ValueError(f"size is {size}, expected a power of two from 8 to 1024")
    full = {4: 512, 8: 512, 16: 512, 32: 512} | {r: 16384 // r * channel_multiplier for r in (64, 128, 256, 512, 1024)}
    return {r: max(1, round(c * width)) for r, c in full.items() if r <= size}


class StyleGAN2Generator(nn.Module):
    """The generator of StyleGAN2 with skip connections (config f: channel_multiplier 2).

    Args:
        size: side of the images, a power of two from 8 to 1024.
        style_dim: width of z, w and the mapping network.
        n_mlp: layers of the mapping network.
        width: factor on every channel count of the synthesis network; 0.5 is DGL-GAN's half-width student.
    """

    def __init__(self, size, style_dim=512, n_mlp=8, channel_multiplier=2, width=1.0):
        super().__init__()
        self.config = dict(size=size, style_dim=style_dim, n_mlp=n_mlp)
        self.config |= dict(channel_multiplier=channel_multiplier, width=width)
        channels = stylegan2_channels(size, channel_multiplier, width)
        self.style_dim = style_dim
        mapping = [EqualLinear(style_dim, style_dim, lr_multiplier=0.01, activate=True) for _ in range(n_mlp)]
        self.style = nn.Sequential(PixelNorm(), *mapping)
        self.input = ConstantInput(channels[4])
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
        self.register_load_state_dict_pre_hook(adapt_reference_keys)

    def mean_latent(self, n_samples=4096):
        """Mean of w over n_samples random z, (1, style_dim): the centre of truncation."""
        z = torch.randn(n_samples, self.style_dim, device=self.input.input.device)
        return self.style(z).mean(0, keepdim=True)

    def mapping(self, z, inject_index=None):
        """z (N, style_dim), or a list of two, -> w for every layer, (N, n_latent, style_dim).

        With two latents, layers from inject_index (random when None) on use the second: style mixing.
        """
        z = [z] if isinstance(z, torch.Tensor) else list(z)
        w = self.style(torch.cat(z)).unsqueeze(1).expand(-1, self.n_latent, -1)
        if len(z) == 1:
            return w.contiguous()
        index = torch.randint(1, self.n_latent, ()).item() if inject_index is None else inject_index
        first, second = w.chunk(2)
        return torch.cat([first[:, :index], second[:, index:]], 1)

    def synthesis(self, latents, noise="random"):
        """w (N, n_latent, style_dim) -> images (N, 3, size, size); noise "random" or "fixed" (the buffers)."""
        if noise not in ("random", "fixed"):
            raise ValueError(f"noise is {noise!r}, expected 'random' or 'fixed'")

        def layer_noise(n):
            buffer = getattr(self.noises, f"noise_{n}")
            return buffer.new_empty(len(latents), *buffer.shape[1:]).normal_() if noise == "random" else buffer

        x = self.input.input.repeat(len(latents), 1, 1, 1).contiguous(memory_format=torch.channels_last)
        x = self.conv1(x, latents[:, 0], layer_noise(0))
        image = self.to_rgb1(x, latents[:, 1])
        for i, to_rgb in enumerate(self.to_rgbs):
            x = self.convs[2 * i](x, latents[:, 2 * i + 1], layer_noise(2 * i + 1))
            x = self.convs[2 * i + 1](x, latents[:, 2 * i + 2], layer_noise(2 * i + 2))
            image = to_rgb(x, latents[:, 2 * i + 3], image)
        return image

    def forward(self, z, truncation=1.0, mean_latent=None, noise="random"):
        """Latents -> images (N, 3, size, size), trained towards [-1, 1] but not bounded.

        Args:
            z: (N, style_dim) from N(0, 1), or a list of two for style mixing. For w see synthesis.
            truncation: moves w towards mean_latent: mean + truncation * (w - mean).
            noise: "random" or "fixed".

        Raises ValueError for another noise, and for truncation without mean_latent.
        """
        if truncation != 1 and mean_latent is None:
            raise ValueError(f"truncation {truncation} needs mean_latent: pass generator.mean_latent()")
        latents = self.mapping(z)
        if truncation != 1:
            latents = mean_latent + truncation * (latents - mean_latent)
        return self.synthesis(latents, noise)


def conv_layer(in_channels, out_channels, kernel_size, downsample=False, activate=True):
    """Convolution of the discriminator; downsample filters first (1 3 3 1), then takes every second pixel."""
    layers = []
    if downsample and kernel_size == 1:  # the pixels that a strided 1x1 convolution would skip are not filtered at all
        layers += [Blur(padding=1, stride=2), EqualConv2d(in_channels, out_channels, 1)]
    elif downsample:
        layers += [Blur(padding=2), EqualConv2d(in_channels, out_channels, kernel_size, stride=2)]
    else:
        layers += [EqualConv2d(in_channels, out_channels, kernel_size, padding=kernel_size // 2)]
    return nn.Sequential(*layers, BiasLeakyReLU(out_channels)) if activate else nn.Sequential(*layers)


class ResidualDownBlock(nn.Module):
    def __init__(self, in_channels, out_channels):
        super().__init__()
        self.conv1 = conv_layer(in_channels, in_channels, 3)
        self.conv2 = conv_layer(in_channels, out_channels, 3, downsample=True)
        self.skip = conv_layer(in_channels, out_channels, 1, downsample=True, activate=False)

    def forward(self, x):
        return (self.conv2(self.conv1(x)) + self.skip(x)) / math.sqrt(2)


class StyleGAN2Discriminator(nn.Module):
    """The residual discriminator of StyleGAN2, with minibatch standard deviation over groups of four.

    Args:
        size: side of the images, a power of two from 8 to 1024.
        width: factor on every channel count.
    """

    def __init__(self, size, channel_multiplier=2, width=1.0):
        super().__init__()
        channels = stylegan2_channels(size, channel_multiplier, width)
        down = [ResidualDownBlock(channels[r], channels[r // 2]) for r in sorted(channels, reverse=True)[:-1]]
        self.convs = nn.Sequential(conv_layer(3, channels[size], 1), *down)
        self.final_conv = conv_layer(channels[4] + 1, channels[4], 3)
        self.final_linear = nn.Sequential(
            EqualLinear(channels[4] * 16, channels[4], activate=True), EqualLinear(channels[4], 1)
        )
        self.register_load_state_dict_pre_hook(adapt_reference_keys)

    def forward(self, images):
        """(N, 3, size, size) -> logits (N, 1), float32.

        The standard deviation is taken over groups of the largest size up to 4 that divides N: samples n, n + N/4, ..
        """
        x = self.convs(images)
        n, c, h, w = x.shape
        group = next(g for g in (4, 3, 2, 1) if n % g == 0)
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

    def __init__(self, *shape, bias=True, eps=1e-6):
        super().__init__()
        bound = 1 / math.sqrt(math.prod(shape[1:]))
        self.weight = nn.Parameter(torch.empty(shape).uniform_(-bound, bound))
        self.bias = nn.Parameter(torch.empty(shape[0]).uniform_(-bound, bound)) if bias else None
        self.register_buffer("u0", torch.randn(1, shape[0]))
        self.register_buffer("sv0", torch.ones(1))
        self.eps = eps

    def normalised_weight(self):
        """W / sigma: v = unit(W^T u0), u = unit(W v), sigma = u . W v. In the type of W, even under autocast."""
        weight = self.weight
        # Any order of the columns gives the same sigma: take the one that needs no copy.
        matrix = (weight if weight.is_contiguous() else weight.movedim(1, -1)).flatten(1)
        with disable_autocast(weight):
            with torch.no_grad():
                v = F.normalize(torch.mv(matrix.t(), self.u0[0]), dim=0, eps=self.eps)
            product = torch.mv(matrix, v)
            u = F.normalize(product.detach(), dim=0, eps=self.eps)
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

    def __init__(self, channels, eps):
        super().__init__()
        if channels < 8:
            raise ValueError(f"attention needs 8 channels or more, found {channels}: raise ch, or attention=None")
        self.theta = SpectralLayer(channels // 8, channels, 1, 1, bias=False, eps=eps)
        self.phi = SpectralLayer(channels // 8, channels, 1, 1, bias=False, eps=eps)
        self.g = SpectralLayer(channels // 2, channels, 1, 1, bias=False, eps=eps)
        self.o = SpectralLayer(channels, channels // 2, 1, 1, bias=False, eps=eps)
        self.gamma = nn.Parameter(torch.zeros(()))

    def forward(self, x):
        maps = self.theta(x), F.max_pool2d(self.phi(x), 2), F.max_pool2d(self.g(x), 2)
        query, key, value = (m.flatten(2).mT.unsqueeze(1) for m in maps)  # (N, 1, positions, channels)
        attended = F.scaled_dot_product_attention(query, key, value, scale=1.0)
        return x + self.gamma * self.o(attended.mT.reshape(len(x), -1, *x.shape[2:]))


class ConditionalBatchNorm(nn.Module):
    """BN(x) * (1 + gain(v)) + bias(v) for a condition v; make_map(channels) builds the two maps."""

    def __init__(self, channels, make_map):
        super().__init__()
        self.gain, self.bias = make_map(channels), make_map(channels)
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x, v):
        gain, bias = (m.to(x.dtype)[:, :, None, None] for m in (1 + self.gain(v), self.bias(v)))
        return F.batch_norm(x, self.stored_mean, self.stored_var, training=self.training) * gain + bias


class OutputBatchNorm(nn.Module):
    """Batch norm with a learned gain and bias per channel: nn.BatchNorm2d in the checkpoints' names."""

    def __init__(self, channels):
        super().__init__()
        self.gain, self.bias = nn.Parameter(torch.ones(channels)), nn.Parameter(torch.zeros(channels))
        self.register_buffer("stored_mean", torch.zeros(channels))
        self.register_buffer("stored_var", torch.ones(channels))

    def forward(self, x):
        return F.batch_norm(x, self.stored_mean, self.stored_var, self.gain, self.bias, self.training)


class GeneratorBlock(nn.Module):
    """Residual block that doubles the side; both branches are enlarged before their convolutions."""

    def __init__(self, in_channels, out_channels, make_map, eps):
        super().__init__()
        self.conv1 = SpectralLayer(out_channels, in_channels, 3, 3, eps=eps)
        self.conv2 = SpectralLayer(out_channels, out_channels, 3, 3, eps=eps)
        self.conv_sc = SpectralLayer(out_channels, in_channels, 1, 1, eps=eps)
        self.bn1 = ConditionalBatchNorm(in_channels, make_map)
        self.bn2 = ConditionalBatchNorm(out_channels, make_map)

    def forward(self, x, v):
        h = F.interpolate(F.relu(self.bn1(x, v), inplace=True), scale_factor=2)
        h = F.relu(self.bn2(self.conv1(h), v), inplace=True)
        return self.conv2(h) + self.conv_sc(F.interpolate(x, scale_factor=2))


class DiscriminatorBlock(nn.Module):
    """Residual block, wide form; halve: average pooling at the end; first: reads images, so no ReLU at the entry."""

    def __init__(self, in_channels, out_channels, first, halve, eps):
        super().__init__()
        self.conv1 = SpectralLayer(out_channels, in_channels, 3, 3, eps=eps)
        self.conv2 = SpectralLayer(out_channels, out_channels, 3, 3, eps=eps)
        self.conv_sc = nn.Identity()
        if halve or in_channels != out_channels:
            self.conv_sc = SpectralLayer(out_channels, in_channels, 1, 1, eps=eps)
        self.first, self.halve = first, halve

    def forward(self, x):
        h = self.conv1(x if self.first else F.relu(x))  # not in place: the shortcut takes x as it is
        h = self.conv2(F.relu(h, inplace=True))
        if self.first:  # a 1x1 convolution and pooling commute: images are pooled first, three channels being few
            return F.avg_pool2d(h, 2) + self.conv_sc(F.avg_pool2d(x, 2))
        h = h + self.conv_sc(x)
        return F.avg_pool2d(h, 2) if self.halve else h


def biggan_channels(size, ch):
    """Channels of the generator's 4x4 start and after each of its blocks, and after each of the discriminator's."""
    factors = {
        32: ((4, 4, 4, 4), (4, 4, 4, 4)),
        64: ((16, 16, 8, 4, 2), (1, 2, 4, 8, 16)),
        128: ((16, 16, 8, 4, 2, 1), (1, 2, 4, 8, 16, 16)),
        256: ((16, 16, 8, 8, 4, 2, 1), (1, 2, 4, 8, 8, 16, 16)),
    }
    if size not in factors:
        raise ValueError(f"size is {size}, expected 32, 64, 128 or 256")
    return [[ch * factor for factor in widths] for widths in factors[size]]


class BigGANGenerator(nn.Module):
    """The generator of BigGAN: class and latent condition the batch norm of every block.

    Args:
        size: side of the images, 32, 64, 128 or 256.
        ch: channel multiplier, 96 in the paper; 48 is DGL-GAN's half-width student.
        dim_z: length of z; when hierarchical, rounded down to a multiple of the chunks: read self.dim_z.
        shared_dim: length of the class embedding that all norms share; None: a table of classes in every norm (CIFAR).
        hierarchical: z is cut into equal chunks, the first for the 4x4 start and one for each block.
        attention: side of the maps that an attention layer reads; none for a side that no block has, and for None.
        sn_eps: epsilon of the spectral norm: 1e-6 for ImageNet, 1e-8 for CIFAR in the released scripts.

    Raises ValueError for another size, and for hierarchical without a shared embedding to join the chunks to.
    """

    def __init__(
        self, size, ch=96, n_classes=1000, dim_z=120, shared_dim=128, hierarchical=True, attention=64, sn_eps=1e-6
    ):
        super().__init__()
        self.config = dict(size=size, ch=ch, n_classes=n_classes, dim_z=dim_z, shared_dim=shared_dim)
        self.config |= dict(hierarchical=hierarchical, attention=attention, sn_eps=sn_eps)
        if hierarchical and not shared_dim:
            raise ValueError("hierarchical needs a shared embedding: give shared_dim, or hierarchical=False")
        (start, *widths), _ = biggan_channels(size, ch)
        self.n_chunks = len(widths) + 1 if hierarchical else 1
        chunk = dim_z // self.n_chunks
        self.dim_z = chunk * self.n_chunks

        def make_map(channels):
            if not shared_dim:
                return nn.Embedding(n_classes, channels)
            condition_dim = shared_dim + chunk if hierarchical else shared_dim
            return SpectralLayer(channels, condition_dim, bias=False, eps=sn_eps)

        self.shared = nn.Embedding(n_classes, shared_dim) if shared_dim else nn.Identity()
        self.linear = SpectralLayer(16 * start, chunk, eps=sn_eps)
        self.blocks = nn.ModuleList()
        for i, (before, after) in enumerate(zip([start, *widths], widths, strict=False)):
            self.blocks.append(nn.ModuleList([GeneratorBlock(before, after, make_map, sn_eps)]))
            if 8 * 2**i == attention:
                self.blocks[i].append(SelfAttention(after, sn_eps))
        self.output_layer = nn.Sequential(
            OutputBatchNorm(widths[-1]), nn.ReLU(inplace=True), SpectralLayer(3, widths[-1], 3, 3, eps=sn_eps)
        )
        self.register_load_state_dict_pre_hook(adapt_reference_keys)

    def forward(self, z, y):
        """Latents z (N, dim_z) from N(0, 1) and classes y -> images (N, 3, size, size) in [-1, 1], in z's type.

        y: labels (N,), integer; or embedded classes (N, shared_dim), self.shared(labels), which can be mixed.
        """
        v = y if y.is_floating_point() else self.shared(y)
        first, *chunks = z.chunk(self.n_chunks, 1)
        conditions = [torch.cat([v, chunk], 1) for chunk in chunks] or [v] * len(self.blocks)
        x = self.linear(first).view(len(z), -1, 4, 4)
        for layers, condition in zip(self.blocks, conditions, strict=True):
            x = layers[0](x, condition)
            for attention in layers[1:]:
                x = attention(x)
        return torch.tanh(self.output_layer(x).to(z.dtype))


class BigGANDiscriminator(nn.Module):
    """The projection discriminator of BigGAN; arguments as BigGANGenerator's."""

    def __init__(self, size, ch=96, n_classes=1000, attention=64, sn_eps=1e-6):
        super().__init__()
        _, widths = biggan_channels(size, ch)
        halvings = 2 if size == 32 else len(widths) - 1
        self.blocks = nn.Sequential()
        for i, (before, after) in enumerate(zip([3, *widths], widths, strict=False)):
            layers = [DiscriminatorBlock(before, after, first=i == 0, halve=i < halvings, eps=sn_eps)]
            if size >> min(i + 1, halvings) == attention:
                layers += [SelfAttention(after, sn_eps)]
            self.blocks.append(nn.Sequential(*layers))
        self.linear = SpectralLayer(1, widths[-1], eps=sn_eps)
        self.embed = SpectralLayer(n_classes, widths[-1], bias=False, eps=sn_eps)  # one row a class
        self.register_load_state_dict_pre_hook(adapt_reference_keys)

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
            nn.init.orthogonal_(module.weight) if orthogonal else nn.init.normal_(module.weight, 0.0, 0.02)
    return net


# ----------------------------------------------------------------------------------------------------------------------
# Training: steps, moving averages, several processes


def processes():
    """(rank, number of processes) of torch.distributed, (0, 1) without it."""
    return (dist.get_rank(), dist.get_world_size()) if dist.is_available() and dist.is_initialized() else (0, 1)


def say(text):
    """Prints, on rank 0 alone."""
    if processes()[0] == 0:
        print(text, flush=True)


def start_processes(device):
    """Joins the process group that torchrun describes, if any, and tunes torch to the device."""
    if device.type == "cuda":
        torch.cuda.set_device(device)
        torch.backends.cudnn.benchmark = True
        torch.set_float32_matmul_precision("high")
    elif hasattr(ctypes.CDLL(None) if os.name == "posix" else None, "mallopt"):
        # glibc would give every tensor over 32 MB back to the system, and clearing its pages anew can cost half a step.
        ctypes.CDLL(None).mallopt(-4, 0)  # M_MMAP_MAX: blocks mapped one by one
        ctypes.CDLL(None).mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD: bytes kept at the end of the heap
    if int(os.environ.get("WORLD_SIZE", 1)) > 1:
        backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, timeout=timedelta(hours=2))  # rank 0 may download, or resize the images


def run_batches(dataset, batch_size, numbers, workers):
    """Iterates over a run's batches of these numbers: n has the items from n * global batch on, shared out.

    Which items a batch has depends on its number alone, so a run that resumes sees what it would have seen.
    """
    rank, world = processes()
    starts = ((n * world + rank) * batch_size for n in numbers)
    return iter(
        DataLoader(
            dataset,
            batch_sampler=(range(start, start + batch_size) for start in starts),
            num_workers=workers,
            pin_memory=torch.cuda.is_initialized(),
            worker_init_fn=ignore_signals,
            generator=torch.Generator(),  # the loader draws a seed: not from the run's random numbers
        )
    )


def share_batches(dataset, batch_size, workers):
    """Iterates once over this process's share of a dataset, in batches of up to batch_size."""
    share = range(processes()[0], len(dataset), processes()[1])
    options = dict(num_workers=workers, worker_init_fn=ignore_signals, generator=torch.Generator())
    return DataLoader(dataset, batch_size, sampler=share, **options)


def ignore_signals(_worker):
    """Data loader workers go on until the main process, which may get the same signal, has done its step."""
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    signal.signal(signal.SIGINT, signal.SIG_IGN)


def end_processes():
    """Ends data loader workers, and leaves the process group, unless this process fails: NCCL waits for the others."""
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # torch would raise for each
    for worker in multiprocessing.active_children():
        worker.kill()
    if sys.exc_info()[0] is None and processes()[1] > 1:
        dist.destroy_process_group()


def take_step(optimizer, loss):
    """One step of the optimiser against the gradient of loss, averaged over the processes."""
    optimizer.zero_grad()
    loss.backward()
    average_gradients(optimizer)
    optimizer.step()


def average_gradients(optimizer):
    """Replaces the gradients of the optimiser's parameters by their mean over the processes."""
    world = processes()[1]
    if world > 1:
        gradients = [p.grad for group in optimizer.param_groups for p in group["params"] if p.grad is not None]
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, mean in zip(gradients, (flat / world).split([g.numel() for g in gradients]), strict=True):
            gradient.copy_(mean.view_as(gradient))


def share_weights(networks):
    """Gives every process rank 0's parameters and buffers."""
    if processes()[1] > 1:
        for net in networks:
            for tensor in net.state_dict().values():
                dist.broadcast(tensor, 0)


@torch.no_grad()
def update_ema(ema, net, decay, buffers=False):
    """Moves the parameters, and buffers, of a moving average towards net's: ema = decay * ema + (1 - decay) * net."""
    averaged, moved = (list((n.state_dict() if buffers else dict(n.named_parameters())).values()) for n in (ema, net))
    torch._foreach_lerp_(averaged, moved, 1 - decay)


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
    except RuntimeError as error:  # torch's word for a full disk
        temporary.unlink(missing_ok=True)
        raise OSError(f"{path}: not written ({error})") from error
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise


def write_json(path, content):
    write_atomically(path, lambda file: file.write((json.dumps(content, indent=1) + "\n").encode()))


def save_checkpoint(path, networks, optimizers, own, **content):
    """Writes all that a run needs to go on to the bit; every process calls it, rank 0 writes.

    Args:
        networks, optimizers: name to module, name to optimiser.
        own: what this process alone knows; its random state is added.
        content: anything else that load_file reads.

    Raises SystemExit, the file at path being untouched, when a weight is not finite or the disk is full.
    """
    device = next(next(iter(networks.values())).parameters()).device
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    rank, world = processes()
    ranks = [own | dict(random=torch.get_rng_state(), cuda=cuda)] * world
    if world > 1:
        dist.gather_object(ranks[0], ranks if rank == 0 else None)
    if rank > 0:
        return
    content |= {"ranks": ranks, "networks": {name: net.state_dict() for name, net in networks.items()}}
    content |= {"optimizers": {name: optimizer.state_dict() for name, optimizer in optimizers.items()}}
    for name, weights in content["networks"].items():
        for key, value in weights.items():
            if not value.isfinite().all():
                raise SystemExit(f"error: diverged, {name} {key} is not finite; the last checkpoint stays: {path}")
    try:
        write_atomically(path, lambda file: torch.save(content, file))
    except OSError as error:
        raise SystemExit(f"error: {path}: not saved ({error}); the last checkpoint stays") from error


def amend_checkpoint(path, checkpoint, **changes):
    """Writes a checkpoint that was read, with other content of these names; on rank 0."""
    if processes()[0] == 0:
        write_atomically(path, lambda file: torch.save(checkpoint | changes, file))


def load_checkpoint(path, script):
    """Reads what save_checkpoint wrote with script=...; InputError for another script's or anything else."""
    content = load_file(path)
    if content.get("script") != script:
        found = f"a checkpoint of train_{content['script']}.py" if "script" in content else "no checkpoint of a run"
        raise InputError(f"{path}: {found}, expected one of train_{script}.py")
    return content


def restore(checkpoint, path, networks, optimizers=()):
    """Loads networks, optimisers and this process's random state from a checkpoint -> what it alone knew.

    Raises InputError when the run had another number of processes or other networks.
    """
    rank, world = processes()
    if len(checkpoint["ranks"]) != world:
        raise InputError(f"{path}: the run has {len(checkpoint['ranks'])} processes, found {world}: start as many")
    for name, net in networks.items():
        load_weights(net, checkpoint["networks"].get(name), f"{path}, {name}")
    for name, optimizer in dict(optimizers).items():
        optimizer.load_state_dict(checkpoint["optimizers"][name])
    own = checkpoint["ranks"][rank]
    torch.set_rng_state(own["random"])
    if own["cuda"] is not None and torch.cuda.is_available():
        torch.cuda.set_rng_state(own["cuda"])
    return own


def load_file(path):
    """Reads a checkpoint, a dictionary of tensors, containers, numbers, strings and argparse.Namespace.

    Nothing in it is executed. Raises InputError when the file is missing, truncated, or holds anything else.
    """
    if not Path(path).is_file():
        raise InputError(f"{path}: no such file")
    try:
        with torch.serialization.safe_globals([argparse.Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of old pickles, which are then read or refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        found = re.search(r"GLOBAL (\S+)", str(error))
        detail = f"it asks for {found[1]}, and only plain tensors are loaded" if found else "damaged, or something else"
        raise InputError(f"{path}: not a checkpoint that can be trusted: {detail}") from error
    except (RuntimeError, EOFError, OSError, ValueError, KeyError, IndexError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not a checkpoint, or truncated; copy it again ({type(error).__name__})") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise InputError(f"{path}: expected a checkpoint, names to tensors, found {type(content).__name__}")
    return content


def load_weights(net, state_dict, source):
    """Loads a state dict strictly, the reference implementations' spelling included.

    Raises InputError naming source and the first parameter that does not fit, with both shapes.
    """
    if not isinstance(state_dict, dict) or not all(isinstance(v, torch.Tensor) for v in state_dict.values()):
        raise InputError(f"{source}: expected a state dict (names to tensors), found {type(state_dict).__name__}")
    state_dict = dict(state_dict)
    adapt_reference_keys(net, state_dict)
    expected = {key: tuple(value.shape) for key, value in net.state_dict().items()}
    for key, shape in expected.items():
        if key not in state_dict:
            raise InputError(f"{source}: does not fit {type(net).__name__}: it has no {key}, expected shape {shape}")
        if tuple(state_dict[key].shape) != shape:
            found = tuple(state_dict[key].shape)
            raise InputError(
                f"{source}: does not fit this {type(net).__name__}: {key} has shape {found}, expected {shape}"
            )
    for key in state_dict:
        if key not in expected:
            raise InputError(f"{source}: does not fit {type(net).__name__}: it has {key}, which this network has not")
    net.load_state_dict(state_dict)


def load_networks(paths, networks, script):
    """Loads trained networks (name to module): a file each, in their order, or all from one checkpoint.pt of ours.

    Returns the names of those that were loaded. Raises InputError for more files than networks, for a checkpoint of
    another script than the one named, and for a file that is missing, damaged or does not fit.
    """
    if len(paths) > len(networks):
        raise InputError(f"{len(paths)} files of weights, expected at most {len(networks)}: {', '.join(networks)}")
    for path, (name, net) in zip(paths, networks.items(), strict=False):
        content = load_file(path)
        if "script" in content:
            content = load_checkpoint(path, script)
            for each in networks:
                load_weights(networks[each], content["networks"].get(each), f"{path}, {each}")
            return [*networks]
        load_weights(net, content.get("state_dict", content), f"{path}, as {name} of this architecture and width")
    return [*networks][: len(paths)]


def save_generator(path, net, **facts):
    """Writes the generator's weights, the arguments needed to rebuild it, and facts; load_generator reads it."""
    state_dict = {key: value.detach().cpu().contiguous() for key, value in net.state_dict().items()}
    content = {"network": type(net).__name__, "config": net.config, "state_dict": state_dict} | facts
    write_atomically(path, lambda file: torch.save(content, file))


def load_generator(path, device="cpu"):
    """Rebuilds the generator that save_generator wrote, in eval mode on device.

    Raises InputError when the file is missing, damaged or something else.
    """
    content = load_file(path)
    classes = {cls.__name__: cls for cls in (ResnetGenerator, UnetGenerator, StyleGAN2Generator, BigGANGenerator)}
    if content.get("network") not in classes or not {"config", "state_dict"} <= content.keys():
        raise InputError(f"{path}: not a file of save_generator; for a bare state dict build the network and load it")
    net = classes[content["network"]](**content["config"])
    load_weights(net, content["state_dict"], path)
    return net.to(device).eval()


def trained_options(path, script, role):
    """What a checkpoint.pt of the script, or a student.pt, says of the network with that role, as its options."""
    content = load_file(path)
    if "script" in content:
        saved = load_checkpoint(path, script)["args"]
        return {key: saved[key] for key in (f"{role}_arch", f"{role}_ngf") + (("ndf",) if role == "teacher" else ())}
    if content.get("network") not in ("ResnetGenerator", "UnetGenerator") or "config" not in content:
        return {}
    config = content["config"]
    arch = "unet_256" if "num_downs" in config else "mobile_" * config["separable"] + "resnet_9blocks"
    return {f"{role}_arch": arch, f"{role}_ngf": config["ngf"]}


# ----------------------------------------------------------------------------------------------------------------------
# A run's folder: args.json, log.jsonl, samples/ and the files above


def check_output(args):
    """Raises InputError on rank 0, before anything is written, for an output folder that holds a run, cannot be
    written, or holds the trained networks that the run is given and would replace."""
    out = Path(args.out).resolve()
    if processes()[0] > 0:
        return
    if (out / "args.json").exists() and not (args.resume or args.overwrite):
        raise InputError(f"{args.out}: holds a run; go on with --resume, replace it with --overwrite, or choose --out")
    for path in filter(None, [*np.ravel(args.teacher), args.student]):
        if args.overwrite and Path(path).resolve().parent == out:
            raise InputError(f"{path}: lies in {args.out}, which --overwrite empties; choose another --out")
    existing = next(path for path in (out, *out.parents) if path.exists())
    if not existing.is_dir() or not os.access(existing, os.W_OK):
        raise InputError(f"{args.out}: cannot be written, {existing} is no folder or is write-protected")


def open_output(args, checkpoint, goes_on):
    """On rank 0, makes the output folder; drops a replaced run's files, and of a log what the checkpoint lacks.

    A run that is extended has its new budgets in checkpoint.pt from here on.
    """
    if processes()[0] > 0:
        return
    out = Path(args.out)
    (out / "samples").mkdir(parents=True, exist_ok=True)
    if args.overwrite:
        names = "checkpoint.pt student.pt best_student.pt teacher.pt stage1.pt stage2.pt log.jsonl summary.json"
        for old in (*(out / name for name in names.split()), *out.glob("samples/*.png"), *out.glob("squares_*.npy*")):
            old.unlink(missing_ok=True)
    if args.resume and goes_on and (out / "log.jsonl").exists():
        whole = [line for line in (out / "log.jsonl").read_text().splitlines(keepends=True) if line.endswith("}\n")]
        known = [(line, json.loads(line)) for line in whole]
        ends = checkpoint["step"], checkpoint["evaluated"]
        kept = [line for line, e in known if e["step"] <= ends["evaluation" in e] and "cut" not in e]
        write_atomically(out / "log.jsonl", lambda file: file.write("".join(kept).encode()))
    write_json(out / "args.json", vars(args))
    if checkpoint and args.extended != checkpoint["args"]["extended"]:
        amend_checkpoint(out / "checkpoint.pt", checkpoint, args=vars(args))
        grown = ", ".join(f"{key} {value:g}" for key, value in args.extended[-1]["extended"].items())
        log(args, args.extended[-1], f"extended at step {checkpoint['step']}: {grown}")


def log(args, entry, progress="", losses=(), cut=False):
    """On rank 0, appends an entry to log.jsonl, and says progress and losses, folded at 100 columns between the losses.

    cut: the entry is there because the run was cut short, and is dropped when it goes on.
    """
    if processes()[0] == 0:
        with open(Path(args.out, "log.jsonl"), "a") as file:
            file.write(json.dumps(entry | (dict(cut=True) if cut else {})) + "\n")
        parts = [progress, *(f"{name} {value:.3g}" for name, value in dict(losses).items())]
        folded = textwrap.fill("  ".join(part.replace(" ", "\xa0") for part in parts), 100, subsequent_indent="    ")
        say(folded.replace("\xa0", " "))


def log_step(args, entry, progress, means, last_step, since, cut):
    """Logs a step with the means of its losses, the pace and the time left.

    entry: of the log, with step and images; since: (time, images) from which the pace counts, without interruptions.
    """
    pace = (entry["images"] - since[1]) / (time.perf_counter() - since[0])
    left = timedelta(seconds=round((last_step - entry["step"]) * entry["images"] / entry["step"] / pace))
    progress = f"step {entry['step']}/{last_step}  {progress}  {pace:.1f} images/s  {left} left"
    log(args, entry | dict(images_per_second=pace) | means, progress, means, cut)


def write_summary(args, step, teacher, student, inputs, scores):
    """On rank 0, compares two generators in summary.json, with a run's last scores, and says it as a table."""
    if processes()[0] == 0:
        rows, out = compare(teacher, student, *inputs), Path(args.out)
        write_json(out / "summary.json", dict(steps=step, scores=scores) | rows)
        say("\n" + table(rows) + "".join(f"\n{name} {value:.4g}" for name, value in scores.items()))
        made = next(name for name in ("student.pt", "teacher.pt", "checkpoint.pt") if (out / name).exists())
        say(f"\ngenerator: {out / made}, pictures: {out / 'samples'}")


# ----------------------------------------------------------------------------------------------------------------------
# Pictures


def to_rgb(image):
    """Convert a PIL image of any mode to 8-bit RGB: turned as its EXIF data say, transparency on white.

    Otherwise Pillow's conversion, but 16-bit grey is scaled, not clipped.
    """
    image.load()
    with contextlib.suppress(Exception):  # damaged EXIF data count for none
        image = ImageOps.exif_transpose(image)
    if image.mode == "I" or image.mode.startswith("I;16"):
        grey, clear = np.asarray(image), image.info.get("transparency", -1)
        image = Image.fromarray(np.where(grey == clear, 255, (grey / 257 + 0.5).clip(0, 255)).astype(np.uint8))
    if image.has_transparency_data:
        image = (image.convert("LA") if image.mode == "La" else image).convert("RGBA")
        image = Image.alpha_composite(Image.new("RGBA", image.size, "white"), image)
    return image.convert("RGB")


def save_grid(path, blocks, columns=1):
    """Writes named blocks of images as one picture, each under its name.

    Args:
        blocks: name to images (N, 3, H, W) in [-1, 1]. With columns=1 every block is a column and they stand side by
            side, else every block has rows of so many images and they stand one below the other.
    """
    pictures = []
    for name, images in blocks.items():
        grid = make_grid((images.float().cpu().clamp(-1, 1) + 1) / 2, nrow=columns)
        grid = Image.fromarray((grid * 255).round().byte().permute(1, 2, 0).numpy())
        labelled = Image.new("RGB", (grid.width, grid.height + 16), "white")
        labelled.paste(grid, (0, 16))
        sizes = [size for size in range(12, 5, -1) if ImageFont.load_default(size).getlength(name) <= grid.width - 2]
        ImageDraw.Draw(labelled).text((2, 8), name, "black", ImageFont.load_default([*sizes, 6][0]), anchor="lm")
        pictures.append(np.asarray(labelled))
    picture = Image.fromarray(np.concatenate(pictures, axis=1 if columns == 1 else 0))
    write_atomically(path, lambda file: picture.save(file, "png"))


@torch.inference_mode()
def translate(net, image):
    """One RGB PIL image of any size -> its translation, a PIL image of the same size.

    The sides are padded by reflection to what the generator can halve, and the padding is cut off again.
    """
    pixels = np.asarray(image)
    height, width = pixels.shape[:2]
    multiple = max(net.size_multiple, 16)  # smaller maps than 4x4 cannot be padded inside the network
    pixels = np.pad(pixels, ((0, -height % multiple), (0, -width % multiple), (0, 0)), mode="reflect")
    x = torch.from_numpy(pixels).to(next(net.parameters()).device).permute(2, 0, 1)[None] / 127.5 - 1
    y = (net(x)[0, :, :height, :width].clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(y.round().byte().permute(1, 2, 0).cpu().numpy())


def translate_folder(net, source, target):
    """Translates every picture below the folder source into a PNG of the same name below target."""
    paths = sorted(path for path in Path(source).rglob("*") if path.is_file())
    if not paths:
        raise InputError(f"{source}: no such folder, or nothing in it")
    skipped, transparent, places = 0, 0, set()
    for n, path in enumerate(paths, 1):
        try:
            with Image.open(path) as image:
                transparent += image.has_transparency_data
                image = to_rgb(image)
        except Exception as error:  # Pillow's decoders raise nearly anything on what is no picture
            skipped += 1
            print(f"skipped {path}: {' '.join(str(error).split())}", file=sys.stderr)
            continue
        place = Path(target, path.relative_to(source)).with_suffix(".png")
        if place in places:  # a.jpg has been translated, this is a.gif
            place = place.with_name(f"{path.name.replace('.', '_')}.png")
        places.add(place)
        place.parent.mkdir(parents=True, exist_ok=True)
        translate(net, image).save(place)
        print(f"{n}/{len(paths)} {place}")
    done = f"{len(paths) - skipped} pictures translated into {target}, {skipped} files skipped"
    print(f"{done}, {transparent} with transparency, shown on white")


@torch.inference_mode()
def draw_samples(net, target, count, truncation, seed):
    """Writes count pictures of a StyleGAN2 or BigGAN into the folder target, and beside it a grid of the first 64.

    truncation: StyleGAN2's w is moved to the mean so far; BigGAN's z has no entry beyond it, classes take turns.
    """
    Path(target).mkdir(parents=True, exist_ok=True)
    device = next(net.parameters()).device
    torch.manual_seed(seed)
    center = net.mean_latent() if isinstance(net, StyleGAN2Generator) else None
    images, generator = [], torch.Generator().manual_seed(seed)
    for n in range(count):
        if isinstance(net, BigGANGenerator):
            z = nn.init.trunc_normal_(torch.empty(1, net.dim_z), a=-truncation, b=truncation, generator=generator)
            image = net(z.to(device), torch.tensor([n % net.config["n_classes"]], device=device))
        else:
            image = net(torch.randn(1, net.style_dim, generator=generator).to(device), truncation, center)
        image = image[0].clamp(-1, 1).cpu()
        images = (images + [image])[:64]
        Image.fromarray(((image + 1) * 127.5).round().byte().permute(1, 2, 0).numpy()).save(
            Path(target, f"{n:05d}.png")
        )
        print(f"{n + 1}/{count}", end="\r", flush=True)
    grid = Path(target).with_name(f"{Path(target).name}_grid.png")
    save_grid(grid, {f"truncation {truncation:g}, seed {seed}": torch.stack(images)}, 8)
    print(f"{count} pictures in {target}, the first in {grid}")


# ----------------------------------------------------------------------------------------------------------------------
# Cost


def published_conv_flops(x_shape, w_shape, _bias, _stride, _padding, _dilation, _transposed, *_, out_shape=None, **__):
    """Two operations per weight and output pixel, also of a transposed convolution, where the exact count is per input
    pixel: the counter of the GAN compression papers counts a stride-2 transposed convolution four times over."""
    return 2 * out_shape[0] * math.prod(out_shape[2:]) * math.prod(w_shape)


def count_macs(net, *inputs, published=False):
    """Multiply-accumulates of net(*inputs): convolutions and matrix products.

    Args:
        published: count as the compression papers do (see published_conv_flops), to compare with their tables.
    """
    custom = {torch.ops.aten.convolution: published_conv_flops} if published else {}
    with torch.no_grad(), FlopCounterMode(display=False, custom_mapping=custom) as counter:
        net(*inputs)
    return counter.get_total_flops() // 2


def seconds_per_call(net, *inputs, repeats=3):
    """Best wall time of net(*inputs) over some repeats, after one warm-up."""
    times = []
    with torch.inference_mode():
        for _ in range(repeats + 1):
            start = time.perf_counter()
            net(*inputs)
            if inputs[0].is_cuda:
                torch.cuda.synchronize()
            times.append(time.perf_counter() - start)
    return min(times[1:])


def cost(net, *inputs):
    """What a network costs -> dict of parameters, macs and macs_published of one call, and its seconds here."""
    return dict(
        parameters=sum(p.numel() for p in net.parameters()),
        macs=count_macs(net, *inputs),
        macs_published=count_macs(net, *inputs, published=True),
        seconds=seconds_per_call(net, *inputs),
    )


def compare(teacher, student, *inputs):
    """{"teacher": cost, "student": cost, "ratio": teacher / student} of two networks, put in eval mode."""
    rows = {"teacher": cost(teacher.eval(), *inputs), "student": cost(student.eval(), *inputs)}
    return rows | {"ratio": {key: rows["teacher"][key] / rows["student"][key] for key in rows["student"]}}


def table(rows):
    """{name: {column: number}} -> the same as an aligned text table."""
    columns = list(max(rows.values(), key=len))
    lines = [f"{'':10}" + "".join(f"{column:>16}" for column in columns)]
    for name, row in rows.items():
        texts = (f"{row[c]:,}" if isinstance(row[c], int) else f"{row[c]:.4g}" for c in columns if c in row)
        lines.append(f"{name:10}" + "".join(f"{text:>16}" for text in texts))
    return "\n".join(lines)


def print_table():
    """What each generator costs, as it is and as an exported program; beside the first of a group the factors."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    image, y = torch.randn(1, 3, 256, 256, device=device), torch.zeros(1, dtype=torch.long, device=device)
    z512, z120, z128 = (torch.randn(1, n, device=device) for n in (512, 120, 128))
    cifar = dict(n_classes=10, dim_z=128, shared_dim=None, hierarchical=False, attention=None)
    groups = [
        [
            ("ResNet-9, ngf 64 (original)", lambda: ResnetGenerator(), image),
            ("mobile ResNet-9, ngf 64", lambda: ResnetGenerator(separable=True), image),
            ("mobile ResNet-9, ngf 16 (DCD)", lambda: ResnetGenerator(ngf=16, separable=True), image),
        ],
        [
            ("U-Net-256, ngf 64 (original)", lambda: UnetGenerator(), image),
            ("U-Net-256, ngf 16 (DCD)", lambda: UnetGenerator(ngf=16), image),
        ],
        *(
            [
                (f"StyleGAN2-{size}, width {name}", lambda s=size, w=width: StyleGAN2Generator(s, width=w), z512)
                for name, width in (("1 (original)", 1), ("1/2 (DGL)", 0.5), ("1/4 (DGL)", 0.25))
            ]
            for size in (256, 1024)
        ),
        [
            ("BigGAN-128, ch 96 (original)", lambda: BigGANGenerator(128), z120, y),
            ("BigGAN-128, ch 48 (DGL)", lambda: BigGANGenerator(128, 48), z120, y),
        ],
        [
            ("BigGAN-32 for CIFAR-10, ch 96", lambda: BigGANGenerator(32, **cifar), z128, y),
            ("BigGAN-32, ch 48 (DGL)", lambda: BigGANGenerator(32, 48, **cifar), z128, y),
        ],
    ]
    print(f"{'':34}{'parameters':>18}{'MACs, exact':>19}{'MACs, published':>20}{'time per image':>16}{'exported':>12}")
    for group in groups:
        original = None
        for name, build, *inputs in group:
            net = build().to(device).eval()
            *counts, seconds = cost(net, *inputs).values()
            exported = seconds_per_call(torch.export.export(net, tuple(inputs)).module(), *inputs)
            original = original or counts
            params, exact, published = (
                f"{count / unit:.3f}{letter} {first / count:5.1f}x"
                for count, first, unit, letter in zip(counts, original, (1e6, 1e9, 1e9), "MGG", strict=True)
            )
            times = f"{1000 * seconds:13.1f} ms{1000 * exported:9.1f} ms"
            print(f"{name:34}{params:>18}{exact:>19}{published:>20}{times}", flush=True)
    print(f"\nTime on {device} ({torch.get_num_threads()} threads), batch 1, float32; image networks at 256x256.")
    print("Exported: the program that torch.export makes, which runs without this file.")
    print("Published MACs: the convention of the papers' tables, which counts transposed convolutions four times.")


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=HelpFormatter)
    parser.error = lambda message: parser.exit(2, f"models.py: error: {message}\n")
    parser.add_argument("generator", nargs="?", metavar="student.pt", help="a compressed generator; without: the table")
    parser.add_argument("folders", nargs="*", metavar="FOLDER", help="pictures and where to put their translations; or")
    parser.add_argument("--count", type=int, default=64, help="where to put so many pictures of a StyleGAN2 or BigGAN")
    parser.add_argument("--truncation", type=float, default=0.7, help="of their latents, above 0")
    parser.add_argument("--seed", type=int, default=0, help="of their latents")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda")
    args = parser.parse_args(argv)
    if args.generator is None:
        return print_table()
    if args.count < 1 or args.truncation <= 0:
        parser.error(f"--count {args.count} --truncation {args.truncation}: expected 1 or more, and more than 0")
    try:
        net = load_generator(args.generator)
        need = 1 if isinstance(net, (StyleGAN2Generator, BigGANGenerator)) else 2
        if len(args.folders) != need:
            what = ("one folder, where to draw", "two folders, from and to")[need - 1]
            raise InputError(f"{args.generator} is a {type(net).__name__}: give {what}, found {len(args.folders)}")
        try:
            net.to(args.device)
        except (RuntimeError, AssertionError) as error:  # a build of torch without CUDA raises the second
            raise InputError(f"--device {args.device} does not work here, use cpu") from error
        if need == 1:
            draw_samples(net, *args.folders, args.count, args.truncation, args.seed)
        else:
            translate_folder(net, *args.folders)
    except (InputError, OSError) as error:
        parser.error(error)


if __name__ == "__main__":
    main()
