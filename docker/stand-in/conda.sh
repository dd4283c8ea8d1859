# shellcheck shell=sh
# Stands in for what miniforge keeps in this place: `conda activate NAME`.
conda() {
  if [ "$1" != activate ]; then
    /opt/conda/bin/conda "$@"
    return
  fi
  # shellcheck disable=SC1090 # made by python -m venv
  . "/opt/conda/envs/$2/bin/activate"
  export CONDA_DEFAULT_ENV="$2" CONDA_PREFIX="/opt/conda/envs/$2"
}
