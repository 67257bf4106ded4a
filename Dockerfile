# syntax=docker/dockerfile:1
#   docker build --build-arg REVISION="$(git rev-parse HEAD)" --tag scheduled-event-orchestrator:0.1.0 .
# Runs with a read-only root file system, without capabilities, as 10001:10001.

# Debian's own Python: 40 MB with certificates, without pip, and mended by Debian for years.
FROM debian:trixie-20260918-slim AS base
# Versions of packages are not pinned: Debian keeps the newest of a release only, and that is the one to have.
# hadolint ignore=DL3008
RUN apt-get update \
    && apt-get install --yes --no-install-recommends ca-certificates python3 \
    && rm -rf /var/lib/apt/lists/* /var/cache/apt/* /var/cache/debconf/* /var/log/apt /var/log/*.log \
    && groupadd --gid 10001 orchestrator \
    && useradd --uid 10001 --gid orchestrator --no-create-home --home-dir /nonexistent --shell /usr/sbin/nologin orchestrator

# What is left behind here is not in the image.
FROM base AS dependencies
# hadolint ignore=DL3008,DL3009
RUN apt-get update && apt-get install --yes --no-install-recommends binutils python3-venv && python3 -m venv /tools
ENV PIP=/tools/bin/pip
WORKDIR /src
COPY ops/image ops/image
COPY pyproject.toml ./
RUN --mount=type=cache,target=/root/.cache/pip ops/image/install.sh dependencies /opt/orchestrator

FROM dependencies AS program
COPY README.md LICENSE ./
COPY sql sql
COPY orchestrator orchestrator
RUN --mount=type=cache,target=/root/.cache/pip ops/image/install.sh program /opt/orchestrator /program

FROM base
COPY --from=dependencies /opt/orchestrator /opt/orchestrator
COPY --from=program /program /
ENV PATH=/opt/orchestrator/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1 MANAGEMENT_SERVER_PORT=9080
USER 10001:10001
# The API; health and metrics, which stay plain HTTP when the API speaks TLS.
EXPOSE 8080 9080
# Liveness only: a database that is away is no reason to restart the container. Bash alone answers within milliseconds,
# and a busy host has ten seconds. Without a management port, health is on the API's.
HEALTHCHECK --interval=5s --timeout=10s --start-period=60s --retries=6 CMD ["bash", "-c", "exec 3<>\"/dev/tcp/127.0.0.1/${MANAGEMENT_SERVER_PORT:-${SERVER_PORT:-8080}}\" && printf 'GET /health HTTP/1.0\\r\\n\\r\\n' >&3 && read -r -t 9 -u 3 _ status _ && [ \"$status\" = 200 ]"]
ENTRYPOINT ["orchestrator"]
CMD ["run"]
ARG VERSION=0.1.0
ARG REVISION=unknown
ARG SOURCE=unknown
LABEL org.opencontainers.image.title="scheduled-event-orchestrator" \
    org.opencontainers.image.description="Keeps events in PostgreSQL until they are due, and delivers each one on time." \
    org.opencontainers.image.licenses="MIT" \
    org.opencontainers.image.version="$VERSION" \
    org.opencontainers.image.revision="$REVISION" \
    org.opencontainers.image.source="$SOURCE"
