# docker build -t graftserve .
# docker run --gpus all -p 8000:8000 -e GRAFT_API_KEY=... graftserve
# docker run --gpus all -p 8000:8000 -e GRAFT_API_KEY=... -v "$PWD/llama:/models/llama" graftserve /models/llama --quantize int8
#
# TORCH_INDEX: an index to take torch from besides the default one, such as PyTorch's CPU-only wheels for a machine
# without a GPU:  --build-arg TORCH_INDEX=...
# PYTHON_IMAGE: another image with Python 3.11 or newer and Debian's packages, such as a mirror's.
ARG PYTHON_IMAGE=python:3.12-slim
FROM ${PYTHON_IMAGE}

ARG TORCH_INDEX=""
ENV PYTHONUNBUFFERED=1 \
    PYTHONDONTWRITEBYTECODE=1

# A C compiler: for the kernels on a CPU, and for Triton's on a GPU.
RUN apt-get update && apt-get install --yes --no-install-recommends gcc libc6-dev && rm -rf /var/lib/apt/lists/*

WORKDIR /app
# The dependencies first: this layer is built again only when the pins change. An editable install finds the package,
# and the demo beside it, in /app.
COPY pyproject.toml constraints.txt README.md LICENSE ./
COPY server/__init__.py server/__init__.py
RUN pip install --no-cache-dir -c constraints.txt ${TORCH_INDEX:+--extra-index-url "$TORCH_INDEX"} -e .
COPY server server
COPY demo/base demo/base

RUN useradd --create-home --uid 1000 graft \
    && install --directory --owner=graft --group=graft /models /adapters /home/graft/.cache
# A new volume at /adapters starts with the demo's adapters.
COPY --chown=graft:graft adapters_store /adapters
USER graft

# A container is reached from outside itself, so it listens on every address and asks for GRAFT_API_KEY.
# Bases downloaded from a hub are cached beside the local ones.
ENV GRAFT_HOST=0.0.0.0 \
    GRAFT_PORT=8000 \
    GRAFT_STORE=/adapters \
    HF_HOME=/models/.hub
VOLUME ["/models", "/adapters"]
EXPOSE 8000

# Loading a large base takes minutes; failures count only after that.
HEALTHCHECK --interval=15s --timeout=5s --start-period=10m --retries=3 \
    CMD ["python", "-c", "import os, urllib.request; urllib.request.urlopen(f'http://127.0.0.1:{os.environ[\"GRAFT_PORT\"]}/health', timeout=4)"]

ENTRYPOINT ["graft", "serve"]
