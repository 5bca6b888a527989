#!/usr/bin/env bash
# A latent cache from images: converts the autoencoder, encodes, verifies. Continues where it stopped.
#
#   launch/prepare_data.sh --source=SOURCE --vae=KIND:DIR --out=DIR [--weights=FILE] [--dry_run]
#       [-- more flags of python -m ppflow_jax.prepare]
#
# --weights: a PyTorch file of the autoencoder, converted to the DIR of --vae if that is not there.
# --python: the interpreter (default python). Flags may come from PPFLOW_SOURCE, PPFLOW_VAE, ...
# shellcheck source=launch/flags.sh disable=SC2154
source "$(dirname "$0")/flags.sh"

parse "source vae out weights python" "$@"
need source vae out
python=${python:-python}
need_tool "$python"
[[ $vae == *:* ]] || fail "--vae=$vae: write vae:DIR or taesd:DIR"
if [[ -n $weights && ! -e ${vae#*:} ]]; then
  run "$python" -m ppflow_jax.convert --source="$weights" --target="${vae#*:}"
fi
run "$python" -m ppflow_jax.prepare --source="$source" --vae="$vae" --out="$out" "${command[@]}"
run "$python" -m ppflow_jax.prepare --out="$out" --verify
