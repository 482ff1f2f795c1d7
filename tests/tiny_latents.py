"""Sources with holes, small tokenizers, and the sets of latents that they make of them."""

from contextlib import contextmanager

import numpy as np
import torch
from safetensors.torch import load_file, save_file

from latentlm_core import files
from latentlm_core.data.audio import ClipLimits
from latentlm_core.data.base import Clip, Example
from latentlm_core.data.caching import encode_source
from latentlm_core.data.sources import Subset, open_source
from latentlm_core.data.speech_caching import encode_speech
from latentlm_core.errors import CorruptFileError
from latentlm_core.progress import SilentProgress
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig
from latentlm_core.tokenizers.speech import CausalConvConfig

NETWORK = ConvConfig(image_size=16, channels=(8, 8), stem_patch_size=4)
SPEECH_NETWORK = CausalConvConfig(
    sample_rate=8000, base_channels=4, strides=(4, 20), num_blocks=(1, 1, 1), layer_scale=0.5
)
"""80 samples a latent position."""


class Holed:
    """Shapes with some broken items."""

    def __init__(self, broken=(), count=50):
        self._whole = Subset(open_source("embedded:shapes"), range(count))
        self.name, self.classes, self._broken = "holed", self._whole.classes, set(broken)

    def __len__(self):
        return len(self._whole)

    def __getitem__(self, index) -> Example:
        if index in self._broken:
            raise CorruptFileError(f"{index}.png is empty.")
        return self._whole[index]


class Recordings:
    """Noise of 0.1 to 0.5 seconds, two speakers; some items are broken, some are silent."""

    def __init__(self, broken=(), silent=(), count=30, sample_rate=8000):
        self.name, self.classes, self._count = "recordings", ("anna", "bert"), count
        self._broken, self._silent, self._rate = set(broken), set(silent), sample_rate

    def __len__(self):
        return self._count

    def __getitem__(self, index) -> Clip:
        if index in self._broken:
            raise CorruptFileError(f"{index}.wav is empty.")
        noise = np.random.default_rng(index)
        samples = noise.uniform(-0.3, 0.3, noise.integers(self._rate // 10, self._rate // 2))
        samples *= index not in self._silent
        return Clip(
            samples=samples.astype(np.float32),
            sample_rate=self._rate,
            text=None if index % 5 == 4 else f"clip {index} \u00e9",
            speaker=None if index % 7 == 6 else index % 2,
            key=f"{index}.wav",
        )


class Interrupting(SilentProgress):
    """Presses Ctrl-C at the n-th advance."""

    def __init__(self, at):
        self.left = at

    @contextmanager
    def bar(self, label, total, unit, done=0):
        yield self

    def advance(self, amount=1, **figures):
        self.left -= 1
        if self.left == 0:
            raise KeyboardInterrupt


def content(folder):
    """Bytes of every file below a folder, by name."""
    return {
        path.relative_to(folder).as_posix(): path.read_bytes()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


def export_tokenizer(kind, export, network=NETWORK):
    """A tiny tokenizer, and the folder of its export."""
    config = SigmaVAEConfig(
        latent_channels=3, posterior=LatentPosteriorConfig(kind=kind), network=network
    )
    tokenizer = build_tokenizer(config)
    files.write_json(export / "config.json", config.to_dict())
    files.write_safetensors(export / "model.safetensors", tokenizer.state_dict())
    return tokenizer, export


def encode_below(root, tokenizers, place="a", source=None, kind=PosteriorKind.GAUSSIAN, **options):
    """Encode into ROOT/PLACE/set with the tokenizer of that kind; 16 latents a shard."""
    tokenizer, export = tokenizers[kind]
    defaults = {"spec": "holed", "split": "train", "shard_size": 16, "batch_size": 6}
    return encode_source(
        source or Holed(),
        tokenizer,
        root / place / "set",
        tokenizer_export=export,
        **(defaults | options),
    )


def encode_recordings(folder, tokenizer, export, source=None, **options):
    """Encode into ``folder``; 8 items a shard, a second of audio at once."""
    defaults = {"spec": "recordings", "split": "train", "shard_size": 8, "max_batch_seconds": 1}
    defaults["limits"] = ClipLimits(min_seconds=0.05)
    return encode_speech(
        source or Recordings(), tokenizer, folder, tokenizer_export=export, **(defaults | options)
    )


def forge(folder, number, **changed):
    """Rewrite a shard with other tensors and a manifest that vouches for it."""
    path = folder / f"shard-{number:05d}.safetensors"
    tensors = {k: v.clone() for k, v in load_file(path).items()}
    tensors |= changed
    save_file({k: v for k, v in tensors.items() if v is not None}, path)
    data = files.read_json(folder / "manifest.json")
    data["shards"][number] |= {
        "sha256": files.sha256_file(path),
        "num_bytes": path.stat().st_size,
    }
    rewrite(folder / "manifest.json", shards=data["shards"])


def rewrite(path, **changed):
    """Change a JSON object as who edits it does, which is without its seal."""
    data = files.read_json(path) | changed
    data.pop(files.SEAL, None)
    files.write_json(path, data)


def vouch(export):
    """Make an export say that the weights that it has are its own."""
    sha256 = files.sha256_file(export / "model.safetensors")
    rewrite(export / "config.json", weights_sha256=sha256)


def around(count, end):
    """Offsets from 0 to ``end`` whose differences are positive because they overflow int64."""
    step = (2**64 + end) // count
    places = [step * k % 2**64 for k in range(count)] + [end]
    return torch.tensor([place - 2**64 * (place >= 2**63) for place in places])


def flip_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 4
    path.write_bytes(data)
