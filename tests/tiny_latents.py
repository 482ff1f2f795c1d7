"""A source with holes, small tokenizers, and the sets of latents that they make of it."""

from latentlm_core import files
from latentlm_core.data.base import Example
from latentlm_core.data.caching import encode_source
from latentlm_core.data.sources import Subset, open_source
from latentlm_core.errors import CorruptFileError
from latentlm_core.tokenizers.base import LatentPosteriorConfig, PosteriorKind
from latentlm_core.tokenizers.build import build_tokenizer
from latentlm_core.tokenizers.conv import ConvConfig
from latentlm_core.tokenizers.sigma_vae import SigmaVAEConfig

NETWORK = ConvConfig(image_size=16, channels=(8, 8), stem_patch_size=4)


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


def export_tokenizer(kind, export):
    """A tiny tokenizer, and the folder of its export."""
    config = SigmaVAEConfig(
        latent_channels=3, posterior=LatentPosteriorConfig(kind=kind), network=NETWORK
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


def flip_bit(path, place):
    data = bytearray(path.read_bytes())
    data[place % len(data)] ^= 4
    path.write_bytes(data)
