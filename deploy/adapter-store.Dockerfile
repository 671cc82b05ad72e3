# syntax=docker/dockerfile:1
# The adapter store; it has no torch.
# From the root of the repository: docker build --file deploy/adapter-store.Dockerfile --tag lorry-adapter-store .

FROM python:3.11-slim-bookworm AS build
WORKDIR /source
RUN python -m venv /opt/lorry
ENV PATH=/opt/lorry/bin:$PATH PIP_DISABLE_PIP_VERSION_CHECK=1
COPY . .
RUN --mount=type=cache,target=/root/.cache/pip \
    pip install --constraint constraints-cpu.txt '.[adapter-store]'

FROM python:3.11-slim-bookworm
RUN useradd --uid 10001 --no-create-home --shell /usr/sbin/nologin lorry \
    && install --directory --owner=10001 --group=10001 --mode=0700 /var/lib/lorry
COPY --from=build /opt/lorry /opt/lorry
ENV PATH=/opt/lorry/bin:$PATH PYTHONUNBUFFERED=1
USER 10001:10001
EXPOSE 50052
HEALTHCHECK --interval=5s --timeout=5s --start-period=60s --retries=3 \
    CMD ["python", "-m", "lorry.rpc.health", "--address", "127.0.0.1:50052"]
ENTRYPOINT ["python", "-m", "lorry.adapter_store"]
