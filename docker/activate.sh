# shellcheck shell=sh
# Login shells and interactive shells source this file.
# shellcheck disable=SC1091 # the file exists in the image
. /opt/conda/etc/profile.d/conda.sh
conda activate yolov12
