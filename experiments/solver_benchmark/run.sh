#!/bin/sh
# Both benchmarks and the comparison with separate compilation; resumable (finished buckets are kept).
# The digits part needs a trained run: jaxdiff train --config configs/digits.py --workdir runs/digits
set -e
cd "$(dirname "$0")/../.."
out=experiments/solver_benchmark
jaxdiff bench --config configs/bench/gmm.py --out runs/bench/gmm
jaxdiff bench --config configs/bench/digits.py --out runs/bench/digits
python benchmarks/sweep.py --separate 48 --json $out/sweep.json
for name in gmm digits; do
  mkdir -p $out/$name
  sed '/^!\[mean_error/d; /^!\[covariance_error/d' runs/bench/$name/report.md > $out/$name/report.md
  cp runs/bench/$name/error_rms*.png runs/bench/$name/error_sliced_w2*.png $out/$name/
  gzip -9nc runs/bench/$name/results.csv > $out/$name/results.csv.gz
done
cp runs/bench/digits/error_frechet.png $out/digits/
