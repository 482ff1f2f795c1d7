"""LatentLM: sigma-VAE tokenizers and next-token diffusion in one causal Transformer.

The core has no terminal: it never prints, and everything that a person should see goes through
``latentlm_core.progress``. Start reading at ``latentlm_core.workflows``: one function per command.
"""

from importlib.metadata import PackageNotFoundError, version

try:
    __version__ = version("latentlm")
except PackageNotFoundError:  # run from a source tree that was never installed
    __version__ = "0+unknown"

__all__ = ["__version__"]
