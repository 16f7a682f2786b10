"""Fréchet and Kernel Inception Distance (FID, KID) between two sets of images, and the Inception Score (IS) of one.

    FID = |mu_a - mu_b|^2 + tr(S_a) + tr(S_b) - 2 tr((S_a S_b)^(1/2))

mu, S: mean and covariance (n - 1) of the 2048 features that the FID Inception gives to the images of a set (Heusel et
al., arXiv 1706.08500). The number is pytorch-fid's for the same images and weights: bilinear resize to 299x299 without
antialiasing; but here transparency is shown on white, and EXIF orientation applied. KID (Binkowski et al., arXiv
1801.01401) has no bias for small sets. IS: Salimans et al., arXiv 1606.03498. The file works alone.

    python fid.py real/ fake.zip                             # folders, .zip of images, .npz of statistics
    python fid.py real/ --save real.npz                      # keep the statistics of real/
    python fid.py real/ fake/ --kid --is                     # KID too, and the Inception Score of real/
    torchrun --nproc-per-node 8 fid.py real.npz fake/        # several GPUs share the images out
"""

import argparse
import contextlib
import functools
import hashlib
import os
import pathlib
import sys
import typing
import zipfile

import numpy as np
import scipy.linalg
import torch
import torch.distributed as dist
import torch.nn.functional as F
from PIL import Image, ImageOps
from torch import nn
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.data import DataLoader
from torchvision.models import inception as blocks
from torchvision.transforms.functional import center_crop, pil_to_tensor

try:
    from models import InputError
except ImportError:  # fid.py copied alone

    class InputError(ValueError):
        """Bad input: a message of one line that says what was found, where, and what to do."""


WEIGHTS_URL = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth"
)
WIDTH = 2048  # features per image
EXTENSIONS = tuple(".avif .bmp .gif .jfif .jp2 .jpe .jpeg .jpg .pbm .pgm .png .pnm .ppm .tga .tif .tiff .webp".split())


# ----------------------------------------------------------------------------------------------------------------------
# Distances


def frechet_distance(mu1, sigma1, mu2, sigma2):
    """Return the squared Fréchet distance, a float >= 0, of Gaussians with means (D,) and covariances (D, D).

    tr((S1 S2)^(1/2)) is the sum of the singular values of L1^T L2 for any L with S = L L^T: real, the same both ways,
    and without the roots of a product's eigenvalues, which near 0 are nothing but rounding.
    Raises InputError for shapes that do not match and for values that are not finite.
    """
    arrays = [np.asarray(array, dtype=np.float64) for array in (mu1, sigma1, mu2, sigma2)]
    shapes = [array.shape for array in arrays]
    width = arrays[0].size
    if shapes != [(width,), (width, width)] * 2:
        raise InputError(f"means and covariances of shapes {shapes}: both need features of the same width")
    if not all(np.isfinite(array).all() for array in arrays):
        raise InputError("a mean or covariance holds NaN or infinity")
    mu1, sigma1, mu2, sigma2 = arrays
    L1, L2 = root(sigma1), root(sigma2)
    overlap = scipy.linalg.svdvals(L1.T @ L2).sum()
    distance = np.sum((mu1 - mu2) ** 2) + np.trace(sigma1) + np.trace(sigma2) - 2 * overlap
    return max(0.0, float(distance))


def root(sigma):
    """Return L (D, rank) with L L^T = sigma, symmetric (D, D), whose eigenvalues of 0 to rounding drop out."""
    w, V = scipy.linalg.eigh(sigma, driver="evd")
    kept = w > w[-1] * len(w) * np.finfo(np.float64).eps
    return V[:, kept] * np.sqrt(w[kept])


