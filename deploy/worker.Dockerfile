# syntax=docker/dockerfile:1
# The worker; CUDA comes with torch's wheels, the host needs NVIDIA's driver and container toolkit.
# From the root of the repository: docker build --file deploy/worker.Dockerfile --tag lorry-worker .

FROM python:3.11-slim-bookworm AS build
WORKDIR /source
RUN python -m venv /opt/lorry
ENV PATH=/opt/lorry/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . .
# Another index for torch, such as https://download.pytorch.org/whl/cpu for a worker without a GPU.
ARG TORCH_INDEX=https://pypi.org/simple
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints-cpu.txt --extra-index-url "$TORCH_INDEX" '.[worker]'

FROM python:3.11-slim-bookworm
# Triton compiles the launchers of its kernels with the C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin lorry \
    && install --directory --owner=10001 --group=10001 /var/cache/lorry
COPY --from=build /opt/lorry /opt/lorry
ENV PATH=/opt/lorry/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 50053
HEALTHCHECK --interval=5s --timeout=5s --start-period=600s --retries=3 \
    CMD ["python", "-m", "lorry.rpc.health", "--address", "127.0.0.1:50053"]
ENTRYPOINT ["python", "-m", "lorry.worker"]
