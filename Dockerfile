# syntax=docker/dockerfile:1
# docker build -t yolov12 . && docker run --gpus all --shm-size=8g yolov12 train data=demo
#
# Needs BuildKit or buildah, and a network that has the three bases. `scripts/image.sh build` does without them where it
# has to, with stand-ins given by these arguments.
#
# The bases are pinned here and nowhere else. The digest decides; the tag only says what it was.
# To renew them: change a tag, delete its digest, and run `scripts/image.sh pin`, which asks the registry for the digest.
# To mirror them: NVIDIA deletes the tags of a CUDA release six months after its end of life, so keep copies while they
# can be pulled: `skopeo copy --all docker://NAME@DIGEST docker://MIRROR/NAME`. A copy keeps the digest, so that
# `--build-arg CUDA_RUNTIME=MIRROR/NAME@DIGEST` builds the same image.
# podman and buildah find these names if their registries.conf has a registry for names without one.
ARG CUDA_DEVEL=nvidia/cuda:12.1.1-cudnn8-devel-ubuntu22.04@sha256:21196d81f56b48dbee70494d5f10322e1a77cc47ffe202a3bf68eab81533c20f
# torch's wheels bring cuBLAS, cuDNN, NCCL and the CUDA runtime. This base adds the variables that give a container its
# GPU, the check of the driver, and cuda-compat for older drivers of data centers.
ARG CUDA_RUNTIME=nvidia/cuda:12.1.1-base-ubuntu22.04@sha256:457a4076c56025f51217bff647ca631c7880ad3dbf546b03728ba98297ebbc22
ARG CONDA=condaforge/miniforge3:24.11.3-2@sha256:1148ac0d3edaa4f25ca77d35e440766883a1be275fd5552f106c4756ac53f532

# hadolint ignore=DL3006 # the default above has a tag
FROM ${CONDA} AS conda

# hadolint ignore=DL3006
FROM ${CUDA_DEVEL} AS environment
COPY --from=conda /opt/conda /opt/conda
ENV PATH=/opt/conda/envs/yolov12/bin:/opt/conda/bin:$PATH
WORKDIR /root/yolov12
COPY environment.yml ./
COPY requirements requirements
# `lock`, or `current` for the newest versions, which need CUDA 13: give CUDA_RUNTIME a base of CUDA 13 with it
# (docs/guides/container.md), and no GPU_REQUIREMENTS, as flash-attn and TensorRT are pinned for `lock` only.
ARG LOCK=lock
RUN --mount=type=cache,target=/root/.cache \
    sed -i "s|requirements/lock.txt|requirements/$LOCK.txt|" environment.yml && \
    CONDA_PKGS_DIRS=/root/.cache/conda conda env create --file environment.yml
# Empty for an image without flash-attn and TensorRT.
ARG GPU_REQUIREMENTS=requirements/gpu.txt
# `source` compiles flash-attn. `wheel` takes upstream's wheel, whose SHA-256 has to be given.
ARG FLASH_ATTN=source
ARG FLASH_ATTN_SHA256=
# setup.py of flash-attn 2.7.4.post1 knows 80, 90, 100 and 120, and CUDA 12.1 can compile 80 and 90. It ignores 86 and 89:
# A10, L4 and RTX 30 and 40 run the code of 80.
ARG FLASH_ATTN_CUDA_ARCHS=80;90
# Memory: upstream's setup.py counts 8 to 9 GB for a job with 4 threads, so 4 jobs need at most 36 GB. Time: upstream's
# README says 3 to 5 minutes on 64 cores; with 4 jobs it is many times that, and was not measured.
ARG MAX_JOBS=4
ARG NVCC_THREADS=2
COPY docker/gpu-packages.sh docker/gpu-packages.sh
RUN if [ -n "$GPU_REQUIREMENTS" ]; then docker/gpu-packages.sh "$GPU_REQUIREMENTS"; fi

# hadolint ignore=DL3006
FROM ${CUDA_RUNTIME} AS final
# gcc is not for users: Triton builds the launcher of a kernel with it when the kernel first runs. Without it BatchNorm and
# SiLU are two operations, and a model keeps a third more (docs/explanation/engine.md).
# hadolint ignore=DL3008 # the bases pin the release; its security updates are wanted
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
# What `yolov12 check` says of the image. `scripts/image.sh build` passes REVISION and SOURCE.
ARG CONDA
ARG CUDA_DEVEL
ARG CUDA_RUNTIME
ARG LOCK=lock
ARG GPU_REQUIREMENTS=requirements/gpu.txt
ARG FLASH_ATTN=source
ARG VERSION=0.1.0
ARG REVISION=
ARG SOURCE=
# Other users than root find the project too. Shells reset PATH when they log in, and ask for an activated environment.
RUN python -m pip install --no-deps --no-build-isolation --no-index --no-cache-dir --editable . && \
    python docker/verify.py && \
    chmod 755 /root && \
    ln -s /root/yolov12/docker/activate.sh /etc/profile.d/yolov12.sh && \
    echo '. /root/yolov12/docker/activate.sh' >>/etc/bash.bashrc
LABEL org.opencontainers.image.title="yolov12" \
      org.opencontainers.image.description="YOLOv12 on Ultralytics, with training that adapts to the GPU memory that is free" \
      org.opencontainers.image.licenses="AGPL-3.0-only" \
      org.opencontainers.image.documentation="/root/yolov12/README.md" \
      org.opencontainers.image.version="$VERSION" \
      org.opencontainers.image.revision="$REVISION" \
      org.opencontainers.image.source="$SOURCE"
ENTRYPOINT ["tini", "--", "/root/yolov12/docker/entrypoint.sh"]
