#!/usr/bin/env bash
# Emoji of their names at 64x64, and their names of emoji. The full size is for a GPU, by estimate
# half an hour; EMOJI_SCALE=small is for two CPU cores and makes blots. Results go to the folder that
# is given (default: the workspace). Twemoji graphics (c) Twitter and contributors, CC BY 4.0.
#
#     examples/emoji.sh [FOLDER]
set -euo pipefail
export LATENTLM_HOME="${1:-${LATENTLM_HOME:-.}}"
scale="${EMOJI_SCALE:-full}"
vae=() lm=()
if [[ $scale == small ]]; then
    vae=(--set trainer.total_steps=1000 --set "tokenizer.network.channels=[64, 128, 128]")
    lm=(--set trainer.total_steps=800 --set data.batch_elements=4096 --set trainer.ema_decay=0.99
        --set model.backbone.num_layers=6 --set model.backbone.hidden_size=256
        --set model.backbone.num_heads=4 --set model.backbone.intermediate_size=704
        --set model.head.num_layers=3 --set model.head.intermediate_size=512)
fi
runs="$LATENTLM_HOME/runs" latents="$LATENTLM_HOME/latents/emoji-$scale"
samples="$LATENTLM_HOME/samples"

latentlm train-vae --data emoji --out "$runs/vae-emoji-$scale" "${vae[@]}"
latentlm eval recon --data emoji --vae "$runs/vae-emoji-$scale" --offline
latentlm tokenize --data emoji --vae "$runs/vae-emoji-$scale" --flip --out "$latents"
latentlm train-lm --data "$latents" --recipe emoji --out "$runs/lm-emoji-$scale" "${lm[@]}"
latentlm sample --model "$runs/lm-emoji-$scale" --data emoji --split train -n 512 --out "$samples/emoji-$scale"
latentlm eval t2i --samples "$samples/emoji-$scale" --reference emoji --offline
latentlm eval caption --data emoji --model "$runs/lm-emoji-$scale"
