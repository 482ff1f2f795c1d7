"""Encoding and decoding speech piece by piece, with the result of the whole, sample for sample.

    encoder = StreamingEncoder(vae)
    for piece in pieces:
        posterior = encoder.push(piece)         # of the latents that the piece completes
    posterior = encoder.finish()                # of what is left: the last partial one

Pieces may have any length. All state lives in these objects, so streams never mix.

Axes: B rows, S audio samples, T latent positions, C latent channels.
"""

import torch
from torch import Tensor

from latentlm_core.errors import ArtifactError
from latentlm_core.runtime import evaluating
from latentlm_core.tokenizers.base import LatentPosterior
from latentlm_core.tokenizers.causal import StreamState
from latentlm_core.tokenizers.sigma_vae import SigmaVAE
from latentlm_core.tokenizers.spectral import SpectralDecoder, SpectralEncoder
from latentlm_core.tokenizers.speech import CausalConvDecoder, CausalConvEncoder


class StreamingEncoder:
    """Audio comes in pieces, latents go out as soon as their samples are complete.

    Args:
        vae: a tokenizer of speech.
        num_rows: B streams that go side by side.

    Raises:
        ArtifactError: it is a tokenizer of images.
    """

    def __init__(self, vae: SigmaVAE, num_rows: int = 1) -> None:
        if not isinstance(vae.encoder, CausalConvEncoder | SpectralEncoder):
            raise ArtifactError("This is a tokenizer of images, which are encoded as a whole.")
        self._encoder = vae.encoder
        self._vae = vae
        self._state = StreamState()
        self._nothing = torch.zeros(num_rows, 1, 0, device=next(vae.parameters()).device)

    def push(self, audio: Tensor) -> LatentPosterior:
        """Audio (B, 1, S) => posterior over (B, T, C); T may be 0."""
        with evaluating(self._vae):
            return self._vae.posterior(self._encoder(audio, self._state))

    def finish(self) -> LatentPosterior:
        """The latents of what is left; the stream is over then."""
        self._state.is_final = True
        return self.push(self._nothing)


class StreamingDecoder:
    """Raw latents come in pieces, samples go out as soon as no later latent adds to them.

    Args:
        vae: a tokenizer of speech.
        num_rows: B streams that go side by side.

    Raises:
        ArtifactError: it is a tokenizer of images.
    """

    def __init__(self, vae: SigmaVAE, num_rows: int = 1) -> None:
        if not isinstance(vae.decoder, CausalConvDecoder | SpectralDecoder):
            raise ArtifactError("This is a tokenizer of images, which are decoded as a whole.")
        self._decoder = vae.decoder
        self._vae = vae
        self._state = StreamState()
        device = next(vae.parameters()).device
        self._nothing = torch.zeros(num_rows, 0, vae.latent_channels, device=device)

    def push(self, latents: Tensor) -> Tensor:
        """Raw latents (B, T, C) => audio (B, 1, S); S may be 0."""
        with evaluating(self._vae):
            audio: Tensor = self._decoder(latents, (latents.shape[1],), self._state)
            return audio

    def finish(self) -> Tensor:
        """The samples that are left; the stream is over then."""
        self._state.is_final = True
        return self.push(self._nothing)
