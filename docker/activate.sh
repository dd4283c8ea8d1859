# shellcheck shell=sh
# Login shells and interactive shells source this file. A login shell has just reset PATH, so the environment is put first
# even if conda cannot activate it, as for a user whom it does not know.
# shellcheck disable=SC1091 # the file exists in the image
{ . /opt/conda/etc/profile.d/conda.sh && conda activate yolov12; } || PATH=/opt/conda/envs/yolov12/bin:/opt/conda/bin:$PATH
