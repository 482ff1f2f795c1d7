#!/usr/bin/env bash
# Text and images in small: every command once, on drawn shapes with captions and on Python's own
# documentation, in about a minute on two CPU cores. After so few steps the images are blots and the
# text is babble: `latentlm demo --modality text` trains long enough to be judged. Results go to the
# folder that is given (or a new one).
set -euo pipefail
export LATENTLM_HOME="${1:-$(mktemp -d)}"
latents="$LATENTLM_HOME/latents/embedded-shapes"

latentlm train-vae --data embedded:shapes --recipe tiny
latentlm tokenize --data embedded:shapes
latentlm train-lm --data "text:pydoc=1,$latents=2,interleaved:$latents=1" --recipe multimodal-tiny
latentlm sample --prompt "a red circle on a blue background" -n 4 --out "$LATENTLM_HOME/samples/drawn"
image="$LATENTLM_HOME/samples/drawn/000000.png"
latentlm sample --caption "$image" --max-tokens 20
latentlm sample --ask "which shape?" --image "$image" --max-tokens 8 --json
latentlm sample --text-only "The " --max-tokens 20 --temperature 0.8 --top-p 0.9
echo '["a red circle on a blue background", {"image": "000000.png"}]' > "$LATENTLM_HOME/samples/drawn/page.json"
latentlm sample --interleaved "$LATENTLM_HOME/samples/drawn/page.json" --max-tokens 20
latentlm sample --data embedded:shapes -n 8 --out "$LATENTLM_HOME/samples/captions"
latentlm eval t2i --samples "$LATENTLM_HOME/samples/captions" --extractor none --clip none
latentlm eval caption --data embedded:shapes -n 8
latentlm eval ppl --data pydoc -n 2

echo "Everything is in $LATENTLM_HOME" >&2
