"""From configurations to networks: the one place that knows which network a kind stands for."""

from latentlm_core.runtime import seeded_init
from latentlm_core.tokenizers.conv import ConvConfig, ConvDecoder, ConvEncoder
from latentlm_core.tokenizers.critics import CriticConfig, PatchCritic
from latentlm_core.tokenizers.sigma_vae import Decoder, Encoder, SigmaVAE, SigmaVAEConfig
from latentlm_core.tokenizers.spectral import SpectralConfig, SpectralDecoder, SpectralEncoder
from latentlm_core.tokenizers.speech import CausalConvConfig, CausalConvDecoder, CausalConvEncoder
from latentlm_core.tokenizers.vit import ViTConfig, ViTDecoder, ViTEncoder


def build_tokenizer(config: SigmaVAEConfig, seed: int = 0) -> SigmaVAE:
    """A tokenizer whose initial weights depend on ``config`` and ``seed`` alone."""
    with seeded_init("tokenizer", seed):
        return SigmaVAE(config, *_networks(config))


def build_critic(config: CriticConfig, seed: int = 0) -> PatchCritic:
    """A discriminator whose initial weights depend on ``config`` and ``seed`` alone."""
    with seeded_init("critic", seed):
        return PatchCritic(config)


def _networks(config: SigmaVAEConfig) -> tuple[Encoder, Decoder]:
    outputs, channels = config.encoder_outputs, config.latent_channels
    match config.network:
        case ViTConfig() as vit:
            return ViTEncoder(vit, outputs), ViTDecoder(vit, channels)
        case ConvConfig() as conv:
            return ConvEncoder(conv, outputs), ConvDecoder(conv, channels)
        case CausalConvConfig() as causal:
            return CausalConvEncoder(causal, outputs), CausalConvDecoder(causal, channels)
        case SpectralConfig() as spectral:
            return SpectralEncoder(spectral, outputs), SpectralDecoder(spectral, channels)
