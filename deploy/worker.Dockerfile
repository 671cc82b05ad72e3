# The worker. CUDA comes with torch's wheels; the host needs NVIDIA's driver and container toolkit.
# For a worker on the CPU: --build-arg PIP_EXTRA_INDEX_URL=https://download.pytorch.org/whl/cpu
# From the root of the repository: docker build --file deploy/worker.Dockerfile --tag lorry-worker .

# Python 3.11 or newer with pip and venv; pin it by digest for builds that must repeat.
ARG BASE_IMAGE=python:3.11.13-slim-bookworm

FROM ${BASE_IMAGE} AS build
# What pip reads: another index, or a folder of wheels by URL and no index at all.
ARG PIP_INDEX_URL=https://pypi.org/simple
ARG PIP_EXTRA_INDEX_URL=
ARG PIP_FIND_LINKS=
ARG PIP_NO_INDEX=0
ENV PIP_DISABLE_PIP_VERSION_CHECK=1 PIP_NO_CACHE_DIR=1
WORKDIR /source
RUN python3 -m venv /opt/pip && python3 -m venv --without-pip /opt/lorry
COPY pyproject.toml constraints-cpu.txt deploy/requirements.py ./
RUN python3 requirements.py worker > requirements.txt \
    && /opt/pip/bin/pip --python /opt/lorry/bin/python install \
    --constraint constraints-cpu.txt --requirement requirements.txt
COPY . .
RUN /opt/pip/bin/pip install --no-deps --target /opt/code .

FROM ${BASE_IMAGE}
# Triton compiles the launchers of its kernels with the C compiler.
RUN apt-get update \
    && apt-get install --yes --no-install-recommends gcc libc6-dev \
    && rm -rf /var/lib/apt/lists/*
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin lorry \
    && install --directory --owner=10001 --group=10001 /var/cache/lorry
COPY --from=build /opt/lorry /opt/lorry
COPY --from=build /opt/code /opt/code
ENV PATH=/opt/lorry/bin:$PATH PYTHONPATH=/opt/code PYTHONUNBUFFERED=1
# Health checks show no certificate, so they have a port of their own.
ENV LORRY_WORKER_HEALTH_ADDRESS=127.0.0.1:52053
USER 10001:10001
EXPOSE 50053
HEALTHCHECK --interval=10s --timeout=10s --start-period=600s --retries=3 \
    CMD ["python", "-m", "lorry.rpc.health", "--address", "127.0.0.1:52053"]
ENTRYPOINT ["python", "-m", "lorry.worker"]
