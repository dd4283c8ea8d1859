# shellcheck shell=sh
# Sourced by login shells and interactive ones.
# shellcheck disable=SC1091 # part of the image
. /opt/conda/etc/profile.d/conda.sh
conda activate yolov12
