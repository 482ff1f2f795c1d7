#!/usr/bin/env bash
# The image path in small: every command once, on drawn shapes, in about a minute on two CPU cores.
# Results go to the folder that is given (or a new one). CI runs this script.
set -euo pipefail
export LATENTLM_HOME="${1:-$(mktemp -d)}"

latentlm train-vae --data embedded:shapes
latentlm tokenize --data embedded:shapes --flip
latentlm train-lm
latentlm sample --class circle -n 8 --cfg 2 --npz
latentlm eval recon --data embedded:shapes --extractor none --offline
latentlm train-lm --recipe dit-tiny
latentlm sample --class circle --class triangle -n 4 --json

echo "Everything is in $LATENTLM_HOME" >&2
