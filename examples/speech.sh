#!/usr/bin/env bash
# The speech path in small: every command once, on a synthetic voice (extra `demo`), in about two
# minutes on two CPU cores. What it says after so few steps is babble: `latentlm demo --modality
# speech` trains long enough to be understood. Results go to the folder that is given (or a new one).
set -euo pipefail
export LATENTLM_HOME="${1:-$(mktemp -d)}"

latentlm train-vae --data hibari --recipe speech-tiny
latentlm tokenize --data hibari
latentlm train-lm --recipe speech-tiny
latentlm sample --text "the red fox" -n 2
latentlm sample --text "the red fox" --stream --json
latentlm sample --protocol reference-utterance --data hibari -n 4 --out "$LATENTLM_HOME/samples/pairs"
latentlm eval wer --samples "$LATENTLM_HOME/samples/pairs"
latentlm eval wer --samples "$LATENTLM_HOME/samples/pairs" --of originals
latentlm eval recon --data hibari -n 4 --encoder none

echo "Everything is in $LATENTLM_HOME" >&2