def kernel_distance(features1, features2, subset_size=1000, n_subsets=100, seed=0):
    """Return KID and its standard deviation over subsets, floats, of features (N1, D) and (N2, D).

    The mean over subsets of the unbiased MMD^2 (Gretton et al. 2012, eq. 3) with the kernel (x.y / D + 1)^3; each
    subset has min(subset_size, N1, N2) features of either side, drawn without replacement. KID may be negative.
    Raises InputError for features of different widths or fewer than 2.
    """
    all1, all2 = np.asarray(features1, dtype=np.float64), np.asarray(features2, dtype=np.float64)
    m = min(subset_size, len(all1), len(all2))
    if all1.shape[1:] != all2.shape[1:] or m < 2:
        raise InputError(f"features {all1.shape} and {all2.shape}: need 2 or more on both sides, of one width")

    def kernel(a, b):
        return (a @ b.T / a.shape[1] + 1) ** 3

    rng = np.random.default_rng(seed)
    distances = []
    for _ in range(n_subsets):
        x = all1[rng.choice(len(all1), m, replace=False)]
        y = all2[rng.choice(len(all2), m, replace=False)]
        xx, yy, xy = kernel(x, x), kernel(y, y), kernel(x, y)
        within = (xx.sum() - xx.trace() + yy.sum() - yy.trace()) / (m * (m - 1))
        distances.append(within - 2 * xy.mean())
    return float(np.mean(distances)), float(np.std(distances))


