# syntax=docker/dockerfile:1
FROM python:3.13-slim AS build
ENV PIP_NO_CACHE_DIR=1 PIP_DISABLE_PIP_VERSION_CHECK=1 PATH=/opt/orchestrator/bin:$PATH
RUN python -m venv /opt/orchestrator
WORKDIR /src
# Dependencies change less often than the code: a layer of their own.
COPY pyproject.toml ./
RUN python -c "import tomllib; print(*tomllib.load(open('pyproject.toml', 'rb'))['project']['dependencies'], sep='\n')" \
        > requirements.txt \
    && pip install -r requirements.txt
COPY README.md LICENSE ./
COPY sql ./sql
COPY orchestrator ./orchestrator
RUN pip install --no-deps .

FROM python:3.13-slim
RUN groupadd --system --gid 10001 orchestrator \
    && useradd --system --uid 10001 --gid orchestrator --no-create-home --shell /usr/sbin/nologin orchestrator
COPY --from=build /opt/orchestrator /opt/orchestrator
ENV PATH=/opt/orchestrator/bin:$PATH PYTHONUNBUFFERED=1 PYTHONDONTWRITEBYTECODE=1
USER 10001:10001
EXPOSE 8080
# Liveness only: a database that is away is no reason to restart the container.
HEALTHCHECK --interval=10s --timeout=3s --start-period=20s --retries=3 CMD ["python", "-c", "import os, urllib.request as u; port = os.environ.get('MANAGEMENT_SERVER_PORT') or os.environ.get('SERVER_PORT') or '8080'; u.build_opener(u.ProxyHandler({})).open(f'http://127.0.0.1:{port}/health', timeout=2)"]
ENTRYPOINT ["orchestrator"]
CMD ["run"]
