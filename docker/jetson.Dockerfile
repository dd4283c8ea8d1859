# syntax=docker/dockerfile:1
# NOBODY HAS BUILT THIS YET. The image for a Jetson (aarch64) with JetPack 6.0, to be built on the Jetson:
#
#   docker build --file docker/jetson.Dockerfile --tag yolov12-jetson \
#     --build-arg REGISTRY=... --build-arg TORCH_INDEX=... .
#   docker run --runtime nvidia --shm-size=8g yolov12-jetson train data=demo
#
# REGISTRY is the host of NVIDIA's container registry, TORCH_INDEX the address of the Python package index that NVIDIA's
# Jetson team runs for JetPack 6 and CUDA 12.2. docs/guides/container.md says what differs from the other image.
ARG REGISTRY

# hadolint ignore=DL3006 # the tag is here, its host is an argument
FROM ${REGISTRY}/nvidia/l4t-jetpack:r36.3.0
# hadolint ignore=DL3008 # the base pins the release; its security updates are wanted
RUN apt-get update && \
    apt-get install --yes --no-install-recommends \
        ca-certificates gcc libc6-dev libgl1 libglib2.0-0 libopenblas0 libopenmpi3 python3-dev python3-venv tini && \
    rm -rf /var/lib/apt/lists/*
# JetPack's own TensorRT is a package of the system's Python, so the environment sees the system's packages.
RUN python3 -m venv --system-site-packages /opt/yolov12
ENV PATH=/opt/yolov12/bin:$PATH \
    VIRTUAL_ENV=/opt/yolov12 \
    CONDA_DEFAULT_ENV=yolov12 \
    PYTHONNOUSERSITE=1 \
    YOLO_AUTOINSTALL=false \
    PYTHONUNBUFFERED=1
WORKDIR /root/yolov12
COPY requirements requirements
# PyPI's torch for aarch64 has no CUDA: torch and torchvision are NVIDIA's, everything else is as in the lock.
ARG TORCH_INDEX
# hadolint ignore=DL3042 # the cache is a mount and not in the layer
RUN --mount=type=cache,target=/root/.cache \
    python -m pip install --no-deps --require-hashes --index-url "$TORCH_INDEX" -r requirements/jetson.txt && \
    awk '/^[a-z]/ { keep = !/^(torch|torchvision|triton|nvidia-[a-z0-9-]*-cu12)==/ } keep' requirements/lock.txt >/tmp/lock.txt && \
    python -m pip install --no-deps --require-hashes -r /tmp/lock.txt && \
    rm /tmp/lock.txt
COPY . .
RUN python -m pip install --no-deps --no-build-isolation --no-index --no-cache-dir --editable . && \
    chmod 755 /root && \
    python -c 'import torch; assert torch.version.cuda, "this torch has no CUDA"'
LABEL org.opencontainers.image.title="yolov12-jetson" \
      org.opencontainers.image.licenses="AGPL-3.0-only"
ENTRYPOINT ["tini", "--", "/root/yolov12/docker/entrypoint.sh"]