def inception_score(logits, splits=10):
    """Return the Inception Score and its standard deviation over splits, floats, of logits (N, classes).

    exp(E KL(p(y|x) || p(y))) = exp(H(p(y)) - E H(p(y|x))) of each of `splits` consecutive parts, as the code of
    Salimans et al. (arXiv 1606.03498): images sorted by class come out too low. Logits as FIDInceptionV3 gives them.
    Raises InputError for fewer images than splits and for logits that are not finite.
    """
    p = torch.as_tensor(logits).double().softmax(dim=1)  # p(y|x)
    if len(p) < splits or not p.isfinite().all():
        raise InputError(f"logits {tuple(p.shape)}: Inception Score needs finite ones of {splits} images or more")
    scores = []
    for i in range(splits):
        part = p[i * len(p) // splits : (i + 1) * len(p) // splits]
        entropy = torch.special.entr(part).sum(dim=1).mean()
        marginal_entropy = torch.special.entr(part.mean(dim=0)).sum()
        scores.append((marginal_entropy - entropy).exp().item())
    return float(np.mean(scores)), float(np.std(scores))


# ----------------------------------------------------------------------------------------------------------------------
# Statistics


class FeatureStats(typing.NamedTuple):
    """What the Fréchet distance needs of a set of features: mean (D,) and cov (D, D), divisor n - 1, of n images.

    Both are float64 arrays. n is 0 if a file does not say.
    """

    n: int
    mean: np.ndarray
    cov: np.ndarray

    def save(self, path):
        """Write .npz with mu and sigma, the format of pytorch-fid, and n; a crash leaves no half a file."""
        with part_of(path) as part, open(part, "wb") as file:
            np.savez(file, mu=self.mean, sigma=self.cov, n=self.n)

    @classmethod
    def load(cls, path):
        """Read an .npz with mu (D,), sigma (D, D) and, if there, n. Raises InputError for other files."""
        try:
            with np.load(path, allow_pickle=False) as file:
                n = int(file["n"]) if "n" in file else 0
                return cls(n, file["mu"].astype(np.float64), file["sigma"].astype(np.float64))
        except Exception as error:  # numpy raises a different error for each way not to be such a file
            raise InputError(f"{path}: not an .npz of statistics, mu and sigma ({first_line(error)})") from error


def feature_stats(parts):
    """Return FeatureStats of features that come in parts, an iterable of tensors (N, D) on any device.

    They are summed up in float64, where they are: memory does not grow with their number. With several processes every
    one has to call it, with its share; all return the statistics of all features. Raises InputError for fewer than two.
    """
    n = 0
    total = products = torch.zeros((), dtype=torch.float64)
    for part in parts:
        x = part.detach().double()
        n += len(x)
        total = total + x.sum(dim=0)
        products = products + x.T @ x
    shares = gather((n, total.cpu(), products.cpu()))
    n, total, products = (sum(column) for column in zip(*shares, strict=True))
    if n < 2:
        raise InputError(f"{n} images, statistics need two or more")
    mean = total / n
    scatter = products - torch.outer(total, mean)  # sum of (x - mean) (x - mean)^T
    return FeatureStats(n, mean.numpy(), (scatter / (n - 1)).numpy())


def processes():
    """Return (rank, number of processes) of torch.distributed, (0, 1) without it. As in models.py."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank(), dist.get_world_size()
    return 0, 1


def gather(item):
    """Return the list of all processes' items, by rank, on each of them; every process has to call it."""
    items = [item] * processes()[1]
    if len(items) > 1:
        dist.all_gather_object(items, item)
    return items


def gather_rows(rows):
    """Return all processes' rows in one tensor (N, D): the first row of each by rank, then the second of each ..."""
    parts = gather(rows)
    joined = torch.empty(sum(map(len, parts)), *parts[0].shape[1:])
    for rank, part in enumerate(parts):
        if len(part):
            joined[rank :: len(parts)] = part
    return joined


def first_line(error):
    """Return the message of an exception in one line, its type's name if it has none."""
    message = str(error).strip() or type(error).__name__
    return message.splitlines()[0]


@contextlib.contextmanager
def part_of(path):
    """Give the path of a file to write: whole, it is moved to path, after an error it goes. Makes path's folder."""
    part = pathlib.Path(f"{path}.{os.getpid()}.tmp")  # two runs may want the same file at once
    part.parent.mkdir(parents=True, exist_ok=True)
    try:
        yield part
        with open(part, "rb") as file:
            os.fsync(file.fileno())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


# ----------------------------------------------------------------------------------------------------------------------
# The Inception network: v3 as in TensorFlow's graph of 2015, with the module names of its PyTorch port


def bilinear(images):
    """Resize float images (N, 3, H, W) to (N, 3, 299, 299), without antialiasing; 299x299 passes unchanged."""
    return F.interpolate(images, size=(299, 299), mode="bilinear", align_corners=False)


class FIDInceptionV3(blocks.Inception3):
    """The FID Inception: torchvision's with 1008 classes, no auxiliary head, and the poolings of the 2015 graph."""

    def __init__(self):
        super().__init__(num_classes=1008, aux_logits=False, init_weights=False)

    def forward(self, images):
        """Return the features (N, 2048) and logits (N, 1008), float32, of float images (N, 3, H, W) in [0, 1].

        Images may be on any device, and are resized to 299x299. The logits are without the bias of the last layer, as
        the code of the Inception Score has them. Always in float32, no TF32, also in autocast.
        """
        images = images.to(self.fc.weight)
        no_tf32 = torch.backends.cudnn.flags(enabled=True, deterministic=True, allow_tf32=False)
        with torch.autocast(images.device.type, enabled=False), no_tf32:
            x = 2 * bilinear(images) - 1
            for name, layer in self.named_children():  # in the order of the graph
                if hasattr(layer, "branch_pool"):
                    branches = layer._forward(x)
                    if name == "Mixed_7c":
                        pooled = F.max_pool2d(x, 3, stride=1, padding=1)
                    else:  # windows leave the padding out
                        pooled = F.avg_pool2d(x, 3, stride=1, padding=1, count_include_pad=False)
                    branches[-1] = layer.branch_pool(pooled)
                    x = torch.cat(branches, dim=1)
                elif name != "fc":
                    x = layer(x)
            features = x.flatten(1)
            logits = F.linear(features.double(), self.fc.weight.double())  # there is no TF32 in float64
        return features, logits.float()


def fetch_weights(url, option):
    """Return the path of a weight file in torch hub's cache, downloaded if it is not there, with a bar on stderr.

    The file's name ends in the first eight hex digits of its SHA-256. With torch.distributed initialised, every process
    has to call it: the first downloads, the others wait. option: how the user gives a file instead, "--weights FILE".
    Raises InputError, the same in every process, if the download fails; no part of the file stays.
    """
    name = os.path.basename(url)
    path = os.path.join(torch.hub.get_dir(), "checkpoints", name)
    problem = None
    if processes()[0] == 0 and not os.path.exists(path):
        try:
            with part_of(path) as part:
                torch.hub.download_url_to_file(url, part, hash_prefix=name.rpartition("-")[2][:8])
        except Exception as error:  # whatever the network, the proxy or the disk raises
            problem = first_line(error)
    problem = gather(problem)[0]
    if problem:
        raise InputError(
            f"no weights {name} (download failed: {problem}): get {url} and give {option}, or put it at {path}"
        )
    return path


def load_inception(weights="auto", device="cpu", option="--inception FILE"):
    """Return a frozen FIDInceptionV3 in eval mode on a device, with its normalisations folded into the convolutions.

    Folded, and on a CPU channels last, it is twice as fast; its state dict no longer has FIDInceptionV3's keys.
    weights: a path to pytorch-fid's weight file; "auto": that file from torch hub's cache, see fetch_weights, option
    too. Raises InputError if the file is missing, is no weight file, or does not fit.
    """
    net = FIDInceptionV3()
    path = weights
    if weights == "auto":
        path = fetch_weights(WEIGHTS_URL, option)
    try:
        net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
    except Exception as error:  # torch.load raises nearly anything on a file of another kind
        reason = first_line(error).split(". ")[0]  # torch goes on with advice to execute what is in the file
        problem = f"not the weights of the FID Inception ({reason})"
        raise InputError(f"{path}: {problem}: give pytorch-fid's file, or leave {option} out to download it") from error
    net.eval().requires_grad_(False)
    for module in list(net.modules()):
        if isinstance(module, blocks.BasicConv2d):
            module.conv, module.bn = fuse_conv_bn_eval(module.conv, module.bn), nn.Identity()
    if torch.device(device).type == "cpu":
        net.to(memory_format=torch.channels_last)
    return net.to(device)


# ----------------------------------------------------------------------------------------------------------------------
# Measuring sets


@torch.no_grad()
def measure(batches, inception, keep=()):
    """Return FeatureStats of float images (N, 3, H, W) in [0, 1], and {name: all outputs} for the names in keep.

    "features" are (n, 2048), "logits" (n, 1008), on the CPU. With several processes every one has to call it, the
    process r with the images r, r + world, ...; all return the same, the outputs in the order of the images.
    """
    kept = {name: [torch.empty(0)] for name in keep}

    def features():
        for images in batches:
            outputs = dict(zip(("features", "logits"), inception(images), strict=True))
            for name in keep:
                kept[name].append(outputs[name].cpu())
            yield outputs["features"]

    stats = feature_stats(features())
    return stats, {name: gather_rows(torch.cat(kept[name])) for name in keep}


def image_stats(files, inception, batch_size=50, workers=0, keep=()):
    """Return FeatureStats of ImageFiles and a dictionary of what to keep, in their order: see measure.

    workers: processes that decode images, 0 for none. keep: names out of "features" and "logits". Batches are counted
    on stderr. With torch.distributed initialised, every process has to call it: each measures its share of the images,
    and all return the same. Raises InputError naming the first image that cannot be read.
    """
    device = next(inception.parameters()).device
    rank, world = processes()
    share = range(rank, len(files), world)
    loader = DataLoader(files, batch_size, sampler=share, num_workers=workers, collate_fn=list)

    def batches():
        for i, pictures in enumerate(loader, 1):
            tensors = [pil_to_tensor(picture).to(device) for picture in pictures]
            yield torch.cat([bilinear(tensor[None] / 255) for tensor in tensors])  # they may differ in size
            if rank == 0 and i % 20 == 0:
                print(f"{files.source}: batch {i} of {len(loader)}", file=sys.stderr)

    return measure(batches(), inception, keep)


def generated_stats(batches, inception, splits=None):
    """Return FeatureStats of generated images, with splits a tuple (FeatureStats, their inception_score).

    batches: iterable of float images (N, 3, H, W) in [-1, 1] on any device; values outside are clipped, and all are
    rounded to 8 bits like the files that image_stats reads. With torch.distributed initialised, every process has to
    call it, the process r with the images r, r + world, ... (their order counts for the score); all return the same.
    """
    rounded = (((images.float().clamp(-1, 1) + 1) * 127.5).round() / 255 for images in batches)
    if splits is None:
        return measure(rounded, inception)[0]
    stats, kept = measure(rounded, inception, ["logits"])
    return stats, inception_score(kept["logits"], splits)


def kept_stats(name, batches, inception):
    """Return generated_stats(batches(), inception), kept in NAME_WEIGHTS.npz: where it exists, batches is not called.

    WEIGHTS tells the network's weights apart. Rank 0's file counts; every process has to call this.
    """
    weights = hashlib.sha256(inception.fc.weight.cpu().numpy().tobytes()).hexdigest()[:8]
    path = f"{name}_{weights}.npz"
    stats = None
    if processes()[0] == 0 and os.path.exists(path):
        stats = FeatureStats.load(path)
    stats = gather(stats)[0]
    if stats is None:
        stats = generated_stats(batches(), inception)
        if processes()[0] == 0:
            stats.save(path)
    return stats


# ----------------------------------------------------------------------------------------------------------------------
# Images and files


def to_rgb(image):
    """Convert a PIL image of 8 or 16 bits to 8-bit RGB: turned as its EXIF data say, transparency on white.

    Otherwise Pillow's conversion, but 16-bit grey is scaled, not clipped.
    """
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


def find_files(folder, above=()):
    """Return the paths of all files below a folder; links are followed, but not in circles.

    Without what starts with a dot, and without samples/ beside an args.json, which a training run wrote.
    """
    above = (*above, os.path.realpath(folder))
    of_run = os.path.exists(f"{folder}/args.json")
    paths = []
    for entry in os.scandir(folder):
        if entry.name.startswith(".") or (of_run and entry.name == "samples"):
            continue
        if not entry.is_dir():
            paths.append(entry.path)
        elif os.path.realpath(entry.path) not in above:
            paths += find_files(entry.path, above)
    return paths


@functools.cache
def open_archive(path, _process):
    """Open a .zip once in each process: a file handle shared between processes would share its position."""
    return zipfile.ZipFile(path)


class ImageFiles:
    """The images of a folder (see find_files) or of a .zip, in the order of their names.

    `names` are relative to the source, without what starts with a dot; `files[i]` is a PIL RGB image, see to_rgb;
    str(files) tells how many there are. Picklable and safe in workers.
    size: pixels; if given, each image is resized to this square, bicubic, as the training scripts evaluate.
    Raises InputError for a source that is neither folder nor .zip, or has no images; on access for an image that is
    unreadable, truncated, of 32 bits, or larger than twice Image.MAX_IMAGE_PIXELS (found before it is decoded).
    """

    def __init__(self, source, size=None):
        self.source, self.size = os.fspath(source), size
        self.zipped = zipfile.is_zipfile(source)
        if self.zipped:
            try:
                names = open_archive(self.source, os.getpid()).namelist()
            except zipfile.BadZipFile as error:
                raise InputError(f"{source}: a damaged .zip ({first_line(error)})") from error
            names = [name for name in names if "/." not in f"/{name}" and not name.endswith("/")]
        elif os.path.isdir(source):
            names = [os.path.relpath(path, source).replace(os.sep, "/") for path in find_files(source)]
        else:
            raise InputError(f"{source}: no such folder, and no whole .zip")
        self.names = sorted(name for name in names if name.lower().endswith(EXTENSIONS))
        if not self.names:
            raise InputError(f"{source}: holds no images, files that end in {' '.join(EXTENSIONS)}")

    def __str__(self):
        return f"{self.source}: {len(self)} images"

    def __len__(self):
        return len(self.names)

    def __getitem__(self, index):
        with self._image(index) as image:
            image = to_rgb(image)
        if self.size:
            image = image.resize((self.size, self.size), Image.Resampling.BICUBIC)
        return image

    @contextlib.contextmanager
    def _image(self, index):
        """Open an image, its header read and its pixels not yet; whatever fails inside becomes an InputError."""
        where = os.path.join(self.source, self.names[index])
        try:
            if self.zipped:
                file = open_archive(self.source, os.getpid()).open(self.names[index])
            else:
                file = open(where, "rb")
            with file, Image.open(file) as image:
                if image.mode == "F" or (image.mode == "I" and image.format not in ("PNG", "PPM")):
                    # Of floats and 32-bit integers white may be 1, 255 or anything; in PNG and PPM an "I" has 16 bits
                    raise InputError("its values have 32 bits and no known range: save it with 8 or 16 bits")
                yield image
        except Exception as error:  # Pillow's decoders raise nearly anything on a damaged file
            raise InputError(f"{where}: not a readable image ({first_line(error)})") from error

    def next_readable(self, index):
        """Return image `index`, or the next that can be read, with a warning on stderr for each that cannot.

        Goes on with the first after the last. Raises InputError if none can be read.
        """
        for step in range(len(self)):
            try:
                return self[(index + step) % len(self)]
            except InputError as error:
                print(f"warning: {error}, skipped", file=sys.stderr, flush=True)
        raise InputError(f"{self.source}: none of {len(self)} images can be read")

    def check(self):
        """Open every header, decode nothing, and return the list of (width, height) in pixels, before EXIF turns.

        Raises InputError at the first image that has no readable header, 32 bits, or is too large.
        """
        sizes = []
        for index in range(len(self)):
            with self._image(index) as image:
                sizes.append(image.size)
        return sizes

    def fingerprint(self, *more):
        """Return a short digest of the files' names, sizes and modification times, or of the .zip's, and of more."""
        paths = [self.source]
        if not self.zipped:
            paths = [os.path.join(self.source, name) for name in self.names]
        stats = [os.stat(path) for path in paths]
        facts = (self.names, [(stat.st_size, stat.st_mtime) for stat in stats], more)
        return hashlib.sha256(repr(facts).encode()).hexdigest()[:16]


def central_square(image, side, resample):
    """Return the central square of a PIL RGB image, resized by Pillow: a uint8 tensor (3, side, side)."""
    square = center_crop(image, min(image.size))
    return pil_to_tensor(square.resize((side, side), resample))


class StoredSquares:
    """The central squares of ImageFiles, decoded and resized once: item i is a uint8 tensor (3, side, side).

    They stand in one .npy in a folder, 3 side^2 bytes an image, that all processes map. Rank 0 writes it, under another
    name until it is whole, if the folder does not hold it yet for these files; every process has to call this.
    resample: one of Image.Resampling. Raises InputError naming an image that cannot be read.
    """

    def __init__(self, files, side, folder, workers=0, resample=Image.Resampling.BICUBIC):
        path = pathlib.Path(folder, f"squares_{side}_{files.fingerprint(resample)}.npy")
        if processes()[0] == 0 and not path.exists():
            resize = functools.partial(central_square, side=side, resample=resample)
            files.check()  # a header that cannot be read shows before hours of work
            squares = DataLoader(files, None, num_workers=workers, collate_fn=resize)
            header = {"descr": "|u1", "fortran_order": False, "shape": (len(files), 3, side, side)}
            with part_of(path) as part, open(part, "wb") as file:
                np.lib.format.write_array_header_1_0(file, header)
                for n, square in enumerate(squares, 1):
                    file.write(square.numpy().tobytes())
                    if n % 10_000 == 0:
                        print(f"{files.source}: resized {n} of {len(files)} pictures", file=sys.stderr)
        self.path = gather(path)[0]  # and wait for rank 0

    @property
    def images(self):
        return open_array(self.path)

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return torch.from_numpy(np.array(self.images[index]))


@functools.cache
def open_array(path):
    """Map an .npy once in each process: its pages are shared, and a pickled StoredSquares holds the path alone."""
    return np.load(path, mmap_mode="r")


# ----------------------------------------------------------------------------------------------------------------------
# The command


def pick_device(name):
    """Return the torch.device of that name; "auto" and "cuda" mean this process's GPU. InputError if it cannot work."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda":
        name = f"cuda:{os.environ.get('LOCAL_RANK', 0)}"
    try:
        device = torch.device(name)
        torch.empty(1, device=device, dtype=torch.float64)
    except (RuntimeError, AssertionError, TypeError) as error:  # no such device, no CUDA, no float64
        raise InputError(f"--device {name} does not work here, use cpu or auto ({first_line(error)})") from error
    return device


def parse_args(argv):
    parser = argparse.ArgumentParser(
        "fid.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.error = lambda message: parser.exit(2, f"fid.py: error: {message}\n")
    option = parser.add_argument
    option("A", help="folder of images, searched recursively, .zip of images, or .npz of statistics")
    option("B", nargs="?", help="the same; may be left out with --save or --is")
    option("--save", metavar="FILE.npz", help="write the statistics of A")
    option("--kid", action="store_true", help="also the Kernel Inception Distance (no .npz)")
    option("--is", dest="score", action="store_true", help="also the Inception Score of A (in 10 parts)")
    option("--size", type=int, help="first resize the images to SIZE x SIZE, as the training scripts do")
    option("--batch-size", type=int, default=50, help="images per forward pass (%(default)s)")
    option("--workers", type=int, default=min(4, os.cpu_count() or 1), help="processes that decode (%(default)s)")
    option("--device", default="auto", help="auto (a GPU if there is one), cpu, cuda, cuda:1 ...")
    option("--weights", "--inception", default="auto", help="auto (torch hub's cache, else download), or a path")
    args = parser.parse_args(argv)
    if not (args.B or args.save or args.score):
        parser.error("B is missing: give a second set of images or statistics, --save FILE.npz, or --is")
    if args.save and not args.save.endswith(".npz"):
        parser.error(f"--save {args.save}: the name has to end in .npz")
    if args.kid and (not args.B or args.B.endswith(".npz")):
        parser.error("--kid needs a second set of images: give a folder or .zip file")
    if (args.kid or args.score) and args.A.endswith(".npz"):
        parser.error("--kid and --is need the images of A: give a folder or .zip file")
    return args, parser


def run(args, device):
    """Measure, save and print what the parsed arguments ask for, as one of torch.distributed's processes."""
    # Open both sets before either is measured
    rank = processes()[0]
    sources = [source for source in (args.A, args.B) if source is not None]
    stats, files, kept = {}, {}, {}
    for source in sources:
        if source.endswith(".npz"):
            stats[source] = FeatureStats.load(source)
            continue
        files[source] = ImageFiles(source, args.size)
        files[source].check()

    # Measure
    keep = []
    if args.kid:
        keep.append("features")
    if args.score:
        keep.append("logits")
    if files:
        inception = load_inception(args.weights, device, "--weights FILE")
    for source, images in files.items():
        if rank == 0:
            print(images, file=sys.stderr)
        stats[source], kept[source] = image_stats(images, inception, args.batch_size, args.workers, keep)
    if rank > 0:
        return

    # Save and print
    result = {"images": [stats[source].n for source in sources]}
    if args.save:
        stats[args.A].save(args.save)
    if args.B:
        a, b = stats[args.A], stats[args.B]
        result["fid"] = frechet_distance(a.mean, a.cov, b.mean, b.cov)
        for source in sources:
            n = stats[source].n
            if 0 < n < WIDTH:  # some files do not say: 0
                print(f"warning: {n} images in {source}: FID is too high for fewer than {WIDTH}", file=sys.stderr)
    if args.kid:
        result["kid"], result["kid_std"] = kernel_distance(kept[args.A]["features"], kept[args.B]["features"])
    if args.score:
        result["is"], result["is_std"] = inception_score(kept[args.A]["logits"])
    for name, value in result.items():
        print(name, value)


def main(argv=None):
    """Run the command line; bad input ends in SystemExit with status 2 and one line on stderr."""
    args, parser = parse_args(argv)
    parallel = int(os.environ.get("WORLD_SIZE", 1)) > 1
    try:
        device = pick_device(args.device)
        if device.type == "cuda":
            torch.cuda.set_device(device)
        if parallel:
            backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
            dist.init_process_group(backend)
        run(args, device)
        if parallel:
            dist.destroy_process_group()
    except (ValueError, OSError) as error:  # InputError is a ValueError
        last_line = str(error).strip().splitlines()[-1]
        parser.error(last_line.rpartition("InputError: ")[2])  # one from a worker has its traceback before the message


if __name__ == "__main__":
    main()
