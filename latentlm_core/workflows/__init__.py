"""One function per command. A newcomer starts here and descends.

    train_vae     images or speech     => runs/NAME      a sigma-VAE
    tokenize      the same, sigma-VAE  => latents/NAME   raw latents in shards
    train_lm      latents              => runs/NAME      a LatentLM or a DiT
    distill       model, latents       => runs/NAME      the same, drawing in a few steps
    sample        model                => samples/NAME   images
    speak         model, text, voice   => samples/NAME   speech
    write         model, prompt        => samples/NAME   text and images
    evaluate_*    samples, sigma-VAE   => a report
    bench_*       sizes, data          => how fast it is, against a plain loop
    doctor        anything of these    => what is wrong with it
    push          model                => the hub

Each takes plain values, does the whole work, tells ``progress`` about it and returns a ``Result``.
"""

from latentlm_core.workflows.bench_data import bench_load
from latentlm_core.workflows.bench_sample import bench_sample
from latentlm_core.workflows.bench_tokenize import bench_tokenize
from latentlm_core.workflows.bench_train import bench_train
from latentlm_core.workflows.distill import distill
from latentlm_core.workflows.doctor import doctor
from latentlm_core.workflows.evaluate import (
    evaluate_reconstruction,
    evaluate_samples,
    make_statistics,
)
from latentlm_core.workflows.evaluate_drawing import evaluate_text_to_image
from latentlm_core.workflows.evaluate_speech import evaluate_drift, evaluate_sim, evaluate_wer
from latentlm_core.workflows.evaluate_text import evaluate_perplexity
from latentlm_core.workflows.evaluate_understanding import evaluate_captions, evaluate_vqa
from latentlm_core.workflows.push import push
from latentlm_core.workflows.sample import sample
from latentlm_core.workflows.speak import speak
from latentlm_core.workflows.sweep import sweep
from latentlm_core.workflows.tokenize import tokenize
from latentlm_core.workflows.train_lm import train_lm
from latentlm_core.workflows.train_vae import train_vae
from latentlm_core.workflows.write import write

__all__ = [
    "bench_load",
    "bench_sample",
    "bench_tokenize",
    "bench_train",
    "distill",
    "doctor",
    "evaluate_captions",
    "evaluate_drift",
    "evaluate_perplexity",
    "evaluate_reconstruction",
    "evaluate_samples",
    "evaluate_sim",
    "evaluate_text_to_image",
    "evaluate_vqa",
    "evaluate_wer",
    "make_statistics",
    "push",
    "sample",
    "speak",
    "sweep",
    "tokenize",
    "train_lm",
    "train_vae",
    "write",
]
