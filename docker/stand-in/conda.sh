# shellcheck shell=sh
# Replaces miniforge's file of this name: defines `conda activate NAME`.
conda() {
  if [ "$1" != activate ]; then
    /opt/conda/bin/conda "$@"
    return
  fi
  # shellcheck disable=SC1090 # python -m venv makes this file
  . "/opt/conda/envs/$2/bin/activate"
  export CONDA_DEFAULT_ENV="$2" CONDA_PREFIX="/opt/conda/envs/$2"
}
