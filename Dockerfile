# Image of the toolkit. The CUDA build of torch is the default; --build-arg COMPUTE=cpu takes PyTorch's CPU build instead.
#   docker build -t trajectory-hierarchies .
#   docker build -t trajectory-hierarchies:cpu --build-arg COMPUTE=cpu .
#   docker run --rm -it --gpus all --shm-size 8g -v "$PWD/data:/data" -v caches:/cache trajectory-hierarchies
FROM python:3.11-slim-bookworm

ARG COMPUTE=cuda
ENV PIP_NO_CACHE_DIR=1 \
    PIP_DISABLE_PIP_VERSION_CHECK=1 \
    PYTHONUNBUFFERED=1 \
    RAY_USAGE_STATS_ENABLED=0 \
    HF_HOME=/cache/huggingface \
    TORCH_HOME=/cache/torch \
    TORCHINDUCTOR_CACHE_DIR=/cache/inductor \
    TRITON_CACHE_DIR=/cache/triton \
    NUMBA_CACHE_DIR=/cache/numba

# torch.compile needs a C compiler at run time.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install -y --no-install-recommends gcc g++ libc6-dev \
    && rm -rf /var/lib/apt/lists/*

# The CPU index has builds of its own, whose hashes are not in the lock: there torch and torchvision are installed first,
# in the locked versions, and they and the packages of CUDA are left out of the lock.
WORKDIR /app
COPY requirements.lock ./
SHELL ["/bin/bash", "-euo", "pipefail", "-c"]
# hadolint ignore=DL3013
RUN case "$COMPUTE" in \
    cuda) pip install --require-hashes -r requirements.lock ;; \
    cpu) \
      mapfile -t pair < <(sed -nE 's/^(torch|torchvision)==([^ ;]+).*/\1==\2/p' requirements.lock); \
      pip install --index-url https://download.pytorch.org/whl/cpu "${pair[@]}"; \
      awk '/^[^ #]/ { kept = !/^(torch|torchvision|triton|nvidia-[^=]*|cuda-[^=]*)(\[[^]]*\])?==/ } kept' \
        requirements.lock > /tmp/without-cuda.lock; \
      pip install --require-hashes --no-deps -r /tmp/without-cuda.lock; \
      rm /tmp/without-cuda.lock ;; \
    *) echo "COMPUTE is '$COMPUTE', expected cuda or cpu" >&2; exit 2 ;; \
    esac

COPY pyproject.toml README.md LICENSE ./
COPY hierarchy_builder ./hierarchy_builder
COPY trainer ./trainer
COPY pipelines ./pipelines
RUN pip install --no-deps . \
    && useradd --create-home --uid 1000 toolkit \
    && mkdir -p /cache /data \
    && chown toolkit:toolkit /cache /data

USER 1000
VOLUME ["/cache"]
WORKDIR /data
CMD ["/bin/bash"]
