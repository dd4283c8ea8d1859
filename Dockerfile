# syntax=docker/dockerfile:1
# docker build -t yolov12 . && docker run --gpus all --shm-size=8g yolov12 train data=demo
#
# Needs BuildKit or buildah, and a network that has the three bases. `scripts/image.sh build` does without them where it
# has to, with stand-ins given by these arguments.
ARG CUDA_DEVEL=nvidia/cuda:12.1.1-cudnn8-devel-ubuntu22.04
ARG CUDA_RUNTIME=nvidia/cuda:12.1.1-runtime-ubuntu22.04
ARG CONDA=condaforge/miniforge3:24.11.3-0

# hadolint ignore=DL3006 # the default above has a tag
FROM ${CONDA} AS conda

# hadolint ignore=DL3006
FROM ${CUDA_DEVEL} AS environment
COPY --from=conda /opt/conda /opt/conda
ENV PATH=/opt/conda/envs/yolov12/bin:/opt/conda/bin:$PATH
WORKDIR /root/yolov12
COPY environment.yml ./
COPY requirements requirements
RUN --mount=type=cache,target=/root/.cache/pip conda env create --file environment.yml
# Compiled against the torch above, for A100, A10 and RTX 30, L4 and RTX 40, H100. 16 compilers need about 64 GB.
ARG GPU_REQUIREMENTS=requirements/gpu.txt
ARG FLASH_ATTN_CUDA_ARCHS=80;86;89;90
ARG MAX_JOBS=4
ARG NVCC_THREADS=2
# hadolint ignore=DL3008 # the bases pin the release; its security updates are wanted
RUN --mount=type=cache,target=/root/.cache/pip \
    if [ -n "$GPU_REQUIREMENTS" ]; then \
        apt-get update && apt-get install --yes --no-install-recommends ninja-build && \
        rm -rf /var/lib/apt/lists/* && \
        export FLASH_ATTENTION_FORCE_BUILD=TRUE FLASH_ATTN_CUDA_ARCHS MAX_JOBS NVCC_THREADS && \
        python -m pip install --no-deps --no-build-isolation --require-hashes -r "$GPU_REQUIREMENTS"; \
    fi

# hadolint ignore=DL3006
FROM ${CUDA_RUNTIME} AS final
LABEL org.opencontainers.image.title="yolov12" \
      org.opencontainers.image.description="YOLOv12 on Ultralytics, with training that does not run out of GPU memory" \
      org.opencontainers.image.licenses="AGPL-3.0-only" \
      org.opencontainers.image.documentation="/root/yolov12/README.md"
# gcc is not for users: Triton builds the launcher of a kernel with it when the kernel first runs. Without it BatchNorm and
# SiLU are two operations, and a model keeps a third more (docs/explanation/engine.md).
# hadolint ignore=DL3008
RUN apt-get update && \
    apt-get install --yes --no-install-recommends ca-certificates gcc libc6-dev libgl1 libglib2.0-0 tini && \
    rm -rf /var/lib/apt/lists/*
COPY --from=environment /opt/conda /opt/conda
ENV PATH=/opt/conda/envs/yolov12/bin:/opt/conda/bin:$PATH \
    CONDA_DEFAULT_ENV=yolov12 \
    CONDA_PREFIX=/opt/conda/envs/yolov12 \
    PYTHONNOUSERSITE=1 \
    YOLO_AUTOINSTALL=false \
    PYTHONUNBUFFERED=1
WORKDIR /root/yolov12
COPY . .
ARG GPU_REQUIREMENTS=requirements/gpu.txt
# Other users than root find the project too. Shells reset PATH when they log in, and ask for an activated environment.
RUN python -m pip install --no-deps --no-build-isolation --no-index --no-cache-dir --editable . && \
    python docker/verify.py ${GPU_REQUIREMENTS:+"$GPU_REQUIREMENTS"} && \
    chmod 755 /root && \
    ln -s /root/yolov12/docker/activate.sh /etc/profile.d/yolov12.sh && \
    echo '. /root/yolov12/docker/activate.sh' >>/etc/bash.bashrc
ENTRYPOINT ["tini", "--", "/root/yolov12/docker/entrypoint.sh"]
